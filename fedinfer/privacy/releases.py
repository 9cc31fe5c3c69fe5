"""Counts, histograms and sums that leave a device: each object executes its releases *and* accounts for them.

Unit: one example (a row). Relation: add or remove one. Adversary: whoever sees all releases and knows every other row.
Trusted: the device and its operating system's randomness. All fields are public constants; none may be computed from
rows. The number of rows is private too, and no release depends on it but by what is released.

Metrics are releases like any other: what is not named here (a shape, an error, a time) must not depend on rows either.
"""

import math
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedinfer.errors import BadUsage, ShapeMismatch
from fedinfer.privacy.discrete import Integers
from fedinfer.privacy.integer_noise import (
    CELLS,
    MOST_SIGMA,
    SEEN,
    Estimate,
    Gaussian,
    Laplace,
    add_on_grid,
    check_releases,
    check_sigma,
    digest_of,
    fine_epsilon,
    gaussian_rdp,
    least_sigma,
    noise_json,
)
from fedinfer.privacy.noise import NoiseStream

Floats = NDArray[np.floating[Any]]
RELATION = "add or remove one"
MAX_BINS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class HistogramRelease:
    """`steps` noised histograms of `bins` cells, to one of which a row belongs: true and false positives, for example.

    One row moves one count by one, so that all cells together cost what one of them costs.

    Guarantees: `steps` calls of `release` are (epsilon(), delta)-differentially private, exactly; with Laplace noise,
    for which `delta` is 0, (epsilon(), 0).

    >>> from fedinfer.privacy.noise import insecure_seeded_noise
    >>> release = HistogramRelease.calibrate(epsilon=1.0, delta=1e-6, bins=4)
    >>> release.release(np.array([0] * 30 + [3] * 12), insecure_seeded_noise("example")).tolist()
    [24, 6, 7, 17]
    >>> round(release.standard_error, 2)
    4.23
    """

    bins: int
    noise: Gaussian | Laplace
    delta: float
    steps: int = 1

    def __post_init__(self) -> None:
        if type(self.bins) is not int or not 1 <= self.bins <= MAX_BINS:
            raise BadUsage(f"bins: got {self.bins}, expected a whole number from 1 to {MAX_BINS}")
        if isinstance(self.noise, Laplace):
            if self.delta != 0.0:
                raise BadUsage(f"delta: got {self.delta} for Laplace noise, expected 0")
            check_releases(steps=self.steps, delta=0.5)
        else:
            check_releases(steps=self.steps, delta=self.delta)

    @classmethod
    def calibrate(cls, *, epsilon: float, delta: float, bins: int, steps: int = 1) -> Self:
        """The least noise whose ε is at most `epsilon`, met from below to 1e-4; Laplace noise for a `delta` of 0.

        Raises: BadUsage for an argument that cannot be.
        """
        if delta == 0.0:
            pure = cls(bins=bins, noise=Laplace(scale=MOST_SIGMA), delta=delta, steps=steps)
            scale = least_sigma(lambda size: replace(pure, noise=Laplace(scale=size)).epsilon(), epsilon)
            return replace(pure, noise=Laplace(scale=scale))
        draft = cls(bins=bins, noise=Gaussian(sigma=MOST_SIGMA), delta=delta, steps=steps)
        sigma = least_sigma(lambda size: replace(draft, noise=Gaussian(sigma=size)).epsilon(), epsilon)
        return replace(draft, noise=Gaussian(sigma=sigma))

    def release(self, cells: NDArray[np.integer[Any]], stream: NoiseStream) -> Integers:
        """Count the rows (n,) by their cell, and add noise: (bins,). A row whose cell is no cell is counted nowhere."""
        known = cells[(cells >= 0) & (cells < self.bins)]
        return self.noise.add(np.bincount(known, minlength=self.bins).astype(np.int64), stream)

    @property
    def standard_error(self) -> float:
        """The standard deviation of the noise of one count in one release."""
        return self.noise.standard_error

    def epsilon(self) -> float:
        """ε at `delta` of all releases: the least there is, for Gaussian noise."""
        return self.noise.epsilon(steps=self.steps, delta=self.delta)

    def rdp(self, order: float) -> float:
        """Rényi divergence at `order` of all releases."""
        return self.noise.rdp(steps=self.steps, order=order)

    def gdp(self) -> float | None:
        """None: on whole counts the noise is not a Gaussian mechanism."""
        return None

    def to_json(self) -> dict[str, Any]:
        """The public fields, with the names of mechanism, unit and relation."""
        return {
            "mechanism": f"{self.noise.law} of a histogram",
            "unit": "example",
            "relation": RELATION,
            "bins": self.bins,
            "noise": noise_json(self.noise),
            "delta": self.delta,
            "steps": self.steps,
        }

    def digest(self) -> str:
        """SHA-256 of the fields."""
        return digest_of(self.to_json())


@dataclass(frozen=True, kw_only=True)
class CountRelease:
    """`steps` noised counts: a histogram of one cell.

    Guarantees: those of `HistogramRelease`.
    """

    noise: Gaussian | Laplace
    delta: float
    steps: int = 1

    def __post_init__(self) -> None:
        self.histogram()

    @classmethod
    def calibrate(cls, *, epsilon: float, delta: float, steps: int = 1) -> Self:
        """As `HistogramRelease.calibrate`."""
        one = HistogramRelease.calibrate(epsilon=epsilon, delta=delta, bins=1, steps=steps)
        return cls(noise=one.noise, delta=delta, steps=steps)

    def histogram(self) -> HistogramRelease:
        """The same release as a histogram of one cell."""
        return HistogramRelease(bins=1, noise=self.noise, delta=self.delta, steps=self.steps)

    def release(self, chosen: NDArray[np.bool_], stream: NoiseStream) -> int:
        """How many of the rows (n,) are chosen, with noise: a whole number, maybe below zero."""
        return int(self.histogram().release(np.where(chosen, 0, -1), stream)[0])

    @property
    def standard_error(self) -> float:
        return self.noise.standard_error

    def epsilon(self) -> float:
        return self.histogram().epsilon()

    def rdp(self, order: float) -> float:
        return self.histogram().rdp(order)

    def gdp(self) -> float | None:
        return None

    def to_json(self) -> dict[str, Any]:
        return self.histogram().to_json()

    def digest(self) -> str:
        return digest_of(self.to_json())


@dataclass(frozen=True, kw_only=True)
class ScalarAnswer:
    """A sum, a count and a mean from one release. The mean is None if the noise may be all there is of the count."""

    total: Estimate
    count: Estimate
    mean: Estimate | None


@dataclass(frozen=True, kw_only=True)
class ScalarRelease:
    """`steps` noised sums of values between public bounds, each together with the number of rows.

    A row adds to the pair its distance from the middle of the bounds, as a share of half their distance, and one: at
    most sqrt(2) in L2. For values from 0 to a bound the sum is as exact as if it had been released alone.

    Guarantees: `steps` calls of `release` are (epsilon(), delta)-differentially private.

    >>> from fedinfer.privacy.noise import insecure_seeded_noise
    >>> release = ScalarRelease.calibrate(epsilon=1.0, delta=1e-6, low=0.0, high=100.0, default=50.0)
    >>> answer = release.summarise(release.release(np.full(500, 30.0), insecure_seeded_noise("example")))
    >>> round(answer.mean.value, 1), round(answer.mean.standard_error, 1)
    (29.6, 0.6)
    """

    low: float
    high: float
    default: float
    sigma: float
    delta: float
    steps: int = 1

    def __post_init__(self) -> None:
        if not sys.float_info.min < (self.high - self.low) / 2 < math.inf:
            raise BadUsage(f"bounds: got {self.low} and {self.high}, expected finite numbers apart, the lower first")
        if not self.low <= self.default <= self.high:
            raise BadUsage(f"default: got {self.default}, expected a number from {self.low} to {self.high}")
        check_sigma(self.sigma)
        check_releases(steps=self.steps, delta=self.delta)

    @classmethod
    def calibrate(
        cls, *, epsilon: float, delta: float, low: float, high: float, default: float, steps: int = 1
    ) -> Self:
        """The least noise whose ε is at most `epsilon`, met from below to 1e-4.

        Raises: BadUsage for an argument that cannot be.
        """
        draft = cls(low=low, high=high, default=default, sigma=MOST_SIGMA, delta=delta, steps=steps)
        return replace(draft, sigma=least_sigma(lambda sigma: replace(draft, sigma=sigma).epsilon(), epsilon))

    def release(self, values: Floats, stream: NoiseStream) -> Integers:
        """The noised pair (2,) of values (n,), in cells; `summarise` reads it. A value that is no number is `default`.

        Pairs of several devices add up.
        """
        middle, half = self._middle(), self._half()
        known = np.where(np.isfinite(values), values, self.default).astype(np.float64)
        shares = np.clip((known - middle) / half, -1.0, 1.0)
        pair = np.array([np.rint(shares * CELLS).astype(np.int64).sum(), len(values) * CELLS])
        return add_on_grid(pair, sigma=self.sigma, stream=stream)

    def summarise(self, pairs: Integers, *, releases: int = 1) -> ScalarAnswer:
        """What the sum (2,) of `releases` pairs says.

        Raises: ShapeMismatch if it is not a pair.
        """
        if pairs.shape != (2,):
            raise ShapeMismatch(got=pairs.shape, expected="(2,)", what="sum of pairs")
        shares, count = (float(value) / CELLS for value in pairs)
        error, middle, half = self.sigma * math.sqrt(releases), self._middle(), self._half()
        mean = None
        if count > SEEN * error:
            ratio = shares / count
            mean = Estimate(
                value=min(max(middle + half * ratio, self.low), self.high),
                standard_error=half * error / count * math.hypot(1.0, ratio),
            )
        return ScalarAnswer(
            total=Estimate(value=half * shares + middle * count, standard_error=error * math.hypot(half, middle)),
            count=Estimate(value=count, standard_error=error),
            mean=mean,
        )

    def epsilon(self) -> float:
        """ε at `delta` of all releases."""
        cells = self.sigma * CELLS
        return fine_epsilon(mu=self._mu(), sigma=cells, delta=self.delta, coordinates=2 * self.steps)

    def rdp(self, order: float) -> float:
        """Rényi divergence at `order` of all releases."""
        return gaussian_rdp(mu=self._mu(), order=order)

    def gdp(self) -> float | None:
        """μ of all releases: on a fine grid this is a Gaussian mechanism, up to what `fine_epsilon` pays."""
        return self._mu()

    def to_json(self) -> dict[str, Any]:
        """The public fields, with the names of mechanism, unit and relation."""
        mechanism = "discrete Gaussian of a clipped sum and a count"
        return {"mechanism": mechanism, "unit": "example", "relation": RELATION, **asdict(self)}

    def digest(self) -> str:
        """SHA-256 of the fields."""
        return digest_of(self.to_json())

    def _mu(self) -> float:
        return math.sqrt(2.0 * self.steps) / self.sigma

    def _middle(self) -> float:
        return (self.low + self.high) / 2.0

    def _half(self) -> float:
        return (self.high - self.low) / 2.0
