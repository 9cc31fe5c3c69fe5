"""A Flower `Grid` inside this process: the same ServerApp and ClientApp, no network and no other process.

Each node has its own `Context` with its own configuration and state, as on a SuperNode. A ClientApp that raises gives
an error reply, in the words of Flower's own engines.
"""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

Config = Mapping[str, bool | float | int | str]
Progress = Callable[[str, int], None]
Between = Callable[[], None]


class InProcessGrid(Grid):
    """Nodes of one `ClientApp`, run one after another when a message is pushed to them.

    `progress(group_id, node_id)` is called after each answer; in a training run the group id is the round. `between`
    is called before messages are delivered, and may raise to stop a run where no message is half done.
    """

    def __init__(
        self,
        client_app: ClientApp,
        nodes: Sequence[Config],
        run_config: Config,
        progress: Progress | None = None,
        between: Between | None = None,
    ) -> None:
        self._client_app = client_app
        self._progress = progress
        self._between = between
        self._run = Run.create_empty(run_id=uuid.uuid4().int >> 65)
        self._replies: dict[str, Message] = {}
        # Node ids are not 0..n-1 on a real SuperLink either; 1 is the SuperLink itself.
        self._contexts = {
            SUPERLINK_NODE_ID + 1 + index: Context(
                run_id=self._run.run_id,
                node_id=SUPERLINK_NODE_ID + 1 + index,
                node_config=dict(config),
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for index, config in enumerate(nodes)
        }

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver each message and keep the answer; return the message ids.

        Raises: ValueError if a message has no content or goes to a node that is not there.
        """
        if self._between is not None:
            self._between()
        return [self._deliver(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The answers to `message_ids` that were not pulled before."""
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Deliver messages and return the answers that came within `timeout` seconds."""
        if self._between is not None:
            self._between()
        started = time.monotonic()
        replies: list[Message] = []
        for message in messages:
            if timeout is not None and time.monotonic() - started > timeout:
                break
            replies.extend(self.pull_messages([self._deliver(message)]))
        return replies

    def _deliver(self, message: Message) -> str:
        node_id = message.metadata.dst_node_id
        if node_id not in self._contexts:
            raise ValueError(f"message: got destination node {node_id}, expected one of {list(self._contexts)}")
        if not message.has_content():
            raise ValueError("message: got one without content, expected an instruction")
        message_id = uuid.uuid4().hex
        # Flower's own in-memory grid sets the identifier the same way: a Message has no public setter for it.
        message.metadata.__dict__["_message_id"] = message_id
        try:
            reply = self._client_app(message, self._contexts[node_id])
        except Exception as error:
            # On a real SuperNode an exception ends that node's task and not the server's run.
            reason = f"{type(error)}:<'{error}'>"
            code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
            reply = Message(Error(code=code, reason=reason), reply_to=message)
        reply.metadata.__dict__["_message_id"] = uuid.uuid4().hex
        self._replies[message_id] = reply
        if self._progress is not None:
            self._progress(message.metadata.group_id, node_id)
        return message_id


def run_in_process(
    server_app: ServerApp,
    client_app: ClientApp,
    *,
    nodes: Sequence[Config],
    run_config: Config,
    progress: Progress | None = None,
    between: Between | None = None,
) -> Context:
    """Run `server_app` against one node of `client_app` for each configuration in `nodes`.

    Returns the ServerApp's Context after its main function: what main stored is in `context.state`.
    """
    grid = InProcessGrid(client_app, nodes, run_config, progress, between)
    context = Context(
        run_id=grid.run.run_id, node_id=0, node_config={}, state=RecordDict(), run_config=dict(run_config)
    )
    with _task_of(grid.run):
        server_app(grid, context)
    return context


@contextmanager
def _task_of(run: Run) -> Iterator[None]:
    """Say who this process is: Flower's `Message` reads it from here when a ServerApp makes one."""
    before = (TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run.run_id, SUPERLINK_NODE_ID, 0
    try:
        yield
    finally:
        TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id = before
