"""Checks of noise, sampling and clip rules: honest ones pass, and each names what it is made to find."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from fedinfer.privacy import insecure_seeded_noise
from fedinfer.privacy.audit_clipping import settle
from fedinfer.privacy.audit_noise import ENOUGH, repetition_chance, shape_chance, spread_chance
from fedinfer.privacy.audit_sampling import poisson_chances

SEED = 20240610
SURE = 5e-8


def noise(name: str, count: int) -> np.ndarray:
    return insecure_seeded_noise(name).gaussian_float(1.0, count)


@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_an_error_of_two_percent_in_sigma_is_seen(factor: float) -> None:
    for trial in range(10):
        drawn = noise(f"sigma/{trial}", ENOUGH)
        assert spread_chance(factor * drawn, 1.0) < SURE < spread_chance(drawn, 1.0)


def test_chances_of_honest_noise_are_uniform() -> None:
    chances = {
        "spread": [spread_chance(noise(f"spread/{trial}", 500), 1.0) for trial in range(400)],
        "shape": [shape_chance(noise(f"shape/{trial}", 500), 1.0) for trial in range(400)],
    }
    for values in chances.values():
        for level in (0.1, 0.5):
            assert np.mean(np.array(values) < level) == pytest.approx(level, abs=0.08)


def test_noise_of_another_shape_is_seen_though_its_spread_is_right() -> None:
    rng = np.random.default_rng(SEED)
    laplace = rng.laplace(size=ENOUGH) / math.sqrt(2.0)
    shifted = rng.normal(size=ENOUGH) * math.sqrt(0.99) + 0.1
    assert shape_chance(laplace, 1.0) < SURE
    assert shape_chance(shifted, 1.0) < SURE


def test_noise_that_is_used_twice_is_seen() -> None:
    first, second, third = (noise(f"repeat/{name}", 4000) for name in range(3))
    assert repetition_chance([first, second, third]) > SURE
    assert repetition_chance([first, second, first]) < SURE
    assert repetition_chance([first, second, 0.9 * third - 0.4 * second]) < SURE
    smooth = np.convolve(first, [0.8, 0.6], "same")
    assert repetition_chance([smooth, second]) < SURE


def test_noise_that_is_none_or_not_a_number_is_seen() -> None:
    for broken in (np.zeros(1000), np.full(1000, np.nan), np.full(1000, np.inf)):
        assert spread_chance(broken, 1.0) < SURE
        assert shape_chance(broken, 1.0) < SURE
        assert repetition_chance([broken, broken]) < SURE


@pytest.mark.parametrize("rate", [0.01, 0.5, 0.9])
def test_poisson_samples_pass(rate: float) -> None:
    for trial in range(20):
        taken = insecure_seeded_noise(f"poisson/{trial}").uniform(64 * 400).reshape(64, 400) < rate
        assert min(poisson_chances(taken, rate).values()) > SURE


def shuffled(rng: np.random.Generator) -> np.ndarray:
    order = np.concatenate([rng.permutation(400) for _ in range(32)]).reshape(64, 200)
    taken = np.zeros((64, 400), bool)
    np.put_along_axis(taken, order, True, axis=1)
    return taken


def fixed_size(rng: np.random.Generator) -> np.ndarray:
    return np.argsort(rng.random((64, 400)), axis=1) < 200


def in_turns(rng: np.random.Generator) -> np.ndarray:
    first = rng.random(400) < 0.5
    return np.stack([first if step % 2 else ~first for step in range(64)])


def too_often(rng: np.random.Generator) -> np.ndarray:
    return rng.random((64, 400)) < 0.52


@pytest.mark.parametrize(
    ("sampler", "seen"),
    [
        (shuffled, {"batch sizes", "turns"}),
        (fixed_size, {"batch sizes"}),
        (in_turns, {"turns"}),
        (too_often, {"rate"}),
    ],
)
def test_other_samplers_are_seen_by_what_is_odd_about_them(
    sampler: Callable[[np.random.Generator], np.ndarray], seen: set[str]
) -> None:
    chances = poisson_chances(sampler(np.random.default_rng(SEED)), 0.5)
    assert {what for what, chance in chances.items() if chance < SURE} >= seen


def test_everybody_takes_part_at_a_rate_of_one() -> None:
    taken = np.ones((3, 5), bool)
    assert poisson_chances(taken, 1.0) == {"rate": 1.0}
    taken[1, 2] = False
    assert poisson_chances(taken, 1.0) == {"rate": 0.0}


@pytest.mark.parametrize(("sign", "share"), [(1.0, 0.5), (-1.0, None)])
def test_a_clip_rule_settles_at_its_quantile_only_with_the_right_sign(sign: float, share: float | None) -> None:
    norms = np.linspace(0.5, 1.5, 200)

    def rule(clip: float, below: int) -> float:
        return clip * math.exp(-0.2 * sign * (below / 200 - 0.5))

    for start in (0.05, 20.0):
        end = settle(rule, norms, start=start, rounds=100)
        if share is None:
            assert end.share_below in (0.0, 1.0)
        else:
            assert end.share_below == pytest.approx(share, abs=0.02)
            assert end.clip_norm == pytest.approx(1.0, abs=0.02)
