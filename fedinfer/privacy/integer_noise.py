"""Exact noise on integers, with its account: what one row can move, how often, and the ε of it.

On a fine grid (`CELLS` integers stand for one unit) discrete Gaussian noise is the Gaussian mechanism: within 20
standard deviations sigma (in integers) the probability of an integer is that of a rounded Gaussian up to a factor
within (20² + 2) / (24 sigma²) of 1, by the error of the midpoint rule, and further out lies less than 1e-88. Rounding
a Gaussian is done to its answer, and coordinates that a row does not move tell nothing of it. `fine_epsilon` pays for
the factor once for each coordinate that one row can move, in both directions; the rest is far less than the share of δ
that it sets aside, for an ε up to 60.

On whole counts the factor is too large for that, and there is no need: for one moved coordinate the privacy loss is
linear in the noise, so that the sum S of the noise of all releases decides: with n releases it is (S + n / 2) / sigma²,
and δ is the mean of 1 - exp(ε - loss) where that is above zero.

References: Canonne, Kamath and Steinke 2020, arXiv:2004.00010, theorem 7 (δ), proposition 5 (Rényi divergence);
Kairouz, Liu and Steinke 2021, arXiv:2102.06387 (sums of discrete Gaussians).
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from fedinfer.errors import BadUsage
from fedinfer.privacy.accounting import gaussian_epsilon
from fedinfer.privacy.checks import check_epsilon, check_positive
from fedinfer.privacy.discrete import Integers, discrete_gaussian, discrete_laplace
from fedinfer.privacy.noise import NoiseStream

CELLS = 2**20
MAX_STEPS = 1000
LEAST_DELTA = 1e-10
LEAST_SIGMA, MOST_SIGMA = 0.1, 1e6
TOLERANCE = 1e-4
# A count within this many standard errors of zero is not divided by.
SEEN = 4.0
# The shares of δ and of ε that pay for the rounding of our own arithmetic.
DELTA_SHARE, EPSILON_SLACK = 1e-6, 1e-9
MOST_FINE_EPSILON = 60.0
# Above this standard deviation a sum of discrete Gaussians is as good as a rounded Gaussian; below, it is summed up.
LARGEST_SUMMED = 10_000.0


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """Discrete Gaussian noise of standard deviation `sigma`, exactly, on whole counts."""

    sigma: float

    def __post_init__(self) -> None:
        check_sigma(self.sigma)

    @property
    def law(self) -> str:
        return "discrete Gaussian"

    @property
    def standard_error(self) -> float:
        """The standard deviation of the noise; for a small `sigma` the integers' own is slightly smaller."""
        return self.sigma

    def add(self, values: Integers, stream: NoiseStream) -> Integers:
        return values + discrete_gaussian(stream, variance=Fraction(self.sigma) ** 2, count=len(values))

    def epsilon(self, *, steps: int, delta: float) -> float:
        """ε at `delta` of `steps` releases in each of which one row moves one number by one."""
        if math.sqrt(steps) * self.sigma > LARGEST_SUMMED:
            return fine_epsilon(mu=math.sqrt(steps) / self.sigma, sigma=math.sqrt(steps) * self.sigma, delta=delta)
        return whole_epsilon(sigma=self.sigma, steps=steps, delta=delta)

    def rdp(self, *, steps: int, order: float) -> float:
        return gaussian_rdp(mu=math.sqrt(steps) / self.sigma, order=order)


@dataclass(frozen=True, kw_only=True)
class Laplace:
    """Discrete Laplace noise, P(x) ∝ exp(-|x| / scale), exactly, on whole counts: for pure ε."""

    scale: float

    def __post_init__(self) -> None:
        check_sigma(self.scale)

    @property
    def law(self) -> str:
        return "discrete Laplace"

    @property
    def standard_error(self) -> float:
        return 1.0 / (math.sqrt(2.0) * math.sinh(0.5 / self.scale))

    def add(self, values: Integers, stream: NoiseStream) -> Integers:
        return values + discrete_laplace(stream, scale=Fraction(self.scale), count=len(values))

    def epsilon(self, *, steps: int, delta: float) -> float:
        """ε of `steps` releases in each of which one row moves one number by one; it holds for `delta` = 0."""
        return steps / self.scale

    def rdp(self, *, steps: int, order: float) -> float:
        """The loss takes two values only, as that of a coin that is right with probability 1 / (1 + exp(-ε))."""
        right = -math.log1p(math.exp(-1.0 / self.scale))
        return steps * two_point_rdp(right=right, wrong=right - 1.0 / self.scale, order=order)


def whole_delta(*, sigma: float, steps: int, epsilon: float) -> float:
    """δ at `epsilon` of `steps` discrete Gaussian releases of one number that a row moves by one.

    Guarantees: exact for one step, up to the rounding of floats; for more steps above the truth by at most 2e-12.
    """
    law = _sum_law(sigma, steps)
    middle = len(law) // 2
    first = max(0, math.floor(min(epsilon * sigma**2 - steps / 2, middle)) + 1 + middle)
    loss = (np.arange(first, len(law)) - middle + steps / 2) / sigma**2
    spread = 0.0 if steps == 1 else 1e-12
    return float(law[first:] @ -np.expm1(epsilon - loss)) + spread


def whole_epsilon(*, sigma: float, steps: int, delta: float) -> float:
    """The least ε, from above, of `steps` discrete Gaussian releases of one number that a row moves by one."""

    def excess(epsilon: float) -> float:
        return whole_delta(sigma=sigma, steps=steps, epsilon=epsilon) - delta * (1.0 - DELTA_SHARE)

    if excess(0.0) <= 0.0:
        return 0.0
    most = gaussian_rdp_epsilon(mu=math.sqrt(steps) / sigma, delta=delta / 2)
    return float(brentq(excess, 0.0, most, xtol=EPSILON_SLACK / 4, rtol=1e-12)) + EPSILON_SLACK


@lru_cache(maxsize=8)
def _sum_law(sigma: float, steps: int) -> NDArray[np.float64]:
    """P[S = x] of the sum S of `steps` discrete Gaussians, for x from -len/2 on; beyond lies less than 1e-30."""
    half = math.ceil(12.0 * math.sqrt(steps) * sigma) + 13 * steps
    size = 1 << (2 * half + 1).bit_length()
    x = np.arange(size) - size // 2
    law = np.exp(-(x**2) / (2.0 * sigma**2))
    law /= math.fsum(law)
    if steps > 1:
        # Rounding in the transform is about 1e-16 in each of the numbers: `whole_delta` adds 1e-12 for it.
        law = np.fft.fftshift(np.fft.irfft(np.fft.rfft(np.fft.ifftshift(law)) ** steps, size)).clip(0.0)
    return np.asarray(law)


def add_on_grid(cells: Integers, *, sigma: float, stream: NoiseStream, shares: int = 1) -> Integers:
    """Add discrete Gaussian noise to numbers in cells: of `sigma` units together with that of `shares` - 1 others."""
    return cells + discrete_gaussian(stream, variance=(Fraction(sigma) * CELLS) ** 2 / shares, count=len(cells))


def fine_epsilon(*, mu: float, sigma: float, delta: float, coordinates: int = 1) -> float:
    """ε at `delta` of discrete Gaussian noise of `sigma` (in integers) that one row moves by `mu` sigmas in L2.

    `coordinates` is the number of noisy integers, over all releases, that one row can move. Above 60 it is infinity.
    """
    factor = 402.0 / (24.0 * sigma**2)
    epsilon = gaussian_epsilon(mu=mu, delta=delta * (1.0 - DELTA_SHARE)) + 2.0 * coordinates * factor + EPSILON_SLACK
    return epsilon if epsilon <= MOST_FINE_EPSILON else math.inf


def gaussian_rdp(*, mu: float, order: float) -> float:
    """Rényi divergence of a Gaussian or discrete Gaussian mechanism whose sensitivity is `mu` standard deviations."""
    return order * mu * mu / 2.0


def gaussian_rdp_epsilon(*, mu: float, delta: float) -> float:
    """An ε that is enough for both kinds of Gaussian: Bun and Steinke 2016, arXiv:1605.02065, lemma 3.5."""
    return mu * mu / 2.0 + mu * math.sqrt(2.0 * math.log(1.0 / delta))


def two_point_rdp(*, right: float, wrong: float, order: float, others: float = 0.0) -> float:
    """Rényi divergence of answers of which two are swapped; `right` and `wrong` are logarithms of probabilities.

    `others` is the probability of all answers that are as likely under both.
    """
    terms = [order * right + (1.0 - order) * wrong, order * wrong + (1.0 - order) * right]
    largest = max(terms)
    total = sum(math.exp(term - largest) for term in terms) + others * math.exp(-largest)
    return (largest + math.log(total)) / (order - 1.0)


def least_sigma(spent: Callable[[float], float], epsilon: float) -> float:
    """The smallest noise with `spent` of it at most `epsilon`, met from below to 1e-4.

    Raises: BadUsage if no noise from 0.1 to 1,000,000 gives it.
    """
    check_epsilon(epsilon)
    low, high = LEAST_SIGMA, MOST_SIGMA
    if spent(high) > epsilon or spent(low) <= epsilon:
        raise BadUsage(f"epsilon: got {epsilon:g}, expected one that noise from {low:g} to {high:g} gives")
    while epsilon - spent(high) > TOLERANCE and high - low > 1e-12 * high:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if spent(middle) > epsilon else (low, middle)
    return high


def check_sigma(sigma: float) -> None:
    """Raises: BadUsage unless the noise is of a size that is accounted for."""
    check_positive("noise", sigma)
    if not LEAST_SIGMA <= sigma <= MOST_SIGMA:
        raise BadUsage(f"noise: got {sigma:g}, expected from {LEAST_SIGMA:g} to {MOST_SIGMA:g}")


def check_releases(*, steps: int, delta: float) -> None:
    """Raises: BadUsage unless both can be accounted for."""
    if type(steps) is not int or not 1 <= steps <= MAX_STEPS:
        raise BadUsage(f"steps: got {steps}, expected a whole number from 1 to {MAX_STEPS}")
    if not LEAST_DELTA <= delta < 1.0:
        raise BadUsage(f"delta: got {delta}, expected at least {LEAST_DELTA:g} and less than 1, for example 1e-6")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number computed from released ones, with the standard error that their noise alone gives it."""

    value: float
    standard_error: float


def digest_of(fields: Mapping[str, Any]) -> str:
    """SHA-256 of JSON fields: two descriptions are the same, or not."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def noise_json(noise: Gaussian | Laplace) -> dict[str, Any]:
    """The public fields of the noise."""
    return {"law": noise.law, **asdict(noise)}
