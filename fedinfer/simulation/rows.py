"""The rows of clients, kept while there is room."""

from collections import OrderedDict

import torch
from torch import Tensor

from fedinfer.local_app import LocalApp, hidden_errors
from fedinfer.local_task import check_rows
from fedinfer.simulation.stacked import Rows

CPU = torch.device("cpu")


class KeptRows:
    """What `load` gave, on `device`, of the clients seen last, at most `memory_bytes` of it."""

    def __init__(self, app: LocalApp, *, memory_bytes: int, device: torch.device = CPU) -> None:
        self._app = app
        self._device = device
        self._memory_bytes = memory_bytes
        self._kept: OrderedDict[int, Rows] = OrderedDict()
        self._kept_bytes = 0

    def of(self, partition: int, partitions: int) -> Rows:
        """The rows of a client.

        Raises: what `load` raises; ShapeMismatch if x and y differ in length.
        """
        if partition in self._kept:
            self._kept.move_to_end(partition)
            return self._kept[partition]
        x, y = self._app.rows(partition, partitions)
        with hidden_errors(private=self._app.task.plan is not None):
            check_rows(x, y)
        x, y = x.to(self._device), y.to(self._device)
        self._kept[partition] = x, y
        self._kept_bytes += size_bytes(x) + size_bytes(y)
        while self._kept_bytes > self._memory_bytes:
            _, (old_x, old_y) = self._kept.popitem(last=False)
            self._kept_bytes -= size_bytes(old_x) + size_bytes(old_y)
        return x, y


def size_bytes(tensor: Tensor) -> int:
    """How much room the numbers of a tensor take."""
    return tensor.numel() * tensor.element_size()
