"""Client updates are clipped for good, the adaptive clip goes the right way, and both share one budget."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedinfer.errors import BadUsage, ShapeMismatch
from fedinfer.privacy import PrivacyLedger, PrivacyPlan, insecure_seeded_noise
from fedinfer.privacy.clipping import AdaptiveClip, clip_update, clipped_sum
from fedinfer.privacy.samplers import Cyclic, Poisson

SIZE = 6
PLAN = PrivacyPlan(
    unit="client", clip_norm=3.0, noise_multiplier=1.5, sampler=Poisson(rate=0.1), delta=1e-4, steps=60, divisor=100.0
)
ADAPTIVE = AdaptiveClip(plan=PLAN, count_noise=5.0)
updates = arrays(np.float32, SIZE, elements=st.floats(-10.0, 10.0, width=32)) | arrays(
    np.float32, SIZE, elements=st.floats(width=32)
)
clips = st.floats(1e-9, 1e9)


def norm(vector: np.ndarray) -> float:
    """In exact enough arithmetic: float64 squares of float32 numbers do not round."""
    return math.sqrt(math.fsum(float(value) ** 2 for value in vector))


@settings(deadline=None, max_examples=200)
@given(updates, clips)
@example(np.full(SIZE, np.float32(0.1)), norm(np.full(SIZE, np.float32(0.1))) * (1 - 1e-9))
def test_a_clipped_norm_is_within_the_bound_and_the_direction_is_kept(update: np.ndarray, clip: float) -> None:
    clipped = clip_update(update, clip_norm=clip)
    assert clipped.dtype == np.float32
    assert norm(clipped) <= clip
    if not np.isfinite(update).all():
        assert not clipped.any()
    elif norm(update) <= clip * (1 - 1e-9):
        assert np.array_equal(clipped, update)
    else:
        assert norm(clipped) >= clip * (1 - 1e-6)
        cosine = float(clipped.astype(float) @ update.astype(float)) / (norm(clipped) * norm(update))
        assert cosine == pytest.approx(1.0, abs=1e-6)
    assert np.array_equal(clip_update(clipped, clip_norm=clip), clipped)


def test_float32_does_not_overshoot_in_high_dimension() -> None:
    rng = np.random.default_rng(0)
    worst = max(norm(clip_update(rng.normal(size=4096).astype(np.float32), clip_norm=0.7)) for _ in range(300))
    naive = [rng.normal(size=4096).astype(np.float32) for _ in range(300)]
    assert worst <= 0.7
    # The reason for the margin: scaling in float32 goes past the bound.
    assert max(norm(update * np.float32(0.7 / norm(update))) for update in naive) > 0.7


def test_zero_stays_zero_and_the_input_is_not_touched() -> None:
    update = np.full(SIZE, 4.0, np.float32)
    assert not clip_update(np.zeros(SIZE, np.float32), clip_norm=1.0).any()
    clip_update(update, clip_norm=1.0)[:] = 0.0
    assert (update == 4.0).all()


@settings(deadline=None)
@given(st.lists(updates, max_size=5), updates, st.floats(1e-3, 1e3))
def test_one_client_changes_the_sum_by_at_most_the_clip(others: list[np.ndarray], one: np.ndarray, clip: float) -> None:
    without = clipped_sum(others, size=SIZE, clip_norm=clip)
    with_one = clipped_sum([*others, one], size=SIZE, clip_norm=clip)
    assert norm(with_one.total - without.total) <= clip * (1 + 1e-12)
    assert with_one.nonfinite == sum(not np.isfinite(update).all() for update in [*others, one])


def test_no_clients_give_zeros_and_counts_are_not_shown() -> None:
    empty = clipped_sum([], size=3, clip_norm=1.0)
    assert empty.total.shape == (3,)
    assert not empty.total.any()
    poisoned = clipped_sum([np.array([np.inf, 1.0], np.float32)], size=2, clip_norm=1.0)
    assert poisoned.nonfinite == 1
    assert repr(poisoned) == "ClippedSum()"


def test_wrong_shapes_and_clips_are_refused() -> None:
    with pytest.raises(ShapeMismatch):
        clip_update(np.zeros((2, 2), np.float32), clip_norm=1.0)
    with pytest.raises(ShapeMismatch):
        clipped_sum([np.zeros(2, np.float32)], size=3, clip_norm=1.0)
    for clip in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(BadUsage, match="clip norm"):
            clip_update(np.zeros(2, np.float32), clip_norm=clip)


@settings(deadline=None, max_examples=200)
@given(updates, clips, st.floats(0.76, 1e6), st.floats(0.1, 1.5), st.floats(1e-3, 1e3))
def test_the_pair_of_update_and_bit_keeps_to_the_plans_clip_norm(
    update: np.ndarray, clip: float, count_noise: float, noise: float, bound: float
) -> None:
    adaptive = AdaptiveClip(plan=replace(PLAN, noise_multiplier=noise, clip_norm=bound), count_noise=count_noise)
    pair = adaptive.contribution(update, clip=clip)
    assert pair.shape == (SIZE + 1,)
    assert norm(pair) <= bound
    if np.isfinite(update).all():
        # The bit spends its whole share whatever the update: nothing in the length of the pair is lost.
        assert abs(pair[-1]) == pytest.approx(bound * noise / (2 * count_noise), rel=1e-6)
        if norm(update) > clip * (1 + 1e-9):
            assert pair[-1] < 0
            assert norm(pair) == pytest.approx(bound, rel=1e-6)
    else:
        assert not pair.any()


def test_a_pair_on_the_edge_of_the_clip_does_not_overshoot_in_float32() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        update = rng.normal(size=SIZE).astype(np.float32)
        # Just within the clip: the update is not scaled, so that no margin of its own helps the pair.
        assert norm(ADAPTIVE.contribution(update, clip=norm(update) * (1 + 2e-9))) <= PLAN.clip_norm


def test_the_budget_is_split_as_in_the_paper() -> None:
    # Andrew et al., theorem 1: z_Δ = (1/z² - 1/(2 σ_b)²)^(-1/2). At z = 1 and σ_b = 5 it is 1/sqrt(0.99).
    assert replace(ADAPTIVE, plan=replace(PLAN, noise_multiplier=1.0)).update_noise == pytest.approx(0.99**-0.5)
    total = 1 / ADAPTIVE.update_noise**2 + 1 / (2 * ADAPTIVE.count_noise) ** 2
    assert 1 / math.sqrt(total) == pytest.approx(PLAN.noise_multiplier, rel=1e-12)
    assert (ADAPTIVE.epsilon(), ADAPTIVE.delta, ADAPTIVE.steps) == (PLAN.epsilon(), PLAN.delta, PLAN.steps)
    assert ADAPTIVE.rdp(8.0) == PLAN.rdp(8.0)
    assert ADAPTIVE.gdp() == PLAN.gdp()


def test_noise_is_by_the_clip_that_was_used_and_the_count_has_its_own() -> None:
    stream = insecure_seeded_noise("used")
    clip, trials, dimension = 7.0, 300, 200
    # Nobody is within the clip, so that the next clip is far from the one in use.
    total = np.zeros(dimension + 1)
    for _ in range(100):
        total += ADAPTIVE.contribution(np.full(dimension, 9.0, np.float32), clip=clip)
    means, following = zip(*(ADAPTIVE.release(total, clip=clip, stream=stream) for _ in range(trials)), strict=True)
    deviation = ADAPTIVE.update_noise * clip / PLAN.divisor
    # 60,000 and 300 normal numbers: five standard errors.
    assert np.stack(means).std(0).mean() == pytest.approx(deviation, rel=0.02)
    assert np.stack(means).mean() == pytest.approx(clip / math.sqrt(dimension), rel=0.01)
    fractions = ADAPTIVE.target_quantile - np.log(np.array(following) / clip) / ADAPTIVE.learning_rate
    assert fractions.mean() == pytest.approx(0.0, abs=0.02)
    assert fractions.std() == pytest.approx(ADAPTIVE.count_noise / PLAN.divisor, rel=0.22)


def trajectory(first: float, quantile: float, *, sign: float = 1.0) -> list[float]:
    """The clips of 150 rounds of 100 clients whose update norms are lognormal around 1."""
    plan = replace(PLAN, steps=1000, noise_multiplier=1.0)
    adaptive = AdaptiveClip(plan=plan, count_noise=5.0, target_quantile=quantile)
    rng, stream, clips = np.random.default_rng(7), insecure_seeded_noise(f"{first}/{quantile}"), [first]
    for _ in range(150):
        total = np.zeros(SIZE + 1)
        for _ in range(100):
            direction = rng.normal(size=SIZE)
            update = direction / np.linalg.norm(direction) * rng.lognormal(0.0, 0.5)
            total += adaptive.contribution(update.astype(np.float32), clip=clips[-1])
        _, following = adaptive.release(total, clip=clips[-1], stream=stream)
        clips.append(clips[-1] * (following / clips[-1]) ** sign)
    return clips


@pytest.mark.parametrize("first", [0.01, 100.0])
@pytest.mark.parametrize(("quantile", "expected"), [(0.5, 1.0), (0.8, 1.523)])
def test_the_clip_converges_to_the_target_quantile(first: float, quantile: float, expected: float) -> None:
    # exp(0.5 z) with z the quantile of a standard normal number.
    assert np.mean(trajectory(first, quantile)[-50:]) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("first", [0.01, 100.0])
def test_with_the_sign_inverted_the_clip_runs_away(first: float) -> None:
    clips = trajectory(first, 0.5, sign=-1.0)
    assert abs(math.log(clips[-1])) > abs(math.log(first)) + 10


def test_the_clip_stays_a_number_whatever_the_noise_says() -> None:
    wild = AdaptiveClip(plan=replace(PLAN, divisor=1e-3), count_noise=1e6)
    stream, clip = insecure_seeded_noise("wild"), 1.0
    for _ in range(50):
        _, clip = wild.release(np.zeros(2), clip=clip, stream=stream)
        assert 1e-12 <= clip <= 1e12


def test_an_adaptive_clip_that_cannot_be_is_refused() -> None:
    # Half of z = 1.5: all of the budget would go to the count.
    for wrong in ({"count_noise": 0.75}, {"count_noise": math.nan}, {"target_quantile": 1.0}, {"learning_rate": 0.0}):
        with pytest.raises(BadUsage, match="got"):
            replace(ADAPTIVE, **wrong)


def test_it_round_trips_and_its_digest_sees_every_field() -> None:
    others = [
        replace(ADAPTIVE, count_noise=6.0),
        replace(ADAPTIVE, target_quantile=0.6),
        replace(ADAPTIVE, learning_rate=0.3),
        replace(ADAPTIVE, plan=replace(PLAN, steps=59)),
        replace(ADAPTIVE, plan=replace(PLAN, sampler=Cyclic(period=10))),
    ]
    assert len({one.digest() for one in (ADAPTIVE, *others)}) == 6
    values = ADAPTIVE.to_json()
    assert AdaptiveClip.from_json(values) == ADAPTIVE
    assert (values["unit"], values["relation"]) == ("client", "add or remove one")
    without_plan = {name: value for name, value in values.items() if name != "plan"}
    changed: list[dict[str, object]] = [{"unit": "example"}, {"extra": 1}, {"plan": 3}, {"count_noise": "5"}]
    for wrong in (without_plan, *({**values, **change} for change in changed)):
        with pytest.raises(BadUsage, match=r"adaptive clip|plan"):
            AdaptiveClip.from_json(wrong)


def test_a_ledger_charges_the_plan_once_for_updates_and_count() -> None:
    with PrivacyLedger.scratch(epsilon=40.0, delta=1e-3) as ledger:
        ledger.commit(ledger.reserve(run="r", round=1, plan=ADAPTIVE))
        (run,) = ledger.summary().runs
    assert (run.epsilon, run.steps) == (PLAN.epsilon(), PLAN.steps)
