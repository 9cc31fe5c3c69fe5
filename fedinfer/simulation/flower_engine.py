"""Flower's own simulation (Ray), with the arguments and the result of ours: the peer that ours is compared with."""

import time
from collections.abc import Iterable, Mapping

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from flwr.supercore.run import Run

from fedinfer.simulation.grid import Config
from fedinfer.simulation.meter import Meter
from fedinfer.simulation.waves import Waves

# Flower's default is two CPUs a client, which halves its speed on a small machine.
RESOURCES: Mapping[str, int | float] = {"num_cpus": 1, "num_gpus": 0.0}
POLL_S = 0.1


def run_by_flower(
    server_app: ServerApp,
    client_app: ClientApp,
    *,
    nodes: int,
    node_config: Mapping[str, int],
    run_config: Config,
    meter: Meter,
    waves: Waves,
) -> Context:
    """Run both apps in Flower's simulation and return the ServerApp's Context."""
    seen: list[Context] = []
    observed = ServerApp()

    @observed.main()
    def main(grid: Grid, context: Context) -> None:
        context.run_config.update(run_config)
        server_app(ObservedGrid(grid, meter, waves), context)
        seen.append(context)

    run_simulation(
        observed,
        ConfiguredApp(client_app, dict(node_config), dict(run_config)),
        num_supernodes=nodes,
        backend_config={"client_resources": dict(RESOURCES)},
    )
    return seen[0]


class ConfiguredApp(ClientApp):
    """A ClientApp on nodes with more configuration than Flower's simulation gives them."""

    def __init__(self, app: ClientApp, node_config: Config, run_config: Config) -> None:
        super().__init__()
        self._app = app
        self._node_config = node_config
        self._run_config = run_config

    def __call__(self, message: Message, context: Context) -> Message:
        context.node_config.update(self._node_config)
        context.run_config.update(self._run_config)
        return self._app(message, context)


class ObservedGrid(Grid):
    """Flower's grid; the meter begins with the first reply and counts those that follow, `waves` is told of waves."""

    def __init__(self, grid: Grid, meter: Meter, waves: Waves) -> None:
        self._grid = grid
        self._meter = meter
        self._waves = waves
        self._replied = False

    def set_run(self, run: Run) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[NodeInfo]:
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(self._grid.pull_messages(message_ids))
        if replies:
            self._meter.begin()
            for reply in replies if self._replied else replies[1:]:
                self._meter.count(reply)
            self._replied = True
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """As Flower's own: pull every 0.1 s, until all have answered or the time is up."""
        started, sent = time.monotonic(), list(messages)
        missing = set(self.push_messages(sent))
        deadline = None if timeout is None else started + timeout
        replies: list[Message] = []
        while deadline is None or time.monotonic() < deadline:
            found = list(self.pull_messages(missing))
            replies += found
            missing -= {reply.metadata.reply_to_message_id for reply in found}
            if not missing:
                break
            time.sleep(POLL_S)
        asked = [message.metadata.message_type for message in sent]
        self._waves.answered(replies, asked=asked, seconds=time.monotonic() - started)
        return replies
