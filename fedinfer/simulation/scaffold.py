"""SCAFFOLD at the server: its control variate, and any of Flower's strategies with it.

Reference: Karimireddy et al. 2020, arXiv:1910.06378, algorithm 1.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from fedinfer.errors import BadUsage
from fedinfer.local_app import CONTROL
from fedinfer.local_task import LocalTask, trained


class ServerControl:
    """The server's c: the mean of the c_i of all devices, as long as none of their moves is lost.

    Each device counts the same. So SCAFFOLD finds a minimum of the mean of the devices' mean losses, with whatever
    weights the server averages what they send.
    """

    def __init__(self, task: LocalTask) -> None:
        self._values: Mapping[str, NDArray[Any]] = {
            name: np.zeros_like(value.numpy()) for name, value in trained(task.model)
        }
        self._record = self._made()

    @property
    def record(self) -> ArrayRecord:
        """What goes beside the weights, as "control"; one object until it moves."""
        return self._record

    def move(self, auxiliary: Mapping[str, NDArray[Any]], *, devices: int) -> None:
        """Move by the sum `auxiliary` of the moves of some of all `devices`."""
        self._values = {
            name: (value + auxiliary[name] / devices).astype(value.dtype) if name in auxiliary else value
            for name, value in self._values.items()
        }
        self._record = self._made()

    def _made(self) -> ArrayRecord:
        return ArrayRecord({name: Array(value) for name, value in self._values.items()})


class ScaffoldStrategy(Strategy):
    """A strategy of Flower's (`FedAvg` in the paper) for the devices of a `LocalTask` with `Scaffold()`.

    It sends the server's c, its `control`, beside the weights and takes the moves of the devices' c_i out of their
    answers, before `inner` sees those. All nodes of the grid count as devices.
    """

    def __init__(self, inner: Strategy, task: LocalTask) -> None:
        self._inner = inner
        self.control = ServerControl(task)
        self._devices = 0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._devices = len(list(grid.get_node_ids()))
        messages = list(self._inner.configure_train(server_round, arrays, config, grid))
        for message in messages:
            message.content[CONTROL] = self.control.record
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        sums: dict[str, NDArray[np.float64]] = {}
        for reply in replies:
            if not reply.has_error():
                for name, array in _taken(reply.content).items():
                    sums[name] = sums.get(name, np.float64(0.0)) + array.numpy()
        self.control.move(sums, devices=self._devices)
        return self._inner.aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self._inner.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return self._inner.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        self._inner.summary()


def _taken(content: RecordDict) -> ArrayRecord:
    record = content.pop(CONTROL, None)
    if not isinstance(record, ArrayRecord):
        raise BadUsage("scaffold: got an answer without a control variate, expected those of a task with Scaffold()")
    return record
