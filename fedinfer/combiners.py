"""From many updates to one: the mean, and rules that stand a number of wrong devices.

The mean is all that a secure sum can give. The others read each device's own update: they need the clear mode, where
each device adds all of its noise itself, and cost accuracy when nobody attacks (docs/robustness.md has figures). They
compute on what was released already, so that they cost no ε. They count each device once: a weight is a number that
a wrong device would choose.

A rule's *breakdown point* is the share of wrong updates below which its result stays near the honest ones, whatever
the wrong ones are. Costs are for n updates of d numbers. Adding a rule is a class and a row in `COMBINERS`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedinfer.arrays import Vector, digest
from fedinfer.errors import BadUsage, NonFinite, ShapeMismatch

Floats = NDArray[np.float64]
BLOCK = 1 << 21
# Weiszfeld's steps stop here, or when no distance changes by a greater share of itself.
STEPS, TOLERANCE = 1000, 1e-10
SMOOTHING = 1e-6


class Combiner(Protocol):
    """From updates, each (d,), and their weights to one vector (d,), the same in whatever order they come."""

    @property
    def least(self) -> int:
        """The fewest updates with which the promise holds."""
        ...

    def combine(self, updates: Sequence[Vector], weights: Sequence[float]) -> Vector: ...


@dataclass(frozen=True, kw_only=True)
class Mean:
    """The weighted mean, in double precision; zero where all weights are. Breakdown point 0; O(n d).

    Guarantees: permutation invariance, translation equivariance.

    >>> Mean().combine([np.zeros(2, np.float32), np.ones(2, np.float32)], [1.0, 3.0])
    array([0.75, 0.75], dtype=float32)
    """

    wrong_devices: int = 0

    def __post_init__(self) -> None:
        if self.wrong_devices != 0:
            raise BadUsage(
                f"mean: got {self.wrong_devices} wrong devices, expected 0, because one moves it anywhere; "
                f"choose one of {', '.join(name for name in COMBINERS if name != 'mean')}"
            )

    @property
    def least(self) -> int:
        return 1

    def combine(self, updates: Sequence[Vector], weights: Sequence[float]) -> Vector:
        _check(updates, self.least, "mean")
        weight_of_all = math.fsum(weights)
        if weight_of_all == 0.0:
            return np.zeros_like(updates[0])
        # In double precision the order of the devices does not show in the float32 mean.
        pairs = zip(updates, weights, strict=True)
        total = sum(np.float64(weight) * update.astype(np.float64) for update, weight in pairs)
        return np.asarray(total / weight_of_all, np.float32)


@dataclass(frozen=True, kw_only=True)
class Median:
    """The median of each coordinate. Breakdown point 1/2; O(n d log n).

    Guarantees: permutation invariance, translation equivariance; with at most `wrong_devices` wrong updates each
    coordinate lies between the least and the greatest honest one.
    Raises: BadUsage for fewer than 2 f + 1 updates, f the wrong devices; NonFinite for NaN or infinity.
    Reference: Yin et al. 2018, arXiv:1803.01498, definition 1.

    >>> Median(wrong_devices=1).combine([np.float32([x]) for x in (1, 2, 1e30)], [1.0] * 3)
    array([2.], dtype=float32)
    """

    wrong_devices: int

    def __post_init__(self) -> None:
        _check_wrong(self.wrong_devices, "median")

    @property
    def least(self) -> int:
        return 2 * self.wrong_devices + 1

    def combine(self, updates: Sequence[Vector], weights: Sequence[float]) -> Vector:
        _check(updates, self.least, "median")
        return _median(updates)


@dataclass(frozen=True, kw_only=True)
class TrimmedMean:
    """The mean of each coordinate without its `wrong_devices` least and greatest values. O(n d log n).

    The share f/n trimmed on each side is the breakdown point.

    Guarantees: permutation invariance, translation equivariance; with at most `wrong_devices` wrong updates each
    coordinate lies between the least and the greatest honest one.
    Raises: BadUsage for fewer than 2 f + 1 updates, f the wrong devices; NonFinite for NaN or infinity.
    Reference: Yin et al. 2018, arXiv:1803.01498, definition 2.

    >>> TrimmedMean(wrong_devices=1).combine([np.float32([x]) for x in (1, 2, 4, 1e30)], [1.0] * 4)
    array([3.], dtype=float32)
    """

    wrong_devices: int

    def __post_init__(self) -> None:
        _check_wrong(self.wrong_devices, "trimmed mean")

    @property
    def least(self) -> int:
        return 2 * self.wrong_devices + 1

    def combine(self, updates: Sequence[Vector], weights: Sequence[float]) -> Vector:
        _check(updates, self.least, "trimmed mean")
        return _middle(updates, trimmed=self.wrong_devices)


@dataclass(frozen=True, kw_only=True)
class Krum:
    """The update nearest to its n - f - 2 nearest others or, where `many`, the mean of the n - f nearest ones.

    f is `wrong_devices`; the breakdown point is near 1/2: n >= 2 f + 3. O(n² d) time, O(n²) memory.

    Guarantees: permutation invariance, translation equivariance; with at most f wrong updates the result lies within
    sqrt((n - f - 2) / (n - 2 f - 1)) times the greatest distance between honest updates of one of them or, where
    `many`, of their convex hull. (n - f honest updates have sums of squares of at most n - f - 2 such squares; a wrong
    one that is chosen has no greater sum, and n - 2 f - 1 honest updates in it.)
    Raises: BadUsage for fewer than 2 f + 3 updates; NonFinite for NaN or infinity.
    Reference: Blanchard et al. 2017, Machine learning with adversaries, section 4.

    >>> Krum(wrong_devices=1).combine([np.float32([x]) for x in (0, 2, 3, 7, 1e30)], [1.0] * 5)
    array([2.], dtype=float32)
    """

    wrong_devices: int
    many: bool = False

    def __post_init__(self) -> None:
        _check_wrong(self.wrong_devices, "Krum")

    @property
    def least(self) -> int:
        return 2 * self.wrong_devices + 3

    def combine(self, updates: Sequence[Vector], weights: Sequence[float]) -> Vector:
        _check(updates, self.least, "Krum")
        ordered = _in_one_order(updates)
        products = _products(ordered, _median(ordered))
        squares = np.diag(products)
        distances = np.maximum(squares[:, None] + squares[None, :] - 2.0 * products, 0.0)
        np.fill_diagonal(distances, np.inf)
        nearest = np.sort(distances, axis=1)[:, : len(ordered) - self.wrong_devices - 2]
        best = np.argsort(nearest.sum(axis=1), kind="stable")
        chosen = [ordered[i] for i in best[: len(ordered) - self.wrong_devices if self.many else 1]]
        return Mean().combine(chosen, [1.0] * len(chosen))


@dataclass(frozen=True, kw_only=True)
class GeometricMedian:
    """The point with the least sum of distances to all updates. Breakdown point 1/2; O(n² d) time, O(n²) memory.

    Weiszfeld's steps from the median of each coordinate, on inner products: the point is a weighted mean of the
    updates, and a step changes n weights. A distance below a millionth of the median distance counts as that much.

    Guarantees: permutation invariance, translation equivariance; with at most f wrong updates, whatever the point z,
    the result lies within 2 (n - f) / (n - 2 f) times the greatest distance of an honest update from z, up to the
    smoothing.
    Raises: BadUsage for fewer than 2 f + 1 updates, f the wrong devices; NonFinite for NaN or infinity.
    Reference: Pillutla et al. 2022, arXiv:1912.13445 (the smoothed Weiszfeld algorithm).

    >>> GeometricMedian(wrong_devices=1).combine([np.float32([x]) for x in (0, 1, 1e30)], [1.0] * 3).round(3)
    array([1.], dtype=float32)
    """

    wrong_devices: int

    def __post_init__(self) -> None:
        _check_wrong(self.wrong_devices, "geometric median")

    @property
    def least(self) -> int:
        return 2 * self.wrong_devices + 1

    def combine(self, updates: Sequence[Vector], weights: Sequence[float]) -> Vector:
        _check(updates, self.least, "geometric median")
        ordered = _in_one_order(updates)
        centre = _median(ordered)
        shares = _weiszfeld(_products(ordered, centre))
        result = np.empty_like(centre)
        for place, block in _around(ordered, centre):
            result[place] = centre[place] + shares @ block
        return result


def _weiszfeld(products: Floats) -> Floats:
    """The shares (n,) of points in their geometric median, by their inner products (n, n) around a first guess.

    All shares are zero if more than half of the points are the guess itself: then it is the median.
    """
    squares = np.diag(products)
    distances = np.sqrt(squares)
    floor = SMOOTHING * float(np.median(distances))
    shares = np.zeros(len(squares))
    if floor == 0.0:
        return shares
    distances = np.maximum(distances, floor)
    for _ in range(STEPS):
        shares = 1.0 / distances
        shares /= shares.sum()
        along = products @ shares
        before, distances = distances, np.sqrt(np.maximum(squares - 2.0 * along + shares @ along, floor**2))
        if (np.abs(distances - before) <= TOLERANCE * before).all():
            break
    return shares


def _median(updates: Sequence[Vector]) -> Vector:
    return _middle(updates, trimmed=(len(updates) - 1) // 2)


def _middle(updates: Sequence[Vector], *, trimmed: int) -> Vector:
    """The mean of each coordinate without its `trimmed` least and greatest values."""
    result = np.empty_like(updates[0])
    for place in _places(updates):
        ordered = np.sort(np.stack([update[place] for update in updates], axis=1), axis=1)
        result[place] = ordered[:, trimmed : len(updates) - trimmed].mean(axis=1, dtype=np.float64)
    return result


def _in_one_order(updates: Sequence[Vector]) -> list[Vector]:
    """The updates in an order that is their own, so that neither a tie nor rounding shows in which order they came."""
    return sorted(updates, key=digest)


def _products(updates: Sequence[Vector], centre: Vector) -> Floats:
    """Inner products (n, n) of the updates around `centre`.

    Around one that wrong updates cannot move, distances between honest updates keep their precision.
    """
    products = np.zeros((len(updates), len(updates)))
    for _, block in _around(updates, centre):
        products += block @ block.T
    return products


def _around(updates: Sequence[Vector], centre: Vector) -> Iterator[tuple[slice, Floats]]:
    """Coordinates in blocks: which, and the updates less `centre` there (n, block)."""
    for place in _places(updates):
        block = np.stack([update[place] for update in updates]).astype(np.float64)
        block -= centre[place]
        yield place, block


def _places(updates: Sequence[Vector]) -> Iterator[slice]:
    """Coordinates in blocks, so that what is held beside the updates does not grow with them."""
    size, width = len(updates[0]), max(1, BLOCK // len(updates))
    return (slice(start, min(start + width, size)) for start in range(0, size, width))


def _check(updates: Sequence[Vector], least: int, name: str) -> None:
    if len(updates) < least:
        raise BadUsage(f"{name}: got {len(updates)} updates, expected at least {least}; wait for more devices")
    for update in updates:
        if update.shape != updates[0].shape or update.ndim != 1:
            raise ShapeMismatch(got=update.shape, expected=updates[0].shape, what="update")
        if not np.isfinite(update).all():
            raise NonFinite(f"{name}: got an update with NaN or infinity, expected numbers; leave that device out")


def _check_wrong(wrong_devices: int, name: str) -> None:
    if wrong_devices < 1:
        raise BadUsage(
            f"wrong devices: got {wrong_devices}, expected at least 1 for the {name}: how many it must stand; "
            "where none can be wrong, take the mean"
        )


COMBINERS: Mapping[str, Callable[[int], Combiner]] = {
    "mean": lambda wrong: Mean(wrong_devices=wrong),
    "median": lambda wrong: Median(wrong_devices=wrong),
    "trimmed-mean": lambda wrong: TrimmedMean(wrong_devices=wrong),
    "krum": lambda wrong: Krum(wrong_devices=wrong),
    "multi-krum": lambda wrong: Krum(wrong_devices=wrong, many=True),
    "geometric-median": lambda wrong: GeometricMedian(wrong_devices=wrong),
}


def combiner_named(name: str, *, wrong_devices: int) -> Combiner:
    """The rule of that name in `COMBINERS`, for that many wrong devices.

    Raises: BadUsage if there is none, or not for that many.
    """
    if name not in COMBINERS:
        raise BadUsage(f"combine: got {name!r}, expected one of {', '.join(COMBINERS)}")
    return COMBINERS[name](wrong_devices)
