"""Where a device's rows lie in each feature, as one release: a histogram of every feature of the public schema.

A row adds one to one bin of each of the features, so that all histograms together move by the root of their number;
two of them, of different times or places, tell whether the data drift.

Unit: one example (a row). Relation: add or remove one. Adversary: whoever sees all releases and knows every other row.
Trusted: the device and its operating system's randomness; with `min_honest` above 1 the secure sum, and that so many
of the devices in it are honest. All fields are public constants.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedinfer.errors import BadUsage, ShapeMismatch
from fedinfer.privacy.discrete import Integers
from fedinfer.privacy.evaluation import MAX_HONEST
from fedinfer.privacy.integer_noise import (
    CELLS,
    MOST_SIGMA,
    add_on_grid,
    check_releases,
    check_sigma,
    digest_of,
    fine_epsilon,
    gaussian_rdp,
    least_sigma,
)
from fedinfer.privacy.noise import NoiseStream

MAX_FEATURES, MAX_BINS = 1 << 16, 1024
# The public range of an encoded feature.
LOW, HIGH = -1.0, 1.0


@dataclass(frozen=True, kw_only=True)
class FeatureHistograms:
    """`steps` noised vectors (features * bins,): for each feature how many rows lie in each of `bins` equal parts.

    `sigma` is the noise of a count, of `min_honest` shares together.

    Guarantees: `steps` sums of `counts` of at least `min_honest` devices are (epsilon(), delta)-differentially private.

    >>> from fedinfer.privacy.noise import insecure_seeded_noise
    >>> release = FeatureHistograms.calibrate(epsilon=2.0, delta=1e-6, features=2, bins=2)
    >>> rows = np.array([[-0.5, 0.9]] * 200)
    >>> release.read(release.counts(rows, insecure_seeded_noise("example"))).round(-1).tolist()
    [[200.0, 0.0], [10.0, 200.0]]
    """

    features: int
    bins: int
    sigma: float
    delta: float
    steps: int = 1
    min_honest: int = 1

    def __post_init__(self) -> None:
        for name, value, most in (
            ("features", self.features, MAX_FEATURES),
            ("bins", self.bins, MAX_BINS),
            ("honest devices", self.min_honest, MAX_HONEST),
        ):
            if type(value) is not int or not 1 <= value <= most:
                raise BadUsage(f"{name}: got {value}, expected a whole number from 1 to {most}")
        check_sigma(self.sigma)
        check_releases(steps=self.steps, delta=self.delta)

    @classmethod
    def calibrate(
        cls, *, epsilon: float, delta: float, features: int, bins: int, steps: int = 1, min_honest: int = 1
    ) -> Self:
        """The least noise whose ε is at most `epsilon`, met from below to 1e-4.

        Raises: BadUsage for an argument that cannot be.
        """
        draft = cls(features=features, bins=bins, sigma=MOST_SIGMA, delta=delta, steps=steps, min_honest=min_honest)
        return replace(draft, sigma=least_sigma(lambda sigma: replace(draft, sigma=sigma).epsilon(), epsilon))

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Read `to_json` back.

        Raises: BadUsage for a missing or unknown field, or one that cannot be.
        """
        own = {name: value for name, value in fields.items() if name not in ("mechanism", "unit", "relation")}
        try:
            release = cls(**own)
        except TypeError as error:
            raise BadUsage(f"histograms: {error}") from None
        if release.to_json() != dict(fields):
            raise BadUsage("histograms: got another mechanism, unit or relation than these fields describe")
        return release

    @property
    def size(self) -> int:
        """How many numbers a release has."""
        return self.features * self.bins

    def counts(self, rows: NDArray[np.floating[Any]], stream: NoiseStream) -> Integers:
        """The vector (features * bins,) that leaves the device, in cells, with its noise or share of it.

        `rows` (n, features) lie in the public range from -1 to 1; beyond it a value counts at the end, and one that is
        no number in the middle. Vectors of several devices add up.
        Raises: ShapeMismatch for another number of features.
        """
        if rows.ndim != 2 or rows.shape[1] != self.features:
            raise ShapeMismatch(got=rows.shape, expected=("n", self.features), what="rows")
        known = np.clip(np.nan_to_num(rows.astype(np.float64), nan=0.0), LOW, HIGH)
        column = np.minimum(((known - LOW) / (HIGH - LOW) * self.bins).astype(np.int64), self.bins - 1)
        places = column + self.bins * np.arange(self.features)
        cells = np.bincount(places.reshape(-1), minlength=self.size).astype(np.int64) * CELLS
        return add_on_grid(cells, sigma=self.sigma, shares=self.min_honest, stream=stream)

    def read(self, total: Integers) -> NDArray[np.float64]:
        """A sum of vectors as counts of rows (features, bins).

        Raises: ShapeMismatch if it is no such vector.
        """
        if total.shape != (self.size,):
            raise ShapeMismatch(got=total.shape, expected=(self.size,), what="sum of histograms")
        return (total.astype(np.float64) / CELLS).reshape(self.features, self.bins)

    def epsilon(self) -> float:
        """ε at `delta` of all releases."""
        coordinates = self.features * self.steps
        return fine_epsilon(mu=self._mu(), sigma=self.sigma * CELLS, delta=self.delta, coordinates=coordinates)

    def rdp(self, order: float) -> float:
        """Rényi divergence at `order` of all releases."""
        return gaussian_rdp(mu=self._mu(), order=order)

    def gdp(self) -> float | None:
        """μ of all releases: on a fine grid this is a Gaussian mechanism, up to what `fine_epsilon` pays."""
        return self._mu()

    def to_json(self) -> dict[str, Any]:
        """The public fields, with the names of mechanism, unit and relation."""
        mechanism = "discrete Gaussian of a histogram of every feature"
        return {"mechanism": mechanism, "unit": "example", "relation": "add or remove one", **asdict(self)}

    def digest(self) -> str:
        """SHA-256 of the fields."""
        return digest_of(self.to_json())

    def _mu(self) -> float:
        return math.sqrt(self.features * self.steps) / self.sigma
