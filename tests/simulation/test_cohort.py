"""Releases of a chunk: each client's noise is its own, however many are released at once."""

import numpy as np
import pytest

from fedinfer.privacy import Poisson, PrivacyPlan, insecure_seeded_noise
from fedinfer.simulation import cohort

PLAN = PrivacyPlan(clip_norm=0.1, noise_multiplier=1.0, sampler=Poisson(rate=0.5), delta=1e-5, steps=9, divisor=4.0)
CLIENTS, SIZE = 7, 50


@pytest.mark.parametrize("at_once", [1, 120, 1 << 16])
def test_each_client_gets_its_own_sum_back_with_noise_of_its_own(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cohort, "RELEASED_AT_ONCE", at_once)
    totals = np.arange(CLIENTS)[:, None] * np.ones(SIZE)
    stream = insecure_seeded_noise("all")
    noise = 4.0 * cohort._released(PLAN, totals, [stream] * CLIENTS) - totals
    # Noise of deviation 0.1: beyond 10 deviations once in 10**23.
    assert np.abs(noise).max() < 1.0
    assert len(np.unique(noise.round(5), axis=0)) == CLIENTS
    assert 0.05 < noise.std() < 0.2


def test_a_client_with_a_seed_gets_the_noise_of_its_seed() -> None:
    totals = np.ones((CLIENTS, SIZE))
    streams = [insecure_seeded_noise(str(client)) for client in range(CLIENTS)]
    released = cohort._released(PLAN, totals, streams)
    for client in range(CLIENTS):
        assert np.array_equal(released[client], PLAN.release(totals[client], insecure_seeded_noise(str(client))))
