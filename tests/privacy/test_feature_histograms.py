"""Histograms of every feature: what one row moves, what is paid for it, and that shares add up."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedinfer.errors import BadUsage, ShapeMismatch
from fedinfer.privacy.accounting import gaussian_epsilon
from fedinfer.privacy.histograms import FeatureHistograms
from fedinfer.privacy.integer_noise import CELLS
from fedinfer.privacy.noise import insecure_seeded_noise, os_noise

RELEASE = FeatureHistograms(features=3, bins=4, sigma=2.0, delta=1e-6)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(width=32), min_size=3, max_size=3))
def test_one_row_moves_one_count_of_each_feature(row: list[float]) -> None:
    base = np.zeros((5, 3), np.float32)
    more = np.concatenate([base, np.array([row], np.float32)])
    moved = RELEASE.counts(more, insecure_seeded_noise("a")) - RELEASE.counts(base, insecure_seeded_noise("a"))
    assert moved.reshape(3, 4).sum(1).tolist() == [CELLS] * 3
    assert np.linalg.norm(moved / CELLS) == pytest.approx(math.sqrt(3))


def test_the_account_is_that_of_the_root_of_the_features() -> None:
    expected = gaussian_epsilon(mu=math.sqrt(3) / 2.0, delta=1e-6)
    assert expected <= RELEASE.epsilon() <= expected + 1e-4
    more = FeatureHistograms(features=12, bins=4, sigma=4.0, delta=1e-6)
    assert more.epsilon() == pytest.approx(RELEASE.epsilon(), abs=1e-4)
    assert RELEASE.gdp() == pytest.approx(math.sqrt(3) / 2.0)


def test_calibration_meets_epsilon_from_below() -> None:
    release = FeatureHistograms.calibrate(epsilon=1.0, delta=1e-6, features=40, bins=8, min_honest=3)
    assert 1.0 - 1e-3 <= release.epsilon() <= 1.0


def test_shares_of_the_noise_add_up_to_it() -> None:
    release = FeatureHistograms(features=64, bins=64, sigma=3.0, delta=1e-6, min_honest=4)
    nobody = np.zeros((0, 64))
    total = sum(release.counts(nobody, os_noise()) for _ in range(4))
    # 4,096 numbers: the deviation of their deviation is 1.1 %, and seven of those are 8 %.
    assert np.std(total / CELLS) == pytest.approx(3.0, rel=0.08)
    assert np.std(release.counts(nobody, os_noise()) / CELLS) == pytest.approx(1.5, rel=0.08)


def test_values_count_where_they_lie_and_beyond_the_range_at_its_ends() -> None:
    release = FeatureHistograms(features=1, bins=4, sigma=0.1, delta=1e-6)
    rows = np.array([[-1.0], [-0.6], [-0.4], [0.1], [0.6], [1.0], [7.0], [-7.0], [np.nan]])
    found = release.read(release.counts(rows, os_noise()))
    np.testing.assert_allclose(found, [[3, 1, 2, 3]], atol=1.0)


def test_what_cannot_be_is_refused_and_json_comes_back() -> None:
    with pytest.raises(BadUsage, match="features: got 0"):
        FeatureHistograms(features=0, bins=4, sigma=1.0, delta=1e-6)
    with pytest.raises(BadUsage, match="bins: got 2000"):
        FeatureHistograms(features=1, bins=2000, sigma=1.0, delta=1e-6)
    with pytest.raises(ShapeMismatch):
        RELEASE.counts(np.zeros((2, 5)), os_noise())
    with pytest.raises(ShapeMismatch):
        RELEASE.read(np.zeros(5, np.int64))
    assert FeatureHistograms.from_json(RELEASE.to_json()) == RELEASE
    with pytest.raises(BadUsage, match="another mechanism"):
        FeatureHistograms.from_json(RELEASE.to_json() | {"unit": "client"})
    with pytest.raises(BadUsage, match="histograms"):
        FeatureHistograms.from_json(RELEASE.to_json() | {"more": 1})
