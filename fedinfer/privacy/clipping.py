"""Clipping of whole client updates, to a norm that is fixed or that follows a quantile under the same budget.

Every client weighs the same: sums are divided by a public constant (the plan's divisor), never by how many answered
nor by how many examples they hold.

Reference: McMahan et al. 2018, arXiv:1710.06963 (client-level privacy); Andrew et al. 2021, arXiv:1905.03871.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedinfer.arrays import Vector
from fedinfer.errors import BadUsage, ShapeMismatch
from fedinfer.privacy.checks import check_positive
from fedinfer.privacy.noise import NoiseStream
from fedinfer.privacy.plan import PrivacyPlan

Floats = NDArray[np.float64]
# Rounding to float32 may carry a norm past its bound by 2**-24 of it.
MARGIN = 1.0 - 2.0**-22
# An adaptive clip stays between these, whatever the noise says; its entries stay normal float32 numbers.
LEAST_CLIP, MOST_CLIP = 1e-12, 1e12


def clip_update(update: Vector, *, clip_norm: float) -> Vector:
    """Scale `update` (d,) to L2 norm at most `clip_norm`.

    Guarantees: the norm of the result, float32 rounding included, is at most `clip_norm`; direction kept; an update
    within the bound, zero above all, stays as it is; one with NaN or infinity becomes zeros.
    Raises: ShapeMismatch if it is not a vector; BadUsage for a clip norm that cannot be.
    Reference: McMahan et al. 2018, arXiv:1710.06963.

    >>> clip_update(np.array([30.0, 40.0], np.float32), clip_norm=1.0).round(3)
    array([0.6, 0.8], dtype=float32)
    """
    if not LEAST_CLIP <= clip_norm <= MOST_CLIP:
        raise BadUsage(f"clip norm: got {clip_norm}, expected {LEAST_CLIP:g} to {MOST_CLIP:g}")
    norm = _norm(update)
    if not math.isfinite(norm):
        return np.zeros_like(update)
    if norm <= clip_norm * (1.0 - 2.0**-30):
        return update.copy()
    return (update.astype(np.float64) * (MARGIN * clip_norm / norm)).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class ClippedSum:
    """A sum (d,) of clipped updates. It and `nonfinite`, the updates that counted as zeros, are private."""

    total: Floats = field(repr=False)
    nonfinite: int = field(repr=False)


def clipped_sum(updates: Iterable[Vector], *, size: int, clip_norm: float) -> ClippedSum:
    """Sum updates (size,), each clipped.

    Guarantees: one client changes the sum by at most `clip_norm` in L2 norm; no clients give zeros.
    Raises: ShapeMismatch for an update of another size.
    """
    total, nonfinite = np.zeros(size), 0
    for update in updates:
        if update.shape != (size,):
            raise ShapeMismatch(got=update.shape, expected=(size,), what="update")
        nonfinite += not np.isfinite(update).all()
        total += clip_update(update, clip_norm=clip_norm)
    return ClippedSum(total=total, nonfinite=nonfinite)


@dataclass(frozen=True, kw_only=True)
class AdaptiveClip:
    """A clip norm that follows `target_quantile` of the update norms, inside the budget of one `plan`.

    A client's update, over the clip in use, and its bit (is the norm within the clip? less one half) are scaled into
    *one* vector of norm at most `plan.clip_norm`, and the plan releases the sum of those. So the noise on updates is
    by the clip that was used, the count is never seen without noise, and both cost together what the plan accounts:
    1/z² = 1/update_noise² + 1/(2 count_noise)².

    `count_noise` is the deviation of the noise on the number of clients within the clip; `plan.divisor` is the
    public number of clients expected in a round. If fewer answer, the fraction is drawn towards one half.

    Unit, relation, adversary and trusted parties are the plan's. The clip of each round is public.

    Guarantees: those of the plan; the clip grows while fewer clients than the target quantile are within it.
    Raises: BadUsage if `count_noise` is half the plan's noise multiplier or less: nothing is left for the updates.
    Reference: Andrew et al. 2021, arXiv:1905.03871, theorem 1 and algorithm 1.
    """

    plan: PrivacyPlan
    count_noise: float
    target_quantile: float = 0.5
    learning_rate: float = 0.2

    def __post_init__(self) -> None:
        check_positive("count noise", self.count_noise)
        check_positive("learning rate", self.learning_rate)
        if not 0.0 < self.target_quantile < 1.0:
            raise BadUsage(f"target quantile: got {self.target_quantile}, expected more than 0 and less than 1")
        if 2.0 * self.count_noise <= self.plan.noise_multiplier:
            raise BadUsage(
                f"count noise: got {self.count_noise:g} under a noise multiplier of {self.plan.noise_multiplier:g}, "
                "expected more than half of it"
            )

    @property
    def update_noise(self) -> float:
        """Noise multiplier of the updates alone, a little above the plan's."""
        return 1.0 / math.sqrt(self.plan.noise_multiplier**-2 - (2.0 * self.count_noise) ** -2)

    def contribution(self, update: Vector, *, clip: float) -> Vector:
        """One client's vector (d + 1,): the update (d,) clipped to `clip` and the bit, scaled to share the budget.

        Guarantees: its L2 norm is at most `plan.clip_norm`; an update with NaN or infinity gives zeros.
        """
        clipped = clip_update(update, clip_norm=clip).astype(np.float64)
        norm = _norm(update)
        if not math.isfinite(norm):
            return np.zeros(len(update) + 1, np.float32)
        bit = 0.5 if norm <= clip else -0.5
        pair = np.append(clipped * self._update_scale(clip), bit * self._bit_scale())
        return clip_update(pair.astype(np.float32), clip_norm=self.plan.clip_norm)

    def release(self, total: NDArray[np.floating[Any]], *, clip: float, stream: NoiseStream) -> tuple[Vector, float]:
        """From the sum (d + 1,) of contributions made with `clip`: the noisy mean update (d,), and the next clip.

        Raises: ShapeMismatch if the sum is not a vector.
        """
        released = self.plan.release(total, stream).astype(np.float64)
        mean = (released[:-1] / self._update_scale(clip)).astype(np.float32)
        within = 0.5 + float(released[-1]) / self._bit_scale()
        step = self.learning_rate * (self.target_quantile - within)
        # More than e^100 at once would be cut off anyway, and would overflow.
        return mean, min(max(clip * math.exp(min(step, 100.0)), LEAST_CLIP), MOST_CLIP)

    @property
    def steps(self) -> int:
        return self.plan.steps

    @property
    def delta(self) -> float:
        return self.plan.delta

    def epsilon(self) -> float:
        """The plan's ε: the count of clients within the clip is in it."""
        return self.plan.epsilon()

    def rdp(self, order: float) -> float:
        return self.plan.rdp(order)

    def gdp(self) -> float | None:
        return self.plan.gdp()

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read `to_json` back.

        Raises: BadUsage for a missing or unknown field, or one that cannot be.
        """
        try:
            rest = {name: value for name, value in values.items() if name not in ("mechanism", "unit", "relation")}
            read = cls(**{**rest, "plan": PrivacyPlan.from_json(rest["plan"])})
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise BadUsage(f"adaptive clip: {error}") from None
        if read.to_json() != values:
            raise BadUsage("adaptive clip: got another mechanism, unit or relation than its plan's")
        return read

    def to_json(self) -> dict[str, Any]:
        """The public fields as JSON values, with the names of mechanism, unit and relation."""
        return {
            "mechanism": "adaptive clipping",
            "unit": self.plan.unit,
            "relation": self.plan.relation,
            "plan": self.plan.to_json(),
            "count_noise": self.count_noise,
            "target_quantile": self.target_quantile,
            "learning_rate": self.learning_rate,
        }

    def digest(self) -> str:
        """SHA-256 of the fields: two are the same, or not."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def _update_scale(self, clip: float) -> float:
        return self.plan.clip_norm * self.plan.noise_multiplier / (self.update_noise * clip)

    def _bit_scale(self) -> float:
        return self.plan.clip_norm * self.plan.noise_multiplier / self.count_noise


def _norm(update: Vector) -> float:
    if update.ndim != 1:
        raise ShapeMismatch(got=update.shape, expected="(d,)", what="update")
    return float(np.linalg.norm(update.astype(np.float64)))
