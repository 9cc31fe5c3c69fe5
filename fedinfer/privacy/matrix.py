"""The banded matrix mechanism: noise that a later round partly takes back, for rounds without sampling.

Devices come when they can, so that no amplification by sampling is claimed. What is claimed needs only that one
device takes part at most `at_most` times, `separation` rounds apart; the device itself sees to that.

Reference: Choquette-Choo et al. 2023, arXiv:2306.08153; McMahan et al. 2024, arXiv:2408.08868 (in production).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedinfer.arrays import Vector
from fedinfer.errors import BadUsage, BudgetExceeded, ShapeMismatch
from fedinfer.privacy.accounting import gaussian_epsilon, least_noise
from fedinfer.privacy.checks import check_delta, check_epsilon, check_positive
from fedinfer.privacy.noise import NoiseStream
from fedinfer.privacy.toeplitz import MAX_ROUNDS, Objective, optimal_coefficients, sensitivity

Floats = NDArray[np.float64]
# What a reader of `to_json` must know, and nobody may set.
LABELS = {
    "mechanism": "banded matrix",
    "unit": "client",
    "relation": "add or remove one, slots fixed",
    "adversary": "outsider",
    "trusted": "server",
}


@dataclass(frozen=True, kw_only=True)
class Participation:
    """When a device may take part: at most `at_most` times, any two at least `separation` rounds apart."""

    separation: int
    at_most: int

    def __post_init__(self) -> None:
        for name, value in (("separation", self.separation), ("participations", self.at_most)):
            if type(value) is not int or value < 1:
                raise BadUsage(f"{name}: got {value}, expected a whole number of at least 1")

    def admit(self, earlier: Sequence[int], round: int) -> tuple[int, ...]:
        """The device's rounds with `round` added; `earlier` are all it ever reserved of this run, in order.

        Guarantees: tuples made by `admit` alone keep to this participation.
        Raises: BudgetExceeded if the round comes too soon or again, or is one too many.

        >>> Participation(separation=4, at_most=3).admit((1, 5), 9)
        (1, 5, 9)
        """
        if len(earlier) >= self.at_most:
            raise BudgetExceeded(f"round {round}: got {len(earlier)} participations of {self.at_most}; none is left")
        if earlier and round < earlier[-1] + self.separation:
            raise BudgetExceeded(
                f"round {round}: got asked {round - earlier[-1]} rounds after round {earlier[-1]}, expected at least "
                f"{self.separation}; nothing was released"
            )
        return (*earlier, round)


@dataclass(frozen=True, kw_only=True)
class NoiseMemory:
    """The noise of the last rounds, newest first. It is secret: with it anybody takes the noise off the releases.

    It lives in one process, is never pickled or written, and is gone with it: see `MatrixPlan.start`.
    """

    size: int
    rounds_done: int
    past: tuple[Floats, ...] = field(repr=False)

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("the noise of past rounds is secret and is not copied; start anew from the next round")


@dataclass(frozen=True, kw_only=True)
class MatrixPlan:
    """`rounds` noised sums of clipped client updates, whose noise is C⁻¹z for white z: its prefix sums stay small.

    Unit: one client. Relation: add or remove all of its updates. Adversary: an outsider, who sees every model after
    the server added the noise. Trusted: the server, which sees clipped updates in the clear; against it nothing is
    claimed. The ledger of a device counts the device's own `steps`, and `participation` belongs in its check.

    All fields are public constants. `coefficients` are the first column of C, 1 first, never growing, never
    negative; (1.0,) is independent noise.

    Guarantees: `release` of sums in which a client has updates of norm at most `clip_norm`, in rounds that
    `participation` admits, is (epsilon(), delta)-differentially private, up to floating point
    (see `NoiseStream.gaussian_float`), also if the updates depend on earlier releases.
    Reference: Denisov et al. 2022, arXiv:2202.08312, theorem 2.1 (adaptive updates).
    """

    coefficients: tuple[float, ...] = field(repr=False)
    rounds: int
    participation: Participation
    clip_norm: float
    noise_multiplier: float
    delta: float
    divisor: float

    def __post_init__(self) -> None:
        check_positive("clip norm", self.clip_norm)
        check_positive("noise multiplier", self.noise_multiplier)
        check_positive("divisor", self.divisor)
        check_delta(self.delta)
        if type(self.rounds) is not int or not 1 <= self.rounds <= MAX_ROUNDS:
            raise BadUsage(f"rounds: got {self.rounds}, expected a whole number from 1 to {MAX_ROUNDS}")
        if len(self.coefficients) > self.rounds:
            raise BadUsage(f"coefficients: got {len(self.coefficients)}, expected at most one a round ({self.rounds})")
        check_positive("sensitivity", self.sensitivity)

    @classmethod
    def calibrate(
        cls,
        *,
        epsilon: float,
        delta: float,
        rounds: int,
        participation: Participation,
        clip_norm: float,
        divisor: float,
        momentum: float = 0.0,
        objective: Objective = "max",
    ) -> Self:
        """The plan with the least noise of ε at most `epsilon`, and the best coefficients of `separation` bands.

        Raises: BadUsage for an argument that cannot be.
        """
        check_epsilon(epsilon)
        check_delta(delta)
        coefficients = optimal_coefficients(
            rounds=rounds,
            bands=min(participation.separation, rounds),
            separation=participation.separation,
            participations=participation.at_most,
            momentum=momentum,
            objective=objective,
        )
        noise = least_noise(
            lambda noise: gaussian_epsilon(mu=1.0 / noise, delta=delta),
            epsilon,
            start=1.0,
            question={"mechanism": LABELS["mechanism"], "delta": delta},
        )
        return cls(
            coefficients=coefficients,
            rounds=rounds,
            participation=participation,
            clip_norm=clip_norm,
            noise_multiplier=noise,
            delta=delta,
            divisor=divisor,
        )

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Read `to_json` back.

        Raises: BadUsage for a missing or unknown field, another label, or a value that cannot be.
        """
        own = {name: value for name, value in fields.items() if name not in LABELS}
        if any(fields.get(name) != label for name, label in LABELS.items()):
            raise BadUsage(f"matrix plan: got other labels than {', '.join(LABELS.values())}")
        try:
            participation = Participation(**own.pop("participation"))
            return cls(coefficients=tuple(own.pop("coefficients")), participation=participation, **own)
        except (TypeError, KeyError, ValueError) as error:
            raise BadUsage(f"matrix plan: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """The public fields and who is trusted, as JSON values."""
        return {**LABELS, **asdict(self), "coefficients": list(self.coefficients)}

    def digest(self) -> str:
        """SHA-256 of the fields: two plans are the same, or not."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    @property
    def steps(self) -> int:
        """How many updates one device may give: what its ledger counts."""
        return self.participation.at_most

    @cached_property
    def sensitivity(self) -> float:
        """How far one client moves Cx, for updates of norm 1. Exact."""
        return sensitivity(
            self.coefficients,
            rounds=self.rounds,
            separation=self.participation.separation,
            participations=self.participation.at_most,
        )

    def epsilon(self) -> float:
        """ε at `delta` of all rounds together: one Gaussian release of the whole of Cx."""
        return gaussian_epsilon(mu=self.gdp(), delta=self.delta)

    def rdp(self, order: float) -> float:
        """Rényi divergence of `order` > 1 between neighbours, at most."""
        return order / (2.0 * self.noise_multiplier**2)

    def gdp(self) -> float:
        """μ of Gaussian differential privacy: exact, for this is a plain Gaussian mechanism."""
        return 1.0 / self.noise_multiplier

    def start(self, size: int, *, after: int = 0) -> NoiseMemory:
        """No noise yet, for vectors of `size`, with `after` rounds done.

        A server that lost its memory starts anew after the last round it *asked for*, answered or not. That costs
        accuracy and no privacy: C becomes two blocks, whose columns are those of C cut short, so that no inner
        product of columns grows. A round asked twice would be a participation too many, and devices refuse it.
        """
        if not 0 <= after <= self.rounds:
            raise BadUsage(f"rounds done: got {after}, expected 0 to {self.rounds}")
        return NoiseMemory(size=size, rounds_done=after, past=())

    def release(
        self, clipped_sum: NDArray[np.floating[Any]], memory: NoiseMemory, stream: NoiseStream
    ) -> tuple[Vector, NoiseMemory]:
        """Add this round's noise to a sum (d,) of clipped updates and divide by the public divisor.

        Memory and time are (bands · d). The noise is z minus the noise of the last rounds by their coefficients:
        one row of C⁻¹z.

        Raises: ShapeMismatch if the sum is not a vector of the memory's size; BudgetExceeded after the last round.
        """
        if clipped_sum.shape != (memory.size,):
            raise ShapeMismatch(got=clipped_sum.shape, expected=(memory.size,), what="clipped sum")
        if memory.rounds_done >= self.rounds:
            raise BudgetExceeded(f"round {memory.rounds_done + 1}: got all {self.rounds} rounds of the plan done")
        noise = stream.gaussian_float(self.noise_multiplier * self.clip_norm * self.sensitivity, memory.size)
        for coefficient, past in zip(self.coefficients[1:], memory.past, strict=False):
            noise -= coefficient * past
        kept = (noise, *memory.past)[: len(self.coefficients) - 1]
        released = ((clipped_sum.astype(np.float64) + noise) / self.divisor).astype(np.float32)
        return released, NoiseMemory(size=memory.size, rounds_done=memory.rounds_done + 1, past=kept)
