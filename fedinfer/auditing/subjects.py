"""What is audited: anything that turns units, whose gradients or updates are given, into noised sums.

Ours, each mutant and each peer is one `Subject`. An audit chooses what every unit contributes, as an adversary may
who writes rows and, as the server, sends the weights; it then sees what an adversary sees (`released`) and, through
the same code path, the sum to which the noise was added (`before`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedinfer.data import Table
from fedinfer.models import ModelSpec, build
from fedinfer.privacy import NoiseStream, PrivacyPlan
from fedinfer.privacy.audit_clipping import ClipRule
from fedinfer.training import StepReply, StepTask, private_step

Floats = NDArray[np.float64]
Step = Callable[[StepTask, nn.Module, Table, NoiseStream], StepReply]


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

    d may be larger than the units' rows: a model may have other parameters after those. `claimed` is the ε that the
    subject itself states after the run, and None where it states none.
    """

    before: Floats = field(repr=False)
    released: Floats = field(repr=False)
    claimed: float | None

    @property
    def noise(self) -> Floats:
        return self.released - self.before


class Subject(Protocol):
    """Something under audit.

    `fixed_units`: the number of units is public, so that neighbours have as many. `sampled`: amplification is claimed
    for a Poisson sample of the units in each step.
    """

    @property
    def name(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def fixed_units(self) -> bool: ...
    @property
    def sampled(self) -> bool: ...
    def run(self, units: Units, plan: PrivacyPlan, stream: NoiseStream) -> Trace: ...
    def clip_rule(self, units: int) -> ClipRule | None: ...


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


def whole_plan(plan: PrivacyPlan) -> float:
    """What we claim: the plan is charged whole, before its first release."""
    return plan.epsilon()


@dataclass(frozen=True, kw_only=True)
class Training:
    """Our training step, or a variation of it: rows are written so that their gradients are what the audit chose.

    The model is logistic regression at zero weights, which the server sends; there a row x of label 0 has gradient
    x/2, and 1/2 for the bias.
    """

    name: str = "fedinfer"
    unit: str = "example"
    fixed_units: bool = False
    sampled: bool = True
    step: Step = private_step
    claim: Callable[[PrivacyPlan], float] = whole_plan
    rule: Callable[[int], ClipRule] | None = None

    def run(self, units: Units, plan: PrivacyPlan, stream: NoiseStream) -> Trace:
        recording = RecordingPlan.recording(plan)
        spec = ModelSpec(family="logistic", inputs=units.rows.shape[1])
        net = build(spec)
        with np.errstate(over="ignore"):
            table = Table(features=2.0 * units.rows, labels=np.zeros(len(units), np.float32))
        weights = np.zeros(spec.inputs + 1, np.float32)
        released = []
        for number in range(1, plan.steps + 1):
            task = StepTask(run="audit", round=number, spec=spec, schema_digest="", weights=weights, plan=recording)
            released.append(self.step(task, net, table, stream).gradient.astype(np.float64) * plan.divisor)
        return Trace(before=np.stack(recording.seen), released=np.stack(released), claimed=self.claim(plan))

    def clip_rule(self, units: int) -> ClipRule | None:
        return None if self.rule is None else self.rule(units)
