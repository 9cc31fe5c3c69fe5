"""Ways to divide labelled examples over clients, for experiments on public data.

A scheme says how; `divide(labels, clients)` gives a `Division`, which is two arrays however many clients there are: no
object is made for a client, and its rows are looked up when somebody asks for them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedinfer.errors import BadUsage, ShapeMismatch

if TYPE_CHECKING:
    from torch import Tensor

Index = NDArray[np.int64]
Labels = NDArray[Any]
# Clients whose shares of labels are drawn at once: what bounds memory, at 8 bytes a class and client, a few times over.
AT_ONCE = 1 << 16


@dataclass(frozen=True, kw_only=True, eq=False)
class Division:
    """Examples by client: those of client i are `order[starts[i]:starts[i + 1]]`.

    Guarantees: each example belongs to exactly one client; a client may have none.
    """

    order: Index = field(repr=False)
    starts: Index = field(repr=False)

    def __post_init__(self) -> None:
        if self.starts[0] != 0 or self.starts[-1] != len(self.order) or (np.diff(self.starts) < 0).any():
            raise BadUsage("division: got starts that do not rise from 0 to the number of examples")
        if not np.array_equal(np.sort(self.order), np.arange(len(self.order))):
            raise BadUsage("division: got an order that does not hold each example once")

    @property
    def clients(self) -> int:
        return len(self.starts) - 1

    @property
    def sizes(self) -> Index:
        """How many examples each client has (clients,)."""
        return np.diff(self.starts)

    def indices(self, client: int) -> Index:
        """The sorted indices of a client's examples.

        Raises: BadUsage if there is no such client.
        """
        if not 0 <= client < self.clients:
            raise BadUsage(f"client: got {client}, expected 0 to {self.clients - 1}")
        return np.sort(self.order[self.starts[client] : self.starts[client + 1]])

    def load(self, x: "Tensor", y: "Tensor") -> Callable[[int, int], tuple["Tensor", "Tensor"]]:
        """What `LocalTask.client_app` wants: a function from (partition_id, num_partitions) to a client's rows.

        Raises: ShapeMismatch if x or y has not one row for each example.
        """
        return DividedRows(division=self, x=x, y=y)


@dataclass(frozen=True, kw_only=True, eq=False)
class DividedRows:
    """The rows of each client of a division; it can be sent to another process."""

    division: Division
    x: "Tensor" = field(repr=False)
    y: "Tensor" = field(repr=False)

    def __post_init__(self) -> None:
        examples = len(self.division.order)
        for name, rows in (("x", self.x), ("y", self.y)):
            if len(rows) != examples:
                raise ShapeMismatch(got=tuple(rows.shape), expected=f"({examples}, ...)", what=name)

    def __call__(self, partition: int, partitions: int) -> tuple["Tensor", "Tensor"]:
        if partitions != self.division.clients:
            raise BadUsage(f"partitions: got {partitions}, expected the {self.division.clients} of the division")
        rows = self.division.indices(partition)
        return self.x[rows], self.y[rows]


class Partition(Protocol):
    """A scheme."""

    def divide(self, labels: Labels, clients: int) -> Division:
        """Divide the examples of `labels` (n,) over `clients`."""


@dataclass(frozen=True, kw_only=True)
class Iid:
    """Everybody the same: examples at random, as many for each client, within one.

    >>> Iid(seed=0).divide(np.zeros(10), clients=4).sizes.tolist()
    [2, 3, 2, 3]
    """

    seed: int = 0

    def divide(self, labels: Labels, clients: int) -> Division:
        _check(labels, clients)
        order = np.random.default_rng(self.seed).permutation(len(labels))
        return Division(order=order, starts=_even(len(labels), clients))


@dataclass(frozen=True, kw_only=True)
class LabelDirichlet:
    """Clients of one size, within one, each with a mixture of labels of its own.

    A client draws its shares of the labels from Dirichlet(alpha * p), where p are the shares in all examples, and then
    its examples by those shares, without replacement. A label of which no example is left is left out of the shares of
    the clients that come later. A large `alpha` gives clients that are alike, a small one clients of one label.

    Reference: Hsu, Qi and Brown 2019, arXiv:1909.06335, section 3.1.

    >>> labels = np.arange(600) % 3
    >>> division = LabelDirichlet(alpha=0.01, seed=1).divide(labels, clients=6)
    >>> [len(set(labels[division.indices(client)])) for client in range(3)]
    [1, 1, 1]
    """

    alpha: float
    seed: int = 0

    def __post_init__(self) -> None:
        _check_alpha(self.alpha)

    def divide(self, labels: Labels, clients: int) -> Division:
        _check(labels, clients)
        generator = np.random.default_rng(self.seed)
        _, label, left = np.unique(labels, return_inverse=True, return_counts=True)
        concentration = self.alpha * left / len(labels)
        starts = _even(len(labels), clients)
        # By label, each label's examples at random: a label's next examples go to the next client that takes some.
        supply = generator.permutation(len(labels))
        supply = supply[np.argsort(label[supply], kind="stable")]
        taken = np.cumsum(left) - left
        parts: list[Index] = []
        for first in range(0, clients, AT_ONCE):
            sizes = np.diff(starts[first : first + AT_ONCE + 1])
            shares = generator.dirichlet(concentration, len(sizes))
            counts = _served(shares, sizes, left, generator)
            left = left - counts.sum(0)
            # Place number k of a label's run goes to the client whose cumulated count passes k.
            ends = taken + np.cumsum(counts, axis=0)
            begins = ends - counts
            taken = ends[-1]
            parts.append(supply[_ranges(begins.ravel(), counts.ravel())])
        return Division(order=np.concatenate(parts), starts=starts)


@dataclass(frozen=True, kw_only=True)
class SizeDirichlet:
    """Clients of one kind and very different sizes: examples at random, in shares drawn from Dirichlet(alpha).

    Reference: Li, Diao, Chen and He 2021, arXiv:2102.02079 (quantity skew).
    """

    alpha: float
    seed: int = 0

    def __post_init__(self) -> None:
        _check_alpha(self.alpha)

    def divide(self, labels: Labels, clients: int) -> Division:
        _check(labels, clients)
        generator = np.random.default_rng(self.seed)
        weights = generator.gamma(self.alpha, size=clients)
        if not weights.any():
            # So small an alpha is one client with everything.
            weights[generator.integers(clients)] = 1.0
        ends = np.rint(np.cumsum(weights) / weights.sum() * len(labels)).astype(np.int64)
        ends[-1] = len(labels)
        return Division(order=generator.permutation(len(labels)), starts=np.concatenate([[0], ends]))


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Clients of few labels: examples sorted by label are cut into shards, of which each client gets `per_client`.

    Guarantees: where no shard is larger than the smallest label, a client has at most 2 * `per_client` labels.
    Reference: McMahan et al. 2017, arXiv:1602.05629, section 3 (the pathological division, 2 shards a client).

    >>> labels = np.arange(600) % 3
    >>> division = Shards(per_client=2).divide(labels, clients=6)
    >>> max(len(set(labels[division.indices(client)])) for client in range(6))
    2
    """

    per_client: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if type(self.per_client) is not int or self.per_client < 1:
            raise BadUsage(f"shards: got {self.per_client} a client, expected a whole number of at least 1")

    def divide(self, labels: Labels, clients: int) -> Division:
        _check(labels, clients)
        generator = np.random.default_rng(self.seed)
        bounds = _even(len(labels), clients * self.per_client)
        shuffled = generator.permutation(len(labels))
        by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
        dealt = generator.permutation(clients * self.per_client)
        sizes = np.diff(bounds)[dealt]
        starts = np.concatenate([[0], np.cumsum(sizes)[self.per_client - 1 :: self.per_client]])
        return Division(order=by_label[_ranges(bounds[dealt], sizes)], starts=starts)


@dataclass(frozen=True, kw_only=True, eq=False)
class ByColumn:
    """A client for each value of a column: a hospital, a writer, a speaker. Client i is the i-th value in order.

    >>> ByColumn(values=np.array(["oslo", "bonn", "oslo"])).divide(np.zeros(3), clients=2).indices(1)
    array([0, 2])
    """

    values: Labels = field(repr=False)

    def divide(self, labels: Labels, clients: int) -> Division:
        _check(labels, clients)
        if self.values.shape != (len(labels),):
            raise ShapeMismatch(got=self.values.shape, expected=(len(labels),), what="column")
        names, counts = np.unique(self.values, return_counts=True)
        if len(names) != clients:
            raise BadUsage(f"clients: got {clients}, expected {len(names)}, one for each value of the column")
        order = np.argsort(self.values, kind="stable")
        return Division(order=order, starts=np.concatenate([[0], np.cumsum(counts)]))


def _served(shares: NDArray[np.float64], sizes: Index, left: Index, generator: np.random.Generator) -> Index:
    """How many examples (clients, labels) each client gets, `sizes` in all, by `shares` of what is `left` (labels,).

    All draw at once; where a label gives out, those who come last go on with the labels that are left. Each pass serves
    everybody or empties a label.
    """
    counts = np.zeros(shares.shape, np.int64)
    while True:
        missing = sizes - counts.sum(1)
        hungry = np.flatnonzero(missing)
        if not len(hungry):
            return counts
        rest = left - counts.sum(0)
        open_shares = np.where(rest > 0, shares[hungry], 0.0)
        nothing = open_shares.sum(1) < np.finfo(np.float64).tiny
        # A client whose own labels have all given out takes what there is.
        open_shares[nothing] = rest
        asked = generator.multinomial(missing[hungry], open_shares / open_shares.sum(1, keepdims=True))
        before = np.cumsum(asked, axis=0) - asked
        counts[hungry] += np.clip(rest - before, 0, asked)


def _ranges(begins: Index, counts: Index) -> Index:
    """The numbers begins[0], begins[0] + 1, ... (counts[0] of them), then those of begins[1], and so on."""
    ends = np.cumsum(counts)
    return np.repeat(begins - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)


def _even(examples: int, pieces: int) -> Index:
    """Where pieces of equal size begin, within one, and where the last ends."""
    return np.arange(pieces + 1, dtype=np.int64) * examples // pieces


def _check(labels: Labels, clients: int) -> None:
    if labels.ndim != 1 or not len(labels):
        raise ShapeMismatch(got=labels.shape, expected="(n,), at least one", what="labels")
    if type(clients) is not int or clients < 1:
        raise BadUsage(f"clients: got {clients}, expected a whole number of at least 1")


def _check_alpha(alpha: float) -> None:
    if not 0.0 < alpha < math.inf:
        raise BadUsage(f"alpha: got {alpha}, expected a finite number above 0")
