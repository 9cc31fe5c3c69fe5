"""The cost of choosing: hyper-parameters by private runs, and stopping by a private metric.

Training ten times and keeping the best is not the price of one run: which of ten fixed runs is best can say of a row
what none of the ten may say. What has an account is a *random* number of runs, drawn in secret, each with settings
drawn at random from a fixed list, of which the best is released and nothing else.

Adversary: an outsider who sees only what is released at the end. Whoever sees the single runs, as a server does that
takes part in them, learns more: against it each run is charged as what it is. How long the tuning takes tells how many
runs there were, and must not be seen either.

Reference: Papernot and Steinke 2022, arXiv:2110.03620.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property
from typing import Any

from fedinfer.errors import BadUsage
from fedinfer.privacy.checks import check_delta
from fedinfer.privacy.conversions import rdp_overhead
from fedinfer.privacy.filters import Charge, exact, round_up
from fedinfer.privacy.noise import NoiseStream
from fedinfer.privacy.repetition import (
    ORDERS,
    Divergence,
    PoissonRuns,
    Runs,
    TruncatedNegativeBinomial,
    draw_number,
)

NUMBERS = ("steps", "delta", "epsilon", "rdp", "gdp", "digest", "to_json")


@dataclass(frozen=True, kw_only=True)
class Composed:
    """Releases of several kinds that belong together, as one charge: their ε and δ add up, their divergences too."""

    parts: tuple[Charge, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise BadUsage("parts: got none, expected at least one charge")
        for part in self.parts:
            _check_charge("part", part)

    @property
    def steps(self) -> int:
        return sum(part.steps for part in self.parts)

    @property
    def delta(self) -> float:
        return round_up(sum((exact(part.delta) for part in self.parts), Fraction(0)))

    def epsilon(self) -> float:
        return round_up(sum((exact(part.epsilon()) for part in self.parts), Fraction(0)))

    def rdp(self, order: float) -> float:
        return math.nextafter(math.fsum(part.rdp(order) for part in self.parts), math.inf)

    def gdp(self) -> float | None:
        mus = [part.gdp() for part in self.parts]
        known = [mu for mu in mus if mu is not None]
        return math.hypot(*known) if len(known) == len(mus) else None

    def digest(self) -> str:
        return _digest(self.to_json())

    def to_json(self) -> dict[str, Any]:
        return {"kind": "composed", "parts": [part.to_json() for part in self.parts], **_neighbours(self.parts)}


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The best of a random number of runs by a private score, as one release.

    A run is `training` and then `score`, both private. There are `draw_runs` of them, each with settings drawn at
    random, with the same chances in every run, from a list that was fixed in advance.

    Guarantees: releasing the best run (its model, its settings, its score), and nothing of the others and not their
    number, has Rényi divergence at most `rdp(order)`, and is (epsilon(), delta)-private.
    Reference: Papernot and Steinke 2022, Theorems 2 and 6.
    """

    training: Charge
    score: Charge
    runs: Runs
    delta: float

    def __post_init__(self) -> None:
        if not isinstance(self.runs, TruncatedNegativeBinomial | PoissonRuns):
            raise BadUsage(
                f"runs: got {self.runs!r}, expected TruncatedNegativeBinomial or PoissonRuns; the best of a fixed "
                "number of runs has no account but that of all of them: charge each run by itself"
            )
        _check_charge("training", self.training)
        _check_charge("score", self.score)
        check_delta(self.delta)

    @property
    def steps(self) -> int:
        return 1

    @cached_property
    def _base(self) -> Divergence:
        return cache(Composed(parts=(self.training, self.score)).rdp)

    @cached_property
    def _curve(self) -> dict[float, float]:
        return {order: self.runs.rdp(self._base, order) for order in ORDERS}

    def epsilon(self) -> float:
        """ε at `delta`, by the best order."""
        return max(0.0, min(rdp + rdp_overhead(order, self.delta) for order, rdp in self._curve.items()))

    def rdp(self, order: float) -> float:
        """The bound at `order`, or at a higher one if that is smaller: divergences grow with the order."""
        if order <= 1.0:
            raise BadUsage(f"order: got {order}, expected more than 1")
        above = [rdp for other, rdp in self._curve.items() if other >= order]
        return min([self.runs.rdp(self._base, order), *above])

    def gdp(self) -> float | None:
        return None

    def digest(self) -> str:
        return _digest(self.to_json())

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "tuned",
            "training": self.training.to_json(),
            "score": self.score.to_json(),
            "runs": self.runs.to_json(),
            "delta": self.delta,
            **_neighbours((self.training, self.score)),
        }

    def draw_runs(self, stream: NoiseStream) -> int:
        """Draw the number of runs, exactly as distributed; it stays secret.

        Raises: BadUsage for a stream that can be repeated.
        """
        if stream.void:
            raise BadUsage("stream: got a seeded one, expected os_noise(); the number of runs must be a secret")
        return draw_number(self.runs, stream)


def stopped_early(*, training: Charge, metric: Charge) -> Composed:
    """The charge of a training that may stop by a private metric: all its steps, and every look at the metric.

    Stopping earlier gives nothing back, because the budget was promised before the first answer.
    Raises: BadUsage for a metric that has no charge: a raw one cannot be used to stop.
    """
    _check_charge("metric", metric)
    return Composed(parts=(training, metric))


def _check_charge(name: str, charge: object) -> None:
    missing = [number for number in NUMBERS if not hasattr(charge, number)]
    if missing:
        raise BadUsage(
            f"{name}: got {type(charge).__name__}, expected a charge: a raw value that depends on rows may neither "
            "choose nor stop; release it with noise and charge that"
        )


def _neighbours(parts: tuple[Charge, ...]) -> dict[str, Any]:
    """Unit and relation of the parts, which must agree if they say them."""
    said = [(body.get("unit"), body.get("relation")) for body in (part.to_json() for part in parts)]
    stated = {pair for pair in said if None not in pair}
    if len(stated) > 1:
        raise BadUsage(f"parts: got {sorted(map(str, stated))}, expected one unit and relation; their ε do not add up")
    return {name: value for pair in stated for name, value in zip(("unit", "relation"), pair, strict=True)}


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
