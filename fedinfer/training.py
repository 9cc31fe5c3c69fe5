"""One training step on a device: from weights and its own rows to the one vector that leaves it."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedinfer.arrays import Vector, flatten, unflatten
from fedinfer.data import Table
from fedinfer.errors import BadUsage
from fedinfer.models import ModelSpec
from fedinfer.privacy import NoiseStream, PrivacyPlan, clipped_gradient


@dataclass(frozen=True, kw_only=True)
class StepTask:
    """What a server asks of a device in one round. `plan` is None where the devices allow unprotected training."""

    run: str
    round: int
    spec: ModelSpec
    schema_digest: str
    weights: Vector = field(repr=False)
    plan: PrivacyPlan | None

    def __post_init__(self) -> None:
        if self.round < 1:
            raise BadUsage(f"round: got {self.round}, expected at least 1")
        if not np.isfinite(self.weights).all():
            raise BadUsage("weights: got NaN or infinity, expected finite numbers")


@dataclass(frozen=True, kw_only=True)
class StepReply:
    """What leaves the device: its mean gradient (d,), how much it weighs, and whether its noise was void.

    Under a plan the weight is the constant 1, because counts are private; without one it is the number of rows.
    """

    gradient: Vector = field(repr=False)
    weight: float
    void: bool


def logistic_loss(output: Tensor, target: Tensor) -> Tensor:
    """Per-example logistic loss (B,) of logits (B, 1) against targets (B,) of 0 and 1."""
    return functional.binary_cross_entropy_with_logits(output[:, 0], target, reduction="none")


def private_step(task: StepTask, net: nn.Module, table: Table, stream: NoiseStream) -> StepReply:
    """Sample rows, clip their gradients, sum, add noise: all by the task's plan.

    It computes in double precision: in single precision one row more can change how all others are rounded, and a
    sum of many rows would then move by more than the clip norm.

    Guarantees: those of `PrivacyPlan`; the reply depends on no row that was not sampled.
    """
    if task.plan is None:
        raise BadUsage("private step: got no plan, expected one")
    _set_weights(net.double(), task.weights)
    chosen = torch.from_numpy(task.plan.sample(len(table), stream, step=task.round))
    x, y = torch.from_numpy(table.features)[chosen].double(), torch.from_numpy(table.labels)[chosen].double()
    sums = clipped_gradient(net, logistic_loss, x, y, clip_norm=task.plan.clip_norm)
    total = torch.cat([gradient.reshape(-1) for gradient in sums.values()]).numpy()
    return StepReply(gradient=task.plan.release(total, stream), weight=1.0, void=stream.void)


def unsafe_step(task: StepTask, net: nn.Module, table: Table) -> StepReply:
    """The plain mean gradient over all rows: no privacy at all, for public data and comparisons."""
    _set_weights(net.float(), task.weights)
    if len(table) == 0:
        return StepReply(gradient=np.zeros_like(task.weights), weight=0.0, void=True)
    losses = logistic_loss(net(torch.from_numpy(table.features)), torch.from_numpy(table.labels))
    names = [name for name, _ in net.named_parameters()]
    gradients = torch.autograd.grad(losses.mean(), list(net.parameters()))
    return StepReply(gradient=flatten(dict(zip(names, gradients, strict=True))), weight=float(len(table)), void=True)


def _set_weights(net: nn.Module, weights: Vector) -> None:
    net.load_state_dict(unflatten(weights, net.state_dict()))
