"""A random number of private runs of which the best is kept: how many, and what that costs.

Reference: Papernot and Steinke 2022, arXiv:2110.03620.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal, localcontext
from typing import Any, Protocol

from fedinfer.errors import BadUsage
from fedinfer.privacy.conversions import rdp_delta
from fedinfer.privacy.noise import NoiseStream

Divergence = Callable[[float], float]
ORDERS = (
    *(1.0 + step / 8.0 for step in range(1, 57)),
    *(float(order) for order in range(9, 33)),
    *(float(round(32.0 * 1.25**power)) for power in range(1, 26)),
)
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
