"""Correlated noise: the sensitivity is exact, the error is near the optimum, the account is of what runs."""

import itertools
import math
import pickle
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.linalg import sqrtm, toeplitz

from fedinfer.errors import BadUsage, BudgetExceeded, ShapeMismatch
from fedinfer.privacy import PrivacyLedger, insecure_seeded_noise
from fedinfer.privacy.matrix import MatrixPlan, Participation
from fedinfer.privacy.toeplitz import error, optimal_coefficients, sensitivity

PLAN = MatrixPlan.calibrate(
    epsilon=2.0,
    delta=1e-5,
    rounds=12,
    participation=Participation(separation=4, at_most=3),
    clip_norm=0.5,
    divisor=10.0,
)


def lower(coefficients: tuple[float, ...], rounds: int) -> np.ndarray:
    return np.tril(toeplitz(np.pad(coefficients, (0, rounds - len(coefficients)))))


def schedules(rounds: int, separation: int, participations: int) -> Iterator[tuple[int, ...]]:
    for count in range(1, participations + 1):
        for chosen in itertools.combinations(range(rounds), count):
            if all(later - earlier >= separation for earlier, later in itertools.pairwise(chosen)):
                yield chosen


def worst_schedule(matrix: np.ndarray, separation: int, participations: int) -> float:
    """By trying all: the longest sum of columns, which is the worst client if no entry is negative."""
    rounds = matrix.shape[1]
    return max(np.linalg.norm(matrix[:, list(s)].sum(1)) for s in schedules(rounds, separation, participations))


coefficient_lists = st.lists(st.floats(0.0, 1.0), max_size=9).map(lambda xs: (1.0, *sorted(xs, reverse=True)))


@settings(deadline=None, max_examples=150)
@given(coefficient_lists, st.integers(1, 10), st.integers(1, 5), st.integers(1, 4))
def test_the_sensitivity_is_that_of_the_worst_schedule(
    coefficients: tuple[float, ...], rounds: int, separation: int, participations: int
) -> None:
    coefficients = coefficients[:rounds]
    got = sensitivity(coefficients, rounds=rounds, separation=separation, participations=participations)
    assert got == pytest.approx(worst_schedule(lower(coefficients, rounds), separation, participations), rel=1e-12)


@settings(deadline=None, max_examples=60)
@given(coefficient_lists, st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_no_updates_of_a_client_reach_further(
    coefficients: tuple[float, ...], separation: int, participations: int, seed: int
) -> None:
    rounds, rng = 10, np.random.default_rng(seed)
    coefficients = coefficients[:rounds]
    matrix = lower(coefficients, rounds)
    bound = sensitivity(coefficients, rounds=rounds, separation=separation, participations=participations)
    for schedule in itertools.islice(schedules(rounds, separation, participations), 40):
        client = np.zeros((rounds, 3))
        directions = rng.normal(size=(len(schedule), 3))
        client[list(schedule)] = directions / np.linalg.norm(directions, axis=1, keepdims=True)
        assert np.linalg.norm(matrix @ client) <= bound * (1 + 1e-12)


def test_with_bands_within_the_separation_participations_add_in_quadrature() -> None:
    c = (1.0, 0.7, 0.2)
    assert sensitivity(c, rounds=30, separation=3, participations=5) == pytest.approx(math.sqrt(5) * np.linalg.norm(c))


@pytest.mark.parametrize("wrong", [(), (0.5,), (1.0, -0.1), (1.0, 0.2, 0.3), (1.0, math.nan)])
def test_coefficients_without_a_proof_are_refused(wrong: tuple[float, ...]) -> None:
    with pytest.raises(BadUsage, match="coefficients"):
        replace(PLAN, coefficients=wrong)


def test_with_coefficients_that_grow_the_earliest_schedule_is_not_the_worst() -> None:
    growing = lower((1.0, 0.0, 0.0, 0.0, 1.0), 8)
    assert worst_schedule(growing, 3, 2) > 1.1 * np.linalg.norm(growing[:, [0, 3]].sum(1))


def row_errors(encoder: np.ndarray, workload: np.ndarray) -> np.ndarray:
    return np.linalg.norm(workload @ np.linalg.pinv(encoder), axis=1)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_error_is_that_of_the_matrices(momentum: float) -> None:
    coefficients, rounds = (1.0, 0.6, 0.4, 0.1), 9
    heavy_ball = lower(tuple(np.cumsum(momentum ** np.arange(rounds))), rounds)
    rows = row_errors(lower(coefficients, rounds), heavy_ball)
    assert error(coefficients, rounds=rounds, momentum=momentum) == pytest.approx(rows.max())
    mean = error(coefficients, rounds=rounds, momentum=momentum, objective="mean")
    assert mean == pytest.approx(math.sqrt((rows**2).mean()))


def best_mean_error(rounds: int) -> tuple[float, float]:
    """Least sensitivity times RMSE over *all* matrices, one participation; from above by a matrix, from below by its
    dual certificate.

    Denisov et al. 2022, arXiv:2202.08312: X = CᵀC with diag(X) = 1 minimises tr(AᵀA X⁻¹); at multipliers v the
    Lagrangian is least at V^(-1/2) (V^(1/2) AᵀA V^(1/2))^(1/2) V^(-1/2), and its value is 2 tr(that root) - sum(v).
    """
    prefix = np.tril(np.ones((rounds, rounds)))
    gram, v = prefix.T @ prefix, np.ones(rounds)
    for _ in range(300):
        root = np.sqrt(v)
        middle = np.real(sqrtm(root[:, None] * gram * root))
        v = np.diag(middle).copy()
    root = np.sqrt(v)
    middle = np.real(sqrtm(root[:, None] * gram * root))
    best = middle / root[:, None] / root
    above = np.trace(gram @ np.linalg.inv(best)) * np.diag(best).max()
    below = 2 * np.trace(middle) - v.sum()
    return math.sqrt(above / rounds), math.sqrt(below / rounds)


def test_eight_rounds_are_near_the_optimum_over_all_matrices() -> None:
    above, below = best_mean_error(8)
    assert above == pytest.approx(below, rel=1e-6)
    question = {"rounds": 8, "separation": 8, "participations": 1}
    c = optimal_coefficients(**question, bands=8, objective="mean")
    ours = sensitivity(c, **question) * error(c, rounds=8, objective="mean")
    # A Toeplitz matrix cannot do better than the best of all, and does nearly as well.
    assert below <= ours <= 1.04 * below


def square_root(rounds: int) -> tuple[float, ...]:
    """Fichtenberger, Henzinger and Upadhyay 2022: binom(2k, k) / 4^k."""
    return tuple(math.comb(2 * k, k) / 4**k for k in range(rounds))


@pytest.mark.parametrize("rounds", [1, 2, 8, 64, 300])
def test_the_square_root_factorisation_is_equalled_or_beaten(rounds: int) -> None:
    question = {"rounds": rounds, "separation": rounds, "participations": 1}
    root, best = square_root(rounds), optimal_coefficients(**question, bands=rounds)
    known = sum(r**2 for r in root)
    assert sensitivity(root, **question) * error(root, rounds=rounds) == pytest.approx(known)
    assert sensitivity(best, **question) * error(best, rounds=rounds) <= known * (1 + 1e-9)
    mean = optimal_coefficients(**question, bands=rounds, objective="mean")
    reach = sensitivity(root, **question) * error(root, rounds=rounds, objective="mean")
    gain = sensitivity(mean, **question) * error(mean, rounds=rounds, objective="mean") / reach
    assert gain <= 1 + 1e-9
    assert gain < 0.99 or rounds < 8


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 12),
    st.integers(1, 12),
    st.floats(0.0, 0.99),
    st.sampled_from(["max", "mean"]),
)
def test_the_search_never_ends_worse_than_the_square_root_it_starts_from(
    rounds: int, bands: int, separation: int, participations: int, momentum: float, objective: str
) -> None:
    bands = min(bands, rounds)
    question = {"rounds": rounds, "separation": separation, "participations": participations}
    measure = {"rounds": rounds, "momentum": momentum, "objective": objective}
    found = optimal_coefficients(**question, bands=bands, momentum=momentum, objective=objective)
    root = np.array(square_root(rounds))
    heavy = np.convolve(root, root * momentum ** np.arange(rounds))[:bands]
    # Rounding may turn a step of zero into a small one upwards.
    start = tuple(np.minimum.accumulate(heavy))
    reach = sensitivity(found, **question) * error(found, **measure)
    assert reach <= sensitivity(start, **question) * error(start, **measure) * (1 + 1e-9)


def binary_tree(rounds: int) -> np.ndarray:
    """One row a node: the sums of blocks of 1, 2, 4, … rounds."""
    blocks = [(start, size) for size in 2 ** np.arange(rounds.bit_length()) for start in range(0, rounds, size)]
    return np.array([[float(start <= t < start + size) for t in range(rounds)] for start, size in blocks])


@pytest.mark.parametrize(("rounds", "separation", "participations"), [(16, 16, 1), (16, 4, 4), (16, 8, 2)])
def test_the_total_error_is_below_independent_noise_and_the_binary_tree(
    rounds: int, separation: int, participations: int
) -> None:
    question = {"rounds": rounds, "separation": separation, "participations": participations}
    c = optimal_coefficients(**question, bands=separation)
    ours = sensitivity(c, **question) * error(c, rounds=rounds)
    independent = sensitivity((1.0,), **question) * error((1.0,), rounds=rounds)
    assert independent == pytest.approx(math.sqrt(participations * rounds))
    # The tree with the best use of all its nodes (pseudo-inverse), which no streaming tree reaches.
    tree = binary_tree(rounds)
    by_tree = worst_schedule(tree, separation, participations) * row_errors(tree, np.tril(np.ones((rounds,) * 2))).max()
    assert ours < 0.95 * by_tree
    assert ours < 0.9 * independent


def test_bands_help_up_to_the_separation() -> None:
    question = {"rounds": 60, "separation": 6, "participations": 10}
    totals = []
    for bands in (1, 2, 4, 6, 12):
        c = optimal_coefficients(**question, bands=bands)
        assert len(c) == bands
        totals.append(sensitivity(c, **question) * error(c, rounds=60))
    assert totals[:4] == sorted(totals[:4], reverse=True)
    assert totals[4] == pytest.approx(totals[3], rel=1e-4)


def test_with_momentum_the_coefficients_are_for_its_workload() -> None:
    question = {"rounds": 60, "separation": 6, "participations": 10}
    plain, heavy = (optimal_coefficients(**question, bands=6, momentum=momentum) for momentum in (0.0, 0.9))
    assert error(heavy, rounds=60, momentum=0.9) * sensitivity(heavy, **question) < 0.99 * (
        error(plain, rounds=60, momentum=0.9) * sensitivity(plain, **question)
    )


def test_two_thousand_rounds_are_optimised_in_seconds_and_once() -> None:
    question = {"rounds": 2000, "bands": 100, "separation": 100, "participations": 20}
    begin = time.process_time()
    first = optimal_coefficients(**question)
    middle = time.process_time()
    assert optimal_coefficients(**question) is first
    assert middle - begin < 10.0
    assert time.process_time() - middle < 0.01


def whole_noise(plan: MatrixPlan, size: int, name: str) -> np.ndarray:
    """The noise of all rounds (rounds, size), in sums."""
    stream, memory, rows = insecure_seeded_noise(name), plan.start(size), []
    for _ in range(plan.rounds):
        released, memory = plan.release(np.zeros(size), memory, stream)
        rows.append(released.astype(np.float64) * plan.divisor)
    return np.stack(rows)


def test_the_noise_is_c_inverse_z() -> None:
    size = 20_000
    noise = whole_noise(PLAN, size, "correlated")
    white = lower(PLAN.coefficients, PLAN.rounds) @ noise
    sigma = PLAN.noise_multiplier * PLAN.clip_norm * PLAN.sensitivity
    covariance = white @ white.T / size / sigma**2
    # Entries of a sample covariance have deviation 1/sqrt(size), and sqrt(2/size) on the diagonal.
    assert np.abs(covariance - np.eye(PLAN.rounds)).max() < 8 * math.sqrt(2 / size)
    assert stats.kstest(white.ravel() / sigma, "norm").pvalue > 1e-9
    # What it is for: the noise in the model is less than that of independent noise with the same account.
    independent = replace(PLAN, coefficients=(1.0,))
    assert independent.epsilon() == PLAN.epsilon()
    last = noise.sum(0).std() / whole_noise(independent, size, "independent").sum(0).std()
    assert last == pytest.approx(
        PLAN.sensitivity * error(PLAN.coefficients, rounds=12) / independent.sensitivity / math.sqrt(12), rel=0.05
    )
    assert last < 0.8


def test_memory_is_one_vector_less_than_there_are_bands() -> None:
    memory, stream = PLAN.start(5), insecure_seeded_noise("memory")
    for done in range(1, PLAN.rounds + 1):
        before = memory
        _, memory = PLAN.release(np.zeros(5), memory, stream)
        assert (memory.rounds_done, len(memory.past)) == (done, min(done, len(PLAN.coefficients) - 1))
        assert before.rounds_done == done - 1
    with pytest.raises(BudgetExceeded, match="all 12 rounds"):
        PLAN.release(np.zeros(5), memory, stream)
    with pytest.raises(ShapeMismatch):
        PLAN.release(np.zeros(4), PLAN.start(5), stream)


def test_the_noise_of_past_rounds_is_not_shown_and_not_copied() -> None:
    _, memory = PLAN.release(np.zeros(2), PLAN.start(2), insecure_seeded_noise("secret"))
    assert repr(memory) == "NoiseMemory(size=2, rounds_done=1)"
    with pytest.raises(TypeError, match="secret"):
        pickle.dumps(memory)


@settings(deadline=None, max_examples=100)
@given(coefficient_lists, st.integers(0, 9), st.integers(1, 4), st.integers(1, 4))
def test_starting_anew_costs_no_privacy(
    coefficients: tuple[float, ...], after: int, separation: int, participations: int
) -> None:
    rounds = 9
    whole = lower(coefficients[:rounds], rounds)
    blocks = whole.copy()
    blocks[after:, :after] = 0.0
    bound = sensitivity(coefficients[:rounds], rounds=rounds, separation=separation, participations=participations)
    assert worst_schedule(blocks, separation, participations) <= bound * (1 + 1e-12)


def test_starting_anew_goes_on_with_the_rounds_that_are_left() -> None:
    memory = PLAN.start(3, after=11)
    _, memory = PLAN.release(np.zeros(3), memory, insecure_seeded_noise("anew"))
    with pytest.raises(BudgetExceeded):
        PLAN.release(np.zeros(3), memory, insecure_seeded_noise("anew"))
    for wrong in (-1, 13):
        with pytest.raises(BadUsage, match="rounds done"):
            PLAN.start(3, after=wrong)


@pytest.mark.parametrize("epsilon", [0.5, 2.0, 8.0])
def test_epsilon_is_that_of_one_gaussian_and_met_from_below(epsilon: float) -> None:
    plan = MatrixPlan.calibrate(
        epsilon=epsilon, delta=1e-5, rounds=12, participation=PLAN.participation, clip_norm=1.0, divisor=1.0
    )
    assert epsilon - 1e-4 <= plan.epsilon() <= epsilon
    # Balle and Wang 2018, theorem 8.
    mu, cdf = 1 / plan.noise_multiplier, stats.norm.cdf
    spent = cdf(mu / 2 - plan.epsilon() / mu) - math.exp(plan.epsilon()) * cdf(-mu / 2 - plan.epsilon() / mu)
    assert spent == pytest.approx(1e-5, rel=1e-6)
    assert plan.gdp() == mu
    # Rényi divergence of two normal numbers that far apart.
    assert plan.rdp(4.0) == pytest.approx(2.0 * mu**2)


def test_a_device_refuses_a_server_that_asks_too_soon_again_or_too_often() -> None:
    taking_part = Participation(separation=4, at_most=3)
    rounds = taking_part.admit((), 2)
    for wrong in (2, 3, 5, 1):
        with pytest.raises(BudgetExceeded, match="expected at least 4"):
            taking_part.admit(rounds, wrong)
    rounds = taking_part.admit(taking_part.admit(rounds, 6), 11)
    assert rounds == (2, 6, 11)
    with pytest.raises(BudgetExceeded, match="none is left"):
        taking_part.admit(rounds, 100)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.lists(st.integers(0, 40), max_size=40))
def test_whatever_a_server_asks_the_rounds_keep_to_the_participation(
    separation: int, at_most: int, asked: list[int]
) -> None:
    taking_part, rounds = Participation(separation=separation, at_most=at_most), ()
    for number in asked:
        try:
            rounds = taking_part.admit(rounds, number)
        except BudgetExceeded:
            continue
    assert len(rounds) <= at_most
    assert all(later - earlier >= separation for earlier, later in itertools.pairwise(rounds))


def test_a_ledger_charges_the_plan_whole_and_counts_the_devices_own_steps() -> None:
    with PrivacyLedger.scratch(epsilon=2.0, delta=1e-5) as ledger:
        for number in (1, 5, 9):
            ledger.commit(ledger.reserve(run="r", round=number, plan=PLAN))
        with pytest.raises(BudgetExceeded):
            ledger.reserve(run="r", round=13, plan=PLAN)
        (run,) = ledger.summary().runs
    assert (run.epsilon, run.steps) == (PLAN.epsilon(), 3)
    assert run.plan["trusted"] == "server"
    assert run.plan["adversary"] == "outsider"


def test_a_plan_round_trips_and_its_digest_sees_every_field() -> None:
    values = PLAN.to_json()
    assert MatrixPlan.from_json(values) == PLAN
    others = [
        replace(PLAN, coefficients=(1.0, 0.5)),
        replace(PLAN, rounds=13),
        replace(PLAN, participation=Participation(separation=5, at_most=3)),
        replace(PLAN, participation=Participation(separation=4, at_most=2)),
        *(replace(PLAN, **{name: 0.9}) for name in ("clip_norm", "noise_multiplier", "delta", "divisor")),
    ]
    assert len({plan.digest() for plan in (PLAN, *others)}) == 9
    unlabelled = {name: value for name, value in values.items() if name != "trusted"}
    odd = [{**values, **other} for other in ({"coefficients": "abc"}, {"participation": 3}, {"clip_norm": "1"})]
    for wrong in (*odd, {**values, "trusted": "nobody"}, unlabelled, {**values, "extra": 1}, {"rounds": 3}):
        with pytest.raises(BadUsage, match="matrix plan"):
            MatrixPlan.from_json(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rounds": 0},
        {"rounds": 2},
        {"rounds": 10**6},
        {"clip_norm": 0.0},
        {"noise_multiplier": math.nan},
        {"delta": 1.0},
        {"divisor": -1.0},
    ],
)
def test_a_plan_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(BadUsage, match="got"):
        replace(PLAN, **wrong)
    with pytest.raises(BadUsage, match="got"):
        Participation(separation=0, at_most=1)
    with pytest.raises(BadUsage, match="got"):
        optimal_coefficients(rounds=3, bands=4, separation=1, participations=1)
