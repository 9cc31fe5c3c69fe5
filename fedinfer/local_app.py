"""A local task as a Flower ClientApp: messages and a node's state on one side, tensors on the other."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedinfer.errors import BadInput, BudgetExceeded, PrivacyError, UnprotectedRefused
from fedinfer.privacy import NoiseStream, PrivacyPlan, insecure_seeded_noise, os_noise

Load = Callable[[int, int], tuple[Tensor, Tensor]]
# In the node's own configuration, which its owner writes: a server cannot make a device's noise predictable.
SEED_KEY = "insecure-simulation-seed"
STATE_KEY = "fedinfer-local-task"
MEMORY_KEY = "fedinfer-local-memory"
ARRAYS, METRICS, CONTROL = "arrays", "metrics", "control"


class Update(Protocol):
    @property
    def state(self) -> Mapping[str, Tensor]: ...
    @property
    def loss(self) -> float | None: ...
    @property
    def examples(self) -> int: ...
    @property
    def auxiliary(self) -> Mapping[str, Tensor]: ...
    @property
    def memory(self) -> Mapping[str, Tensor]: ...


class Task(Protocol):
    """What the app needs of `fedinfer.local_task.LocalTask`."""

    @property
    def plan(self) -> PrivacyPlan | None: ...
    @property
    def releases(self) -> int: ...
    def train(
        self,
        state: Mapping[str, Tensor],
        x: Tensor,
        y: Tensor,
        stream: NoiseStream,
        *,
        done: int,
        memory: Mapping[str, Tensor] | None,
        control: Mapping[str, Tensor] | None,
    ) -> Update: ...
    def evaluate(
        self, state: Mapping[str, Tensor], x: Tensor, y: Tensor, *, memory: Mapping[str, Tensor] | None
    ) -> tuple[float, int]: ...


class Visit(NamedTuple):
    """One node's turn in a round: its rows are `load(partition, partitions)`, its plan has made `done` releases.

    `memory` is what its algorithm kept of its last turn, None before the first.
    """

    partition: int
    partitions: int
    done: int
    seed: str | None
    memory: Mapping[str, Tensor] | None

    def stream(self) -> NoiseStream:
        """Fresh randomness from the operating system; with a seed the same at each call."""
        return os_noise() if self.seed is None else insecure_seeded_noise(self.seed)


class LocalApp(ClientApp):
    """Answers "train" with the new weights ("arrays") and, in "metrics", `num-examples` and without a plan `loss`.

    SCAFFOLD's control variates come and go beside the weights, as "control". What an algorithm keeps from round to
    round is in the node's `Context.state`, and never in an answer.

    With a plan `num-examples` is the constant 1, no loss leaves, and "evaluate" is refused. Releases are counted in
    the node's `Context.state` before rows are touched, and one more than the plan has is refused; Flower keeps that
    state in memory for one run. An account that outlives it is the ledger of a `Device`.

    Noise comes from the operating system. With `SEED_KEY` in the node's own configuration it comes from that seed:
    for simulations, and ε is void.
    """

    def __init__(self, task: Task, load: Load) -> None:
        super().__init__()
        self.task = task
        self.load = load

        @self.train()
        def train(message: Message, context: Context) -> Message:
            state = weights_in(message.content)
            turn = self.visit(context)
            x, y = self.rows(turn.partition, turn.partitions)
            with hidden_errors(private=task.plan is not None):
                update = task.train(
                    state, x, y, turn.stream(), done=turn.done, memory=turn.memory, control=control_in(message.content)
                )
            if update.memory:
                context.state[MEMORY_KEY] = record_of(update.memory)
            return self.reply(message, update)

        @self.evaluate()
        def evaluate(message: Message, context: Context) -> Message:
            if task.plan is not None:
                raise UnprotectedRefused(
                    "evaluation: got a task with a plan, which accounts for no loss; expected none"
                )
            x, y = self.rows(*place_of(context))
            loss, examples = task.evaluate(weights_in(message.content), x, y, memory=memory_in(context))
            return Message(reply_content(None, loss, examples), reply_to=message)

    def reply(self, message: Message, update: Update) -> Message:
        """The answer to `message`."""
        control = record_of(update.auxiliary) if update.auxiliary else None
        content = reply_content(record_of(update.state), update.loss, update.examples, control)
        return Message(content, reply_to=message)

    def visit(self, context: Context) -> Visit:
        """Count this turn in the node's state, then say what it is.

        Raises: BudgetExceeded if the plan has too few releases left.
        """
        partition, partitions = place_of(context)
        visits, done = charge(context.state, self.task)
        seed = context.node_config.get(SEED_KEY)
        own = None if seed is None else f"local task {seed}/{partition}/{visits}"
        return Visit(partition=partition, partitions=partitions, done=done, seed=own, memory=memory_in(context))

    def rows(self, partition: int, partitions: int) -> tuple[Tensor, Tensor]:
        """The rows of a node."""
        with hidden_errors(private=self.task.plan is not None):
            return self.load(partition, partitions)


class hidden_errors:  # noqa: N801 (a context manager)
    """With `private`, an error tells its kind only, because its text may quote a row or count them.

    Errors of privacy itself say what was asked for, which is public.
    """

    def __init__(self, *, private: bool) -> None:
        self._private = private

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if self._private and isinstance(error, Exception) and not isinstance(error, PrivacyError):
            raise BadInput(f"local task: got {type(error).__name__} on the rows of this device") from None


def charge(state: RecordDict, task: Task) -> tuple[int, int]:
    """Count one turn of `task` in what a node keeps; how many turns and releases there were before.

    Raises: BudgetExceeded if the plan has too few releases left; nothing is counted then.
    """
    record = state.get(STATE_KEY)
    if not isinstance(record, MetricRecord):
        record = state[STATE_KEY] = MetricRecord({"visits": 0, "releases": 0})
    visits, done = _whole(record, "visits"), _whole(record, "releases")
    if task.plan is not None and done + task.releases > task.plan.steps:
        raise BudgetExceeded(
            f"plan: got {done} releases made and {task.releases} more asked for, expected at most {task.plan.steps}"
        )
    record["visits"] = visits + 1
    if task.plan is not None:
        record["releases"] = done + task.releases
    return visits, done


def place_of(context: Context) -> tuple[int, int]:
    """The node's partition and the number of partitions, as Flower's simulation and SuperNodes configure them."""
    try:
        return int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    except KeyError as missing:
        raise BadInput(
            f"node configuration: got no {missing}, expected it; start the SuperNode with "
            '--node-config "partition-id=0 num-partitions=10"'
        ) from None


def weights_in(content: RecordDict) -> Mapping[str, Tensor]:
    """The weights in a message's content.

    Raises: BadInput if there are none.
    """
    record = content.get(ARRAYS)
    if not isinstance(record, ArrayRecord):
        raise BadInput(f"message: got no ArrayRecord {ARRAYS!r}, expected the weights")
    return record.to_torch_state_dict()


def control_in(content: RecordDict) -> Mapping[str, Tensor] | None:
    """The control variates in a message's content, if there are any."""
    record = content.get(CONTROL)
    return record.to_torch_state_dict() if isinstance(record, ArrayRecord) else None


def memory_in(context: Context) -> Mapping[str, Tensor] | None:
    """What an algorithm kept in a node's state, if it did."""
    record = context.state.get(MEMORY_KEY)
    return record.to_torch_state_dict() if isinstance(record, ArrayRecord) else None


def record_of(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors as a record of Flower's."""
    return ArrayRecord({name: tensor.contiguous() for name, tensor in tensors.items()})


def reply_content(
    arrays: ArrayRecord | None, loss: float | None, examples: int, control: ArrayRecord | None = None
) -> RecordDict:
    """The content of an answer."""
    metrics = MetricRecord({"num-examples": examples})
    if loss is not None:
        metrics["loss"] = loss
    content = RecordDict({METRICS: metrics} if arrays is None else {ARRAYS: arrays, METRICS: metrics})
    if control is not None:
        content[CONTROL] = control
    return content


def _whole(record: MetricRecord, name: str) -> int:
    value = record[name]
    assert isinstance(value, int)
    return value
