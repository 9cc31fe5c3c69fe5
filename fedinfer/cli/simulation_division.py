"""How rows are divided over clients, by name: a row a scheme."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]


class Partition(Protocol):
    """A scheme."""

    def divide(self, labels: NDArray[Any], clients: int) -> list[Index]:
        """The examples of each client."""


@dataclass(frozen=True, kw_only=True)
class Iid:
    """Everybody the same: examples at random, as many for each client, within one."""

    seed: int = 0

    def divide(self, labels: NDArray[Any], clients: int) -> list[Index]:
        order = np.random.default_rng(self.seed).permutation(len(labels))
        return [np.sort(part) for part in np.array_split(order, clients)]


PARTITIONS: Mapping[str, type[Partition]] = {"iid": Iid}
