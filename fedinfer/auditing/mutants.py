"""Our training step with one mistake each, as they are found in the field: `fedinfer audit --mutants` must catch all.

They are here so that whoever relies on the audit can see that it works. Nothing but that command imports this file.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedinfer.arrays import unflatten
from fedinfer.auditing.subjects import AdaptiveClients, Claim, Floats, RecordingPlan, Subject, Training
from fedinfer.data import Table
from fedinfer.privacy import NoiseStream, PrivacyPlan, clipped_gradient, insecure_seeded_noise
from fedinfer.privacy.clipping import LEAST_CLIP, MOST_CLIP, AdaptiveClip
from fedinfer.training import StepReply, StepTask, logistic_loss, private_step


def unsafe_no_noise(task: StepTask, net: nn.Module, table: Table, stream: NoiseStream) -> StepReply:
    """Clips, and forgets the noise."""
    plan = _plan(task)
    total = _clipped_sum(plan, net, *_drawn(task, net, table, stream))
    plan.seen.append(total)
    return _reply((total / plan.divisor).astype(np.float32), stream)


def unsafe_quarter_noise(task: StepTask, net: nn.Module, table: Table, stream: NoiseStream) -> StepReply:
    """Runs with a quarter of the noise that is accounted."""
    plan = _plan(task)
    return private_step(
        replace(task, plan=replace(plan, noise_multiplier=plan.noise_multiplier / 4)), net, table, stream
    )


def unsafe_no_clip(task: StepTask, net: nn.Module, table: Table, stream: NoiseStream) -> StepReply:
    """Adds the right noise to a sum of gradients of any length."""
    x, y = _drawn(task, net, table, stream)
    return _reply(_plan(task).release(_plain_sum(net, x, y), stream), stream)


def unsafe_clip_after_sum(task: StepTask, net: nn.Module, table: Table, stream: NoiseStream) -> StepReply:
    """Clips the sum of the batch and not each example's gradient: one example can turn it around."""
    plan = _plan(task)
    x, y = _drawn(task, net, table, stream)
    total = _plain_sum(net, x, y)
    length = float(np.linalg.norm(total))
    return _reply(plan.release(total * min(1.0, plan.clip_norm / max(length, 1e-30)), stream), stream)


def unsafe_size_from_data(task: StepTask, net: nn.Module, table: Table, stream: NoiseStream) -> StepReply:
    """Takes the sampling rate from a batch size and the number of rows, and divides by what that gives."""
    plan = _plan(task)
    rate = min(1.0, plan.divisor / max(len(table), 1))
    chosen = np.flatnonzero(stream.uniform(len(table)) < rate)
    total = _clipped_sum(plan, net, *_rows(task, net, table, chosen))
    return _reply(replace(plan, divisor=max(rate * len(table), 1.0)).release(total, stream), stream)


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
        chosen = np.sort(np.array_split(self.order, batches)[place])
        return _reply(plan.release(_clipped_sum(plan, net, *_rows(task, net, table, chosen)), stream), stream)


def unsafe_last_round(plan: PrivacyPlan) -> Claim:
    """What an accountant says that is made anew in each round or process: the ε of one step."""
    return lambda delta: replace(plan, delta=delta).epsilon(1)


class MutantInvertedSign(AdaptiveClip):
    """Takes the share within the clip for the share beyond it, so that the clip norm moves the wrong way."""

    def release(
        self, total: NDArray[np.floating[Any]], *, clip: float, stream: NoiseStream
    ) -> tuple[NDArray[np.float32], float]:
        mean, following = super().release(total, clip=clip, stream=stream)
        return mean, min(max(clip * clip / following, LEAST_CLIP), MOST_CLIP)


def mutants() -> tuple[Subject, ...]:
    """Every mutant as a subject."""
    return (
        Training(name="no noise", step=unsafe_no_noise),
        Training(name="a quarter of the noise", step=unsafe_quarter_noise),
        Training(name="no clipping", step=unsafe_no_clip),
        Training(name="clipping after the sum", step=unsafe_clip_after_sum),
        Training(name="accountant made anew", claim=unsafe_last_round),
        Training(name="shuffled, not Poisson", step=UnsafeShuffledBatches()),
        Training(name="rate and divisor from data", step=unsafe_size_from_data),
        AdaptiveClients(name="inverted adaptive sign", mechanism=MutantInvertedSign),
        Training(name="no release without rows", step=unsafe_skip_empty),
        Training(name="noise that repeats", step=unsafe_repeated_noise),
    )


def _plan(task: StepTask) -> RecordingPlan:
    if not isinstance(task.plan, RecordingPlan):
        raise TypeError("mutants run in an audit alone")
    return task.plan


def _drawn(task: StepTask, net: nn.Module, table: Table, stream: NoiseStream) -> tuple[Tensor, Tensor]:
    return _rows(task, net, table, _plan(task).sample(len(table), stream, step=task.round))


def _rows(task: StepTask, net: nn.Module, table: Table, chosen: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    net.double().load_state_dict(unflatten(task.weights, net.state_dict()))
    places = torch.from_numpy(chosen)
    return torch.from_numpy(table.features)[places].double(), torch.from_numpy(table.labels)[places].double()


def _clipped_sum(plan: PrivacyPlan, net: nn.Module, x: Tensor, y: Tensor) -> Floats:
    return _flat(clipped_gradient(net, logistic_loss, x, y, clip_norm=plan.clip_norm).values())


def _plain_sum(net: nn.Module, x: Tensor, y: Tensor) -> Floats:
    return _flat(torch.autograd.grad(logistic_loss(net(x), y).sum(), list(net.parameters())))


def _flat(tensors: Iterable[Tensor]) -> Floats:
    vector: Floats = torch.cat([tensor.reshape(-1) for tensor in tensors]).numpy()
    return vector


def _reply(gradient: NDArray[np.float32], stream: NoiseStream) -> StepReply:
    return StepReply(gradient=gradient, weight=1.0, void=stream.void)
