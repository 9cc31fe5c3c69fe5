"""Stratified train and test rows for experiments on public data. A test split of private data is itself private."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]


def stratified_quarters(classes: Sequence[int], *, seed: int) -> Iterator[tuple[Index, Index]]:
    """Yield four (train, test) index pairs; the four tests are disjoint, hold each row once and the classes evenly.

    Guarantees: a class of m rows puts floor(m/4) or ceil(m/4) of them into each test quarter.

    >>> [len(test) for _, test in stratified_quarters([0] * 8 + [1] * 4, seed=0)]
    [3, 3, 3, 3]
    """
    generator = np.random.default_rng(seed)
    quarter = np.zeros(len(classes), np.int64)
    start = 0
    for value in sorted(set(classes)):
        members = generator.permutation(np.flatnonzero(np.asarray(classes) == value))
        # Each class goes on where the last one stopped, so that the quarters are of one size.
        quarter[members] = (start + np.arange(len(members))) % 4
        start += len(members)
    for number in range(4):
        yield np.flatnonzero(quarter != number), np.flatnonzero(quarter == number)
