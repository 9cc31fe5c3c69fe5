"""Attacks on client-level clipping, on the adaptive clip and on correlated noise.

Each game is played many times at once: coordinates of a release have independent noise, so that a vector of equal
coordinates is that many games. What winning proves is a lower bound of μ, as in μ-Gaussian differential privacy; the
naive version proves more than is claimed, ours does not.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import beta, norm

from fedinfer.errors import BudgetExceeded
from fedinfer.privacy import NoiseStream, PrivacyPlan, insecure_seeded_noise
from fedinfer.privacy.clipping import AdaptiveClip, clip_update, clipped_sum
from fedinfer.privacy.matrix import MatrixPlan, NoiseMemory, Participation
from fedinfer.privacy.samplers import Poisson

GAMES = 40_000
ONCE = PrivacyPlan.calibrate(
    epsilon=1.0, delta=1e-5, steps=1, unit="client", clip_norm=1.0, sampler=Poisson(rate=1.0), divisor=10.0
)


def proven_mu(without: np.ndarray, with_target: np.ndarray) -> float:
    """From scores that are larger with the target: the best threshold by one half, its bound by the other.

    Nasr et al. 2023, arXiv:2302.07956: μ is at least Φ⁻¹(1 - α) - Φ⁻¹(β) for the error rates α and β of any test;
    both are bounded at 99.9 % (Clopper-Pearson).
    """

    def bound(absent: np.ndarray, present: np.ndarray, threshold: float) -> float:
        rates = []
        for wrong in (absent > threshold, present <= threshold):
            count, errors = len(wrong), int(wrong.sum())
            rates.append(float(beta.ppf(1 - 5e-4, errors + 1, count - errors)) if errors < count else 1.0)
        return float(norm.isf(rates[0]) - norm.ppf(rates[1]))

    thresholds = np.quantile(np.concatenate([without[::2], with_target[::2]]), np.linspace(0.02, 0.98, 97))
    best = max(thresholds, key=lambda threshold: bound(without[::2], with_target[::2], threshold))
    return bound(without[1::2], with_target[1::2], best)


# --- Clipping and weights: one round, nine clients of norm 1 and the target. ---


def clipped(update: float) -> float:
    return float(clip_update(np.array([update], np.float32), clip_norm=1.0)[0])


def ours(clients: list[float], answered: int) -> float:
    return float(clipped_sum([np.array([c], np.float32) for c in clients], size=1, clip_norm=1.0).total[0])


def unclipped(clients: list[float], answered: int) -> float:
    return sum(clients)


def clipped_after_the_sum(clients: list[float], answered: int) -> float:
    return 10.0 * clipped(sum(clients) / 10.0)


def weighted_by_examples(clients: list[float], answered: int) -> float:
    # The target says that it has five times the examples of the others.
    return sum(clipped(update) for update in clients) + 4.0 * sum(clipped(update) for update in clients[9:])


def divided_by_those_who_answered(clients: list[float], answered: int) -> float:
    # The plan divides by 10 afterwards: the noise is as declared, the sum is the mean of those who came, times 10.
    return sum(clipped(update) for update in clients) * 10.0 / answered


Sum = Callable[[list[float], int], float]


def played(total: Sum) -> float:
    # Opposed to the others: what a mean over a private number doubles.
    others, target, seeds = [1.0] * 9, -50.0, iter(range(2))
    scores = []
    for clients in (others, [*others, target]):
        value = total(clients, len(clients))
        released = ONCE.release(np.full(GAMES, value), insecure_seeded_noise(f"clip {next(seeds)}"))
        scores.append(-released.astype(np.float64))
    return proven_mu(*scores)


def test_a_long_update_is_worth_no_more_than_the_clip() -> None:
    assert 0.85 * ONCE.gdp() < played(ours) <= ONCE.gdp()


@pytest.mark.parametrize(
    "naive", [unclipped, clipped_after_the_sum, weighted_by_examples, divided_by_those_who_answered]
)
def test_the_game_catches_naive_sums(naive: Sum) -> None:
    assert played(naive) > ONCE.gdp()


def test_one_poisoned_update_does_not_poison_the_round() -> None:
    clients = [np.ones(3, np.float32), np.array([1.0, np.nan, np.inf], np.float32)]
    assert not np.isfinite(np.sum(clients, axis=0)).all()
    assert np.isfinite(clipped_sum(clients, size=3, clip_norm=1.0).total).all()


# --- The adaptive clip: the server publishes the next clip with the model. ---

LOUD = PrivacyPlan.calibrate(
    epsilon=8.0, delta=1e-5, steps=1, unit="client", clip_norm=1.0, sampler=Poisson(rate=1.0), divisor=10.0
)
ADAPTIVE = AdaptiveClip(plan=LOUD, count_noise=0.8 * LOUD.noise_multiplier, learning_rate=2.0)


def adaptive_scores(
    release: Callable[[AdaptiveClip, np.ndarray, float, NoiseStream], tuple[np.ndarray, float]], name: str
) -> float:
    """Nine clients within the clip and a target beyond it: by the mean, by the next clip, and by both together."""
    clip, games, scores = 1.0, 4000, []
    others = [np.array([0.5], np.float32)] * 9
    for present in (False, True):
        clients = [*others, np.array([-50.0], np.float32)] if present else others
        total = np.sum([ADAPTIVE.contribution(update, clip=clip) for update in clients], axis=0)
        stream, game = insecure_seeded_noise(f"{name} {present}"), []
        for _ in range(games):
            mean, following = release(ADAPTIVE, total, clip, stream)
            within = ADAPTIVE.target_quantile - math.log(following / clip) / ADAPTIVE.learning_rate
            # Signals 1 and 1/2, each over the variance that is claimed: their sum is the likelihood ratio.
            by_mean, by_clip = -mean[0] / ADAPTIVE.update_noise**2, -within / (2 * ADAPTIVE.count_noise**2)
            game.append((by_mean, by_clip, by_mean + by_clip))
        scores.append(np.array(game).T)
    return max(proven_mu(*score) for score in zip(*scores, strict=True))


def noised(adaptive: AdaptiveClip, total: np.ndarray, clip: float, stream: NoiseStream) -> tuple[np.ndarray, float]:
    return adaptive.release(total, clip=clip, stream=stream)


def raw_count(adaptive: AdaptiveClip, total: np.ndarray, clip: float, stream: NoiseStream) -> tuple[np.ndarray, float]:
    mean, _ = adaptive.release(total, clip=clip, stream=stream)
    scale = adaptive.plan.clip_norm * adaptive.plan.noise_multiplier / adaptive.count_noise
    within = 0.5 + total[-1] / scale / adaptive.plan.divisor
    return mean, clip * math.exp(adaptive.learning_rate * (adaptive.target_quantile - within))


def noise_by_the_updated_clip(
    adaptive: AdaptiveClip, total: np.ndarray, clip: float, stream: NoiseStream
) -> tuple[np.ndarray, float]:
    mean, following = adaptive.release(total, clip=clip, stream=stream)
    exact = total[0] * adaptive.update_noise * clip / adaptive.plan.noise_multiplier / adaptive.plan.divisor
    return exact + (mean - exact) * following / clip, following


def test_mean_and_next_clip_together_prove_no_more_than_the_plan() -> None:
    assert 0.85 * ADAPTIVE.gdp() < adaptive_scores(noised, "noised") <= ADAPTIVE.gdp()


@pytest.mark.parametrize("naive", [raw_count, noise_by_the_updated_clip])
def test_the_game_catches_naive_adaptive_clips(
    naive: Callable[[AdaptiveClip, np.ndarray, float, NoiseStream], tuple[np.ndarray, float]],
) -> None:
    assert adaptive_scores(naive, naive.__name__) > ADAPTIVE.gdp()


# --- Correlated noise: an outsider has all releases, undoes the correlation and looks where the target would be. ---

ROUNDS = 12
CORRELATED = MatrixPlan.calibrate(
    epsilon=2.0,
    delta=1e-5,
    rounds=ROUNDS,
    participation=Participation(separation=3, at_most=4),
    clip_norm=1.0,
    divisor=1.0,
)
Play = Callable[[np.ndarray, str], np.ndarray]


def schedule(asked: range) -> np.ndarray:
    """The sums of a target that gives its most whenever its device admits the round."""
    rounds: tuple[int, ...] = ()
    for number in asked:
        try:
            rounds = CORRELATED.participation.admit(rounds, number)
        except BudgetExceeded:
            continue
    return np.isin(np.arange(ROUNDS), rounds).astype(np.float64)


def run(plan: MatrixPlan, sums: np.ndarray, name: str, *, restarts: tuple[int, ...] = ()) -> np.ndarray:
    stream, memory, rows = insecure_seeded_noise(name), plan.start(GAMES), []
    for number, value in enumerate(sums):
        if number in restarts:
            memory = plan.start(GAMES, after=number)
        released, memory = plan.release(np.full(GAMES, value), memory, stream)
        rows.append(released.astype(np.float64))
    return np.stack(rows)


def honest(sums: np.ndarray, name: str) -> np.ndarray:
    return run(CORRELATED, sums, name)


def restarted(sums: np.ndarray, name: str) -> np.ndarray:
    return run(CORRELATED, sums, name, restarts=(2, 5))


def noise_for_one_participation(sums: np.ndarray, name: str) -> np.ndarray:
    column = float(np.linalg.norm(CORRELATED.coefficients))
    return run(
        replace(CORRELATED, noise_multiplier=CORRELATED.noise_multiplier * column / CORRELATED.sensitivity), sums, name
    )


def noise_for_the_identity(sums: np.ndarray, name: str) -> np.ndarray:
    """Deviation of independent noise, correlated all the same: ||C|| is forgotten."""
    independent = replace(CORRELATED, coefficients=(1.0,)).sensitivity / CORRELATED.sensitivity
    return run(replace(CORRELATED, noise_multiplier=CORRELATED.noise_multiplier * independent), sums, name)


def seed_kept_over_a_restart(sums: np.ndarray, name: str) -> np.ndarray:
    """The server restarts after four rounds from the seed it stored: the same white noise again."""
    again = [run(CORRELATED, sums[start : start + 4], name) for start in range(0, ROUNDS, 4)]
    return np.concatenate(again)


def attack(play: Play, sums: np.ndarray, *, blocks: tuple[int, ...] = ()) -> float:
    """μ proven by the likelihood ratio of white noise, for an attacker who knows schedule, C and restarts."""
    encoder = np.array([[_entry(i - j) for j in range(ROUNDS)] for i in range(ROUNDS)])
    for start in blocks:
        encoder[start:, :start] = 0.0
    signal = encoder @ sums
    scores = [signal @ (encoder @ play(present * sums, f"{play.__name__} {present}")) for present in (0.0, 1.0)]
    return proven_mu(*scores)


def _entry(lag: int) -> float:
    return CORRELATED.coefficients[lag] if 0 <= lag < len(CORRELATED.coefficients) else 0.0


def test_undoing_the_correlation_proves_no_more_than_claimed() -> None:
    assert 0.85 * CORRELATED.gdp() < attack(honest, schedule(range(ROUNDS))) <= CORRELATED.gdp()


def test_neither_does_a_server_that_lost_its_memory() -> None:
    assert attack(restarted, schedule(range(ROUNDS)), blocks=(2, 5)) <= CORRELATED.gdp()


@pytest.mark.parametrize("naive", [noise_for_one_participation, noise_for_the_identity])
def test_the_game_catches_too_little_correlated_noise(naive: Play) -> None:
    assert attack(naive, schedule(range(ROUNDS))) > CORRELATED.gdp()


def test_a_stored_seed_gives_the_update_away() -> None:
    # The target comes in rounds 0, 3, 6 and 9; blocks of four rounds with the same noise differ by its updates alone.
    sums = schedule(range(ROUNDS))
    blocks = seed_kept_over_a_restart(sums, "seed").reshape(3, 4, GAMES)
    assert np.abs(blocks[0] - blocks[1]).max() == pytest.approx(1.0, abs=1e-3)
    ours = honest(sums, "seed").reshape(3, 4, GAMES)
    assert np.abs(ours[0] - ours[1]).std() > 1.0


def test_a_device_that_answers_whenever_it_is_asked_is_worth_more_than_claimed() -> None:
    # A server that asks in each round: the guard admits four, three apart.
    assert schedule(range(ROUNDS)).sum() == 4
    assert attack(honest, np.ones(ROUNDS)) > CORRELATED.gdp()
    # Four participations as well, but in a row.
    assert attack(honest, (np.arange(ROUNDS) < 4).astype(np.float64)) > CORRELATED.gdp()


def test_whoever_has_the_servers_memory_has_the_updates() -> None:
    """Why it is secret: the attacker takes the noise off, in a comparison that no error of ours could pass."""
    stream, sums = insecure_seeded_noise("leaked"), schedule(range(ROUNDS))
    memory: NoiseMemory = CORRELATED.start(8)
    released, memory = CORRELATED.release(np.full(8, sums[0]), memory, stream)
    assert np.abs(released - memory.past[0] - sums[0]).max() < 1e-5
    assert np.abs(released - sums[0]).max() > 0.1
    assert str(float(memory.past[0][0])) not in repr(memory)
