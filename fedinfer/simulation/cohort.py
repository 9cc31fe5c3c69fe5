"""A chunk of clients trained as one program: the same steps as `LocalTask.train`, with a leading axis of clients."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedinfer.algorithms import Named, Pull, first_memory, personal_pull, shared_pull
from fedinfer.local_task import Indices, LocalTask, all_in_double, clip_updates, cut
from fedinfer.privacy import NoiseStream, Poisson, PrivacyPlan
from fedinfer.simulation.stacked import Stack, State

# Numbers, of 8 bytes each and a few times over.
RELEASED_AT_ONCE = 1 << 16


class Turn(Protocol):
    """Where a client's randomness comes from, how many releases its plan has made, and what it remembers."""

    @property
    def done(self) -> int: ...
    @property
    def seed(self) -> str | None: ...
    @property
    def memory(self) -> Named | None: ...
    def stream(self) -> NoiseStream: ...


class Member(Protocol):
    """One client of a chunk: what it was sent, its rows, its turn."""

    @property
    def state(self) -> State: ...
    @property
    def control(self) -> Named: ...
    @property
    def x(self) -> Tensor: ...
    @property
    def y(self) -> Tensor: ...
    @property
    def turn(self) -> Turn: ...


@dataclass(frozen=True, kw_only=True)
class Trained:
    """`weights` (C, *shape) by trained parameter; row r belongs to member `order[r]`, as does `losses[r]`.

    So do the rows of what an algorithm sends beside the weights and of what each member is to remember.
    """

    order: Sequence[int]
    weights: Named = field(repr=False)
    losses: Sequence[float] | None = field(repr=False)
    auxiliary: Named = field(repr=False)
    memory: Named = field(repr=False)


def train_chunk(task: LocalTask, stack: Stack, members: Sequence[Member]) -> Trained:
    """Train all `members`; what they hold besides trained weights must be the same for all.

    Guarantees: each member's weights are those that `LocalTask.train` gives, up to rounding.
    """
    stack.use(members[0].state)
    private = task.example_plan is not None
    order = list(range(len(members)))
    batches: list[list[Indices]] = []
    if not private:
        batches = [task.batches(len(member.x), member.turn.stream) for member in members]
        order.sort(key=lambda index: (-len(batches[index]), len(members[index].x)))
        members, batches = [members[index] for index in order], [batches[index] for index in order]
    begin = _start(task, members)
    sent = all_in_double(begin) if private else begin
    control = _stacked([member.control for member in members], sent if members[0].control else {})
    memory = _remembered(task, members, sent)
    weights = {name: memory[name] if name in task.local_names else weight for name, weight in sent.items()}
    weights = {name: weight.clone() for name, weight in weights.items()}
    pull = shared_pull(task.algorithm, sent, memory, control)
    losses: list[float] | None = None
    if private:
        batches = _private(task, stack, members, list(weights.values()), pull)
    else:
        totals = _plain(task, stack, members, batches, list(weights.values()), pull).tolist()
        losses = [total / max(1, len(own)) for total, own in zip(totals, batches, strict=True)]
    own_pull = personal_pull(task.algorithm, sent)
    if own_pull is not None:
        memory = {name: weight.clone() for name, weight in memory.items()}
        _plain(task, stack, members, batches, list(memory.values()), own_pull)
    steps = torch.tensor([len(own) for own in batches], device=members[0].x.device)
    memory, auxiliary = task.leaving(sent, weights, memory, control, steps)
    shared = {name: weight for name, weight in weights.items() if name not in task.local_names}
    if task.plan is not None and not private:
        clip_updates([sent[name] for name in shared], list(shared.values()), clip_norm=task.plan.clip_norm)
    return Trained(
        order=order,
        weights=_as(begin, shared),
        losses=losses if task.plan is None else None,
        auxiliary=_as(begin, auxiliary),
        memory=_as(begin, memory),
    )


def _plain(
    task: LocalTask,
    stack: Stack,
    members: Sequence[Member],
    batches: Sequence[Sequence[Indices]],
    weights: Sequence[Tensor],
    pull: Pull | None,
) -> Tensor:
    """Move `weights` in place; the sums (C,) of the batches' mean losses. Members have fewer and fewer batches."""
    x, y, starts = _joined(members)
    totals = torch.zeros(len(members), dtype=torch.float64, device=x.device)
    state = task.optimiser.start(weights)
    for number in range(1, len(batches[0]) + 1):
        active = sum(len(own) >= number for own in batches)
        now = [own[number - 1] for own in batches[:active]]
        sizes = {(len(batch), len(member.x)) for batch, member in zip(now, members, strict=False)}
        first_size, first_rows = next(iter(sizes))
        if len(sizes) == 1 and first_size == first_rows > 0:
            # Everybody's batch is all of its rows, and all have as many: the rows lie as they are needed.
            batch_x, batch_y = x[: active * first_size], y[: active * first_size]
            share = weights[0].new_full((active, first_size), 1.0 / first_size)
        else:
            index, present = _gathered(now, starts, x.device)
            batch_x, batch_y = x[index], y[index]
            share = present.to(weights[0].dtype) / present.sum(1, keepdim=True).clamp_min(1)
        moving = [weight[:active] for weight in weights]
        gradients, losses = stack.gradients(moving, batch_x, batch_y, share)
        totals[:active] += (losses * share).sum(1)
        if pull is not None:
            gradients = pull.of_first(active).added(moving, gradients)
        task.optimiser.step(moving, gradients, [[tensor[:active] for tensor in part] for part in state], number)
    return totals


def _private(
    task: LocalTask, stack: Stack, members: Sequence[Member], weights: Sequence[Tensor], pull: Pull | None
) -> list[list[Indices]]:
    """Move `weights` in place by releases of the example plan; the rows that each member sampled."""
    plan = task.example_plan
    assert plan is not None
    x, y, starts = _joined(members)
    state = task.optimiser.start(weights)
    streams = _streams(members)
    batches: list[list[Indices]] = [[] for _ in members]
    for number in range(1, task.releases + 1):
        for own, chosen in zip(batches, _sampled(plan, members, streams, number), strict=True):
            own.append(chosen)
        index, present = _gathered([own[-1] for own in batches], starts, x.device)
        sums = stack.clipped(weights, x[index], y[index], present, plan.clip_norm)
        totals = torch.cat([gradient.flatten(1) for gradient in sums], dim=1).cpu().numpy()
        released = _released(plan, totals, streams)
        gradients = cut(torch.from_numpy(released).to(weights[0]), [weight[0] for weight in weights])
        if pull is not None:
            gradients = pull.added(weights, gradients)
        task.optimiser.step(weights, gradients, state, number)
    return batches


def _streams(members: Sequence[Member]) -> list[NoiseStream]:
    """Each member's own randomness; one stream for all if it comes from the operating system."""
    if all(member.turn.seed is None for member in members):
        return [members[0].turn.stream()] * len(members)
    return [member.turn.stream() for member in members]


def _sampled(
    plan: PrivacyPlan, members: Sequence[Member], streams: Sequence[NoiseStream], number: int
) -> Sequence[Indices]:
    """The rows of each member in its next step but `number` - 1."""
    if isinstance(plan.sampler, Poisson) and streams[0] is streams[-1]:
        return plan.sampler.choose_each([len(member.x) for member in members], streams[0])
    return [
        plan.sample(len(member.x), stream, step=member.turn.done + number)
        for member, stream in zip(members, streams, strict=True)
    ]


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


def _start(task: LocalTask, members: Sequence[Member]) -> Named:
    """The weights (C, *shape) that the members were sent."""
    own = {name: parameter for name, parameter in task.model.named_parameters() if parameter.requires_grad}
    return _stacked([member.state for member in members], own)


def _remembered(task: LocalTask, members: Sequence[Member], sent: Named) -> Named:
    """What the members (C, *shape) remember, or would before their first round."""
    first = first_memory(task.algorithm, sent, task.local_names)
    return {
        name: torch.stack(
            [
                default[row] if member.turn.memory is None else member.turn.memory[name].to(default)
                for row, member in enumerate(members)
            ]
        )
        for name, default in first.items()
    }


def _stacked(each: Sequence[Named], like: Named) -> Named:
    """The members' tensors (C, *shape) by the names and in the types of `like`; one for all if all have the same."""
    first = each[0]
    if all(own is first for own in each):
        return {name: first[name].to(old.dtype).expand(len(each), *first[name].shape) for name, old in like.items()}
    return {name: torch.stack([own[name].to(old.dtype) for own in each]) for name, old in like.items()}


def _as(like: Named, tensors: Named) -> Named:
    """Tensors in the types of those of the same names in `like`."""
    return {name: tensor.to(like[name].dtype) for name, tensor in tensors.items()}


def _joined(members: Sequence[Member]) -> tuple[Tensor, Tensor, list[int]]:
    """The rows of all, one after another, and where each begins; never without a row."""
    x, y = torch.cat([member.x for member in members]), torch.cat([member.y for member in members])
    if len(x) == 0:
        x, y = x.new_zeros((1, *x.shape[1:])), y.new_zeros((1, *y.shape[1:]))
    ends = np.cumsum([len(member.x) for member in members])
    return x, y, [0, *ends[:-1].tolist()]


def _gathered(batches: Sequence[Indices], starts: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row numbers (C * B,) of ragged batches, and which of (C, B) are there; a gap is filled with the batch's first."""
    sizes = np.array([len(batch) for batch in batches])
    ends = np.cumsum(sizes)
    rows = np.concatenate(batches) + np.repeat(np.array(starts[: len(batches)], np.int64), sizes)
    present = np.arange(max(1, sizes.max())) < sizes[:, None]
    # A client without rows has the first row of all in its gaps.
    first = np.append(rows, 0)[np.where(sizes > 0, ends - sizes, len(rows))]
    index = np.repeat(first[:, None], present.shape[1], axis=1)
    index[present] = rows
    return torch.from_numpy(index.reshape(-1)).to(device), torch.from_numpy(present).to(device)
