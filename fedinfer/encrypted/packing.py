"""How one affine map becomes rotations, plaintexts and folds, for given places of its inputs and outputs.

A layout says which element each slot of each ciphertext holds, or -1. A map is done in two moves. First every slot p
gathers: z[p] = sum over shifts k of weight_k[p] * x[p + k]. Then the slots that belong to one output are folded
together by rotations and sums. Which slots belong together is a question of the `Fold`; which weight goes where is then
forced, and `gather` finds it for any matrix and any layout, or says that the shifts do not reach.

Reference: Halevi and Shoup 2014, eprint 2014/106 (diagonals); Juvekar et al. 2018, arXiv:1801.05507 (hybrid);
Ebel et al. 2023, arXiv:2311.03470 (convolutions as diagonals).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Places = NDArray[np.int64]
EMPTY = -1


def power_of_two(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(0, int(number) - 1).bit_length()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """`held` (ciphertexts, period): the element in each slot, repeated over all slots; -1 is a slot nobody may read."""

    held: Places = field(repr=False)

    @property
    def period(self) -> int:
        return int(self.held.shape[1])

    def same(self, other: "Layout") -> bool:
        """Whether two values lie alike, slot by slot."""
        return self.held.shape == other.held.shape and bool((self.held == other.held).all())

    def over(self, slots: int) -> Places:
        """The elements of all slots (ciphertexts, slots)."""
        return np.tile(self.held, (1, slots // self.period))

    def spread(self, values: Floats, slots: int) -> Floats:
        """Values of the elements in their slots, zero elsewhere (ciphertexts, slots)."""
        held = self.over(slots)
        return np.where(held >= 0, values[np.maximum(held, 0)], 0.0)


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Which slots are summed into output slot t: those at t + r * stride + g * period, r < regions, g < groups.

    `reach` is the number of output slots that are valid afterwards, if there are several regions.
    """

    period: int
    groups: int
    regions: int = 1
    stride: int = 0
    reach: int = 0

    @property
    def runs(self) -> list[tuple[int, int]]:
        """(first step, number) of sums of rotations by step, 2 step, ..."""
        out = []
        if self.regions > 1:
            out.append((self.stride, self.regions))
        if self.groups > 1:
            out.append((self.period, self.groups))
        return out


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """weights[source, ciphertext][shift] (slots,): what each slot gathers for one output ciphertext."""

    weights: dict[tuple[int, int], dict[int, Floats]] = field(repr=False)
    tiled: bool

    @property
    def shifts(self) -> list[int]:
        return sorted({shift for group in self.weights.values() for shift in group})


def gather(
    matrices: Sequence[sp.csr_matrix],
    layouts: Sequence[Layout],
    rows: Places,
    fold: Fold,
    shifts: Sequence[int],
    slots: int,
) -> Gathered | None:
    """The weights for output rows `rows` (fold.period,), -1 for none, or None if `shifts` do not reach every column.

    Guarantees: after the fold, slot t holds row `rows[t % period]` of the matrices times the sources, exactly.
    """
    if fold.regions > 1 and fold.groups == 1:
        # Nothing repeats inside a region, so every slot that is to be valid is found its own weights.
        rows = np.resize(rows, fold.reach)
    period = len(rows)
    span = period * fold.groups
    tiled = fold.regions == 1 and all(layout.period <= span for layout in layouts)
    present = np.nonzero(rows >= 0)[0]
    left, blocks = 0, []
    for matrix in matrices:
        block = np.zeros((period, matrix.shape[1]))
        block[present] = matrix[rows[present]].toarray()
        left += int(np.count_nonzero(block))
        blocks.append(block)
    found: dict[tuple[int, int], dict[int, Floats]] = {}
    weights = np.zeros((fold.regions, span))
    for shift in shifts:
        if not left:
            break
        for index, layout in enumerate(layouts):
            for number, held in enumerate(layout.held):
                taken = _take(blocks[index], held, fold.stride, shift, weights)
                if taken:
                    left -= taken
                    length = span - period + max(fold.reach, period)
                    laid = _laid(weights, fold, slots, length, tiled=tiled)
                    found.setdefault((index, number), {})[shift] = laid
                    weights[:] = 0.0
    return None if left else Gathered(weights=found, tiled=tiled)


@njit(cache=True)
def _take(block, held, stride, shift, weights):  # type: ignore[no-untyped-def]
    """Move to `weights` (regions, span) every weight of `block` (period, columns) that the shift brings to its row."""
    period, taken = block.shape[0], 0
    for region in range(weights.shape[0]):
        for u in range(weights.shape[1]):
            column = held[(region * stride + u + shift) % held.shape[0]]
            if column >= 0 and block[u % period, column] != 0.0:
                weights[region, u] = block[u % period, column]
                block[u % period, column] = 0.0
                taken += 1
    return taken


def _laid(weights: Floats, fold: Fold, slots: int, length: int, *, tiled: bool) -> Floats:
    span = weights.shape[1]
    if tiled:
        return np.tile(weights[0], slots // span)
    out = np.zeros(slots)
    if fold.regions == 1:
        out[:span] = weights[0]
        return out
    for region, row in enumerate(weights):
        start = region * fold.stride
        out[start : start + length] = np.resize(row, length)
    return out


def folded(rows: Places, fold: Fold, slots: int, *, tiled: bool) -> Places:
    """What the slots hold after the fold: `rows` in a period, or in those few slots that the fold makes whole."""
    if tiled or (fold.regions == 1 and fold.period * fold.groups == slots):
        return rows
    reach = fold.reach if fold.regions > 1 else fold.period
    out = np.full(slots, EMPTY)
    out[:reach] = np.resize(rows, reach)
    return out


def reaching_shifts(
    matrices: Sequence[sp.csr_matrix], layouts: Sequence[Layout], rows: Places, period: int
) -> list[int]:
    """Shifts modulo `period` that bring each column to every row that needs it, the most useful first."""
    counts: dict[int, int] = {}
    present = np.nonzero(rows >= 0)[0]
    for matrix, layout in zip(matrices, layouts, strict=True):
        entries = matrix[rows[present]].tocoo()
        row, column = present[entries.row], entries.col
        modulus = min(period, layout.period)
        for held in layout.held:
            place = np.full(matrix.shape[1], -1)
            filled = np.nonzero(held >= 0)[0]
            place[held[filled[::-1]]] = filled[::-1]
            inside = place[column] >= 0
            shift = (place[column[inside]] - row[inside]) % modulus
            for value, count in zip(*np.unique(shift, return_counts=True), strict=True):
                counts[int(value)] = counts.get(int(value), 0) + int(count)
    return sorted(counts, key=lambda shift: (-counts[shift], shift))
