"""The modulus chain: which primes, how large each scale is, and where to rescale.

A map multiplies the scale by that of its plaintexts, a product squares it, and a rescale divides by a prime. Rescaling
late keeps primes few and large, and the cost of a rotation grows with the square of their number; rescaling early keeps
them small. The solver walks every pattern of rescaling over a grid of scales, drops what would overflow or err too
much by the deviations of `noise`, and keeps the cheapest few for the search for layouts to price.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedinfer.encrypted import noise
from fedinfer.encrypted.graph import Affine, Input, Product, Value, evaluated, in_order, sources_of
from fedinfer.encrypted.packing import power_of_two
from fedinfer.encrypted.params import MAX_BITS_128, MAX_PRIME_BITS, MIN_PRIME_BITS, Parameters
from fedinfer.errors import EncryptedError

Floats = NDArray[np.float64]
# Bits of plaintexts, of those of the last map, of what a rescale keeps, and of a fresh query: a first grid, and two for
# what asks for more precision, the last for flooding.
GRIDS = (
    ((15, 18, 21, 24), (12, 15, 18, 21, 24), (22, 24, 26, 28, 30, 32, 34, 36), (22, 24, 26, 28, 30, 32, 34)),
    ((24, 28, 32, 36), (21, 24, 28, 32), (31, 36, 40, 44), (30, 36, 42)),
    ((36, 40, 44, 48), (30, 34, 38, 42, 46), (40, 42, 44, 46, 48, 50, 52, 54, 56), (44, 46, 50)),
)
# Bits of what is left for the answer: one prime, or two where flooding needs the room.
ANSWER_BITS = (32, 36, 40, 44, 48, 64, 72, 80, 88, 96)
# Room for a sign and for values twice as large as the calibration data showed, with features stretched.
HEADROOM_BITS = 2.0
STRETCH = 1.25
# Largest error over standard deviation that a few thousand answers show.
TAIL = 5.0
# A larger ring is seldom cheaper than the least that fits.
ENOUGH_DEGREES = 2
MAX_FREE_DEPTH = 9
UNBOUNDED_DEGREE = 1 << 20
DELTA = 1e-4
# How much larger the special prime is than the others, where there is room.
SPECIAL_BITS = 6
# Rotations that a map adds up, and folds after it, as far as nothing is known of its packing.
TURNS = 8
FOLDS = 4


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Parameters and, for each depth, the level before and after rescaling and the nominal scale in bits after it.

    The deviations of an output: `circuit` is what the circuit makes before its last map, `last` what that adds to each
    slot, `zero` what the encryption of zero adds to the mean of its slots.
    """

    parameters: Parameters
    before: tuple[int, ...]
    after: tuple[int, ...]
    scale_bits: tuple[float, ...]
    circuit: float
    last: float
    zero: float

    def noise(self, share: float) -> float:
        """The largest error of an output by what the circuit does, if it is the sum of `share` slots."""
        return TAIL * math.hypot(self.circuit, self.last * math.sqrt(share))

    def error(self, share: float, flooding: float) -> float:
        """The same, made `flooding` times larger, with the encryption of zero in every answer."""
        return math.hypot(self.noise(share) * flooding, TAIL * self.zero * share)

    @property
    def bits(self) -> tuple[int, float]:
        """All primes together, then the error: what is sent, and what is gained."""
        return sum(self.parameters.prime_bits), self.error(1.0, 1.0)

    @property
    def effort(self) -> tuple[int, float]:
        """A stand-in for cost: the ring degree, then the squares of the levels."""
        return self.parameters.degree, sum(level * (level + 1) for level in self.before[1:])


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """What every chain at one degree must give: `outputs` is how many classes of slots an answer has."""

    flooding: float
    degree: int
    outputs: int

    @property
    def allowed_bits(self) -> int:
        return MAX_BITS_128.get(self.degree, self.degree)


@dataclass(frozen=True, kw_only=True)
class _Step:
    """What happens at one depth: is there a product, how large are values, how do errors there reach the output."""

    product: bool
    bound_bits: float
    gain: float
    rounding: float


def _steps(output: Value, depths: Mapping[Value, int]) -> list[_Step]:
    generator = np.random.default_rng(0)
    values = in_order(output)
    base = {v: v.rows[:64] for v in values}
    # Features may be larger than those of the calibration data, and nothing may wrap then.
    far = evaluated(output, {v: v.rows * STRETCH for v in values if isinstance(v, Input)})
    bounds = {v: max(v.bound, float(np.abs(far[v]).max(initial=0.0))) for v in values}
    steps = []
    for depth in range(depths[output] + 1):
        here = [v for v in values if depths[v] == depth]
        gain, rounding = 0.0, 0.0
        for v in here:
            moved = generator.normal(0.0, DELTA, base[v].shape)
            gain += float(np.mean((_rerun(output, v, base[v] + moved, base) - base[output]) ** 2)) / DELTA**2
            if isinstance(v, Affine):
                for source, matrix in v.sources:
                    per_row = matrix.nnz / max(1, matrix.shape[0])
                    rounding += 2 * per_row * float(np.mean(base[source] ** 2))
        bound = max(bounds[v] for v in here)
        # Between the product and its fold a slot may hold a single large term.
        for v in here:
            if isinstance(v, Affine):
                bound = max([bound, *(bounds[s] * float(abs(m).max()) for s, m in v.sources if m.nnz)])
        steps.append(
            _Step(
                product=any(isinstance(v, Product) for v in here),
                bound_bits=math.log2(max(bound, 2.0**-10)),
                gain=math.sqrt(gain),
                rounding=math.sqrt(rounding),
            )
        )
    return steps


def _rerun(output: Value, changed: Value, rows: Floats, base: Mapping[Value, Floats]) -> Floats:
    found: dict[Value, Floats] = {changed: rows}
    for value in in_order(output):
        if value is changed or not any(source in found for source in sources_of(value)):
            continue
        if isinstance(value, Product):
            found[value] = found.get(value.left, base[value.left]) * found.get(value.right, base[value.right])
        elif isinstance(value, Affine):
            total = base[value].copy()
            for source, matrix in value.sources:
                if source in found:
                    total = total + (found[source] - base[source]) @ matrix.T
            found[value] = total
    return found.get(output, base[output])


class Chains:
    """The feasible chains of a graph, whose own noise is made `flooding` times larger at the end.

    `wide` if every slot of an answer is an output.
    """

    def __init__(
        self, output: Value, depths: Mapping[Value, int], *, flooding: float, degrees: tuple[int, ...], wide: bool
    ) -> None:
        self._steps = _steps(output, depths)
        self._degrees, self._flooding = degrees, flooding
        self._outputs = {degree: degree // 2 if wide else power_of_two(output.size) for degree in degrees}
        self._scanned: dict[tuple[int, int], list[_Scan]] = {}

    def within(self, precision: float, share: float) -> list[Chain]:
        """Those whose outputs, each the sum of `share` slots, err by `precision` at most, at the least degrees.

        The cheapest by `Chain.effort` is first; there is one for each pattern of levels.
        """
        best: dict[tuple[int, tuple[int, ...]], Chain] = {}
        for grid, degree in [(grid, degree) for grid in range(len(GRIDS)) for degree in self._degrees]:
            fit = {found for found, _ in best}
            if len(fit) >= ENOUGH_DEGREES or (fit and degree == self._degrees[0]):
                break
            for scan in self._all(grid, degree):
                for chain in scan.smallest(precision, share):
                    key = (degree, chain.before)
                    if key not in best or chain.bits < best[key].bits:
                        best[key] = chain
        return sorted(best.values(), key=lambda chain: chain.effort)

    def missing_bits(self) -> int | None:
        """How many bits of modulus the largest ring lacks at any precision; None if it lacks none."""
        anything = _Wanted(flooding=1.0, degree=UNBOUNDED_DEGREE, outputs=1)
        sizes = [int(scan.total.min()) for scan in _scans(self._steps, anything, GRIDS[0])]
        lacking = min(sizes, default=1 << 12) - MAX_BITS_128[max(MAX_BITS_128)]
        return lacking if lacking > 0 else None

    def _all(self, grid: int, degree: int) -> list["_Scan"]:
        if (grid, degree) not in self._scanned:
            wanted = _Wanted(flooding=self._flooding, degree=degree, outputs=self._outputs[degree])
            self._scanned[grid, degree] = list(_scans(self._steps, wanted, GRIDS[grid]))
        return self._scanned[grid, degree]


def _patterns(depth: int) -> Iterator[tuple[bool, ...]]:
    if depth <= MAX_FREE_DEPTH:
        yield from itertools.product((True, False), repeat=depth)
        return
    for start in range(3):
        for period in (1, 2, 3):
            yield tuple((i + start) % period == 0 for i in range(depth))


def _scans(steps: list[_Step], wanted: _Wanted, grid: Sequence[Sequence[int]]) -> "Iterator[_Scan]":
    tried = np.array(list(itertools.product(*grid)), np.float64).T
    for pattern in _patterns(len(steps) - 1):
        scan = _Scan(steps, pattern, tried, wanted)
        if len(scan.total):
            yield scan


class _Scan:
    """One pattern of rescaling over a whole grid of bits (4, n), side by side; only what fits is kept.

    Each row of `tops`, `scales`, `dropped` and `counts` is a depth: the scale before and after rescaling, the bits that
    it divides by and how many primes these are.
    """

    def __init__(self, steps: list[_Step], pattern: Sequence[bool], tried: Floats, wanted: _Wanted) -> None:
        plain, last, kept, fresh = tried
        self._degree, depth, nothing = wanted.degree, len(steps) - 1, np.zeros_like(fresh)
        tops, scales, dropped, counts = [fresh], [fresh], [nothing], [nothing]
        for i in range(1, depth + 1):
            top = 2 * scales[-1] if steps[i].product else scales[-1] + (last if i == depth else plain)
            bits = np.rint(top - kept) if pattern[i - 1] else nothing
            tops.append(top)
            scales.append(top - bits)
            dropped.append(bits)
            counts.append(np.ceil(bits / MAX_PRIME_BITS))
        small = np.array([*ANSWER_BITS, np.inf])
        need = scales[-1] + steps[-1].bound_bits + HEADROOM_BITS
        answer = small[np.searchsorted(small, need)]
        self._special = depth > 1 or wanted.degree > 2048
        each = np.array(
            [np.divide(b, c, out=np.zeros_like(b), where=c > 0) for b, c in zip(dropped, counts, strict=True)]
        )
        left_over = 1.0 + (answer > MAX_PRIME_BITS)
        largest = np.maximum(np.ceil(answer / left_over), np.ceil(each).max(axis=0))
        data = answer + np.sum(dropped, axis=0)
        # A special prime larger than the others keeps key switching quiet, and costs no time.
        roomy = np.minimum(largest + SPECIAL_BITS, np.maximum(largest, wanted.allowed_bits - data))
        special = np.minimum(MAX_PRIME_BITS, roomy) if self._special else nothing
        fits = np.isfinite(answer) & (data + special <= wanted.allowed_bits)
        if not self._special:
            fits &= (data == answer) & (left_over == 1)
        for i in range(1, depth + 1):
            if pattern[i - 1]:
                fits &= (dropped[i] >= MIN_PRIME_BITS) & (np.floor(each[i]) >= MIN_PRIME_BITS)
            left = answer + np.sum(dropped[i:], axis=0)
            fits &= tops[i] + steps[i].bound_bits + HEADROOM_BITS <= left
        self._tops, self._scales = np.array(tops)[:, fits], np.array(scales)[:, fits]
        self._dropped, self._counts = np.array(dropped)[:, fits], np.array(counts)[:, fits]
        self._answer, self._left_over, self._key = answer[fits], left_over[fits], special[fits]
        self.total = (data + special)[fits]
        self._circuit, self._last = self._deviations(steps, plain[fits], last[fits])
        self._zero = noise.answered(wanted.degree, wanted.outputs) * 2.0 ** -self._scales[-1]
        self._flooding = wanted.flooding

    def _deviations(self, steps: list[_Step], plain: Floats, last: Floats) -> tuple[Floats, Floats]:
        """Those of an output by what the circuit does before its last map, and of a slot by that map."""
        degree, depth = self._degree, len(steps) - 1
        divided = noise.divided(degree)
        # What a key switch adds at the level before each depth: every prime that is left counts.
        low, high = np.floor(self._dropped / np.maximum(self._counts, 1)), np.zeros_like(self._dropped)
        high = self._dropped - low * self._counts
        powers = high * 4.0 ** (low + 1 - self._key) + (self._counts - high) * 4.0 ** (low - self._key)
        kept = self._left_over * 4.0 ** (self._answer / self._left_over - self._key)
        left = np.cumsum(powers[::-1], axis=0)[::-1] + kept
        switched = (
            self._special * degree * noise.ERROR_DEVIATION * np.sqrt(np.vstack([left, left[-1:] - powers[-1:]]) / 12.0)
        )
        total = (steps[0].gain * noise.fresh(degree) * 2.0 ** -self._scales[0]) ** 2
        for i in range(1, depth + 1):
            here = (divided**2 + switched[i] ** 2 * (1 if steps[i].product else TURNS)) * 4.0 ** -self._tops[i]
            if not steps[i].product:
                # A plaintext's scale is what its product needs less what its source has.
                given = last if i == depth else plain
                here = here + (steps[i].rounding * noise.rounded(degree) * 2.0**-given) ** 2
                if i > 1:
                    # Its sources turn too.
                    total = total + (steps[i - 1].gain * switched[i] * 2.0 ** -self._scales[i - 1]) ** 2
                if i < depth:
                    folded = divided**2 + switched[i + 1] ** 2 * TURNS
                    here = here + FOLDS * folded * 4.0 ** -self._scales[i]
            here = here + (self._dropped[i] > 0) * (divided * 2.0 ** -self._scales[i]) ** 2
            if i < depth:
                total = total + (steps[i].gain or 1.0) ** 2 * here
        return np.asarray(np.sqrt(total), np.float64), np.asarray(np.sqrt(here), np.float64)

    def smallest(self, precision: float, share: float) -> "Iterator[Chain]":
        """For each pattern of levels the chain of the fewest bytes that errs by `precision` at most."""
        own = np.hypot(self._circuit, self._last * math.sqrt(share)) * self._flooding
        error = TAIL * np.hypot(own, self._zero * share)
        exact = np.nonzero(error <= precision)[0]
        order = exact[np.lexsort((error[exact], self.total[exact]))]
        seen: set[bytes] = set()
        for index in order:
            levels = self._counts[:, index].tobytes() + self._left_over[index].tobytes()
            if levels not in seen:
                chain = self._chain(int(index))
                if chain is not None:
                    seen.add(levels)
                    yield chain

    def _chain(self, index: int) -> Chain | None:
        primes: list[int] = []
        counts = self._counts[:, index].astype(int).tolist()
        for bits, count in zip(self._dropped[:, index].astype(int).tolist(), counts, strict=True):
            primes += [bits // count + (k < bits % count) for k in range(count)]
        answer, left_over = int(self._answer[index]), int(self._left_over[index])
        data = [*([answer] if left_over == 1 else [answer // 2] * 2), *reversed(primes)]
        before = [left_over + sum(counts[i:]) for i in range(len(counts))]
        try:
            parameters = Parameters(
                degree=self._degree, prime_bits=(*data, int(self._key[index])) if self._special else tuple(data),
                special=self._special, scale_bits=float(self._scales[0, index]),
            )  # fmt: skip
            _ = parameters.primes
        except EncryptedError:
            # There are few primes of 20 bits for a large ring.
            return None
        return Chain(
            parameters=parameters,
            before=tuple(before),
            after=tuple(level - count for level, count in zip(before, counts, strict=True)),
            scale_bits=tuple(self._scales[:, index].tolist()),
            circuit=float(self._circuit[index]),
            last=float(self._last[index]),
            zero=float(self._zero[index]),
        )
