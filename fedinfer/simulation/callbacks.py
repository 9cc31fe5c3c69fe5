"""Who is told of each round: the one seam for logs, progress bars and whatever else looks on.

Our own loop (`federation.py`) tells what it knows of a round; under a stock Flower strategy `simulate` tells what the
grid sees: how many messages were answered, and how fast.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class RoundLog:
    """One round as whoever runs the simulation sees it.

    `clients` were asked, `replies` of them answered, `errors` with an error. `seconds` is how long the clients and the
    sum of their updates took, without evaluation. `loss` is the mean training loss that the clients said, weighted by
    their examples, or None where they say none; `metrics` is what `evaluate` gave, empty in rounds without it. Round 0
    is the start, evaluated.

    With a plan the weights alone are released by it. Cohort sizes and metrics are for the eyes of whoever may see the
    clients' rows.
    """

    round: int
    clients: int
    replies: int
    errors: int
    seconds: float
    loss: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def updates_per_s(self) -> float:
        return self.replies / self.seconds if self.seconds > 0.0 else 0.0


class Callback(Protocol):
    """Is told of each round. It may raise to stop the run; the round that it was told of is kept."""

    def begin(self, done: int) -> None:
        """The run begins, or goes on after `done` rounds; what was said of later ones is void."""

    def round(self, record: RoundLog) -> None:
        """A round is over."""

    def end(self) -> None:
        """The run is over, or failed: give back what was opened."""


def tell(callbacks: Sequence[Callback], record: RoundLog) -> None:
    """Tell all of a round."""
    for callback in callbacks:
        callback.round(record)
