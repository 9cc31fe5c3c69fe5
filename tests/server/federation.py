"""A federation of real devices on the in-process grid, whose network can be told to lose messages."""

from collections.abc import Callable, Iterable
from pathlib import Path

from flwr.app import Message
from flwr.serverapp import Grid

from clients.app import app as client_app
from clients.sdk import DeviceConfig, open_device
from fedinfer.cli.federation import Node, enlist
from fedinfer.cli.methods import write_rows
from fedinfer.data import heart_rows
from fedinfer.data.heart import SCHEMA_PATH
from fedinfer.privacy import PrivacyLedger
from fedinfer.settings import RunConfig
from fedinfer.simulation import InProcessGrid
from fedinfer.sums.membership import opened

# Whether the message of this type to this node (from 0) is lost.
Lose = Callable[[str, int], bool]


class Network(InProcessGrid):
    """The in-process grid, whose subclasses say in `send_and_receive` what becomes of messages and answers."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        asked = list(messages)
        names = {message.metadata.dst_node_id: f"message to {message.metadata.dst_node_id}" for message in asked}
        self._kept = {names[reply.metadata.src_node_id]: reply for reply in self.send_and_receive(asked)}
        return list(names.values())

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for name in message_ids:
            if name in self._kept:
                reply = self._kept.pop(name)
                # The answer may be one to a copy.
                reply.metadata.__dict__["_reply_to_message_id"] = name
                yield reply


class LossyGrid(Network):
    """The in-process grid with a network that loses messages before they arrive, or answers on their way back."""

    def __init__(self, nodes: list[Node], *, lose: Lose, lose_answer: Lose = lambda kind, node: False) -> None:
        super().__init__(client_app, nodes, {})
        self._lose, self._lose_answer = lose, lose_answer
        self.sent: list[tuple[str, int]] = []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        first = min(self.get_node_ids())
        passed, kinds = [], {}
        for message in messages:
            kind, node = message.metadata.message_type, message.metadata.dst_node_id
            self.sent.append((kind, node - first))
            if not self._lose(kind, node - first):
                passed.append(message)
                kinds[node] = kind
        replies = super().send_and_receive(passed, timeout=timeout)
        return [
            reply
            for reply in replies
            if not self._lose_answer(kinds[reply.metadata.src_node_id], reply.metadata.src_node_id - first)
        ]


def nothing_lost(kind: str, node: int) -> bool:
    return False


def hospitals(folder: Path, config: RunConfig, *, rows: int = 40) -> tuple[RunConfig, list[Node]]:
    """As many hospitals as the settings say, each with some rows, a ledger and an identity; places in folders."""
    names = list(heart_rows())
    nodes: list[Node] = []
    for number in range(config.min_devices):
        chosen = heart_rows()[names[number % len(names)]][:rows]
        data = write_rows(folder / f"hospital-{number}.csv", chosen)
        ledger = folder / f"hospital-{number}.ledger"
        PrivacyLedger.create(ledger, epsilon=8.0, delta=1e-4).close()
        nodes.append(
            {
                "data": str(data),
                "schema": str(SCHEMA_PATH),
                "ledger": str(ledger),
                "insecure-seeded-noise": f"hospital {number}",
            }
        )
    return enlist(config, nodes, folder)


def charged(node: Node) -> tuple[int, int]:
    """Releases that a hospital's ledger has reserved, and those it has committed."""
    with PrivacyLedger.open(Path(str(node["ledger"]))) as ledger:
        runs = ledger.summary().runs
    return sum(run.reserved for run in runs), sum(run.committed for run in runs)


def restart(node: Node) -> None:
    """The device's process is another one from here on: nothing of it is in memory."""
    open_device.__globals__["_open"].cache_clear()
    opened.cache_clear()
    assert DeviceConfig.from_node(node)


def on(grid: Grid) -> object:
    """A context in which messages of this grid's ServerApp are made."""
    from fedinfer.simulation.grid import _task_of

    return _task_of(grid.run)
