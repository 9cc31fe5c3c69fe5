"""A Flower `Grid` on this machine: the same ServerApp and ClientApp, and no network between them.

Each node has its own `Context` with its own configuration and state, as on a SuperNode. A node comes into being when a
message goes to it for the first time, so that a million of them cost nothing. A ClientApp that raises gives an error
reply, in the words of Flower's own engines.
"""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run

from fedinfer.simulation.engines import CohortSum, Engine, OneByOne, Task, identity, sealed
from fedinfer.simulation.waves import Waves

Config = Mapping[str, bool | float | int | str]
Progress = Callable[[str, int], None]
Before = Callable[[str], None]


class SimulatedGrid(Grid):
    """`nodes` nodes, run by an `engine` when messages are pushed to them; node i is configured by `configure(i)`.

    `progress(group_id, node_id)` is called after each answer; in a training run the group id is the round.
    `before(group_id)` is called before a wave of messages is delivered, and may raise to stop a run where no message is
    half done; a round may take several waves. `waves` is told of each wave of messages and its answers.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        nodes: int,
        configure: Callable[[int], Config],
        run_config: Config,
        progress: Progress | None = None,
        before: Before | None = None,
        waves: Waves | None = None,
    ) -> None:
        self._engine = engine
        self._configure = configure
        self._run_config = dict(run_config)
        self._progress = progress
        self._before = before
        self._waves = waves or Waves()
        self._run = Run.create_empty(run_id=uuid.uuid4().int >> 65)
        self._replies: dict[str, Message] = {}
        self._contexts: dict[int, Context] = {}
        # Node ids are not 0..n-1 on a real SuperLink either; 1 is the SuperLink itself.
        self._nodes = range(SUPERLINK_NODE_ID + 1, SUPERLINK_NODE_ID + 1 + nodes)

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    @property
    def nodes(self) -> range:
        """The ids of all nodes, there or not."""
        return self._nodes

    def get_node_ids(self) -> Iterable[int]:
        return self._nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver all messages and keep the answers; return the message ids.

        Raises: ValueError if a message has no content or goes to a node that is not there.
        """
        started, tasks = time.monotonic(), self._tasks(messages)
        replies = list(self._answers(tasks))
        self._replies |= {reply.metadata.reply_to_message_id: reply for reply in replies}
        self._told(replies, tasks, started)
        return [task.message().metadata.message_id for task in tasks]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The answers to `message_ids` that were not pulled before."""
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Deliver messages and return the answers that came within `timeout` seconds, in the order of the messages."""
        started = time.monotonic()
        replies: list[Message] = []
        tasks = self._tasks(messages)
        place = {task.message().metadata.message_id: number for number, task in enumerate(tasks)}
        answers = self._answers(tasks)
        while timeout is None or time.monotonic() - started <= timeout:
            reply = next(answers, None)
            if reply is None:
                break
            replies.append(reply)
        self._told(replies, tasks, started)
        # Strategies add floats up in the order of the answers: it must not depend on who was first.
        return sorted(replies, key=lambda reply: place[reply.metadata.reply_to_message_id])

    def sum_of_updates(self, content: RecordDict, node_ids: Iterable[int], *, message_type: str = "train") -> CohortSum:
        """Send `content` to all `node_ids` and return the sum of their updates alone: no reply is ever kept.

        This is not part of Flower's API: it is what a secure sum would hand to a server.
        Raises: ValueError if a node is not there.
        """
        started = time.monotonic()
        tasks = [Task(content, message_type, self._context(node_id)) for node_id in node_ids]
        total = self._engine.total(tasks)
        self._waves.summed(total, asked=len(tasks), seconds=time.monotonic() - started)
        return total

    def node_states(self) -> dict[int, RecordDict]:
        """What the nodes keep from round to round, by node id, of those that keep something."""
        return {node_id: context.state for node_id, context in self._contexts.items() if len(context.state)}

    def restore(self, states: Mapping[int, RecordDict]) -> None:
        """Give nodes back what they kept in an earlier run.

        Raises: ValueError if a node is not there.
        """
        for node_id, state in states.items():
            self._context(node_id).state = state

    def _tasks(self, messages: Iterable[Message]) -> list[Task]:
        tasks: list[Task] = []
        for message in messages:
            if self._before is not None and not tasks:
                self._before(message.metadata.group_id)
            if not message.has_content():
                raise ValueError("message: got one without content, expected an instruction")
            context = self._context(message.metadata.dst_node_id)
            tasks.append(Task(message.content, message.metadata.message_type, context, sealed(message)))
        return tasks

    def _context(self, node_id: int) -> Context:
        if node_id not in self._contexts:
            if node_id not in self._nodes:
                raise ValueError(
                    f"message: got destination node {node_id}, expected {self._nodes.start} to {self._nodes.stop - 1}"
                )
            self._contexts[node_id] = Context(
                run_id=self._run.run_id,
                node_id=node_id,
                node_config=dict(self._configure(node_id - self._nodes.start)),
                state=RecordDict(),
                run_config=dict(self._run_config),
            )
        return self._contexts[node_id]

    def _told(self, replies: Sequence[Message], tasks: Sequence[Task], started: float) -> None:
        asked = [task.message_type for task in tasks]
        self._waves.answered(replies, asked=asked, seconds=time.monotonic() - started)

    def _answers(self, tasks: Sequence[Task]) -> Iterator[Message]:
        for reply in self._engine.replies(tasks):
            yield reply
            if self._progress is not None:
                self._progress(reply.metadata.group_id, reply.metadata.src_node_id)


class InProcessGrid(SimulatedGrid):
    """A node of `client_app` for each configuration in `nodes`, run one after another in this process."""

    def __init__(
        self,
        client_app: ClientApp,
        nodes: Sequence[Config],
        run_config: Config,
        progress: Progress | None = None,
        before: Before | None = None,
    ) -> None:
        super().__init__(
            OneByOne(client_app),
            nodes=len(nodes),
            configure=nodes.__getitem__,
            run_config=run_config,
            progress=progress,
            before=before,
        )


def run_in_process(
    server_app: ServerApp,
    client_app: ClientApp,
    *,
    nodes: Sequence[Config],
    run_config: Config,
    progress: Progress | None = None,
    before: Before | None = None,
) -> Context:
    """Run `server_app` against one node of `client_app` for each configuration in `nodes`.

    Returns the ServerApp's Context after its main function: what main stored is in `context.state`.
    """
    return run_on(server_app, InProcessGrid(client_app, nodes, run_config, progress, before), run_config)


def run_on(
    server_app: ServerApp, grid: SimulatedGrid, run_config: Config, *, node_config: Config | None = None
) -> Context:
    """Run `server_app` on `grid`, and return its Context after its main function."""
    context = Context(
        run_id=grid.run.run_id,
        node_id=0,
        node_config=dict(node_config or {}),
        state=RecordDict(),
        run_config=dict(run_config),
    )
    with _task_of(grid.run):
        server_app(grid, context)
    return context


@contextmanager
def _task_of(run: Run) -> Iterator[None]:
    """Messages that are made meanwhile come from the ServerApp of `run`."""
    with identity(run.run_id):
        yield
