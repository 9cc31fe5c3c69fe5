"""What combiners promise, for honest updates and a number of wrong ones that are anything at all."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.spatial.distance import cdist

from fedinfer import combiners
from fedinfer.combiners import COMBINERS, Combiner, GeometricMedian, Krum, Mean, Median, TrimmedMean, combiner_named
from fedinfer.errors import BadUsage, NonFinite, ShapeMismatch
from fedinfer.settings import RunConfig

ROBUST = [name for name in COMBINERS if name != "mean"]
NAMES = list(COMBINERS)
Case = tuple[np.ndarray, np.ndarray, int]


def named(name: str, wrong: int) -> Combiner:
    return combiner_named(name, wrong_devices=0 if name == "mean" else wrong)


def combined(name: str, updates: np.ndarray, wrong: int) -> np.ndarray:
    return named(name, wrong).combine(list(updates), [1.0] * len(updates))


def numbers(limit: float) -> st.SearchStrategy[float]:
    return st.floats(-limit, limit, width=32)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Honest updates, wrong ones up to the greatest float32, and how many of those a rule is told of."""
    wrong = draw(st.integers(1, 3))
    there = draw(st.sampled_from([wrong, wrong, 0]))
    honest = draw(st.integers(2 * wrong + 3 - there, 2 * wrong + 6 - there))
    size = draw(st.integers(1, 4))
    huge = float(np.finfo(np.float32).max)
    row = st.lists(numbers(100.0), min_size=size, max_size=size)
    wild = st.lists(numbers(huge) | numbers(200.0), min_size=size, max_size=size)
    good = draw(st.lists(row, min_size=honest, max_size=honest))
    bad = draw(st.lists(wild, min_size=there, max_size=there) | wild.map(lambda w: [w] * there))
    return np.float32(good), np.float32(bad).reshape(len(bad), size), wrong


def span(honest: np.ndarray) -> float:
    return float(cdist(honest.astype(np.float64), honest.astype(np.float64)).max())


@pytest.mark.parametrize("name", NAMES)
@given(case=cases(), order=st.randoms(use_true_random=False))
def test_permutation_invariance(name: str, case: Case, order: object) -> None:
    good, bad, wrong = case
    updates = np.concatenate([good, bad]) if name != "mean" else good
    shuffled = list(range(len(updates)))
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    first, second = combined(name, updates, wrong), combined(name, updates[shuffled], wrong)
    if name == "mean":
        np.testing.assert_allclose(first, second, rtol=1e-6, atol=1e-12)
    else:
        assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 2**32), wrong=st.integers(1, 3), shift=st.integers(-100, 100))
def test_translation_equivariance(name: str, seed: int, wrong: int, shift: int) -> None:
    rng = np.random.default_rng(seed)
    # Sixteenths below 2**8 move without rounding.
    updates = np.float32(rng.integers(-999, 999, (2 * wrong + 5, 3)) / 16)
    moved = combined(name, updates + np.float32(shift), wrong)
    np.testing.assert_allclose(moved, combined(name, updates, wrong) + shift, atol=2e-4)


@pytest.mark.parametrize("name", ["median", "trimmed-mean"])
@given(case=cases())
def test_each_coordinate_stays_between_honest_ones(name: str, case: Case) -> None:
    good, bad, wrong = case
    result = combined(name, np.concatenate([good, bad]), wrong)
    assert (good.min(axis=0) <= result).all()
    assert (result <= good.max(axis=0)).all()


@given(case=cases())
def test_krum_stays_near_an_honest_update(case: Case) -> None:
    good, bad, wrong = case
    updates = np.concatenate([good, bad])
    n = len(updates)
    result = Krum(wrong_devices=wrong).combine(list(updates), [1.0] * n)
    assert any(np.array_equal(result, update) for update in updates)
    reach = np.sqrt((n - wrong - 2) / (n - 2 * wrong - 1)) * span(good)
    assert cdist([result], good).min() <= reach * (1 + 1e-6) + 1e-9


@given(case=cases())
def test_multi_krum_stays_near_the_honest_hull(case: Case) -> None:
    good, bad, wrong = case
    updates = np.concatenate([good, bad])
    n = len(updates)
    result = Krum(wrong_devices=wrong, many=True).combine(list(updates), [1.0] * n).astype(np.float64)
    reach = np.sqrt((n - wrong - 2) / (n - 2 * wrong - 1)) * span(good)
    # No half space that holds the honest ones lies further away than that.
    away = result - good.astype(np.float64).mean(axis=0)
    for direction in (away, *np.eye(len(away)), *-np.eye(len(away))):
        beyond = (result @ direction) - (good.astype(np.float64) @ direction).max()
        assert beyond <= np.linalg.norm(direction) * (reach * (1 + 1e-5) + 1e-3)


@given(case=cases())
def test_the_geometric_median_stays_near_the_honest_ones(case: Case) -> None:
    good, bad, wrong = case
    n = len(good) + len(bad)
    result = GeometricMedian(wrong_devices=wrong).combine(list(np.concatenate([good, bad])), [1.0] * n)
    centre = good.astype(np.float64).mean(axis=0)
    radius = cdist([centre], good).max()
    reach = 2 * len(good) / (len(good) - len(bad)) * radius
    assert np.linalg.norm(result - centre) <= reach * (1 + 1e-4) + 1e-4


@pytest.mark.parametrize("name", ROBUST)
def test_the_bounds_are_of_use_where_the_mean_has_none(name: str) -> None:
    rng = np.random.default_rng(0)
    good = np.float32(rng.normal(1.0, 0.1, (8, 50)))
    for bad in (np.full((2, 50), 3e38), np.full((2, 50), -1e6), np.stack([good[0] * 1e9, -good[0] * 1e9])):
        updates = np.concatenate([good, np.float32(bad)])
        centre = good.mean(axis=0, dtype=np.float64)
        assert np.linalg.norm(combined(name, updates, 2) - centre) < 1.5 * span(good)
        assert np.linalg.norm(combined("mean", updates[:-1], 0) - centre) > 1e3 * span(good)


def test_the_mean_counts_weights_and_is_zero_without_any() -> None:
    updates = [np.float32([1.0, 2.0]), np.float32([3.0, 6.0])]
    np.testing.assert_array_equal(Mean().combine(updates, [3.0, 1.0]), np.float32([1.5, 3.0]))
    np.testing.assert_array_equal(Mean().combine(updates, [0.0, 0.0]), np.zeros(2, np.float32))


@pytest.mark.parametrize("name", ROBUST)
def test_robust_rules_let_no_device_say_what_it_weighs(name: str) -> None:
    updates = list(np.float32(np.random.default_rng(1).normal(size=(7, 4))))
    rule = named(name, 1)
    plain, loud = rule.combine(updates, [1.0] * 7), rule.combine(updates, [1e30] + [1.0] * 6)
    assert plain.tobytes() == loud.tobytes()


def test_known_answers() -> None:
    rows = np.float32([[0, 9], [1, 7], [2, 5], [4, 3], [8, 1], [100, -100]])
    np.testing.assert_array_equal(combined("median", rows, 1), np.float32([3.0, 4.0]))
    np.testing.assert_array_equal(combined("trimmed-mean", rows, 1), np.float32([15 / 4, 16 / 4]))
    line = np.float32([[0], [1], [1.5], [4], [9]])
    # The sums of squares to the two nearest: 3.25, 1.25, 2.5, 15.25, 81.25.
    np.testing.assert_array_equal(combined("krum", line, 1), np.float32([1.0]))
    np.testing.assert_array_equal(combined("multi-krum", line, 1), np.float32([6.5 / 4]))


@given(seed=st.integers(0, 2**32))
def test_the_geometric_median_is_the_least_sum_of_distances(seed: int) -> None:
    points = np.float32(np.random.default_rng(seed).standard_t(2, (9, 3)))

    def total(z: np.ndarray) -> float:
        return float(cdist([z], points.astype(np.float64)).sum())

    mine = total(combined("geometric-median", points, 1).astype(np.float64))
    best = minimize(total, np.median(points, axis=0), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-9}).fun
    assert mine <= best * (1 + 1e-5)


def test_where_most_updates_are_one_point_that_is_the_geometric_median() -> None:
    rows = np.float32([[1, 2]] * 4 + [[5, 5], [-9, 0], [100, 3]])
    np.testing.assert_array_equal(combined("geometric-median", rows, 3), np.float32([1, 2]))


@pytest.mark.parametrize("name", ROBUST)
def test_coordinates_in_blocks_are_coordinates_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = np.float32(np.random.default_rng(2).normal(size=(7, 23)))
    once = combined(name, updates, 2)
    monkeypatch.setattr(combiners, "BLOCK", 7 * 5)
    np.testing.assert_allclose(combined(name, updates, 2), once, rtol=1e-6)


@pytest.mark.parametrize("rule", [Median, TrimmedMean, Krum, GeometricMedian])
def test_rules_refuse_what_they_cannot_stand(rule: type) -> None:
    with pytest.raises(BadUsage, match="got 0, expected at least 1"):
        rule(wrong_devices=0)
    least = rule(wrong_devices=2).least
    assert least == (7 if rule is Krum else 5)
    updates: Sequence[np.ndarray] = [np.float32([i, 1]) for i in range(least)]
    rule(wrong_devices=2).combine(updates, [1.0] * least)
    with pytest.raises(BadUsage, match=f"got {least - 1} updates, expected at least {least}"):
        rule(wrong_devices=2).combine(updates[1:], [1.0] * (least - 1))
    with pytest.raises(NonFinite):
        rule(wrong_devices=2).combine([*updates[1:], np.float32([np.nan, 1])], [1.0] * least)
    with pytest.raises(ShapeMismatch):
        rule(wrong_devices=2).combine([*updates[1:], np.float32([1])], [1.0] * least)


def test_settings_take_a_rule_and_refuse_one_that_cannot_hold() -> None:
    config = RunConfig(combine="krum", wrong_devices=1, min_devices=5)
    assert config.combiner() == Krum(wrong_devices=1)
    assert RunConfig.from_flat(config.to_flat()) == config
    assert RunConfig().combiner() == Mean()
    others = {RunConfig().digest(), RunConfig(combine="median", wrong_devices=1).digest(), config.digest()}
    assert len(others) == 3
    for wrong, match in (
        ({"combine": "best"}, "expected one of mean, median"),
        ({"combine": "median"}, "got 0, expected at least 1"),
        ({"wrong_devices": 1}, "mean: got 1 wrong devices, expected 0"),
    ):
        with pytest.raises(BadUsage, match=match):
            RunConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(BadUsage, match="got at least 4 devices a round, expected 5 or more for krum with 1 wrong"):
        RunConfig(combine="krum", wrong_devices=1, min_devices=4).combiner()
