"""The search for layouts: a beam over the graph, cheapest first, every candidate checked by `packing.gather`.

Candidates say where the outputs of a map should lie and which slots are folded together; whether a matrix fits such a
plan, dense or sparse, strided or grouped, is never assumed but found out. The first map of an input has the most
freedom, because the client lays out and repeats its features for nothing; the last has its folds for nothing, because
the client adds up the slots of one output after decryption.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import scipy.sparse as sp

from fedinfer.encrypted.costs import Costs
from fedinfer.encrypted.evaluator import chain_step
from fedinfer.encrypted.graph import Affine, Input, Product, Value, in_order, sources_of
from fedinfer.encrypted.packing import (
    EMPTY,
    Fold,
    Gathered,
    Layout,
    Places,
    folded,
    gather,
    power_of_two,
    reaching_shifts,
)
from fedinfer.errors import CompileError

BEAM = 6
RADICES = (2, 4, 8)
MAX_REPEATS = 64
# What a query costs in microseconds a byte, which is sent every time.
QUERY_US = 1e-2


@dataclass(frozen=True, kw_only=True)
class PackedMap:
    """An affine map as it will run: for each output ciphertext what it gathers, then rotations that fold.

    `split` is the giant step: a shift k is the baby k % split and the giant k - k % split.
    """

    gathered: tuple[Gathered, ...] = field(repr=False)
    split: int
    folds: tuple[tuple[int, ...], ...]
    layout: Layout
    period: int
    last: bool

    @property
    def shifts(self) -> list[int]:
        return sorted({shift for part in self.gathered for shift in part.shifts})

    @property
    def steps(self) -> set[int]:
        """Rotations of the gathering that need a key."""
        turned = {shift % self.split for shift in self.shifts}
        for part in self.gathered:
            giants = sorted({shift - shift % self.split for shift in part.shifts} - {0})
            step = chain_step(giants)
            turned |= {step} if step is not None else set(giants)
        return turned - {0}


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Where every value lies and how every map runs; `keys` are rotation steps with the level they are used at."""

    layouts: Mapping[Value, Layout] = field(default_factory=dict)
    maps: Mapping[Value, PackedMap] = field(default_factory=dict)
    keys: Mapping[int, int] = field(default_factory=dict)
    cost_us: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """Rows of each output ciphertext over a period, the fold, the shifts to try, and new layouts of inputs."""

    rows: Sequence[Places] = field(repr=False)
    fold: Fold
    shifts: Sequence[int] | None = None
    inputs: Mapping[Value, Layout] = field(default_factory=dict)


class Search:
    """Finds the cheapest `Packing` of a graph at given levels.

    `levels` maps each map and product to the level it runs at and the level it is rescaled to.
    """

    def __init__(
        self, output: Value, levels: Mapping[Value, tuple[int, int]], *, degree: int, key_bytes: Mapping[int, int],
        query_bytes: int, key_budget_bytes: int, key_us: float, known: dict[object, Gathered | None],
    ) -> None:  # fmt: skip
        self._output, self._levels = output, levels
        self._slots, self._costs = degree // 2, Costs(degree=degree)
        self._key_bytes, self._query_bytes, self._budget = key_bytes, query_bytes, key_budget_bytes
        self._key_us = key_us
        self._order = in_order(output)
        self._partner: dict[Value, Value] = {}
        for value in self._order:
            if isinstance(value, Product) and value.left is not value.right:
                self._partner[value.left], self._partner[value.right] = value.right, value.left
        # What was gathered depends on neither levels nor primes, so searches at one degree share it.
        self._known = known

    def best(self) -> Packing:
        """The cheapest packing found.

        Raises: CompileError naming the layer for which none fits.
        """
        beam = [Packing()]
        for value in self._order:
            grown: list[Packing] = []
            for state in beam:
                grown.extend(self._grow(state, value))
            if not grown:
                raise CompileError(
                    f"layer {value.name}: no packing of {value.size} values fits {self._slots} slots a ciphertext"
                    f" and {self._budget / 1e6:.0f} MB of keys"
                )
            beam = self._cheapest(grown)
        return beam[0]

    def _cheapest(self, states: Sequence[Packing]) -> list[Packing]:
        best: dict[object, Packing] = {}
        for state in sorted(states, key=lambda state: state.cost_us):
            signature = tuple((id(value), layout.held.tobytes()) for value, layout in state.layouts.items())
            best.setdefault(signature, state)
        return list(best.values())[:BEAM]

    def _grow(self, state: Packing, value: Value) -> Iterator[Packing]:
        if isinstance(value, Input):
            yield state
        elif isinstance(value, Product):
            left, right = state.layouts.get(value.left), state.layouts.get(value.right)
            if left is None or right is None or not left.same(right):
                return
            level, lower = self._levels[value]
            count = len(left.held)
            cost = count * (self._costs.multiply(level) + self._rescale(level, lower))
            yield replace(state, layouts={**state.layouts, value: left}, cost_us=state.cost_us + cost)
        elif isinstance(value, Affine):
            for candidate in self._candidates(state, value):
                yield from self._apply(state, value, candidate)

    def _rescale(self, level: int, lower: int) -> float:
        return sum(self._costs.divide(to) for to in range(lower, level))

    def _apply(self, state: Packing, value: Affine, candidate: _Candidate) -> Iterator[Packing]:
        layouts = {**state.layouts, **candidate.inputs}
        sources = [layouts[source] for source, _ in value.sources]
        matrices = [matrix for _, matrix in value.sources]
        parts: list[Gathered] = []
        for rows in candidate.rows:
            part = self._gather(value, matrices, sources, rows, candidate)
            if part is None:
                return
            parts.append(part)
        last = value is self._output
        held = [folded(rows, candidate.fold, self._slots, tiled=parts[0].tiled) for rows in candidate.rows]
        layout = Layout(held=np.stack(held))
        level, lower = self._levels[value]
        fresh = sum(len(new.held) for new in candidate.inputs.values()) * self._query_bytes * QUERY_US
        for split in self._splits(parts, value):
            radices = RADICES if candidate.fold.runs and not last else RADICES[:1]
            for radix in radices:
                folds = () if last else _folds(candidate.fold, radix)
                packed = PackedMap(
                    gathered=tuple(parts), split=split, folds=folds, layout=layout, period=candidate.fold.period,
                    last=last,
                )  # fmt: skip
                keys = dict(state.keys)
                for step in packed.steps:
                    keys[step] = max(keys.get(step, 0), level)
                for group in folds:
                    for step in group:
                        keys[step] = max(keys.get(step, 0), lower)
                size = sum(self._key_bytes[at] for at in keys.values())
                before = sum(self._key_bytes[at] for at in state.keys.values())
                if size > self._budget:
                    continue
                cost = self._cost(packed, level, lower) + fresh + (size - before) * self._key_us
                yield Packing(
                    layouts={**layouts, value: layout}, maps={**state.maps, value: packed}, keys=keys,
                    cost_us=state.cost_us + cost,
                )  # fmt: skip

    def _cost(self, packed: PackedMap, level: int, lower: int) -> float:
        babies = {
            (where, shift % packed.split)
            for part in packed.gathered
            for where, g in part.weights.items()
            for shift in g
        }
        turned = [baby for baby in babies if baby[1]]
        total = 0.0
        for index, part in enumerate(packed.gathered):
            shifts = part.shifts
            giants = {s - s % packed.split for s in shifts} - {0}
            terms = sum(len(group) for group in part.weights.values())
            # Babies are shared by the output ciphertexts.
            total += self._costs.linear(
                level, len(turned) if index == 0 else 0, len(giants), terms, len({where for where, _ in turned})
            )
            if turned and index and not giants:
                total += self._costs.divide(level)
            total += self._rescale(level, lower) + sum(self._costs.fold(lower, len(group)) for group in packed.folds)
        return total

    def _splits(self, parts: Sequence[Gathered], value: Affine) -> list[int]:
        """Giant steps worth trying: none at all, and those that leave the fewest rotations."""
        shifts = sorted({shift for part in parts for shift in part.shifts})
        options: dict[int, tuple[int, int]] = {}
        spread = np.array(shifts)
        unit = int(np.gcd.reduce(spread)) if spread.any() else 1
        steps = {unit * k for k in range(1, 33)} | {1 << k for k in range(1, 16)}
        for split in steps:
            babies = len(set((spread % split).tolist()) - {0})
            giants = len(set((spread - spread % split).tolist()) - {0})
            if giants:
                options[split] = (babies, giants)
        best = sorted(options, key=lambda split: options[split][0] + 2 * options[split][1])[:3]
        fewest = sorted(options, key=lambda split: sum(options[split]))[:1]
        return list(dict.fromkeys([1 << 30, *best, *fewest, unit]))

    def _gather(
        self, value: Affine, matrices: Sequence[sp.csr_matrix], layouts: Sequence[Layout], rows: Places,
        candidate: _Candidate,
    ) -> Gathered | None:  # fmt: skip
        fold = candidate.fold
        key = (
            self._slots, id(value), rows.tobytes(), fold, tuple(layout.held.tobytes() for layout in layouts),
            tuple(candidate.shifts or ()),
        )  # fmt: skip
        if key not in self._known:
            tries: list[Sequence[int]] = []
            if candidate.shifts is not None:
                tries.append(candidate.shifts)
            else:
                found = reaching_shifts(matrices, layouts, rows, fold.period)
                tries += [found, sorted(found)]
            done = [gather(matrices, layouts, rows, fold, shifts, self._slots) for shifts in tries]
            whole = [part for part in done if part is not None]
            self._known[key] = min(whole, key=lambda part: len(part.shifts)) if whole else None
        return self._known[key]

    def _candidates(self, state: Packing, value: Affine) -> Iterator[_Candidate]:
        fresh = [source for source, _ in value.sources if isinstance(source, Input) and source not in state.layouts]
        partner = self._partner.get(value)
        last = value is self._output
        targets: list[list[Places]] = []
        if partner is not None and partner in state.layouts:
            layout = state.layouts[partner]
            targets = [list(layout.held)]
        elif fresh and len(value.sources) == 1:
            yield from self._first(value, fresh[0], last=last)
            return
        new: dict[Value, Layout] = {source: self._natural(source.size) for source in fresh}
        layouts = {**state.layouts, **new}
        known = [layouts[source] for source, _ in value.sources]
        if not targets:
            if value.elementwise and not last and all(known[0].same(layout) for layout in known):
                yield _Candidate(
                    rows=list(known[0].held), fold=Fold(period=known[0].period, groups=1), shifts=[0], inputs=new
                )
                return
            targets = [self._dense(value.size)[0]] if last else self._targets(value, known)
        for rows in targets:
            yield from self._inner(value, rows, known, new, last=last, free=partner is None)

    def _inner(
        self, value: Affine, rows: Sequence[Places], known: Sequence[Layout], new: Mapping[Value, Layout], *,
        last: bool, free: bool,
    ) -> Iterator[_Candidate]:  # fmt: skip
        period = len(rows[0])
        longest = max(layout.period for layout in known)
        yield _Candidate(rows=rows, fold=Fold(period=period, groups=max(1, longest // period)), inputs=new)
        single = len(known) == 1 and len(known[0].held) == 1 and len(rows) == 1
        if last:
            yield _Candidate(rows=rows, fold=Fold(period=period, groups=max(1, longest // period)),
                             shifts=range(min(period, longest)), inputs=new)  # fmt: skip
        elif single and free and longest < self._slots and period <= longest and (known[0].held >= 0).any():
            for regions in (2, 4, 8, 16, 32):
                step = -(-period // regions)
                stride = (self._slots // regions - step) // longest * longest + step
                reach = stride - longest + period
                if step >= 1 and stride > 0 and reach >= period and (regions - 1) * step < period:
                    fold = Fold(period=period, groups=longest // period, regions=regions, stride=stride, reach=reach)
                    yield _Candidate(rows=rows, fold=fold, shifts=range(step), inputs=new)

    def _dense(self, size: int, repeats: int = 1) -> list[list[Places]]:
        """Elements in their order, each `repeats` times, over a period; several ciphertexts if one is too small."""
        period = power_of_two(size) * repeats
        if period <= self._slots:
            t = np.arange(period) // repeats
            return [[np.where(t < size, t, EMPTY)]]
        if repeats > 1:
            return []
        t = np.arange(-(-size // self._slots) * self._slots)
        return [list(np.where(t < size, t, EMPTY).reshape(-1, self._slots))]

    def _targets(self, value: Affine, known: Sequence[Layout]) -> list[list[Places]]:
        targets = [rows for repeats in self._repeats(value) for rows in self._dense(value.size, repeats)]
        source = value.sources[0][0]
        targets += self._grid(value.shape, source.shape, known[0])
        if value.elementwise or value.size == source.size:
            targets.append(list(known[0].held))
        return targets

    def _repeats(self, value: Affine) -> list[int]:
        """How often each element may stand in a row: as often as the last map has outputs makes that map a product."""
        outputs = power_of_two(self._output.size)
        return [1, *(r for r in (2, 4, 8, 16, 32, 64) if r <= min(outputs, MAX_REPEATS))]

    def _grid(self, shape: tuple[int, ...], before: tuple[int, ...], layout: Layout) -> list[list[Places]]:
        """Feature maps that lie on the grid of the maps they are made from, with gaps where a layer strides."""
        if len(shape) not in (2, 3) or len(before) != len(shape):
            return []
        found = layout.held
        places = np.full(int(np.prod(before)), -1)
        at = np.nonzero(found[0] >= 0)[0]
        places[found[0][at[::-1]]] = at[::-1]
        first = places[: int(np.prod(before[1:]))].reshape(before[1:])
        if (first < 0).any():
            return []
        block = power_of_two(int(first.max()) + 1)
        out = []
        for rounding in (np.floor, np.ceil):
            strides = [max(1, int(rounding(b / s))) for b, s in zip(before[1:], shape[1:], strict=True)]
            taken = [
                np.minimum(np.arange(s) * t, b - 1) for s, t, b in zip(shape[1:], strides, before[1:], strict=True)
            ]
            if any(len(set(t.tolist())) < len(t) for t in taken):
                continue
            plane = first[np.ix_(*taken)].reshape(-1)
            each = max(1, self._slots // block)
            elements = np.arange(int(np.prod(shape))).reshape(shape[0], -1)
            ciphertexts = -(-shape[0] // each)
            period = min(power_of_two(shape[0]), each) * block
            rows = np.full((ciphertexts, period), EMPTY)
            for channel in range(shape[0]):
                rows[channel // each, (channel % each) * block + plane] = elements[channel]
            out.append(list(rows))
        return out

    def _natural(self, size: int) -> Layout:
        return Layout(held=np.stack(self._dense(size)[0]))

    def _first(self, value: Affine, source: Value, *, last: bool) -> Iterator[_Candidate]:
        ((_, matrix),) = value.sources
        wanted = (
            self._dense(value.size) if last else [r for k in self._repeats(value) for r in self._dense(value.size, k)]
        )
        for rows in wanted:
            if len(rows) == 1:
                yield from self._repeated(matrix, source, rows[0])
                if not last:
                    yield from self._stretched(matrix, source, rows[0])
        if len(value.shape) in (2, 3) and not last:
            yield from self._windows(value, matrix, source)
            yield from self._raster(value, source)
        layout = self._natural(source.size)
        for rows in wanted[:1]:
            yield from self._inner(value, rows, [layout], {source: layout}, last=last, free=True)

    def _repeated(self, matrix: sp.csr_matrix, source: Value, rows: Places) -> Iterator[_Candidate]:
        """Every output has its own copy of what it needs: one product and folds."""
        period = len(rows)
        most = int(np.diff(matrix.indptr).max(initial=1))
        for ciphertexts in (1, 2, 4):
            groups = power_of_two(-(-most // ciphertexts))
            if groups * period > self._slots or groups * ciphertexts > 2 * most:
                continue
            held = np.full((ciphertexts, groups, period), EMPTY)
            for t, row in enumerate(rows):
                if row >= 0:
                    columns = matrix.indices[matrix.indptr[row] : matrix.indptr[row + 1]]
                    where = np.arange(len(columns))
                    held[where // groups, where % groups, t] = columns
            layout = Layout(held=held.reshape(ciphertexts, -1))
            yield _Candidate(rows=[rows], fold=Fold(period=period, groups=groups), shifts=[0], inputs={source: layout})

    def _stretched(self, matrix: sp.csr_matrix, source: Value, rows: Places) -> Iterator[_Candidate]:
        """Regions whose copies of the input each start a step further on: few shifts for a wide dense layer."""
        period, n = len(rows), matrix.shape[1]
        for regions in (2, 4, 8, 16, 32):
            stride = self._slots // regions
            step = -(-n // regions)
            reach = stride - step + 1
            if reach < period or step >= period:
                continue
            held = np.full(self._slots, EMPTY)
            t = np.arange(stride)
            for region in range(regions):
                column = region * step + t
                # Past the end of the input the columns begin again.
                held[region * stride : (region + 1) * stride] = np.where(
                    column % (regions * step) < n, column % (regions * step), EMPTY
                )
            fold = Fold(period=period, groups=1, regions=regions, stride=stride, reach=min(reach, stride))
            yield _Candidate(rows=[rows], fold=fold, shifts=range(step), inputs={source: Layout(held=held[None])})

    def _windows(self, value: Affine, matrix: sp.csr_matrix, source: Value) -> Iterator[_Candidate]:
        """Image to columns on the client: channels share the window, so they turn by whole blocks of windows."""
        channels, windows = value.shape[0], int(np.prod(value.shape[1:]))
        wide, many = power_of_two(windows), power_of_two(channels)
        supports = []
        for window in range(windows):
            rows_of = range(window, value.size, windows)
            columns = [matrix.indices[matrix.indptr[row] : matrix.indptr[row + 1]] for row in rows_of]
            supports.append(np.unique(np.concatenate(columns)))
        blocks = max(power_of_two(max(map(len, supports))), many)
        if blocks * wide > self._slots:
            return
        held = np.full((blocks, wide), EMPTY)
        for w, support in enumerate(supports):
            held[: len(support), w] = support
        t = np.arange(many * wide)
        rows = np.where((t % wide < windows) & (t // wide < channels), t // wide * windows + t % wide, EMPTY)
        yield _Candidate(
            rows=[rows],
            fold=Fold(period=many * wide, groups=blocks // many),
            shifts=[d * wide for d in range(blocks)],
            inputs={source: Layout(held=held.reshape(1, -1))},
        )

    def _raster(self, value: Affine, source: Value) -> Iterator[_Candidate]:
        """The image as it is, channels in blocks: the taps of a kernel are shifts."""
        if len(source.shape) != len(value.shape):
            return
        planes = int(np.prod(source.shape[1:]))
        for pitch in {source.shape[-1], power_of_two(source.shape[-1])}:
            flat = np.arange(planes)
            width = source.shape[-1]
            place = flat // width * pitch + flat % width
            block = power_of_two(int(place.max()) + 1)
            if block > self._slots:
                continue
            each = self._slots // block
            count = -(-source.shape[0] // each)
            held = np.full((count, min(power_of_two(source.shape[0]), each) * block), EMPTY)
            for channel in range(source.shape[0]):
                held[channel // each, (channel % each) * block + place] = channel * planes + flat
            layout = Layout(held=held)
            for rows in self._grid(value.shape, source.shape, layout):
                period = len(rows[0])
                fold = Fold(period=period, groups=max(1, layout.period // period))
                yield _Candidate(rows=rows, fold=fold, inputs={source: layout})


def _folds(fold: Fold, radix: int) -> tuple[tuple[int, ...], ...]:
    """Sums of `radix` rotations at a time: more keys, fewer key switches."""
    out = []
    for step, count in fold.runs:
        while count > 1:
            taken = min(radix, count)
            out.append(tuple(step * k for k in range(1, taken)))
            step, count = step * taken, count // taken
    return tuple(out)


def depth_of(output: Value) -> dict[Value, int]:
    """How many maps and products lead to each value."""
    depths: dict[Value, int] = {}
    for value in in_order(output):
        depths[value] = max((depths[source] + 1 for source in sources_of(value)), default=0)
    return depths
