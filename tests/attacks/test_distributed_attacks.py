"""Attacks on sums of shares: each finds out a naive version, and fails on ours.

Laws are exact (tests/privacy/exact_sums.py), so that what an attack finds is no accident.
"""

import math

import numpy as np
import pytest

from fedinfer.errors import RoundFailed
from fedinfer.privacy import DistributedPlan, Poisson, insecure_seeded_noise
from fedinfer.privacy.rounding import likely_within, round_up_or_down, round_within
from tests.privacy.exact_sums import exact_epsilon, neighbours, worst_epsilon

PLAN = DistributedPlan(
    clip_norm=1.0,
    noise_multiplier=2.0,
    sampler=Poisson(rate=0.5),
    delta=1e-5,
    steps=1,
    divisor=100.0,
    dimension=1,
    clients=4,
    min_honest=3,
    colluders=1,
    bits=16,
)


def test_two_sums_held_to_a_norm_are_further_apart_than_one_vector_is_long() -> None:
    # Conditional rounding, as it is right for one client's vector, done to the sums of two neighbouring devices.
    dimension, example, doubt = 1024, 8.0, 1e-3
    claimed = likely_within(example, dimension, doubt=doubt)
    longer = np.full(dimension, example / math.sqrt(dimension))
    shorter = np.zeros(dimension)
    others = np.full(dimension, 10.5)
    limit = likely_within(float(np.linalg.norm(others + longer)), dimension, doubt=doubt)
    naive, ours = [], []
    for seed in range(50):
        # With and without the example; a device that tries again has used other random numbers by then.
        one = round_within(others + longer, insecure_seeded_noise(f"{seed} with"), limit=limit)
        other = round_within(others + shorter, insecure_seeded_noise(f"{seed} without"), limit=limit)
        assert max(np.linalg.norm(one), np.linalg.norm(other)) <= limit
        naive.append(float(np.linalg.norm(one - other)))
        same = [round_up_or_down(x, insecure_seeded_noise(f"{seed}")) for x in (others + longer, others + shorter)]
        ours.append(float(np.linalg.norm(same[0] - same[1])))
    assert min(naive) > claimed
    assert max(ours) <= claimed


def test_conditional_rounding_of_sums_shows_who_was_in_it() -> None:
    # Three halves, and a limit that two of them may not exceed together: a sum at the border cannot be rounded up
    # freely, so that one example more changes the odds of *all* coordinates, and not by its own length only.
    stream, count = insecure_seeded_noise("border"), 20_000
    free, held = np.array([0.5, 0.5, 3.0]), np.array([0.5, 0.5, 4.0])
    limit = math.sqrt(4.0**2 + 1.0)
    ups = [
        np.mean([round_within(x, stream, limit=limit)[:2].sum() == 2.0 for _ in range(count // 10)])
        for x in (free, held)
    ]
    # Both coordinates go up in a quarter of the free sums, and in none of the others: a certain sign, before noise.
    assert ups[0] == pytest.approx(0.25, abs=0.06)
    assert ups[1] == 0.0
    unconditional = [
        np.mean([round_up_or_down(x, stream)[:2].sum() == 2.0 for _ in range(count // 10)]) for x in (free, held)
    ]
    assert unconditional == pytest.approx([0.25, 0.25], abs=0.06)


@pytest.mark.parametrize("honest", [1, 2])
def test_fewer_honest_shares_than_planned_for_cost_more(honest: int) -> None:
    assert worst_epsilon(PLAN) <= PLAN.epsilon() < worst_epsilon(PLAN, shares=honest)
    # A device's own vector, should its mask come off, is protected by a third of the variance only.
    if honest == 1:
        assert worst_epsilon(PLAN, shares=1) > 1.9 * PLAN.epsilon()


def test_more_honest_shares_cost_no_more() -> None:
    by_shares = [worst_epsilon(PLAN, shares=shares) for shares in (3, 4)]
    assert by_shares == sorted(by_shares, reverse=True)


def test_reducing_the_sum_costs_nothing() -> None:
    # The modulus folds outcomes together, and folding makes no two laws easier to tell apart.
    with_unit, without = neighbours(PLAN, place=0.3)
    assert len(with_unit) > 64
    folded = [np.array([law[start::64].sum() for start in range(64)]) for law in (with_unit, without)]
    assert exact_epsilon(folded[0], folded[1], delta=1e-5) <= exact_epsilon(with_unit, without, delta=1e-5) + 1e-9


def test_a_vector_that_is_not_what_was_agreed_is_found_by_its_norm() -> None:
    plan = DistributedPlan(
        clip_norm=1.0,
        noise_multiplier=6.0,
        sampler=Poisson(rate=0.5),
        delta=1e-5,
        steps=10,
        divisor=100.0,
        dimension=200,
        clients=4,
        min_honest=3,
        colluders=1,
        bits=20,
    )
    rng, total = np.random.default_rng(0), np.zeros(plan.padded, np.uint32)
    for device in range(3):
        vector = rng.normal(size=200)
        total += plan.encode(vector * 1e9, insecure_seeded_noise(f"{device}"), rotation="r")
    total &= np.uint32(2**20 - 1)
    plan.check_total(total, survivors=3)
    # Asked of `encode`, no length is too long; past it, a lie of the whole range is.
    for hostile in (rng.integers(0, 2**20, plan.padded, dtype=np.uint32), np.full(plan.padded, 2**19, np.uint32)):
        with pytest.raises(RoundFailed):
            plan.check_total((total + hostile) & np.uint32(2**20 - 1), survivors=4)
