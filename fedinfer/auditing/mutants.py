"""Our training step with one mistake each, as they are found in the field: `fedinfer audit --mutants` must catch all.

They are here so that whoever relies on the audit can see that it works. Nothing else imports this file.
"""

import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedinfer.arrays import flatten, unflatten
from fedinfer.auditing.subjects import RecordingPlan, Training
from fedinfer.data import Table
from fedinfer.privacy import NoiseStream, PrivacyPlan, clipped_gradient, insecure_seeded_noise
from fedinfer.privacy.audit_clipping import ClipRule
from fedinfer.training import StepReply, StepTask, logistic_loss, private_step

CLIP_RATE = 0.2
CLIP_QUANTILE = 0.5


def unsafe_no_noise(task: StepTask, net: nn.Module, table: Table, stream: NoiseStream) -> StepReply:
    """Clips, and forgets the noise."""
    plan = _plan(task)
    clipped = flatten(dict(clipped_gradient(net, logistic_loss, *_drawn(task, net, table, stream), clip_norm=plan.clip_norm)))
    plan.seen.append(clipped.astype(np.float64))
    return _reply((clipped / plan.divisor).astype(np.float32), stream)


def unsafe_quarter_noise(task: StepTask, net: nn.Module, table: Table, stream: NoiseStream) -> StepReply:
    """Runs with a quarter of the noise that is accounted."""
    plan = _plan(task)
    return private_step(replace(task, plan=replace(plan, noise_multiplier=plan.noise_multiplier / 4)), net, table, stream)


def unsafe_no_clip(task: StepTask, net: nn.Module, table: Table, stream: NoiseStream) -> StepReply:
    """Adds the right noise to a sum of gradients of any length."""
    x, y = _drawn(task, net, table, stream)
    return _reply(_plan(task).release(_plain_sum(net, x, y), stream), stream)


def unsafe_clip_after_sum(task: StepTask, net: nn.Module, table: Table, stream: NoiseStream) -> StepReply:
    """Clips the sum of the batch and not each example's gradient: one example can turn it around."""
    plan = _plan(task)
    x, y = _drawn(task, net, table, stream)
    total = _plain_sum(net, x, y)
    length = float(np.linalg.norm(total.astype(np.float64)))
    return _reply(plan.release(total * min(1.0, plan.clip_norm / max(length, 1e-30)), stream), stream)


def unsafe_size_from_data(task: StepTask, net: nn.Module, table: Table, stream: NoiseStream) -> StepReply:
    """Takes the sampling rate from a batch size and the number of rows, and divides by what that gives."""
    plan = _plan(task)
    rate = min(1.0, plan.divisor / max(len(table), 1))
    chosen = torch.from_numpy(np.flatnonzero(stream.uniform(len(table)) < rate))
    x, y = torch.from_numpy(table.features)[chosen], torch.from_numpy(table.labels)[chosen]
    net.load_state_dict(unflatten(task.weights, net.state_dict()))
    clipped = flatten(dict(clipped_gradient(net, logistic_loss, x, y, clip_norm=plan.clip_norm)))
    return _reply(replace(plan, divisor=max(rate * len(table), 1.0)).release(clipped, stream), stream)


def unsafe_skip_empty(task: StepTask, net: nn.Module, table: Table, stream: NoiseStream) -> StepReply:
    """Saves the work where no row was sampled, and the noise with it."""
    if len(table) == 0:
        _plan(task).seen.append(np.zeros(len(task.weights)))
        return _reply(np.zeros_like(task.weights), stream)
    return private_step(task, net, table, stream)


def unsafe_repeated_noise(task: StepTask, net: nn.Module, table: Table, stream: NoiseStream) -> StepReply:
    """Seeds each round's noise, for runs that can be repeated; two runs give two equations with the same noise."""
    return private_step(task, net, table, insecure_seeded_noise(f"{task.run}/{task.round}"))


@dataclass
class UnsafeShuffledBatches:
    """Shuffles once an epoch and takes batch after batch, with the ε of Poisson sampling."""

    order: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)

    def __call__(self, task: StepTask, net: nn.Module, table: Table, stream: NoiseStream) -> StepReply:
        plan = _plan(task)
        batches = round(1.0 / plan.sampling_rate)
        place = (task.round - 1) % batches
        if place == 0:
            self.order = np.argsort(stream.uniform(len(table)))
        chosen = torch.from_numpy(np.sort(np.array_split(self.order, batches)[place]))
        x, y = torch.from_numpy(table.features)[chosen], torch.from_numpy(table.labels)[chosen]
        net.load_state_dict(unflatten(task.weights, net.state_dict()))
        clipped = clipped_gradient(net, logistic_loss, x, y, clip_norm=plan.clip_norm)
        return _reply(plan.release(flatten(dict(clipped)), stream), stream)


def unsafe_last_round(plan: PrivacyPlan) -> float:
    """What an accountant says that is made anew in each round or process: the ε of one step."""
    return plan.epsilon(1)


def unsafe_inverted_rule(units: int) -> ClipRule:
    """Moves the clip norm the wrong way: the share that was clipped stands where the share that was not belongs."""

    def rule(clip_norm: float, below: int) -> float:
        return clip_norm * math.exp(-CLIP_RATE * ((units - below) / units - CLIP_QUANTILE))

    return rule


def mutants() -> tuple[Training, ...]:
    """Every mutant as a subject."""
    return (
        Training(name="no noise", step=unsafe_no_noise),
        Training(name="a quarter of the noise", step=unsafe_quarter_noise),
        Training(name="no clipping", step=unsafe_no_clip),
        Training(name="clipping after the sum", step=unsafe_clip_after_sum),
        Training(name="accountant made anew", claim=unsafe_last_round),
        Training(name="shuffled, not Poisson", step=UnsafeShuffledBatches()),
        Training(name="rate and divisor from data", step=unsafe_size_from_data),
        Training(name="inverted adaptive sign", rule=unsafe_inverted_rule),
        Training(name="no release without rows", step=unsafe_skip_empty),
        Training(name="noise that repeats", step=unsafe_repeated_noise),
    )


def _plan(task: StepTask) -> RecordingPlan:
    if not isinstance(task.plan, RecordingPlan):
        raise TypeError("mutants run in an audit alone")
    return task.plan


def _drawn(task: StepTask, net: nn.Module, table: Table, stream: NoiseStream) -> tuple[Tensor, Tensor]:
    net.load_state_dict(unflatten(task.weights, net.state_dict()))
    chosen = torch.from_numpy(_plan(task).sample(len(table), stream))
    return torch.from_numpy(table.features)[chosen], torch.from_numpy(table.labels)[chosen]


def _plain_sum(net: nn.Module, x: Tensor, y: Tensor) -> NDArray[np.float32]:
    names = [name for name, _ in net.named_parameters()]
    gradients = torch.autograd.grad(logistic_loss(net(x), y).sum(), list(net.parameters()))
    return flatten(dict(zip(names, gradients, strict=True)))


def _reply(gradient: NDArray[np.float32], stream: NoiseStream) -> StepReply:
    return StepReply(gradient=gradient, weight=1.0, void=stream.void)
