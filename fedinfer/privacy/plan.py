"""A privacy plan: one object samples, clips, adds noise *and* accounts, so that they cannot disagree.

Reference: Abadi et al. 2016, arXiv:1607.00133 (DP-SGD).
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from fedinfer.errors import BadUsage, ShapeMismatch
from fedinfer.privacy.accounting import epsilon_of, noise_for
from fedinfer.privacy.noise import NoiseStream

Unit = Literal["example"]
MAX_STEPS = 100_000
# Steps times (rate / noise)²: ε is in the hundreds here, and a device would spend minutes accounting for much more.
MAX_LEAK = 1000.0


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """At most `steps` noised sums of clipped per-example gradients, each over a fresh Poisson sample.

    Unit: one example (a patient). Relation: add or remove one. Adversary: whoever sees all releases, the server
    included, and knows every other row. Trusted: the device and its operating system's randomness. Amplification is
    claimed for the sampling of examples on the device, which nobody else sees.

    All fields are public constants; none may be computed from private rows, `divisor` above all.

    Guarantees: `steps` calls of `release` on sums of gradients clipped to `clip_norm` over rows chosen by `sample`
    are (epsilon(), delta)-differentially private, up to floating point (see `NoiseStream.gaussian_float`).
    """

    unit: Unit = "example"
    clip_norm: float
    noise_multiplier: float
    sampling_rate: float
    delta: float
    steps: int
    divisor: float

    def __post_init__(self) -> None:
        if self.unit != "example":
            raise BadUsage(f"privacy unit: got {self.unit!r}, expected 'example'")
        check_positive("clip norm", self.clip_norm)
        check_positive("noise multiplier", self.noise_multiplier)
        check_positive("divisor", self.divisor)
        if not 0.0 < self.sampling_rate <= 1.0:
            raise BadUsage(f"sampling rate: got {self.sampling_rate}, expected more than 0 and at most 1")
        check_delta(self.delta)
        if type(self.steps) is not int or not 1 <= self.steps <= MAX_STEPS:
            raise BadUsage(f"steps: got {self.steps}, expected a whole number from 1 to {MAX_STEPS}")
        if self.steps * (self.sampling_rate / self.noise_multiplier) ** 2 > MAX_LEAK:
            raise BadUsage(
                f"noise multiplier: got {self.noise_multiplier:g} for {self.steps} steps, expected more; "
                "so little noise protects nothing"
            )

    @classmethod
    def calibrate(
        cls, *, epsilon: float, delta: float, steps: int, sampling_rate: float, clip_norm: float, divisor: float
    ) -> Self:
        """The plan with the least noise whose ε is at most `epsilon`, met from below to 1e-4.

        Raises: BadUsage for an argument that cannot be.
        """
        check_epsilon(epsilon)
        check_delta(delta)
        plan = cls(
            clip_norm=clip_norm,
            noise_multiplier=1.0,
            sampling_rate=sampling_rate,
            delta=delta,
            steps=steps,
            divisor=divisor,
        )
        noise = noise_for(epsilon=epsilon, sampling_rate=sampling_rate, steps=steps, delta=delta)
        return cls(**{**asdict(plan), "noise_multiplier": noise})

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Read `to_json` back.

        Raises: BadUsage for a missing or unknown field, or one that cannot be.
        """
        try:
            return cls(**fields)
        except TypeError as error:
            raise BadUsage(f"privacy plan: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """The public fields as JSON values."""
        return asdict(self)

    def digest(self) -> str:
        """SHA-256 of the fields: two plans are the same, or not."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def epsilon(self, steps: int | None = None) -> float:
        """ε at `delta` after `steps` releases (default: all of the plan)."""
        return epsilon_of(
            noise_multiplier=self.noise_multiplier,
            sampling_rate=self.sampling_rate,
            steps=self.steps if steps is None else steps,
            delta=self.delta,
        )

    def sample(self, rows: int, stream: NoiseStream) -> NDArray[np.int64]:
        """Choose each of `rows` rows independently with probability `sampling_rate`; sorted indices, maybe none."""
        return np.flatnonzero(stream.uniform(rows) < self.sampling_rate)

    def release(self, clipped_sum: NDArray[np.floating[Any]], stream: NoiseStream) -> NDArray[np.float32]:
        """Add the plan's noise to a sum (d,) of clipped gradients and divide by the public divisor.

        Raises: ShapeMismatch if it is not a vector.
        """
        if clipped_sum.ndim != 1:
            raise ShapeMismatch(got=clipped_sum.shape, expected="(d,)", what="clipped sum")
        noise = stream.gaussian_float(self.noise_multiplier * self.clip_norm, len(clipped_sum))
        return ((clipped_sum.astype(np.float64) + noise) / self.divisor).astype(np.float32)


def check_positive(name: str, value: float) -> None:
    """Raises: BadUsage unless `value` is finite and above zero."""
    if not (math.isfinite(value) and value > 0.0):
        raise BadUsage(f"{name}: got {value}, expected a finite number above 0")


def check_epsilon(epsilon: float) -> None:
    """Raises: BadUsage unless `epsilon` is finite and above zero."""
    check_positive("epsilon", epsilon)


def check_delta(delta: float) -> None:
    """Raises: BadUsage unless `delta` lies between 0 and 1."""
    if not 0.0 < delta < 1.0:
        raise BadUsage(f"delta: got {delta}, expected more than 0 and less than 1, for example 1e-5")
