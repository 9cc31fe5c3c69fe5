"""What is audited: anything that turns units, whose gradients or updates are given, into noised sums.

Ours, each mutant and each peer is one `Subject`. An audit chooses what every unit contributes, as an adversary may
who writes rows and, as the server, sends the weights; it then sees what an adversary sees (`released`) and, through
the same code path, the sum to which the noise was added (`before`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedinfer.data import Table
from fedinfer.models import ModelSpec, build
from fedinfer.privacy import DistributedPlan, NoiseStream, Poisson, PrivacyPlan
from fedinfer.privacy.audit_clipping import ClipRule
from fedinfer.privacy.clipping import AdaptiveClip, clipped_sum
from fedinfer.privacy.plan import Unit
from fedinfer.training import StepReply, StepTask, private_step, step_summand

Floats = NDArray[np.float64]
# The ε that is stated at a δ; infinite where nothing is stated at that δ.
Claim = Callable[[float], float]
Step = Callable[[StepTask, nn.Module, Table, NoiseStream], StepReply]
# Of the number of clients within an adaptive clip, as a multiple of the plan's noise multiplier.
COUNT_NOISE = 2.0


@dataclass(frozen=True, kw_only=True)
class Units:
    """What each unit contributes before it is clipped, `rows` (n, d), and how many examples it says it has."""

    rows: NDArray[np.float32] = field(repr=False)
    examples: NDArray[np.int64] = field(repr=False)

    @classmethod
    def of(cls, rows: NDArray[np.floating[Any]], *, examples: NDArray[np.int64] | None = None) -> Self:
        said = np.ones(len(rows), np.int64) if examples is None else examples
        return cls(rows=rows.astype(np.float32), examples=said)

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One run of a plan: for each step the sum before noise and what was released times the plan's divisor, (T, d).

    d may be larger than the units' rows: a model may have other parameters after those. `sigma` is the noise that the
    subject declares on such a sum, and `claim` gives the ε that it states after the run at a δ.
    """

    before: Floats = field(repr=False)
    released: Floats = field(repr=False)
    sigma: float
    claim: Claim = field(repr=False)

    @property
    def noise(self) -> Floats:
        return self.released - self.before

    def along(self, directions: Floats) -> Floats:
        """What was released in each canary's direction, (T, canaries)."""
        products: Floats = self.released[:, : directions.shape[1]] @ directions.T
        return products


class Subject(Protocol):
    """Something under audit.

    `fixed_units`: the number of units is public, so that neighbours have as many. `sampled`: amplification is claimed
    for a Poisson sample of the units in each step. `slow`: each unit costs a message in each step.
    """

    @property
    def name(self) -> str: ...
    @property
    def unit(self) -> Unit: ...
    @property
    def fixed_units(self) -> bool: ...
    @property
    def sampled(self) -> bool: ...
    @property
    def slow(self) -> bool: ...
    def run(self, units: Units, plan: PrivacyPlan, stream: NoiseStream) -> Trace: ...
    def clip_rule(self, units: int, stream: NoiseStream) -> ClipRule | None: ...


@dataclass(frozen=True, kw_only=True)
class RecordingPlan(PrivacyPlan):
    """The plan itself, which also keeps each sum that it is about to add noise to."""

    seen: list[Floats] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def recording(cls, plan: PrivacyPlan) -> Self:
        return cls(**{each.name: getattr(plan, each.name) for each in fields(PrivacyPlan)})

    def release(self, clipped_sum: NDArray[np.floating[Any]], stream: NoiseStream) -> NDArray[np.float32]:
        self.seen.append(clipped_sum.astype(np.float64))
        return super().release(clipped_sum, stream)


def whole_plan(plan: PrivacyPlan) -> Claim:
    """What we claim: the plan is charged whole, before its first release."""
    return lambda delta: replace(plan, delta=delta).epsilon()


@dataclass(frozen=True, kw_only=True)
class Training:
    """Our training step, or a variation of it: rows are written so that their gradients are what the audit chose.

    The model is logistic regression at zero weights, which the server sends; there a row x of label 0 has gradient
    x/2, and 1/2 for the bias.
    """

    name: str = "fedinfer"
    unit: Unit = "example"
    fixed_units: bool = False
    sampled: bool = True
    slow: bool = False
    step: Step = private_step
    claim: Callable[[PrivacyPlan], Claim] = whole_plan

    def run(self, units: Units, plan: PrivacyPlan, stream: NoiseStream) -> Trace:
        recording = RecordingPlan.recording(plan)
        spec = ModelSpec(family="logistic", inputs=units.rows.shape[1])
        net = build(spec)
        table = _table(units)
        weights = np.zeros(spec.inputs + 1, np.float32)
        released = []
        for number in range(1, plan.steps + 1):
            task = StepTask(run="audit", round=number, spec=spec, schema_digest="", weights=weights, plan=recording)
            released.append(self.step(task, net, table, stream).gradient.astype(np.float64) * plan.divisor)
        return Trace(
            before=np.stack(recording.seen),
            released=np.stack(released),
            sigma=plan.noise_multiplier * plan.clip_norm,
            claim=self.claim(plan),
        )

    def clip_rule(self, units: int, stream: NoiseStream) -> ClipRule | None:
        return None


@dataclass(frozen=True, kw_only=True)
class RecordingSum(DistributedPlan):
    """The plan of a secure sum, which also keeps each vector that it is about to encode."""

    seen: list[Floats] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def recording(cls, plan: DistributedPlan) -> Self:
        return cls(**{each.name: getattr(plan, each.name) for each in fields(DistributedPlan)})

    def encode(
        self, clipped_sum: NDArray[np.floating[Any]], stream: NoiseStream, *, rotation: str
    ) -> NDArray[np.uint32]:
        self.seen.append(clipped_sum.astype(np.float64))
        return super().encode(clipped_sum, stream, rotation=rotation)


def run_together(units: Units, plan: DistributedPlan, stream: NoiseStream) -> Trace:
    """Our training step by secure sums: one device has all units, and as few others add noise as the plan counts on.

    What is seen is what a secure sum shows, the sum of the encoded vectors.
    """
    spec = ModelSpec(family="logistic", inputs=units.rows.shape[1])
    recording = RecordingSum.recording(replace(plan, dimension=spec.inputs + 1))
    net, weights = build(spec), np.zeros(spec.inputs + 1, np.float32)
    tables = [_table(units), *[_table(Units.of(units.rows[:0]))] * (plan.min_honest - 1)]
    before, released = [], []
    for number in range(1, plan.steps + 1):
        task = StepTask(run="audit", round=number, spec=spec, schema_digest="", weights=weights, plan=recording)
        recording.seen.clear()
        total = np.zeros(recording.padded, np.uint64)
        for table in tables:
            total += step_summand(task, net, table, stream)
        before.append(np.sum(recording.seen, axis=0))
        mean = recording.decode(total, rotation=task.rotation)
        released.append(mean.astype(np.float64) * plan.divisor)
    return Trace(
        before=np.stack(before),
        released=np.stack(released),
        sigma=plan.noise_multiplier * plan.clip_norm,
        claim=lambda delta: replace(recording, delta=delta).epsilon(),
    )


@dataclass(frozen=True, kw_only=True)
class ClientUpdates:
    """Our sum of whole client updates, clipped to a fixed norm."""

    name: str = "fedinfer, clients"
    unit: Unit = "client"
    fixed_units: bool = False
    sampled: bool = False
    slow: bool = False

    def run(self, units: Units, plan: PrivacyPlan, stream: NoiseStream) -> Trace:
        recording = RecordingPlan.recording(plan)
        released = []
        for _ in range(plan.steps):
            total = clipped_sum(units.rows, size=units.rows.shape[1], clip_norm=plan.clip_norm).total
            released.append(recording.release(total, stream).astype(np.float64) * plan.divisor)
        return Trace(
            before=np.stack(recording.seen),
            released=np.stack(released),
            sigma=plan.noise_multiplier * plan.clip_norm,
            claim=whole_plan(plan),
        )

    def clip_rule(self, units: int, stream: NoiseStream) -> ClipRule | None:
        return None


@dataclass(frozen=True, kw_only=True)
class AdaptiveClients:
    """Our sum of client updates whose clip norm follows a quantile; sums are as the mechanism scales them.

    What is seen of the last coordinate, the noisy share of clients within the clip, is the next clip norm.
    """

    name: str = "fedinfer, clients, adaptive clip"
    unit: Unit = "client"
    fixed_units: bool = False
    sampled: bool = False
    slow: bool = False
    mechanism: type[AdaptiveClip] = AdaptiveClip

    def run(self, units: Units, plan: PrivacyPlan, stream: NoiseStream) -> Trace:
        recording = RecordingPlan.recording(plan)
        adaptive = self.mechanism(plan=recording, count_noise=COUNT_NOISE * plan.noise_multiplier)
        scale = adaptive.contribution(np.ones(1, np.float32), clip=1.0).astype(np.float64)
        clip, released = plan.clip_norm, []
        for _ in range(plan.steps):
            total = np.zeros(units.rows.shape[1] + 1)
            for row in units.rows:
                total += adaptive.contribution(row, clip=clip)
            mean, following = adaptive.release(total, clip=clip, stream=stream)
            within = adaptive.target_quantile - math.log(following / clip) / adaptive.learning_rate
            update = mean.astype(np.float64) * scale[0] / clip
            released.append(np.append(update, 2.0 * scale[1] * (within - 0.5)) * plan.divisor)
            clip = following
        return Trace(
            before=np.stack(recording.seen),
            released=np.stack(released),
            sigma=plan.noise_multiplier * plan.clip_norm,
            claim=whole_plan(plan),
        )

    def clip_rule(self, units: int, stream: NoiseStream) -> ClipRule | None:
        """The rule as it runs, with noise that is small beside `units`."""
        plan = PrivacyPlan(
            unit="client",
            clip_norm=1.0,
            noise_multiplier=units / 200,
            sampler=Poisson(rate=1.0),
            delta=1e-5,
            steps=1,
            divisor=float(units),
        )
        adaptive = self.mechanism(plan=plan, count_noise=COUNT_NOISE * plan.noise_multiplier)

        def rule(clip_norm: float, below: int) -> float:
            small = adaptive.contribution(np.zeros(1, np.float32), clip=clip_norm).astype(np.float64)
            large = adaptive.contribution(np.full(1, 2.0 * clip_norm, np.float32), clip=clip_norm).astype(np.float64)
            return adaptive.release(below * small + (units - below) * large, clip=clip_norm, stream=stream)[1]

        return rule


def _table(units: Units) -> Table:
    """Rows of label 0 whose gradients at zero weights are the units'."""
    with np.errstate(over="ignore"):
        return Table(features=2.0 * units.rows, labels=np.zeros(len(units), np.float32))


def ours() -> tuple[Subject, ...]:
    """Our mechanisms as subjects."""
    return Training(), ClientUpdates(), AdaptiveClients()
