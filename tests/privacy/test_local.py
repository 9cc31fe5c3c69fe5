"""Local releases: sensitivity of replacing a client, exact accounts, unbiased estimates."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from scipy.special import log_ndtr

from fedinfer.errors import BadUsage, ShapeMismatch
from fedinfer.privacy.local import CLIP_CELLS, OTHERS_WEIGHT, LocalVector, RandomisedResponse
from fedinfer.privacy.noise import insecure_seeded_noise

VECTOR = LocalVector(dimension=4, clip_norm=0.5, noise_multiplier=3.0, delta=1e-6)
number = st.one_of(st.floats(), st.floats(-1.0, 1.0), st.sampled_from([0.0, math.nan, math.inf, 1e308, 5e-324]))


@settings(deadline=None, max_examples=300)
@given(one=arrays(np.float64, 4, elements=number), other=arrays(np.float64, 4, elements=number))
def test_two_clients_differ_by_no_more_than_is_accounted(one: np.ndarray, other: np.ndarray) -> None:
    cells = [VECTOR.clipped(vector) for vector in (one, other)]
    for vector in cells:
        assert np.linalg.norm(vector) <= CLIP_CELLS + math.sqrt(4) / 2
    moved = np.linalg.norm(cells[0] - cells[1])
    mu = VECTOR.gdp()
    assert mu is not None
    assert moved <= mu * VECTOR.noise_multiplier * CLIP_CELLS * (1 + 1e-12)
    # And two opposite ones do differ by that.
    far = VECTOR.clipped(np.full(4, 9.0)) - VECTOR.clipped(np.full(4, -9.0))
    assert np.linalg.norm(far) >= 2 * CLIP_CELLS - 2


def test_a_vector_inside_the_clip_norm_is_sent_as_it_is() -> None:
    vector = np.array([0.1, -0.2, 0.3, 0.0])
    assert VECTOR.clipped(vector) * 0.5 / CLIP_CELLS == pytest.approx(vector, abs=1e-7)
    assert VECTOR.clipped(np.zeros(4)).tolist() == [0, 0, 0, 0]
    released = np.stack([VECTOR.release(vector, insecure_seeded_noise(f"inside {i}")) for i in range(4000)])
    assert released.dtype == np.float32
    assert np.abs(released.mean(0) - vector).max() < 6 * 1.5 / math.sqrt(4000)
    assert released.std() == pytest.approx(1.5, rel=0.03)
    with pytest.raises(ShapeMismatch):
        VECTOR.release(np.zeros(3), insecure_seeded_noise("shape"))


def exact_delta(noise_multiplier: float, epsilon: float) -> float:
    """δ of a Gaussian mechanism that a client moves by two clip norms, in high precision by quadrature-free tails."""
    mu = 2.0 / noise_multiplier
    first, second = log_ndtr(mu / 2 - epsilon / mu), log_ndtr(-mu / 2 - epsilon / mu)
    return float(np.exp(first) - np.exp(epsilon + second))


@pytest.mark.parametrize("epsilon", [0.3, 1.0, 4.0, 10.0, 30.0])
def test_calibration_is_exact_where_the_old_formula_is_wrong(epsilon: float) -> None:
    delta = 1e-5
    plan = LocalVector.calibrate(epsilon=epsilon, delta=delta, dimension=4, clip_norm=0.5)
    assert epsilon - 1e-4 <= plan.epsilon() <= epsilon
    assert exact_delta(plan.noise_multiplier, epsilon) <= delta
    assert exact_delta(plan.noise_multiplier, epsilon - 3e-4) >= delta
    # sqrt(2 ln(1.25 / δ)) Δ / ε: too much noise for small ε, and less than ε needs for large ones.
    old = math.sqrt(2 * math.log(1.25 / delta)) * 2.0 / epsilon
    assert (exact_delta(old, epsilon) > delta) == (epsilon >= 10.0)


def test_a_long_vector_pays_for_its_rounding() -> None:
    short = LocalVector(dimension=1, clip_norm=1.0, noise_multiplier=3.0, delta=1e-6)
    long = LocalVector(dimension=2**26, clip_norm=1.0, noise_multiplier=3.0, delta=1e-6)
    assert short.gdp() < long.gdp() < short.gdp() * 1.001  # type: ignore[operator]
    assert short.epsilon() < long.epsilon() < short.epsilon() * 1.01


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("categories", [2, 5])
def test_answers_have_the_probabilities_that_are_accounted(epsilon: float, categories: int) -> None:
    plan = RandomisedResponse.calibrate(epsilon=epsilon, categories=categories)
    assert epsilon - 1e-4 <= plan.epsilon() <= epsilon
    count = 200_000
    reports = plan.release(np.ones(count, np.int64), insecure_seeded_noise(f"answers {epsilon} {categories}"))
    odds = np.full(categories, 1.0)
    odds[1] = math.exp(epsilon)
    seen = np.bincount(reports, minlength=categories)
    assert stats.chisquare(seen, odds / odds.sum() * count).pvalue > 1e-9
    # And the test sees another ε: 1.3 for 1, for example.
    odds[1] *= 1.3
    assert stats.chisquare(seen, odds / odds.sum() * count).pvalue < 1e-3


def test_the_whole_range_of_answers_is_reached_for_each_truth() -> None:
    plan = RandomisedResponse(categories=4, truth=OTHERS_WEIGHT + 1)
    for truth in range(4):
        reports = plan.release(np.full(20_000, truth), insecure_seeded_noise(f"range {truth}"))
        assert stats.chisquare(np.bincount(reports, minlength=4)).pvalue > 1e-9
    # One that is no category counts as the first.
    sure = RandomisedResponse(categories=4, truth=2**62)
    assert sure.release(np.array([-5, 4, 3]), insecure_seeded_noise("range")).tolist() == [0, 0, 3]


def test_estimates_are_unbiased_with_right_errors() -> None:
    plan = RandomisedResponse.calibrate(epsilon=1.0, categories=4)
    truth = np.repeat(np.arange(4), [700, 200, 100, 0])
    estimates = [plan.estimate(plan.release(truth, insecure_seeded_noise(f"estimate {i}"))) for i in range(500)]
    for category, count in enumerate((700, 200, 100, 0)):
        scores = np.array([(found[category].value - count) / found[category].standard_error for found in estimates])
        assert abs(scores.mean()) < 6 / math.sqrt(500)
        assert 0.7 < scores.var() < 1.4


@pytest.mark.parametrize("order", [1.5, 2.0, 30.0])
def test_renyi_divergence_of_answers(order: float) -> None:
    plan = RandomisedResponse.calibrate(epsilon=2.0, categories=5, steps=2)
    one = np.array([math.exp(1.0), 1, 1, 1, 1])
    one /= one.sum()
    other = np.roll(one, 1)
    expected = 2 * math.log((one**order * other ** (1 - order)).sum()) / (order - 1)
    assert plan.rdp(order) == pytest.approx(expected, rel=1e-4)
    assert plan.gdp() is None
    assert plan.delta == 0.0


def test_what_cannot_be_is_refused_and_charges_name_their_unit() -> None:
    for make in (
        lambda: LocalVector(**{**vars(VECTOR), "dimension": 0}),
        lambda: LocalVector(**{**vars(VECTOR), "clip_norm": math.inf}),
        lambda: LocalVector(**{**vars(VECTOR), "noise_multiplier": 0.0}),
        lambda: LocalVector(**{**vars(VECTOR), "delta": 1.0}),
        lambda: RandomisedResponse(categories=1, truth=2**30),
        lambda: RandomisedResponse(categories=2, truth=OTHERS_WEIGHT),
        lambda: RandomisedResponse(categories=2, truth=2**30, steps=0),
        lambda: RandomisedResponse.calibrate(epsilon=100.0, categories=2),
    ):
        with pytest.raises(BadUsage, match="got"):
            make()
    for charge in (VECTOR, RandomisedResponse(categories=3, truth=2**30)):
        assert charge.to_json()["unit"] == "client"
        assert charge.to_json()["relation"] == "replace one"
        assert len(charge.digest()) == 64
