"""What runs the clients of a simulation: one after another, in processes, or (in `vectorised.py`) as one program."""

import itertools
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

from fedinfer.errors import BadUsage
from fedinfer.local_app import CONTROL

_PREFIX = uuid.uuid4().hex
_numbers = itertools.count()


class Task(NamedTuple):
    """An instruction to one node. Where nobody looks at the reply, no message need be made."""

    content: RecordDict
    message_type: str
    context: Context
    sent: Message | None = None

    def message(self) -> Message:
        """The message, as it was sent or as it would have been."""
        return self.sent or sealed(Message(self.content, self.context.node_id, self.message_type))


@dataclass(frozen=True, kw_only=True)
class CohortSum:
    """What a server needs of a cohort when it only needs the sum.

    `update` is the sum over replies of `num-examples` times (new weights - weights sent), by name; `weight` is the
    sum of `num-examples`, and `loss` their mean loss weighted so, or None where none was said. `auxiliary` is the sum,
    with no weights, of what replies carry beside, as SCAFFOLD's do; empty where they carry nothing.
    """

    update: Mapping[str, NDArray[np.float64]] = field(repr=False)
    auxiliary: Mapping[str, NDArray[np.float64]] = field(default_factory=dict, repr=False)
    weight: float
    loss: float | None
    replies: int
    errors: Sequence[Message]


class Engine(Protocol):
    """Runs tasks; an error of a client is an error reply, in the words of Flower's own engines."""

    def replies(self, tasks: Sequence[Task]) -> Iterator[Message]:
        """The replies, in any order, as they come."""

    def total(self, tasks: Sequence[Task]) -> CohortSum:
        """The sum of the replies, none of which is kept."""

    def close(self) -> None:
        """Give back what was started."""


class OneByOne:
    """Runs a ClientApp in this process, one client after another."""

    def __init__(self, client_app: ClientApp) -> None:
        self._client_app = client_app

    def replies(self, tasks: Sequence[Task]) -> Iterator[Message]:
        for task in tasks:
            yield answer(self._client_app, task)

    def total(self, tasks: Sequence[Task]) -> CohortSum:
        return total_of(tasks, self.replies(tasks))

    def close(self) -> None: ...


def answer(client_app: ClientApp, task: Task) -> Message:
    """The reply of one client, or the error reply that a node sends for it."""
    message = task.message()
    try:
        reply = client_app(message, task.context)
    except Exception as error:
        # On a real SuperNode an exception ends that node's task and not the server's run.
        reply = error_reply(message, error)
    return sealed(reply)


def error_reply(message: Message, error: Exception) -> Message:
    """The error reply to `message` of a client that raised `error`."""
    reason = f"{type(error)}:<'{error}'>"
    return Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason), reply_to=message)


def sealed(message: Message) -> Message:
    """The message with an identifier; Flower's own in-memory grid sets it the same way, for want of a setter."""
    message.metadata.__dict__["_message_id"] = f"{_PREFIX}{next(_numbers):x}"
    return message


@contextmanager
def identity(run_id: int) -> Iterator[None]:
    """Say who this process is: Flower's `Message` reads it from here when a ServerApp makes one."""
    before = (TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, SUPERLINK_NODE_ID, 0
    try:
        yield
    finally:
        TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id = before


class Summing:
    """A `CohortSum` in the making."""

    def __init__(self) -> None:
        self.update: dict[str, NDArray[np.float64]] = {}
        self.auxiliary: dict[str, NDArray[np.float64]] = {}
        self.weight = 0.0
        self.replies = 0
        self.errors: list[Message] = []
        self._loss = 0.0
        self._losses = 0

    def add(self, update: Mapping[str, NDArray[Any]], *, weight: float, replies: int) -> None:
        """Add the weighted sum `update` of some replies."""
        _add(self.update, update)
        self.weight += weight
        self.replies += replies

    def add_auxiliary(self, auxiliary: Mapping[str, NDArray[Any]]) -> None:
        """Add the sum of what some replies carry beside the weights."""
        _add(self.auxiliary, auxiliary)

    def add_losses(self, weighted: float, count: int) -> None:
        """Add the weighted sum of the losses of `count` replies."""
        self._loss += weighted
        self._losses += count

    def join(self, other: CohortSum) -> None:
        """Add a sum of other replies."""
        self.add(other.update, weight=other.weight, replies=other.replies)
        self.add_auxiliary(other.auxiliary)
        self.errors += other.errors
        if other.loss is not None:
            self.add_losses(other.weight * other.loss, other.replies)

    def result(self) -> CohortSum:
        """The sum so far."""
        mean = self._loss / self.weight if self.weight and self._losses == self.replies else None
        return CohortSum(
            update=self.update,
            auxiliary=self.auxiliary,
            weight=self.weight,
            loss=mean,
            replies=self.replies,
            errors=tuple(self.errors),
        )


def _add(sums: dict[str, NDArray[np.float64]], parts: Mapping[str, NDArray[Any]]) -> None:
    for name, part in parts.items():
        if name not in sums:
            sums[name] = np.zeros(part.shape)
        sums[name] += part


def total_of(tasks: Sequence[Task], replies: Iterable[Message]) -> CohortSum:
    """The sum of ordinary replies, each forgotten once it is added.

    Raises: BadUsage if a reply or what was sent has no arrays, or no `num-examples`.
    """
    sent = {task.context.node_id: task.content for task in tasks}
    cached: dict[int, dict[str, NDArray[Any]]] = {}
    summing = Summing()
    for reply in replies:
        if reply.has_error():
            summing.errors.append(reply)
            continue
        asked = sent[reply.metadata.src_node_id]
        before = cached.setdefault(id(asked), _arrays(asked))
        metrics = next(iter(reply.content.metric_records.values()), None)
        weight = None if metrics is None else metrics.get("num-examples")
        if metrics is None or not isinstance(weight, int | float):
            raise BadUsage("sum of updates: got a reply without num-examples, expected one number")
        after = _arrays(reply.content)
        summing.add({name: weight * (after[name] - before[name]) for name in before}, weight=weight, replies=1)
        if len(reply.content.array_records) > 1:
            beside = reply.content.array_records[CONTROL]
            summing.add_auxiliary({name: array.numpy() for name, array in beside.items()})
        if isinstance(loss := metrics.get("loss"), int | float):
            summing.add_losses(weight * loss, 1)
    return summing.result()


def _arrays(content: RecordDict) -> dict[str, NDArray[Any]]:
    records = list(content.array_records.values())
    if len(records) == 2 and CONTROL in content.array_records:
        records = [record for name, record in content.array_records.items() if name != CONTROL]
    if len(records) != 1:
        raise BadUsage(f"sum of updates: got {len(records)} records of arrays in a message, expected one")
    return {name: array.numpy().astype(np.float64) for name, array in records[0].items()}
