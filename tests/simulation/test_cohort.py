"""Releases of a chunk: each client's noise is its own, however many are released at once."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), min_size=1, max_size=12), st.integers(0, 2**32 - 1))
def test_ragged_batches_lie_client_after_client_with_rows_of_their_own(sizes: list[tuple[int, int]], seed: int) -> None:
    random = np.random.default_rng(seed)
    batches = [np.sort(random.choice(chosen + spare, chosen, replace=False)) for chosen, spare in sizes]
    ends = np.cumsum([chosen + spare for chosen, spare in sizes])
    starts = [0, *ends[:-1].tolist()]
    index, present = cohort._gathered(batches, starts, torch.device("cpu"))
    rows = index.view(present.shape).numpy()
    assert present.shape == (len(sizes), max(1, max(chosen for chosen, _ in sizes)))
    for client, (batch, start) in enumerate(zip(batches, starts, strict=True)):
        assert present[client].tolist() == [place < len(batch) for place in range(present.shape[1])]
        assert rows[client, : len(batch)].tolist() == (start + batch).tolist()
        # Gaps are filled with a row that is there: the client's first of the batch, or the first of all.
        assert set(rows[client, len(batch) :]) <= {start + batch[0] if len(batch) else 0}


@pytest.mark.parametrize("seeded", [True, False])
def test_each_client_samples_rows_of_its_own_as_a_device_does(seeded: bool) -> None:
    sizes = [9, 0, 5, 40]
    members: list[Any] = [SimpleNamespace(x=torch.zeros(size, 2), turn=SimpleNamespace(done=0)) for size in sizes]

    def streams() -> list[Any]:
        one = insecure_seeded_noise("one")
        return [insecure_seeded_noise(str(place)) if seeded else one for place in range(len(sizes))]

    expected = [PLAN.sample(size, stream, step=1) for size, stream in zip(sizes, streams(), strict=True)]
    got = cohort._sampled(PLAN, members, streams(), 1)
    assert [rows.tolist() for rows in got] == [rows.tolist() for rows in expected]
