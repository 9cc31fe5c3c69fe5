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
    """The server's c, and how it moves.

    A round moves c by (devices that answered / all devices) times the mean of their moves, with the weights by which
    the server averages the weights themselves: so that c is the direction of the same objective. Where all devices
    have as many rows that is the paper's rule.
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

    def move(self, auxiliary: Mapping[str, NDArray[Any]], *, weight: float, share: float) -> None:
        """Move by `share` of the mean, from the weighted sum `auxiliary` and the sum of the weights."""
        if weight == 0.0:
            return
        self._values = {
            name: (value + share * auxiliary[name] / weight).astype(value.dtype) for name, value in self._values.items()
        }
        self._record = self._made()

    def _made(self) -> ArrayRecord:
        return ArrayRecord({name: Array(value) for name, value in self._values.items()})


class ScaffoldStrategy(Strategy):
    """A strategy of Flower's (`FedAvg` in the paper) for the devices of a `LocalTask` with `Scaffold()`.

    It sends the server's c beside the weights and takes the moves of the devices' c_i out of their answers, before
    `inner` sees those. All nodes of the grid count as devices.
    """

    def __init__(self, inner: Strategy, task: LocalTask) -> None:
        self._inner = inner
        self._control = ServerControl(task)
        self._devices = 0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._devices = len(list(grid.get_node_ids()))
        messages = list(self._inner.configure_train(server_round, arrays, config, grid))
        for message in messages:
            message.content[CONTROL] = self._control.record
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        good = [reply for reply in replies if not reply.has_error()]
        sums: dict[str, NDArray[np.float64]] = {}
        total = 0.0
        for reply in good:
            weight = _weight(reply.content)
            total += weight
            for name, array in _taken(reply.content).items():
                sums[name] = sums.get(name, 0.0) + weight * array.numpy().astype(np.float64)
        if good:
            self._control.move(sums, weight=total, share=len(good) / self._devices)
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


def _weight(content: RecordDict) -> float:
    metrics = next(iter(content.metric_records.values()), None)
    weight = None if metrics is None else metrics.get("num-examples")
    if not isinstance(weight, int | float):
        raise BadUsage("scaffold: got an answer without num-examples, expected one number")
    return float(weight)
