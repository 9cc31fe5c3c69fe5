"""Who takes part: device after device, or many devices at once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedinfer.privacy import Poisson
from fedinfer.privacy.noise import insecure_seeded_noise


@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.floats(0.01, 1.0))
def test_many_devices_choose_as_one_after_another(units: list[int], rate: float) -> None:
    sampler = Poisson(rate=rate)
    one_by_one, at_once = insecure_seeded_noise("choose"), insecure_seeded_noise("choose")
    chosen = sampler.choose_each(units, at_once)
    expected = [sampler.choose(own, 1, one_by_one) for own in units]
    assert len(chosen) == len(expected)
    assert all(np.array_equal(got, own) for got, own in zip(chosen, expected, strict=True))
    assert at_once.position == one_by_one.position


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_each_unit_takes_part_at_the_rate_and_alone(rate: float) -> None:
    chosen = Poisson(rate=rate).choose_each([10] * 20_000, insecure_seeded_noise("rate"))
    taken = np.zeros((20_000, 10))
    for device, own in enumerate(chosen):
        taken[device, own] = 1.0
    spread = np.sqrt(rate * (1 - rate) / len(taken))
    assert np.abs(taken.mean(0) - rate).max() < 5 * spread
    correlation = np.corrcoef(taken.T) - np.eye(10)
    assert np.abs(correlation).max() < 5 / np.sqrt(len(taken))
