"""Local differential privacy: what one device sends is private by itself, whoever receives it.

Unit: one client, with all of its rows. Relation: replace one, because everybody sees that a device answers. Adversary:
everybody else, the server included. Trusted: the device and its operating system's randomness. All fields are public
constants.

The old formula of the Gaussian mechanism, sigma = sqrt(2 ln(1.25 / δ)) Δ / ε, is proven for ε below 1, and gives too
little noise for large ones; the account here is exact for all ε (Balle and Wang 2018, arXiv:1805.06530, theorem 8).
"""

import math
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedinfer.errors import BadUsage, ShapeMismatch
from fedinfer.privacy.checks import check_epsilon, check_positive
from fedinfer.privacy.discrete import Integers, discrete_gaussian, uniform_below
from fedinfer.privacy.integer_noise import (
    MOST_SIGMA,
    Estimate,
    check_releases,
    check_sigma,
    digest_of,
    fine_epsilon,
    gaussian_rdp,
    least_sigma,
    two_point_rdp,
)
from fedinfer.privacy.noise import NoiseStream

RELATION = "replace one"
# The clip norm in cells.
CLIP_CELLS = 2**24
MAX_DIMENSION = 2**26
OTHERS_WEIGHT = 2**24
MOST_EPSILON = 26.0
MAX_CATEGORIES = 2**20


@dataclass(frozen=True, kw_only=True)
class LocalVector:
    """`steps` noised vectors (dimension,), each clipped to `clip_norm` first.

    Two vectors differ by twice the clip norm, and by what rounding to the grid moves them.

    Guarantees: `steps` calls of `release` are (epsilon(), delta)-differentially private, the grid included.

    >>> plan = LocalVector.calibrate(epsilon=4.0, delta=1e-6, dimension=3, clip_norm=1.0)
    >>> round(plan.noise_multiplier, 2)
    2.39
    """

    dimension: int
    clip_norm: float
    noise_multiplier: float
    delta: float
    steps: int = 1

    def __post_init__(self) -> None:
        if type(self.dimension) is not int or not 1 <= self.dimension <= MAX_DIMENSION:
            raise BadUsage(f"dimension: got {self.dimension}, expected a whole number from 1 to {MAX_DIMENSION}")
        check_positive("clip norm", self.clip_norm)
        check_sigma(self.noise_multiplier)
        check_releases(steps=self.steps, delta=self.delta)

    @classmethod
    def calibrate(cls, *, epsilon: float, delta: float, dimension: int, clip_norm: float, steps: int = 1) -> Self:
        """The least noise whose ε is at most `epsilon`, met from below to 1e-4.

        Raises: BadUsage for an argument that cannot be.
        """
        draft = cls(dimension=dimension, clip_norm=clip_norm, noise_multiplier=MOST_SIGMA, delta=delta, steps=steps)
        noise = least_sigma(lambda size: replace(draft, noise_multiplier=size).epsilon(), epsilon)
        return replace(draft, noise_multiplier=noise)

    def release(self, vector: NDArray[np.floating[Any]], stream: NoiseStream) -> NDArray[np.float32]:
        """Clip the vector (dimension,), round it to the grid and add the noise. A coordinate that is no number is 0.

        Raises: ShapeMismatch for another shape.
        """
        cells = self.clipped(vector)
        variance = (Fraction(self.noise_multiplier) * CLIP_CELLS) ** 2
        noisy = cells + discrete_gaussian(stream, variance=variance, count=len(cells))
        return (noisy.astype(np.float64) * (self.clip_norm / CLIP_CELLS)).astype(np.float32)

    def clipped(self, vector: NDArray[np.floating[Any]]) -> Integers:
        """The vector clipped and rounded, in cells.

        Guarantees: its norm is at most that of the clip norm and half a cell in each coordinate.
        """
        if vector.shape != (self.dimension,):
            raise ShapeMismatch(got=vector.shape, expected=f"({self.dimension},)", what="vector")
        finite = np.nan_to_num(vector.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        # Divided by the largest first: the squares of finite numbers may not be finite.
        largest = float(np.abs(finite).max())
        if largest == 0.0:
            return np.zeros(self.dimension, np.int64)
        direction = finite / largest
        length = float(np.linalg.norm(direction))
        # Floats may put the norm of a clipped vector above the clip norm by some 1e-16 of it.
        factor = min(largest / self.clip_norm, (1.0 - 1e-12) / length)
        return np.rint(direction * (factor * CLIP_CELLS)).astype(np.int64)

    def epsilon(self) -> float:
        """ε at `delta` of all releases."""
        cells = self.noise_multiplier * CLIP_CELLS
        coordinates = self.steps * self.dimension
        return fine_epsilon(mu=self._mu(), sigma=cells, delta=self.delta, coordinates=coordinates)

    def rdp(self, order: float) -> float:
        """Rényi divergence at `order` of all releases."""
        return gaussian_rdp(mu=self._mu(), order=order)

    def gdp(self) -> float | None:
        """μ of all releases: on a fine grid this is a Gaussian mechanism, up to what `fine_epsilon` pays."""
        return self._mu()

    def to_json(self) -> dict[str, Any]:
        """The public fields, with the names of mechanism, unit and relation."""
        mechanism = "discrete Gaussian of a clipped vector, local"
        return {"mechanism": mechanism, "unit": "client", "relation": RELATION, **asdict(self)}

    def digest(self) -> str:
        """SHA-256 of the fields."""
        return digest_of(self.to_json())

    def _mu(self) -> float:
        shift = 2.0 + math.sqrt(self.dimension) / CLIP_CELLS
        return math.sqrt(self.steps) * shift / self.noise_multiplier


@dataclass(frozen=True, kw_only=True)
class RandomisedResponse:
    """`steps` answers of a client about its category, each true with weight `truth` against 2^24 for each other one.

    Guarantees: `steps` calls of `release` are (epsilon(), 0)-differentially private, exactly.

    Reference: Warner 1965, doi:10.1080/01621459.1965.10480775; Kairouz, Bonawitz and Ramage 2016, arXiv:1602.07387.

    >>> from fedinfer.privacy.noise import insecure_seeded_noise
    >>> plan = RandomisedResponse.calibrate(epsilon=1.0, categories=3)
    >>> plan.release(np.array([0, 0, 1, 2]), insecure_seeded_noise("example")).tolist()
    [2, 1, 0, 1]
    """

    categories: int
    truth: int
    steps: int = 1

    def __post_init__(self) -> None:
        if type(self.categories) is not int or not 2 <= self.categories <= MAX_CATEGORIES:
            raise BadUsage(f"categories: got {self.categories}, expected a whole number from 2 to {MAX_CATEGORIES}")
        if type(self.truth) is not int or not OTHERS_WEIGHT < self.truth <= 2**62:
            raise BadUsage(f"truth: got {self.truth}, expected a whole number above {OTHERS_WEIGHT}, at most 2**62")
        check_releases(steps=self.steps, delta=0.5)

    @classmethod
    def calibrate(cls, *, epsilon: float, categories: int, steps: int = 1) -> Self:
        """The answers that are true most often with ε of at most `epsilon`, met from below to 1e-4.

        Raises: BadUsage for an argument that cannot be.
        """
        check_epsilon(epsilon)
        if not steps * 1e-4 <= epsilon <= steps * MOST_EPSILON:
            raise BadUsage(
                f"epsilon: got {epsilon:g}, expected from 0.0001 to {MOST_EPSILON:g} for each of {steps} steps"
            )
        truth = math.floor(OTHERS_WEIGHT * math.exp(epsilon / steps) * (1.0 - 1e-15))
        return cls(categories=categories, truth=truth, steps=steps)

    @property
    def delta(self) -> float:
        return 0.0

    def release(self, categories: NDArray[np.integer[Any]], stream: NoiseStream) -> Integers:
        """What is told of the categories (n,), each of one client. One that is no category counts as 0."""
        known = np.where((categories >= 0) & (categories < self.categories), categories, 0).astype(np.int64)
        drawn = uniform_below(stream, limit=self._weights(), count=len(known))
        other = np.maximum(drawn - self.truth, 0) // OTHERS_WEIGHT
        other += other >= known
        return np.where(drawn < self.truth, known, other)

    def estimate(self, reports: NDArray[np.integer[Any]]) -> tuple[Estimate, ...]:
        """How many of the clients are in each category, from their reports (n,) of one step: unbiased, maybe below 0.

        The standard error is that of the randomised answers.
        """
        right, wrong = self.truth / self._weights(), OTHERS_WEIGHT / self._weights()
        found = (np.bincount(reports, minlength=self.categories) - len(reports) * wrong) / (right - wrong)
        inside = np.clip(found, 0.0, len(reports))
        variance = inside * right * (1.0 - right) + (len(reports) - inside) * wrong * (1.0 - wrong)
        errors = np.sqrt(variance) / (right - wrong)
        return tuple(Estimate(value=float(v), standard_error=float(e)) for v, e in zip(found, errors, strict=True))

    def epsilon(self) -> float:
        """ε of all answers, for a δ of 0."""
        return self.steps * math.log(self.truth / OTHERS_WEIGHT)

    def rdp(self, order: float) -> float:
        """Rényi divergence at `order` of all answers."""
        total = self._weights()
        right, wrong = math.log(self.truth / total), math.log(OTHERS_WEIGHT / total)
        others = (self.categories - 2) * OTHERS_WEIGHT / total
        return self.steps * two_point_rdp(right=right, wrong=wrong, order=order, others=others)

    def gdp(self) -> float | None:
        """None: this is no Gaussian mechanism."""
        return None

    def to_json(self) -> dict[str, Any]:
        """The public fields, with the names of mechanism, unit and relation."""
        return {"mechanism": "randomised response", "unit": "client", "relation": RELATION, **asdict(self)}

    def digest(self) -> str:
        """SHA-256 of the fields."""
        return digest_of(self.to_json())

    def _weights(self) -> int:
        return self.truth + (self.categories - 1) * OTHERS_WEIGHT
