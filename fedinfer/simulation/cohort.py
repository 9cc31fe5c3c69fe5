"""A chunk of clients trained as one program: the same steps as `LocalTask.train`, with a leading axis of clients."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedinfer.local_task import Indices, LocalTask, clip_updates, cut
from fedinfer.privacy import NoiseStream, PrivacyPlan
from fedinfer.simulation.stacked import Stack, State

# Numbers, of 8 bytes each and a few times over.
RELEASED_AT_ONCE = 1 << 16


class Turn(Protocol):
    """Where a client's randomness comes from, and how many releases its plan has made."""

    @property
    def done(self) -> int: ...
    @property
    def seed(self) -> str | None: ...
    def stream(self) -> NoiseStream: ...


class Member(Protocol):
    """One client of a chunk: what it was sent, its rows, its turn."""

    @property
    def state(self) -> State: ...
    @property
    def x(self) -> Tensor: ...
    @property
    def y(self) -> Tensor: ...
    @property
    def turn(self) -> Turn: ...


@dataclass(frozen=True, kw_only=True)
class Trained:
    """`weights` (C, *shape) by trained parameter; row r belongs to member `order[r]`, as does `losses[r]`."""

    order: Sequence[int]
    weights: Sequence[Tensor] = field(repr=False)
    losses: Sequence[float] | None = field(repr=False)


def trained_names(task: LocalTask) -> list[str]:
    """The names of the parameters that training moves."""
    return [name for name, parameter in task.model.named_parameters() if parameter.requires_grad]


def train_chunk(task: LocalTask, stack: Stack, members: Sequence[Member]) -> Trained:
    """Train all `members`; what they hold besides trained weights must be the same for all.

    Guarantees: each member's weights are those that `LocalTask.train` gives, up to rounding.
    """
    stack.use(members[0].state)
    if task.example_plan is not None:
        return _private(task, stack, members)
    batches = [task.batches(len(member.x), member.turn.stream) for member in members]
    order = sorted(range(len(members)), key=lambda index: (-len(batches[index]), len(members[index].x)))
    members, batches = [members[index] for index in order], [batches[index] for index in order]
    start = _start(task, members)
    weights = [weight.clone() for weight in start]
    totals = _plain(task, stack, members, batches, weights)
    losses: list[float] | None = [total / max(1, len(own)) for total, own in zip(totals.tolist(), batches, strict=True)]
    if task.plan is not None:
        clip_updates(start, weights, clip_norm=task.plan.clip_norm)
        losses = None
    return Trained(order=order, weights=weights, losses=losses)


def _plain(
    task: LocalTask,
    stack: Stack,
    members: Sequence[Member],
    batches: Sequence[Sequence[Indices]],
    weights: Sequence[Tensor],
) -> Tensor:
    """Move `weights` in place; the sums (C,) of the batches' mean losses. Members have fewer and fewer batches."""
    x, y, starts = _joined(members)
    totals = torch.zeros(len(members), dtype=torch.float64)
    state = task.optimiser.start(weights)
    for number in range(1, len(batches[0]) + 1):
        active = sum(len(own) >= number for own in batches)
        now = [own[number - 1] for own in batches[:active]]
        sizes = {(len(batch), len(member.x)) for batch, member in zip(now, members, strict=False)}
        first_size, first_rows = next(iter(sizes))
        if len(sizes) == 1 and first_size == first_rows:
            # Everybody's batch is all of its rows, and all have as many: the rows lie as they are needed.
            batch_x, batch_y = x[: active * first_size], y[: active * first_size]
            share = torch.full((active, first_size), 1.0 / first_size, dtype=weights[0].dtype)
        else:
            index, present = _gathered(now, starts)
            batch_x, batch_y = x[index], y[index]
            share = present.to(weights[0].dtype) / present.sum(1, keepdim=True)
        moving = [weight[:active] for weight in weights]
        gradients, losses = stack.gradients(moving, batch_x, batch_y, share)
        totals[:active] += (losses * share).sum(1)
        task.optimiser.step(moving, gradients, [[tensor[:active] for tensor in part] for part in state], number)
    return totals


def _private(task: LocalTask, stack: Stack, members: Sequence[Member]) -> Trained:
    plan = task.example_plan
    assert plan is not None
    x, y, starts = _joined(members)
    begin = _start(task, members)
    weights = [weight.clone().double() for weight in begin]
    state = task.optimiser.start(weights)
    streams = _streams(members)
    for number in range(1, task.releases + 1):
        chosen = [
            plan.sample(len(member.x), stream, step=member.turn.done + number)
            for member, stream in zip(members, streams, strict=True)
        ]
        index, present = _gathered(chosen, starts)
        sums = stack.clipped(weights, x[index], y[index], present, plan.clip_norm)
        totals = torch.cat([gradient.flatten(1) for gradient in sums], dim=1).numpy()
        released = _released(plan, totals, streams)
        one = [weight[0] for weight in weights]
        task.optimiser.step(weights, cut(torch.from_numpy(released).double(), one), state, number)
    moved = [weight.to(old.dtype) for weight, old in zip(weights, begin, strict=True)]
    return Trained(order=range(len(members)), weights=moved, losses=None)


def _streams(members: Sequence[Member]) -> list[NoiseStream]:
    """Each member's own randomness; one stream for all if it comes from the operating system."""
    if all(member.turn.seed is None for member in members):
        return [members[0].turn.stream()] * len(members)
    return [member.turn.stream() for member in members]


def _released(plan: PrivacyPlan, totals: NDArray[np.float64], streams: Sequence[NoiseStream]) -> NDArray[np.float32]:
    """The release (C, d) of each client's sum.

    Noise is independent from number to number, so that clients with one stream are released together, as many as fit
    into a processor's own memory.
    """
    together = 1 if streams[0] is not streams[-1] else max(1, RELEASED_AT_ONCE // totals.shape[1])
    parts = [
        plan.release(totals[start : start + together].reshape(-1), streams[start])
        for start in range(0, len(totals), together)
    ]
    return np.concatenate(parts).reshape(totals.shape)


def _start(task: LocalTask, members: Sequence[Member]) -> list[Tensor]:
    """The weights (C, *shape) that the members were sent; one tensor for all if they were sent the same."""
    names, first = trained_names(task), members[0].state
    own = {name: parameter.dtype for name, parameter in task.model.named_parameters()}
    if all(member.state is first for member in members):
        return [first[name].to(own[name]).expand(len(members), *first[name].shape) for name in names]
    return [torch.stack([member.state[name].to(own[name]) for member in members]) for name in names]


def _joined(members: Sequence[Member]) -> tuple[Tensor, Tensor, list[int]]:
    """The rows of all, one after another, and where each begins; never without a row."""
    x, y = torch.cat([member.x for member in members]), torch.cat([member.y for member in members])
    if len(x) == 0:
        x, y = x.new_zeros((1, *x.shape[1:])), y.new_zeros((1, *y.shape[1:]))
    ends = np.cumsum([len(member.x) for member in members])
    return x, y, [0, *ends[:-1].tolist()]


def _gathered(batches: Sequence[Indices], starts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Row numbers (C * B,) of ragged batches, and which of (C, B) are there; a gap is filled with the batch's first."""
    width = max(1, max(len(batch) for batch in batches))
    index = np.zeros((len(batches), width), np.int64)
    present = np.zeros((len(batches), width), np.bool_)
    for client, (batch, start) in enumerate(zip(batches, starts, strict=False)):
        if len(batch):
            index[client] = start + batch[0]
            index[client, : len(batch)] = start + batch
            present[client, : len(batch)] = True
    return torch.from_numpy(index.reshape(-1)), torch.from_numpy(present)
