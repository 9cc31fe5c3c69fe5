"""Virtual time: what a simulated round would have taken, however fast this machine is."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedinfer.errors import BadUsage

Floats = NDArray[np.float64]


class VirtualClock:
    """Seconds since the run began. It moves when a server waits, and never back."""

    def __init__(self) -> None:
        self._now_s = 0.0

    @property
    def now_s(self) -> float:
        return self._now_s

    def move_to(self, at_s: float) -> None:
        """Let time pass until `at_s`; nothing happens if that was before."""
        if not math.isfinite(at_s):
            raise BadUsage(f"clock: got a wait until {at_s}, expected a time that comes")
        self._now_s = max(self._now_s, at_s)


@dataclass(frozen=True, kw_only=True)
class Wait:
    """How long a server waits for the clients that it asked in a round.

    `Wait()` is for all of them; `Wait(timeout_s=60.0)` until a deadline; `Wait(first=10)` for as many answers: ask 13,
    take the first 10 (over-selection: Bonawitz et al. 2019, arXiv:1902.01046). Both together: whichever comes first.

    >>> heard_s, answered = np.array([5.0, 1.0, 3.0, 0.5]), np.array([True, True, True, False])
    >>> lasts_s, in_time = Wait(first=2).closes(heard_s, answered)
    >>> lasts_s, in_time.tolist()
    (3.0, [False, True, True, True])
    """

    timeout_s: float | None = None
    first: int | None = None

    def __post_init__(self) -> None:
        if self.timeout_s is not None and not 0.0 <= self.timeout_s < math.inf:
            raise BadUsage(f"timeout: got {self.timeout_s}, expected a finite number of seconds of at least 0")
        if self.first is not None and (type(self.first) is not int or self.first < 1):
            raise BadUsage(f"first answers: got {self.first}, expected a whole number of at least 1")

    def closes(self, heard_s: Floats, answered: NDArray[np.bool_]) -> tuple[float, NDArray[np.bool_]]:
        """How long the round lasts, and who is heard of in time.

        Of client i the server hears after `heard_s[i]`, an answer or an error; only answers are counted.
        Guarantees: no more than `first` answers are in time; among those that come together, those asked first.
        """
        lasts_s = float(heard_s.max(initial=0.0))
        surplus = np.zeros(len(heard_s), np.bool_)
        if self.first is not None:
            order = np.flatnonzero(answered)[np.argsort(heard_s[answered], kind="stable")]
            surplus[order[self.first :]] = True
            if self.first <= len(order):
                lasts_s = float(heard_s[order[self.first - 1]])
        if self.timeout_s is not None:
            lasts_s = min(lasts_s, self.timeout_s)
        return lasts_s, (heard_s <= lasts_s) & ~surplus
