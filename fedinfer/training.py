"""One training step on a device: from weights and its own rows to the one vector that leaves it."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedinfer.algorithms import Ditto as Ditto
from fedinfer.algorithms import FedAvg as FedAvg
from fedinfer.algorithms import FedProx as FedProx
from fedinfer.algorithms import LocalParameters as LocalParameters
from fedinfer.algorithms import Scaffold as Scaffold
from fedinfer.arrays import Vector, flatten, unflatten
from fedinfer.data import Table
from fedinfer.errors import BadUsage, ShapeMismatch
from fedinfer.local_task import MAX_WEIGHT
from fedinfer.local_task import LocalTask as LocalTask
from fedinfer.models import ModelSpec
from fedinfer.optimisers import Adam as Adam
from fedinfer.optimisers import Sgd as Sgd
from fedinfer.privacy import DistributedPlan, NoiseStream, PrivacyPlan, clipped_gradient
from fedinfer.privacy.clipping import clip_update
from fedinfer.privacy.row_by_row import row_by_row
from fedinfer.secagg import SumSpec, Words


@dataclass(frozen=True, kw_only=True)
class StepTask:
    """What a server asks of a device in one round. `plan` is None where the devices allow unprotected training."""

    run: str
    round: int
    spec: ModelSpec
    schema_digest: str
    weights: Vector = field(repr=False)
    plan: PrivacyPlan | DistributedPlan | None

    def __post_init__(self) -> None:
        if self.round < 1:
            raise BadUsage(f"round: got {self.round}, expected at least 1")
        check_weights(self.weights)
        if isinstance(self.plan, DistributedPlan) and self.plan.dimension != len(self.weights):
            raise ShapeMismatch(got=(self.plan.dimension,), expected=self.weights.shape, what="plan of a secure sum")

    @property
    def sum_spec(self) -> SumSpec:
        """What devices add up where the plan is that of a secure sum.

        Raises: BadUsage for another plan.
        """
        plan = _plan_of_sum(self)
        return SumSpec(length=plan.padded, bits=plan.bits)

    @property
    def rotation(self) -> str:
        """The public name of this round's rotation: no row was chosen by it."""
        return f"round {self.round}"

    def digest(self) -> bytes:
        """SHA-256 of everything that is asked: devices that got different tasks do not add up."""
        plan = "" if self.plan is None else self.plan.digest()
        return task_digest("step", f"{self.run}/{self.round}", self.spec, self.schema_digest, plan, self.weights)


@dataclass(frozen=True, kw_only=True)
class StepReply:
    """What leaves the device: its mean gradient (d,), how much it weighs, and whether its noise was void.

    Under a plan the weight is the constant 1, because counts are private; without one it is the number of rows.
    """

    gradient: Vector = field(repr=False)
    weight: float
    void: bool


def task_digest(
    what: str, name: str, spec: ModelSpec, schema_digest: str, charge_digest: str, weights: Vector
) -> bytes:
    """SHA-256 of a task: what it is and of which run, the model's shape and weights, and what pays for it."""
    fields = [what, name, spec.family, spec.inputs, spec.hidden, schema_digest, charge_digest]
    return hashlib.sha256(json.dumps(fields).encode() + b"\0" + weights.astype("<f4").tobytes()).digest()


def check_weights(weights: Vector) -> None:
    """Raises: BadUsage for weights with which a network would overflow."""
    if not (np.isfinite(weights).all() and np.abs(weights).max(initial=0.0) <= MAX_WEIGHT):
        raise BadUsage(f"weights: got NaN, infinity or a number beyond {MAX_WEIGHT:g}, expected ordinary weights")


def logistic_loss(output: Tensor, target: Tensor) -> Tensor:
    """Per-example logistic loss (B,) of logits (B, 1) against targets (B,) of 0 and 1.

    Its gradient is one sigmoid, and not a difference: near a target a difference keeps nothing but rounding.
    """
    return functional.softplus((1.0 - 2.0 * target) * output[:, 0], threshold=40.0)


def private_step(task: StepTask, net: nn.Module, table: Table, stream: NoiseStream) -> StepReply:
    """Sample rows, clip their gradients, sum, add noise: all by the task's plan.

    Where the plan's unit is the client, the mean gradient over all rows is what is clipped, whole.

    Each row is computed as if it were alone (`row_by_row.py`), because a server may choose weights for which the last
    bit decides, and in double precision, so that the rounding of the sum is far below the margin of the clip.

    Guarantees: those of `PrivacyPlan`; the reply depends on no row that was not sampled.
    """
    if not isinstance(task.plan, PrivacyPlan):
        raise BadUsage("private step: got no plan for one device alone, expected one")
    total = _contribution(task, task.plan, net, table, stream)
    return StepReply(gradient=task.plan.release(total, stream), weight=1.0, void=stream.void)


def step_summand(task: StepTask, net: nn.Module, table: Table, stream: NoiseStream) -> Words:
    """What a device adds to a secure sum: as in `private_step`, but on the plan's grid and with a share of the noise.

    Guarantees: those of `DistributedPlan`, of a sum of at least `min_honest` of these.
    """
    plan = _plan_of_sum(task)
    return plan.encode(_contribution(task, plan, net, table, stream), stream, rotation=task.rotation)


def unsafe_step(task: StepTask, net: nn.Module, table: Table) -> StepReply:
    """The plain mean gradient over all rows: no privacy at all, for public data and comparisons."""
    return StepReply(gradient=_mean_gradient(task, net, table), weight=float(len(table)), void=True)


def _mean_gradient(task: StepTask, net: nn.Module, table: Table) -> Vector:
    _set_weights(net.float(), task.weights)
    if len(table) == 0:
        return np.zeros_like(task.weights)
    losses = logistic_loss(net(torch.from_numpy(table.features)), torch.from_numpy(table.labels))
    names = [name for name, _ in net.named_parameters()]
    gradients = torch.autograd.grad(losses.mean(), list(net.parameters()))
    return flatten(dict(zip(names, gradients, strict=True)))


def _plan_of_sum(task: StepTask) -> DistributedPlan:
    if not isinstance(task.plan, DistributedPlan):
        raise BadUsage("task: got no plan of a secure sum, expected one")
    return task.plan


def _contribution(
    task: StepTask, plan: PrivacyPlan | DistributedPlan, net: nn.Module, table: Table, stream: NoiseStream
) -> NDArray[np.floating[Any]]:
    """What a device adds, before any noise: its whole clipped mean, or the sum over sampled rows, each clipped."""
    if plan.unit == "client":
        return clip_update(_mean_gradient(task, net, table), clip_norm=plan.clip_norm)
    return _clipped_sum(task, plan, net, table, stream)


def _clipped_sum(
    task: StepTask, plan: PrivacyPlan | DistributedPlan, net: nn.Module, table: Table, stream: NoiseStream
) -> NDArray[np.floating[Any]]:
    _set_weights(row_by_row(net).double(), task.weights)
    chosen = torch.from_numpy(plan.sample(len(table), stream, step=task.round))
    x, y = torch.from_numpy(table.features)[chosen].double(), torch.from_numpy(table.labels)[chosen].double()
    sums = clipped_gradient(net, logistic_loss, x, y, clip_norm=plan.clip_norm)
    return torch.cat([gradient.reshape(-1) for gradient in sums.values()]).numpy()


def _set_weights(net: nn.Module, weights: Vector) -> None:
    net.load_state_dict(unflatten(weights, net.state_dict()))
