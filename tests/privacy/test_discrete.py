"""The discrete laws are exact: their steps in integers, the slow path, chi-square tests that see 2 % of sigma."""

import json
import logging
import math
import sys
from dataclasses import replace
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedinfer.errors import BadUsage
from fedinfer.privacy import discrete
from fedinfer.privacy.discrete import discrete_gaussian, discrete_laplace, exp_bounds, uniform_below
from fedinfer.privacy.noise import NoiseStream, insecure_seeded_noise

FALSE_ALARM = 1e-9
VECTORS = json.loads((Path(__file__).parent / "vectors" / "discrete.json").read_text(encoding="utf-8"))


def exact_law(rate: Fraction, power: int) -> dict[int, Decimal]:
    """P(x) ∝ exp(-rate |x|^power) to 60 digits, for all x whose weight is not below 10^-65."""
    with localcontext() as context:
        context.prec = 70
        negative_rate = -Decimal(rate.numerator) / Decimal(rate.denominator)
        weights = [Decimal(1)]
        while weights[-1] > Decimal(10) ** -65:
            weights.append((negative_rate * len(weights) ** power).exp())
        total = weights[0] + 2 * sum(weights[1:])
        return {x: weights[abs(x)] / total for x in range(1 - len(weights), len(weights))}


def gaussian_rate(variance: Fraction) -> Fraction:
    return 1 / (2 * variance)


def follows(values: np.ndarray, law: dict[int, Decimal]) -> bool:
    """A chi-square test of the law over all integers, those expected fewer than ten times together."""
    seen = dict(zip(*(part.tolist() for part in np.unique(values, return_counts=True)), strict=True))
    expected = {x: float(p) * len(values) for x, p in law.items()}
    often = [x for x, mean in expected.items() if mean >= 10.0]
    got = [seen.get(x, 0) for x in often]
    means = [expected[x] for x in often]
    got.append(len(values) - sum(got))
    means.append(len(values) - sum(means))
    if means[-1] < 10.0:
        got[-2:], means[-2:] = [got[-2] + got[-1]], [means[-2] + means[-1]]
    statistic = sum((g - m) ** 2 / m for g, m in zip(got, means, strict=True))
    return bool(stats.chi2.sf(statistic, len(got) - 1) > FALSE_ALARM)


@pytest.mark.parametrize("variance", [Fraction(1, 4), Fraction(1), Fraction(22, 7), Fraction(100), Fraction(10**6, 37)])
def test_the_discrete_gaussian_is_exact_and_the_test_sees_two_per_cent(variance: Fraction) -> None:
    values = discrete_gaussian(insecure_seeded_noise(f"gaussian {variance}"), variance=variance, count=10**6)
    assert follows(values, exact_law(gaussian_rate(variance), 2))
    for factor in (Fraction(102, 100), Fraction(98, 100)):
        assert not follows(values, exact_law(gaussian_rate(variance * factor**2), 2))


@pytest.mark.parametrize("scale", [Fraction(1, 2), Fraction(1), Fraction(10, 3), Fraction(50)])
def test_the_discrete_laplace_is_exact_and_the_test_sees_two_per_cent(scale: Fraction) -> None:
    values = discrete_laplace(insecure_seeded_noise(f"laplace {scale}"), scale=scale, count=10**6)
    assert follows(values, exact_law(1 / scale, 1))
    for factor in (Fraction(102, 100), Fraction(98, 100)):
        assert not follows(values, exact_law(1 / (scale * factor), 1))


@pytest.mark.parametrize("sigma", [2**20, 2**40, 2**45])
def test_large_sigmas_are_gaussian_and_the_test_sees_two_per_cent(sigma: int) -> None:
    values = discrete_gaussian(insecure_seeded_noise(f"large {sigma}"), variance=sigma**2, count=10**6) / sigma

    def looks_right(scaled: np.ndarray) -> bool:
        # The variance sees a wrong scale, Kolmogorov's distance a wrong shape.
        square = float((scaled**2).sum())
        tail = 2 * min(stats.chi2.cdf(square, len(scaled)), stats.chi2.sf(square, len(scaled)))
        return bool(tail > FALSE_ALARM and stats.kstest(scaled, "norm").pvalue > FALSE_ALARM)

    assert looks_right(values)
    assert not looks_right(values * 1.02)
    assert not looks_right(values * 0.98)
    # Each moment lies within six of its own standard deviations.
    for order, moment, spread in ((1, 0.0, 1.0), (3, 0.0, 15.0), (4, 3.0, 96.0), (6, 15.0, 10170.0)):
        assert abs((values**order).mean() - moment) < 6 * math.sqrt(spread / len(values))


laws = st.one_of(
    st.tuples(st.fractions(Fraction(1, 10**6), 2**90, max_denominator=10**6).map(gaussian_rate), st.just(2)),
    st.tuples(st.fractions(Fraction(1, 10**6), 2**45, max_denominator=10**6).map(lambda scale: 1 / scale), st.just(1)),
    # Fractions are drawn evenly otherwise: nearly all would be very large.
    st.tuples(st.floats(1e-6, 1e6).map(lambda v: gaussian_rate(Fraction(v))), st.just(2)),
    st.tuples(st.floats(1e-6, 1e6).map(lambda s: 1 / Fraction(s)), st.just(1)),
)


@settings(deadline=None, max_examples=60)
@given(law=laws)
def test_the_steps_lie_above_the_law(law: tuple[Fraction, int]) -> None:
    steps = discrete._steps(*law)
    tail = len(steps.weights) - 1
    assert np.array_equal(np.bincount(steps.blocks, minlength=tail + 1), steps.weights)
    assert len(steps.blocks) == discrete.ENTRIES
    assert steps.tail_start == tail << steps.shift
    one = 1 << 128
    for block in {0, 1, tail // 2, tail - 1} & set(range(tail)):
        low, high = (steps.exponent(edge << steps.shift) for edge in (block, block + 1))
        # At the edge near zero the law is highest, and its entries are enough for it, by an upper bound.
        assert steps.scale * exp_bounds(low, 128)[1] <= int(steps.weights[block]) * one
        # What is surely kept would be kept at the other edge, by a lower bound.
        sure = Fraction(int(steps.surely[block]), 2**64) * int(steps.weights[block]) * one
        assert sure <= steps.scale * exp_bounds(high, 128)[0]
    for number in (0, 1, 2, 40):
        x = steps.tail_start + (number << steps.tail_shift)
        odds = Fraction(steps.scale << (1 + number + steps.tail_shift - steps.shift), int(steps.weights[-1]))
        assert odds * exp_bounds(steps.exponent(x), 128)[1] <= one
    assert steps.surely[-1] == 0
    # Most proposals are kept, whatever the law; half of the small ones fall on the wrong side of zero.
    kept = steps.scale * float(sum(exp_bounds(steps.exponent(x << steps.shift), 64)[0] for x in range(tail))) / 2**64
    assert kept / discrete.ENTRIES > 0.45


@pytest.mark.parametrize(
    "law", [(Fraction(1, 2), 2), (Fraction(1, 800), 2), (Fraction(1, 2**81), 2), (Fraction(1, 9), 1)]
)
def test_the_slow_path_decides_as_the_fast_one(law: tuple[Fraction, int], monkeypatch: pytest.MonkeyPatch) -> None:
    fast = discrete._draw(discrete._steps(*law), insecure_seeded_noise("slow"), 5000)
    steps = discrete._steps(*law)
    monkeypatch.setattr(discrete, "MARGIN", 2.0)
    decided = []
    below = discrete._below
    monkeypatch.setattr(discrete, "_below", lambda *args: decided.append(1) or below(*args))
    never_sure = replace(steps, surely=np.zeros_like(steps.surely))
    slow = discrete._draw(never_sure, insecure_seeded_noise("slow"), 5000)
    assert len(decided) >= 5000
    assert np.array_equal(fast, slow)


@pytest.mark.parametrize("margin", [discrete.MARGIN, 0.01])
@pytest.mark.parametrize(
    "law",
    [
        (Fraction(1, 2), 2),
        (Fraction(7), 2),
        (Fraction(1, 800), 2),
        (Fraction(1, 2**81), 2),
        (Fraction(1, 2**91), 2),
        (Fraction(1, 9), 1),
        (Fraction(1, 2**45), 1),
    ],
)
def test_the_compiled_loop_draws_the_same_numbers(
    law: tuple[Fraction, int], margin: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Within a wide margin many proposals are left to exact arithmetic, one after another.
    count = 300_000 if margin == discrete.MARGIN else 5000
    monkeypatch.setattr(discrete, "MARGIN", margin)
    drawn, places = [], []
    for start in (0, count + 1):
        monkeypatch.setattr(discrete, "COMPILED_FROM", start)
        stream = insecure_seeded_noise("compiled")
        drawn.append(discrete._draw(discrete._steps(*law), stream, count))
        places.append(stream.position)
    assert np.array_equal(drawn[0], drawn[1])
    assert places[0] == places[1]


def test_a_device_that_cannot_compile_draws_the_same_numbers_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiled = discrete_gaussian(insecure_seeded_noise("device"), variance=2**80, count=10_000)
    discrete._kernel.cache_clear()
    monkeypatch.setitem(sys.modules, "fedinfer.privacy.discrete_kernel", None)
    try:
        with caplog.at_level(logging.WARNING, logger="fedinfer.privacy"):
            for _ in range(2):
                again = discrete_gaussian(insecure_seeded_noise("device"), variance=2**80, count=10_000)
        assert discrete._kernel() is None
    finally:
        discrete._kernel.cache_clear()
    assert np.array_equal(again, compiled)
    assert len([record for record in caplog.records if "half the speed" in record.message]) == 1


def test_the_slow_path_asks_for_more_bits_until_it_knows() -> None:
    """U is 1/e to 300 bits, just below and just above: the first 64 bits cannot tell, nor can 128 or 256."""
    bits = 1024
    low, _ = exp_bounds(Fraction(1), bits)

    class Given(NoiseStream):
        def __init__(self, number: int) -> None:
            super().__init__(bytes(32), void=True)
            self._digits = bytes(discrete.MORE_LEVEL) + number.to_bytes(bits // 8, "big")[8:]

        def extra(self, place: int, size_bytes: int) -> bytes:
            return (self._digits + bytes(size_bytes))[:size_bytes]

    for nudge, expected in ((-(1 << 700), True), (1 << 700, False)):
        number = low + nudge
        level = number >> (bits - 64)
        assert level == low >> (bits - 64)
        assert discrete._below(level, Given(number), 0, Fraction(1), Fraction(1)) is expected


@pytest.mark.parametrize("sizes", [[1] * 50 + [99_950], [100_000], [0, 33_333, 66_667], [99_999, 1]])
def test_numbers_do_not_depend_on_how_many_are_drawn_at_once(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = discrete_gaussian(insecure_seeded_noise("chunks"), variance=100, count=100_000)
    monkeypatch.setattr(discrete, "BATCH", 1000)
    tails = []
    tail = discrete._tail
    monkeypatch.setattr(discrete, "_tail", lambda *args, **kwargs: tails.append(1) or tail(*args, **kwargs))
    stream = insecure_seeded_noise("chunks")
    parts = [discrete_gaussian(stream, variance=100, count=size) for size in sizes]
    assert np.array_equal(np.concatenate(parts), whole)
    # Tails, which use extra bits, were among them.
    assert tails


def test_the_tail_is_drawn_and_never_overflows() -> None:
    class Far(NoiseStream):
        """The tail's entry with U = 0, and a superblock whose number has every bit zero: the farthest there is."""

        def take(self, size_bytes: int) -> bytes:
            return (b"\xff\xff\xff\xff\xff\xff\xff\xff" + bytes(8)) * (size_bytes // 16)

        def extra(self, place: int, size_bytes: int) -> bytes:
            return b"\xff" * 8 + bytes(size_bytes - 8)

    far = Far(bytes(32), void=True)
    for steps in (discrete._steps(Fraction(1, 2**91), 2), discrete._steps(Fraction(1, 2**45), 1)):
        x, _ = discrete._tail(steps, far, 0, negative=True)
        assert -(2**62) < x < -(2**50)
        # Its odds are no float.
        assert discrete._decide_one(steps, -1, len(steps.weights) - 1, 2**63, far, 0) == (x, False)
    # With fewer zero bits it is kept: U is 0.
    steps = discrete._steps(Fraction(1, 2), 2)
    words = np.frombuffer(far.take(16), "<u8").reshape(1, 2)
    x, kept = discrete._decide(steps, words, insecure_seeded_noise("tail"), 0)
    assert x[0] <= -1 - steps.tail_start
    assert kept.all()


def test_what_floats_cannot_decide_in_the_tail_is_decided_exactly() -> None:
    steps, stream = discrete._steps(Fraction(1, 200), 2), insecure_seeded_noise("tail")
    tail = len(steps.weights) - 1
    for place in range(0, 1600, 16):
        x, odds = discrete._tail(steps, stream, place, negative=False)
        bits = 64
        low, high = exp_bounds(steps.exponent(x), 2 * bits)
        # The largest U of 64 bits that is surely below, and the least that is surely above.
        under = (low * odds.numerator // odds.denominator >> bits) - 1
        over = (high * odds.numerator // odds.denominator >> bits) + 1
        for level, kept in ((under, True), (over, False)):
            if 0 <= level < 2**bits:
                assert discrete._decide_one(steps, 0, tail, level, stream, place) == (x, kept)


@pytest.mark.parametrize("law", [(Fraction(1, 2), 2), (Fraction(1, 200), 2), (Fraction(1, 4), 1)])
def test_the_tail_has_the_law_too(law: tuple[Fraction, int]) -> None:
    """Proposals of the tail alone: what is kept of them, and how many, as the law has it."""
    steps, count = discrete._steps(*law), 8_000
    words = np.random.default_rng(0).integers(0, 2**64, (count, 2), np.uint64)
    words[:, 0] |= np.uint64(discrete.ENTRIES - 1)
    x, kept = discrete._decide(steps, words, insecure_seeded_noise("tail law"), 0)
    # A proposal of this entry is kept at x with this probability: scale · exp(-exponent) is spread over two signs,
    # the places of a block and the tail's entries.
    chance = steps.scale / (2 * int(steps.weights[-1]) << steps.shift)
    law_of_tail = {y: chance * math.exp(-float(steps.exponent(y))) for y in range(steps.tail_start, 400)}
    law_of_tail |= {-1 - y: chance * math.exp(-float(steps.exponent(-1 - y))) for y in law_of_tail}
    often = {y: p * count for y, p in law_of_tail.items() if p * count >= 10}
    got = [int((kept & (x == y)).sum()) for y in often]
    got.append(count - sum(got))
    means = [*often.values(), count - sum(often.values())]
    assert often
    assert stats.chisquare(got, means).pvalue > FALSE_ALARM


@settings(deadline=None, max_examples=200)
@given(exponent=st.fractions(0, 200, max_denominator=10**9), bits=st.sampled_from([64, 128, 256]))
def test_exp_bounds_enclose(exponent: Fraction, bits: int) -> None:
    low, high = exp_bounds(exponent, bits)
    assert 0 <= low <= high <= low + 2
    with localcontext() as context:
        context.prec = 200
        value = (-Decimal(exponent.numerator) / Decimal(exponent.denominator)).exp() * 2**bits
        assert low <= value <= high


def test_known_probabilities_and_numbers() -> None:
    for name, (rate, power) in {"gaussian": (Fraction(1, 20), 2), "laplace": (Fraction(1, 3), 1)}.items():
        law = exact_law(rate, power)
        for x, digits in VECTORS["probabilities"][name].items():
            assert abs(law[int(x)] - Decimal(digits)) < Decimal(10) ** -58
    stream = insecure_seeded_noise("vectors")
    assert discrete_gaussian(stream, variance=10, count=16).tolist() == VECTORS["numbers"]["gaussian"]
    assert discrete_laplace(stream, scale=3, count=16).tolist() == VECTORS["numbers"]["laplace"]
    assert discrete_gaussian(stream, variance=2**80, count=4).tolist() == VECTORS["numbers"]["large"]


@pytest.mark.parametrize("wrong", [0, -1, Fraction(1, 10**7), 2**90 + 1])
def test_what_cannot_be_drawn_is_refused(wrong: Fraction) -> None:
    stream = insecure_seeded_noise("refused")
    with pytest.raises(BadUsage, match="variance: got"):
        discrete_gaussian(stream, variance=wrong, count=1)
    with pytest.raises(BadUsage, match="scale: got"):
        discrete_laplace(stream, scale=wrong, count=1)
    with pytest.raises(BadUsage, match="limit: got"):
        uniform_below(stream, limit=0, count=1)


def test_extreme_sigmas_are_drawn() -> None:
    stream = insecure_seeded_noise("extreme")
    assert not discrete_gaussian(stream, variance=Fraction(1, 10**6), count=1000).any()
    assert not discrete_laplace(stream, scale=Fraction(1, 100), count=1000).any()
    assert len(discrete_gaussian(stream, variance=1, count=0)) == 0


@pytest.mark.parametrize("limit", [1, 2, 3, 10, 2**40 + 1])
def test_whole_numbers_below_a_limit_are_uniform(limit: int) -> None:
    values = uniform_below(insecure_seeded_noise(f"below {limit}"), limit=limit, count=100_000)
    assert values.min() >= 0
    assert values.max() < limit
    columns = min(limit, 10)
    counts = np.bincount(values * columns // limit, minlength=columns)
    assert stats.chisquare(counts).pvalue > FALSE_ALARM if columns > 1 else counts[0] == 100_000
