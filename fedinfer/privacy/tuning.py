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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import cache, cached_property
from typing import Any, Protocol

from fedinfer.errors import BadUsage
from fedinfer.privacy.checks import check_delta
from fedinfer.privacy.filters import Charge, rdp_overhead
from fedinfer.privacy.noise import NoiseStream

Divergence = Callable[[float], float]
ORDERS = (
    *(1.0 + step / 8.0 for step in range(1, 57)),
    *(float(order) for order in range(9, 33)),
    *(float(round(32.0 * 1.25**power)) for power in range(1, 26)),
)
NUMBERS = ("steps", "delta", "epsilon", "rdp", "gdp", "digest", "to_json")
# 64 bits decide nearly every draw; 64 more are taken for the others.
BITS = 64
MOST_RUNS = 1e6


class Runs(Protocol):
    """How many runs there will be: a distribution over whole numbers."""

    @property
    def mean(self) -> float: ...
    def rdp(self, base: Divergence, order: float) -> float:
        """The Rényi divergence at `order` of releasing the best of so many runs of divergence `base`."""
        ...

    def probabilities(self) -> Iterator[tuple[int, Decimal]]:
        """Each number and its probability, in the precision of the current decimal context."""
        ...

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class TruncatedNegativeBinomial:
    """The number K >= 1 of runs with P[K = k] proportional to (1 - gamma)^k prod_{l<k} (l + eta)/(l + 1).

    eta = 1 is the geometric distribution, eta = 0 the logarithmic; smaller eta costs less and is more often 1.
    Reference: Papernot and Steinke 2022, Definition 1 and Theorem 2.
    """

    eta: float
    gamma: float

    def __post_init__(self) -> None:
        if not -1.0 < self.eta <= 100.0 or 0.0 < abs(self.eta) < 1e-6:
            raise BadUsage(f"eta: got {self.eta}, expected 0, or a number above -1, at most 100 and not nearly 0")
        if not 1e-6 <= self.gamma <= 0.99 or self.mean > MOST_RUNS:
            raise BadUsage(f"gamma: got {self.gamma}, expected 1e-6 to 0.99, and at most a million runs in the mean")

    @property
    def mean(self) -> float:
        """The expected number of runs.

        >>> TruncatedNegativeBinomial(eta=1.0, gamma=0.1).mean
        10.0
        """
        odds = (1.0 - self.gamma) / self.gamma
        if self.eta == 0.0:
            return -odds / math.log(self.gamma)
        return self.eta * odds / -math.expm1(self.eta * math.log(self.gamma))

    def rdp(self, base: Divergence, order: float) -> float:
        log_gamma = math.log(self.gamma)
        # Any second order gives a bound. At the order 1 the divergence of the base does not count at all.
        second = min(-log_gamma, *((1.0 - 1.0 / other) * base(other) - log_gamma / other for other in ORDERS))
        return base(order) + (1.0 + self.eta) * second + math.log(self.mean) / (order - 1.0)

    def probabilities(self) -> Iterator[tuple[int, Decimal]]:
        eta, stay = Decimal(self.eta), 1 - Decimal(self.gamma)
        log_gamma = Decimal(self.gamma).ln()
        probability = -stay / log_gamma if self.eta == 0.0 else stay * eta / ((-eta * log_gamma).exp() - 1)
        number = 1
        while True:
            yield number, probability
            probability = probability * stay * (number + eta) / (number + 1)
            number += 1

    def to_json(self) -> dict[str, Any]:
        return {"distribution": "truncated negative binomial", "eta": self.eta, "gamma": self.gamma}


@dataclass(frozen=True, kw_only=True)
class PoissonRuns:
    """A Poisson number of runs; it is 0 with probability exp(-mean), and then nothing is chosen.

    Reference: Papernot and Steinke 2022, Theorem 6.
    """

    mean: float

    def __post_init__(self) -> None:
        if not 1.0 <= self.mean <= MOST_RUNS:
            raise BadUsage(f"mean: got {self.mean}, expected at least 1 and at most a million")

    def rdp(self, base: Divergence, order: float) -> float:
        epsilon = math.log1p(1.0 / (order - 1.0))
        delta = min(rdp_delta(other, base(other), epsilon) for other in ORDERS)
        return base(order) + self.mean * delta + math.log(self.mean) / (order - 1.0)

    def probabilities(self) -> Iterator[tuple[int, Decimal]]:
        mean, number = Decimal(self.mean), 0
        probability = (-mean).exp()
        while True:
            yield number, probability
            number += 1
            probability = probability * mean / number

    def to_json(self) -> dict[str, Any]:
        return {"distribution": "Poisson", "mean": self.mean}


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
        return math.fsum(part.delta for part in self.parts)

    def epsilon(self) -> float:
        return math.fsum(part.epsilon() for part in self.parts)

    def rdp(self, order: float) -> float:
        return math.fsum(part.rdp(order) for part in self.parts)

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


def rdp_delta(order: float, rdp: float, epsilon: float) -> float:
    """δ at `epsilon` of a mechanism of Rényi divergence `rdp` at `order`.

    Reference: Canonne, Kamath and Steinke 2020, arXiv:2004.00010, Proposition 12.
    """
    exponent = (order - 1.0) * (rdp - epsilon + math.log1p(-1.0 / order)) - math.log(order)
    return 1.0 if exponent >= 0.0 else math.exp(exponent)


def draw_number(runs: Runs, stream: NoiseStream) -> int:
    """A number distributed as `runs` says, to the last digit.

    A uniform number is known to 64 bits, then to 128, and so on, and the sums of probabilities to more digits than
    that, until it is certain between which two of them it lies.
    """
    bits, words = 0, 0
    while True:
        words = words << BITS | int.from_bytes(stream.take(BITS // 8), "big")
        bits += BITS
        number = _located(runs, words, bits)
        if number is not None:
            return number


def _located(runs: Runs, words: int, bits: int) -> int | None:
    """Where a uniform number between words/2^bits and (words + 1)/2^bits falls, if that is certain."""
    with localcontext() as context:
        context.prec = bits // 2 + 30
        unit = Decimal(2) ** -bits
        low, high = words * unit, (words + 1) * unit
        # Each probability has at most a few digits of rounding error by a step before it, and they are summed up.
        slack, total = Decimal(10) ** (15 - context.prec), Decimal(0)
        for number, probability in runs.probabilities():
            before, total = total, total + probability
            if high <= total - slack:
                return number if before == 0 or before + slack <= low else None
            if total + slack >= 1:
                return None
    return None


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
