"""The mean losses of many clients at the same weights: one forward pass over all their rows."""

import copy
import math
from collections.abc import Iterator, Sequence

import torch
from flwr.app import Message
from torch import Tensor

from fedinfer.algorithms import Ditto, LocalParameters
from fedinfer.local_app import LocalApp, place_of, reply_content, weights_in
from fedinfer.local_task import LocalTask
from fedinfer.simulation.engines import Task, answer, sealed
from fedinfer.simulation.rows import KeptRows, size_bytes
from fedinfer.simulation.stacked import Rows, State

# Rows of about so many bytes go through the model at once.
BLOCK_BYTES = 8 << 20
# A model in evaluation mode treats rows alike whoever owns them; how well that must hold for the first client.
TOLERANCE = 1e-4


def evaluations(app: LocalApp, task: LocalTask, kept: KeptRows, asked: Sequence[Task]) -> Iterator[Message]:
    """The replies to "evaluate": clients that were sent the same content are evaluated together."""
    block: list[Task] = []
    rows: list[Rows] = []
    held = 0
    for one in asked:
        try:
            x, y = kept.of(*place_of(one.context))
        except Exception:
            yield answer(app, one)
            continue
        if block and (one.content is not block[0].content or held > BLOCK_BYTES):
            yield from _block(app, task, block, rows)
            block, rows, held = [], [], 0
        block.append(one)
        rows.append((x, y))
        held += size_bytes(x) + size_bytes(y)
    if block:
        yield from _block(app, task, block, rows)


def _block(app: LocalApp, task: LocalTask, block: Sequence[Task], rows: Sequence[Rows]) -> Iterator[Message]:
    means: list[float] | None = None
    # Where clients keep weights of their own, no two are evaluated at the same.
    if task.plan is None and not isinstance(task.algorithm, LocalParameters | Ditto):
        try:
            state = weights_in(block[0].content)
            means = mean_losses(task, state, rows)
            if not _agree(task, state, rows, means):
                means = None
        except Exception:
            # Alone, each client gets its own answer or its own error.
            means = None
    for index, (one, (x, _)) in enumerate(zip(block, rows, strict=True)):
        if means is None:
            yield answer(app, one)
        else:
            yield sealed(Message(reply_content(None, means[index], len(x)), reply_to=one.message()))


def mean_losses(task: LocalTask, state: State, rows: Sequence[Rows]) -> list[float]:
    """The mean loss of each client, as `LocalTask.evaluate` gives it; 0 for a client without rows."""
    net = copy.deepcopy(task.model).eval()
    net.load_state_dict(dict(state))
    with torch.no_grad():
        losses = task.loss(net(torch.cat([x for x, _ in rows])), torch.cat([y for _, y in rows]))
        parts: Sequence[Tensor] = torch.split(losses, [len(x) for x, _ in rows])
        return [float(own.mean()) if len(own) else 0.0 for own in parts]


def _agree(task: LocalTask, state: State, rows: Sequence[Rows], means: Sequence[float]) -> bool:
    """Whether the first client with rows would give the same answer itself."""
    for (x, y), mean in zip(rows, means, strict=True):
        if len(x):
            return math.isclose(mean, task.evaluate(state, x, y)[0], rel_tol=TOLERANCE)
    return False
