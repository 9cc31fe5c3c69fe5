"""Exact samples of the discrete Gaussian and of the discrete Laplace law: bits in, integers out.

Both laws are P(x) ∝ exp(-rate |x|^power) on all integers, and are drawn by rejection from steps that lie above them.
The integers are cut into blocks of 2^shift; an entry of a table of 2^16 entries names the block, one bit the sign, and
further bits the place in the block, so that a proposal is exactly uniform over entries, signs and places. It is kept
if U < scale · exp(-rate |x|^power) / (entries of the block), with U uniform on [0, 1): every entry count is at least
the largest value of that numerator in its block, so what is kept has exactly the law asked for, if the bits are
uniform. The last entry is the tail: superblocks of which each is half as likely as the one before.

Floating point decides only what it can decide for certain. The value that U is compared with is computed with an
absolute error below 2^-46: the exponent has a relative error of at most 5 · 2^-53, z exp(-z) < 0.4, and the remaining
operations, `numpy.exp` among them, err by a few units in the last place. So the comparison is right unless the two
numbers are within MARGIN = 2^-40 of each other, which leaves room for an `exp` that is wrong by thousands of units.
The few proposals within it are decided in integers with as many more bits of U as it takes.

Reference: Canonne, Kamath and Steinke 2020, arXiv:2004.00010, for the laws and their privacy; von Neumann 1951 for
comparing a uniform number digit by digit; Marsaglia and Tsang 2000, doi:10.18637/jss.v005.i08, for the steps.
Not promised: constant time. The number of proposals depends on the noise.
"""

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from decimal import MAX_EMAX, MIN_EMIN, ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from fractions import Fraction
from functools import cache, lru_cache, partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedinfer.errors import BadUsage

Integers = NDArray[np.int64]
Kernel = Callable[..., tuple[int, int, int, int]]
log = logging.getLogger("fedinfer.privacy")

MARGIN = 2.0**-40
ENTRIES = 2**16
# A proposal is two words: entry (16 bits), sign (1), place in the block (47); and the first 64 bits of U.
PROPOSAL_BYTES = 16
BATCH = 2**13
# From so many numbers on a compiled loop decides what is certain; it draws the same numbers.
COMPILED_FROM = 2**12
# Larger factors of exp(-exponent), of which one in 2^450 proposals of the tail has one, are no floats.
MOST_FLOAT_ODDS = 2**512
SMALLEST_VARIANCE, LARGEST_VARIANCE = Fraction(1, 10**6), 2**90
SMALLEST_SCALE, LARGEST_SCALE = Fraction(1, 10**6), 2**45


class Bits(Protocol):
    """What is needed of a stream of uniform bytes; `NoiseStream` is one."""

    @property
    def position(self) -> int: ...
    def take(self, size_bytes: int) -> bytes: ...
    def put_back(self, unread: bytes) -> None: ...
    def extra(self, place: int, size_bytes: int) -> bytes: ...
    def alone(self) -> AbstractContextManager[object]: ...


def discrete_gaussian(stream: Bits, *, variance: Fraction | int, count: int) -> Integers:
    """`count` independent integers (count,) with P(x) proportional to exp(-x² / (2 variance)).

    Guarantees: exactly this law if the bits of `stream` are uniform and independent, up to an event of probability
    2^-1000; |x| < 2^62; `count` numbers are the same whether drawn in one call or in several.
    Raises: BadUsage unless the variance lies between 10^-6 and 2^90.

        >>> from fedinfer.privacy.noise import insecure_seeded_noise
        >>> discrete_gaussian(insecure_seeded_noise("example"), variance=Fraction(9, 4), count=8).tolist()
        [2, 2, 2, 1, 1, 1, 1, 0]
    """
    if not SMALLEST_VARIANCE <= variance <= LARGEST_VARIANCE:
        raise BadUsage(f"variance: got {float(variance):g}, expected a number from 1e-6 to 2**90")
    return _draw(_steps(Fraction(1, 2) / Fraction(variance), 2), stream, count)


def discrete_laplace(stream: Bits, *, scale: Fraction | int, count: int) -> Integers:
    """`count` independent integers (count,) with P(x) proportional to exp(-|x| / scale).

    Guarantees: those of `discrete_gaussian`.
    Raises: BadUsage unless the scale lies between 10^-6 and 2^45.
    """
    if not SMALLEST_SCALE <= scale <= LARGEST_SCALE:
        raise BadUsage(f"scale: got {float(scale):g}, expected a number from 1e-6 to 2**45")
    return _draw(_steps(1 / Fraction(scale), 1), stream, count)


def uniform_below(stream: Bits, *, limit: int, count: int) -> Integers:
    """`count` independent integers (count,), uniform on 0 to `limit` - 1, exactly.

    Raises: BadUsage unless the limit lies between 1 and 2^63.
    """
    if not 1 <= limit <= 2**63:
        raise BadUsage(f"limit: got {limit}, expected a number from 1 to 2**63")
    mask = np.uint64((1 << (limit - 1).bit_length()) - 1)
    out = np.empty(0, np.int64)
    while len(out) < count:
        # At least half of them are below.
        words = np.frombuffer(stream.take(16 * (count - len(out)) + 64), "<u8") & mask
        out = np.append(out, words[words < limit].astype(np.int64))[:count]
    return out


@dataclass(frozen=True, kw_only=True)
class _Steps:
    """The steps above one law: `blocks` [entry] is a block; the arrays by block end with the tail.

    A proposal of a block is kept if U < `odds` [block] · exp(-exponent), and surely if U · 2^64 < `surely` [block].
    """

    rate: Fraction
    power: int
    shift: int
    scale: int
    blocks: NDArray[np.uint16]
    weights: NDArray[np.int64]
    odds: NDArray[np.float64]
    surely: NDArray[np.uint64]
    tail_start: int
    tail_shift: int

    def exponent(self, x: int) -> Fraction:
        return self.rate * Fraction(abs(x) ** self.power)


@lru_cache(maxsize=64)
def _steps(rate: Fraction, power: int) -> _Steps:
    def exponent(x: int) -> Fraction:
        return rate * Fraction(x) ** power

    shift = 0
    while exponent(16 << (shift + 1)) <= 1:
        shift += 1
    count = 1
    while exponent(count << shift) < 9:
        count += 1
    start = count << shift
    # The exponent is convex: each superblock adds at least 1 to it, and e > 2 pays for its half probability.
    tail_shift = shift
    while exponent(start + (1 << tail_shift)) - exponent(start) < 1:
        tail_shift += 1
    heights = np.array([math.exp(-float(exponent(block << shift))) for block in range(count + 1)])
    # The first superblock has half the tail's probability, and its entries are spread over a wider block.
    tops = heights * np.array([1.0] * count + [2.0 ** (1 + tail_shift - shift)])
    scale = int(ENTRIES / tops.sum())
    while (weights := np.ceil(scale * tops * (1.0 + MARGIN)).clip(1.0).astype(np.int64)).sum() > ENTRIES:
        scale -= 1
    weights[0] += ENTRIES - weights.sum()
    least = scale * heights[1:] / weights[:-1] - MARGIN
    surely = [int(max(0.0, value) * 2.0**64) for value in least]
    return _Steps(
        rate=rate,
        power=power,
        shift=shift,
        scale=scale,
        blocks=np.repeat(np.arange(count + 1, dtype=np.uint16), weights),
        weights=weights,
        odds=scale / weights,
        surely=np.array([*surely, 0], np.uint64),
        tail_start=start,
        tail_shift=tail_shift,
    )


def _draw(steps: _Steps, stream: Bits, count: int) -> Integers:
    out = np.empty(count, np.int64)
    filled = 0
    kernel = _kernel() if count >= COMPILED_FROM else None
    fill = _fill if kernel is None else partial(_fill_compiled, kernel)
    with stream.alone():
        while filled < count:
            place = stream.position
            proposals = min(BATCH, (count - filled) * 9 // 8 + 8)
            words = stream.take(PROPOSAL_BYTES * proposals)
            read, wrote = fill(steps, np.frombuffer(words, "<u8").reshape(proposals, 2), out[filled:], stream, place)
            filled += wrote
            if read < proposals:
                stream.put_back(words[PROPOSAL_BYTES * read :])
    return out


def _fill(steps: _Steps, words: NDArray[np.uint64], out: Integers, stream: Bits, place: int) -> tuple[int, int]:
    """Write what is kept of the proposals `words` (n, 2) to `out` until it is full; how many were read and written."""
    x, kept = _decide(steps, words, stream, place)
    chosen = np.flatnonzero(kept)[: len(out)]
    out[: len(chosen)] = x[chosen]
    return int(chosen[-1]) + 1 if len(chosen) == len(out) else len(words), len(chosen)


@cache
def _kernel() -> Kernel | None:
    """The compiled loop; None where it cannot be, as on a disk that nobody may write compiled code to."""
    try:
        from fedinfer.privacy.discrete_kernel import fill
    except (ImportError, RuntimeError) as error:
        log.warning("noise is drawn at half the speed: %s", error)
        return None
    return fill


def _fill_compiled(
    kernel: Kernel, steps: _Steps, words: NDArray[np.uint64], out: Integers, stream: Bits, place: int
) -> tuple[int, int]:
    """What `_fill` does, by the compiled loop as far as it is certain."""
    law = (steps.blocks, steps.surely, steps.odds, float(steps.rate), steps.power, steps.shift, MARGIN)
    read = wrote = 0
    while True:
        more_read, more_wrote, x, block = kernel(words[read:], out[wrote:], *law)
        read, wrote = read + more_read, wrote + more_wrote
        if read == len(words) or wrote == len(out):
            return read, wrote
        x, kept = _decide_one(steps, x, block, int(words[read, 1]), stream, place + PROPOSAL_BYTES * read)
        if kept:
            out[wrote] = x
            wrote += 1
        read += 1


def _decide(
    steps: _Steps, words: NDArray[np.uint64], stream: Bits, place: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """What each proposal proposes, and whether it is kept."""
    first = words[:, 0].astype(np.int64)
    level = np.ascontiguousarray(words[:, 1])
    block = steps.blocks[first & (ENTRIES - 1)].astype(np.int64)
    x = (block << steps.shift) + ((first >> 17) & ((1 << steps.shift) - 1))
    # A set sign bit gives -1 - x: zero is proposed once, and what is proposed is never nearer to zero than x.
    x ^= -((first >> 16) & 1)
    kept = level < steps.surely[block]
    open_ = np.flatnonzero(~kept)
    exponent = float(steps.rate) * np.abs(x[open_].astype(np.float64)) ** steps.power
    gap = steps.odds[block[open_]] * np.exp(-exponent) - level[open_] * 2.0**-64
    kept[open_] = gap > 0.0
    in_tail = block[open_] == len(steps.weights) - 1
    for index in open_[in_tail | (np.abs(gap) <= MARGIN)]:
        here = place + PROPOSAL_BYTES * int(index)
        x[index], kept[index] = _decide_one(steps, int(x[index]), int(block[index]), int(level[index]), stream, here)
    return x, kept


def _decide_one(steps: _Steps, x: int, block: int, level: int, stream: Bits, place: int) -> tuple[int, bool]:
    """What one proposal proposes, and whether it is kept: those of the tail, and those that floats cannot decide."""
    if block < len(steps.weights) - 1:
        odds = Fraction(steps.scale, int(steps.weights[block]))
    else:
        x, odds = _tail(steps, stream, place, negative=x < 0)
        if odds < MOST_FLOAT_ODDS:
            # exponent · odds · exp(-exponent) is below 16 in the tail: floats err by less than 2^-46 here too.
            gap = float(odds) * math.exp(-float(steps.rate) * abs(float(x)) ** steps.power) - level * 2.0**-64
            if abs(gap) > MARGIN:
                return x, gap > 0.0
    return x, _below(level, stream, place, odds, steps.exponent(x))


# Where the parts of a proposal's extra bits begin, in bytes: the place in a superblock, its number, more bits of U.
TAIL_NUMBER, MORE_LEVEL = 8, 8 + 128


def _tail(steps: _Steps, stream: Bits, place: int, *, negative: bool) -> tuple[int, Fraction]:
    """A proposal of the tail, and the factor of exp(-exponent) in the probability that it is kept."""
    bits = stream.extra(place, MORE_LEVEL)
    within = int.from_bytes(bits[:TAIL_NUMBER], "little") & ((1 << steps.tail_shift) - 1)
    number = 1024 - int.from_bytes(bits[TAIL_NUMBER:], "little").bit_length()
    x = steps.tail_start + (number << steps.tail_shift) + within
    odds = Fraction(steps.scale << (1 + number + steps.tail_shift - steps.shift), int(steps.weights[-1]))
    return -1 - x if negative else x, odds


def _below(level: int, stream: Bits, place: int, odds: Fraction, exponent: Fraction) -> bool:
    """Whether U < odds · exp(-exponent), with 64 bits of U in `level` and the rest in the proposal's extra bits.

    It ends: U agrees with the number that it is compared with in ever more bits only if it is that number.
    """
    size = 0
    while True:
        more = stream.extra(place, MORE_LEVEL + size)[MORE_LEVEL:] if size else b""
        level_now = (level << (8 * size)) | int.from_bytes(more, "big")
        bits = 64 + 8 * size
        low, high = exp_bounds(exponent, bits)
        # U lies in [level_now, level_now + 1) / 2^bits, and exp(-exponent) in [low, high] / 2^bits.
        if (level_now + 1) * odds.denominator <= low * odds.numerator:
            return True
        if level_now * odds.denominator >= high * odds.numerator:
            return False
        size = 2 * size + 8


def exp_bounds(exponent: Fraction, bits: int) -> tuple[int, int]:
    """Integers with low ≤ 2^bits · exp(-exponent) ≤ high, at most 2 apart; `exponent` is not negative.

    `Decimal.exp` is correctly rounded (Python's documentation of `decimal`): its neighbours enclose the true value.
    """
    if exponent >= bits:
        return 0, 1
    digits = bits // 3 + 8
    down = Context(prec=digits, rounding=ROUND_FLOOR, Emin=MIN_EMIN, Emax=MAX_EMAX)
    up = Context(prec=digits, rounding=ROUND_CEILING, Emin=MIN_EMIN, Emax=MAX_EMAX)
    numerator, denominator = Decimal(exponent.numerator), Decimal(exponent.denominator)
    low = down.next_minus(down.exp(up.divide(numerator, denominator).copy_negate()))
    high = up.next_plus(up.exp(down.divide(numerator, denominator).copy_negate()))
    return math.floor(Fraction(low) * 2**bits), math.ceil(Fraction(high) * 2**bits)
