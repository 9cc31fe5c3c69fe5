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
from fedinfer.encrypted.graph import Affine, Product, Value, in_order, sources_of
from fedinfer.encrypted.packing import power_of_two
from fedinfer.encrypted.params import MAX_BITS_128, MAX_PRIME_BITS, MIN_PRIME_BITS, Parameters
from fedinfer.errors import EncryptedError

Floats = NDArray[np.float64]
# Bits of plaintexts, of those of the last map, of what a rescale keeps, and of a fresh query: a first grid, and one for
# what asks for more precision.
GRIDS = (
    ((15, 18, 21, 24), (12, 15, 18, 21, 24), (22, 24, 26, 28, 30, 32, 34, 36), (22, 24, 26, 28, 30, 32, 34)),
    ((24, 28, 32, 36), (21, 24, 28, 32), (31, 36, 40, 44), (30, 36, 42)),
)
ANSWER_BITS = (32, 36, 40, 44, 48)
# Room for a sign and for values twice as large as the calibration data showed.
HEADROOM_BITS = 2.0
# Largest error over standard deviation that a few thousand answers show.
TAIL = 5.0
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
    """Parameters and, for each depth, the level before and after rescaling and the nominal scale in bits after it."""

    parameters: Parameters
    before: tuple[int, ...]
    after: tuple[int, ...]
    scale_bits: tuple[float, ...]
    error: float

    @property
    def effort(self) -> tuple[int, float]:
        """A stand-in for cost: the ring degree, then the squares of the levels."""
        return self.parameters.degree, sum(level * (level + 1) for level in self.before[1:])


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """A chain in bits, before its primes are looked for."""

    prime_bits: tuple[int, ...]
    special: bool
    fresh: float
    before: tuple[int, ...]
    after: tuple[int, ...]
    scale_bits: tuple[float, ...]
    error: float


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
        bound = max(v.bound for v in here)
        # Between the product and its fold a slot may hold a single large term.
        for v in here:
            if isinstance(v, Affine):
                bound = max([bound, *(s.bound * float(abs(m).max()) for s, m in v.sources if m.nnz)])
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


def chains(
    output: Value, depths: Mapping[Value, int], *, precision: float, degrees: tuple[int, ...], wide: bool = False
) -> list[Chain]:
    """Feasible chains, the cheapest first by `Chain.effort`, one for each pattern of levels at each degree.

    `precision` is the largest error of an output, absolute; `wide` if every slot of an answer is an output.
    """
    steps = _steps(output, depths)
    best: dict[tuple[int, tuple[int, ...]], _Plan] = {}
    for degree, grid in [(degree, grid) for grid in GRIDS for degree in degrees]:
        if grid is not GRIDS[0] and best:
            break
        for plan in _feasible(steps, precision, degree, grid, degree // 2 if wide else power_of_two(output.size)):
            key = (degree, plan.before)
            # All are exact enough, so the one of the fewest bytes.
            if key not in best or (sum(plan.prime_bits), plan.error) < (sum(best[key].prime_bits), best[key].error):
                best[key] = plan
    found = []
    for (degree, _), plan in best.items():
        try:
            parameters = Parameters(
                degree=degree, prime_bits=plan.prime_bits, special=plan.special, scale_bits=plan.fresh
            )
            _ = parameters.primes
        except EncryptedError:
            # There are few primes of 20 bits for a large ring.
            continue
        found.append(
            Chain(
                parameters=parameters,
                before=plan.before,
                after=plan.after,
                scale_bits=plan.scale_bits,
                error=plan.error,
            )
        )
    return sorted(found, key=lambda chain: chain.effort)


def missing_bits(output: Value, depths: Mapping[Value, int]) -> int | None:
    """How many bits of modulus the largest ring lacks for this graph at any precision; None if it lacks none."""
    steps = _steps(output, depths)
    sizes = [sum(plan.prime_bits) for plan in _feasible(steps, math.inf, UNBOUNDED_DEGREE, GRIDS[0], 1)]
    largest = max(MAX_BITS_128)
    lacking = min(sizes, default=1 << 12) - MAX_BITS_128[largest]
    return lacking if lacking > 0 else None


def _patterns(depth: int) -> Iterator[tuple[bool, ...]]:
    if depth <= MAX_FREE_DEPTH:
        yield from itertools.product((True, False), repeat=depth)
        return
    for start in range(3):
        for period in (1, 2, 3):
            yield tuple((i + start) % period == 0 for i in range(depth))


def _feasible(
    steps: list[_Step], precision: float, degree: int, grid: Sequence[Sequence[int]], outputs: int
) -> Iterator[_Plan]:
    depth = len(steps) - 1
    allowed = MAX_BITS_128.get(degree, degree)
    for pattern in _patterns(depth):
        for plain, last, kept, fresh in itertools.product(*grid):
            plan = _walk(steps, pattern, (fresh, plain, last, kept), degree, allowed, precision, outputs)
            if plan is not None:
                yield plan


def _walk(
    steps: list[_Step], pattern: tuple[bool, ...], bits_of: tuple[float, float, float, float], degree: int,
    allowed: int, precision: float, outputs: int,
) -> _Plan | None:  # fmt: skip
    fresh, plain, last, kept = bits_of
    depth = len(steps) - 1
    tops, scales, dropped = [fresh], [fresh], [0]
    primes: list[int] = []
    scale = fresh
    for i in range(1, depth + 1):
        top = 2 * scale if steps[i].product else scale + (last if i == depth else plain)
        scale, count = top, 0
        if pattern[i - 1]:
            bits = round(top - kept)
            if bits < MIN_PRIME_BITS:
                return None
            count = -(-bits // MAX_PRIME_BITS)
            sizes = [bits // count + (k < bits % count) for k in range(count)]
            if min(sizes) < MIN_PRIME_BITS:
                return None
            primes += sizes
            scale = top - bits
        tops.append(top)
        scales.append(scale)
        dropped.append(count)
    need = scales[-1] + steps[-1].bound_bits + HEADROOM_BITS
    answer = next((bits for bits in ANSWER_BITS if bits >= need), None)
    if answer is None:
        return None
    data = [answer, *reversed(primes)]
    special = depth > 1 or degree > 2048
    if not special:
        total = data
    else:
        # A special prime larger than the others keeps key switching quiet, and costs no time.
        total = [*data, min(MAX_PRIME_BITS, max(data) + SPECIAL_BITS, max(max(data), allowed - sum(data)))]
    if sum(total) > allowed:
        return None
    before, after, level = [len(data)], [len(data)], len(data)
    for i in range(1, depth + 1):
        if tops[i] + steps[i].bound_bits + HEADROOM_BITS > sum(data[:level]):
            return None
        before.append(level)
        level -= dropped[i]
        after.append(level)
    error = TAIL * _error(steps, tops, scales, (before, after), (plain, last), degree, total, outputs)
    if error > precision:
        return None
    return _Plan(
        prime_bits=tuple(total), special=special, fresh=float(fresh), before=tuple(before), after=tuple(after),
        scale_bits=tuple(scales), error=error,
    )  # fmt: skip


def _error(
    steps: list[_Step], tops: list[float], scales: list[float], levels: tuple[list[int], list[int]],
    plain: tuple[float, float], degree: int, bits: Sequence[int], outputs: int,
) -> float:  # fmt: skip
    """The deviation of an output. `levels` is the level before and after each depth, `bits` those of all primes."""
    before, after = levels
    divided = noise.divided(degree)
    total = (steps[0].gain * noise.fresh(degree) * 2.0 ** -scales[0]) ** 2
    for i in range(1, len(steps)):
        switched = noise.switched(degree, bits[: before[i]], bits[-1])
        here = (divided**2 + switched**2 * (1 if steps[i].product else TURNS)) * 4.0 ** -tops[i]
        if not steps[i].product:
            # A plaintext's scale is what its product needs less what its source has.
            here += (steps[i].rounding * noise.rounded(degree) * 2.0 ** -plain[i == len(steps) - 1]) ** 2
            if i > 1:
                # Its sources turn too.
                total += (steps[i - 1].gain * switched * 2.0 ** -scales[i - 1]) ** 2
            if i < len(steps) - 1:
                folded = noise.switched(degree, bits[: after[i]], bits[-1])
                here += FOLDS * (divided**2 + folded**2 * TURNS) * 4.0 ** -scales[i]
        if after[i] < before[i]:
            here += (divided * 2.0 ** -scales[i]) ** 2
        total += (steps[i].gain or 1.0) ** 2 * here
    # An output is the sum of the slots of a class in the worst case, so its mean is that many times smaller.
    answered = noise.answered(degree, outputs) * degree / (2 * outputs) * 2.0 ** -scales[-1]
    return math.sqrt(total + answered**2)
