"""A distinguishing game for each kind of release: a naive version shows more than its ε, ours does not.

The attacker sees many releases of two neighbouring inputs as one number each, chooses an event by half of them, and
bounds its two probabilities by the other half (Clopper and Pearson): an ε that the mechanism certainly leaks.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import beta

from fedinfer.privacy.discrete import Integers
from fedinfer.privacy.evaluation import EvaluationRelease
from fedinfer.privacy.integer_noise import Gaussian
from fedinfer.privacy.local import LocalVector, RandomisedResponse
from fedinfer.privacy.noise import NoiseStream, insecure_seeded_noise
from fedinfer.privacy.releases import CountRelease, HistogramRelease, ScalarRelease
from fedinfer.privacy.votes import ConfidentVotes

TRIALS = 2000
FALSE_ALARM = 1e-9
EPSILON, DELTA = 1.0, 1e-6
COUNT = CountRelease.calibrate(epsilon=EPSILON, delta=DELTA)
HISTOGRAM = HistogramRelease.calibrate(epsilon=EPSILON, delta=0.0, bins=4)
SCALAR = ScalarRelease.calibrate(epsilon=EPSILON, delta=DELTA, low=0.0, high=1.0, default=0.0)
EVALUATION = EvaluationRelease.calibrate(epsilon=EPSILON, delta=DELTA, bins=4, loss_bound=2.0)
VOTES = ConfidentVotes.calibrate(epsilon=EPSILON, delta=DELTA, classes=2, threshold=0.0, queries=5, answers=5)
VECTOR = LocalVector.calibrate(epsilon=EPSILON, delta=DELTA, dimension=4, clip_norm=1.0)
ANSWER = RandomisedResponse.calibrate(epsilon=EPSILON, categories=3)
FAR = np.full(4, 100.0)

# What the attacker makes of one release: larger if the unit seems to be there.
Game = Callable[[bool, NoiseStream], float]


def leaked(game: Game) -> float:
    """An ε that the game leaks at `DELTA`, but with probability `FALSE_ALARM`."""
    seen = np.array(
        [[game(there, insecure_seeded_noise(f"{there} {trial}")) for trial in range(TRIALS)] for there in (False, True)]
    )
    chosen, tested = seen[:, : TRIALS // 2], seen[:, TRIALS // 2 :]
    cuts = np.unique(np.quantile(chosen, np.linspace(0, 1, 101)))
    return bound(tested, max(cuts, key=lambda cut: bound(chosen, cut)))


def bound(seen: np.ndarray, cut: float) -> float:
    (absent, there), trials = (seen >= cut).sum(1), seen.shape[1]
    # Either "above the cut" is likelier with the unit, or "below it" without.
    return max(log_ratio(there, absent, trials), log_ratio(trials - absent, trials - there, trials))


def log_ratio(often: int, rarely: int, trials: int) -> float:
    least = float(beta.ppf(FALSE_ALARM / 2, often, trials - often + 1)) if often else 0.0
    most = float(beta.ppf(1 - FALSE_ALARM / 2, rarely + 1, trials - rarely)) if rarely < trials else 1.0
    return math.log(max(least - DELTA, 1e-300) / most)


def count(there: bool, stream: NoiseStream) -> float:
    return COUNT.release(np.ones(50 + there, bool), stream)


def count_with_a_tenth_of_the_noise(there: bool, stream: NoiseStream) -> float:
    quiet = replace(COUNT, noise=Gaussian(sigma=COUNT.standard_error / 10))
    return quiet.release(np.ones(50 + there, bool), stream)


def histogram(there: bool, stream: NoiseStream) -> float:
    return int(HISTOGRAM.release(np.array([0, 1, 2, 3] * 5 + [2] * there), stream)[2])


def histogram_with_its_exact_total(there: bool, stream: NoiseStream) -> float:
    rows = np.array([0, 1, 2, 3] * 5 + [2] * there)
    return float(len(rows)) + 0 * HISTOGRAM.release(rows, stream)[0]


def scalar(there: bool, stream: NoiseStream) -> float:
    return float(SCALAR.release(np.array([0.5] * 9 + [30.0] * there), stream).sum())


def scalar_without_clipping(there: bool, stream: NoiseStream) -> float:
    loose = replace(SCALAR, high=30.0, sigma=SCALAR.sigma / 30)
    return float(loose.release(np.array([0.5] * 9 + [30.0] * there), stream).sum())


def evaluate(release: EvaluationRelease, there: bool, stream: NoiseStream) -> Integers:
    scores = np.array([0.9] * (5 + there))
    return release.counts(scores, np.ones(5 + there), np.array([0.1] * 5 + [80.0] * there), stream)


def evaluation(there: bool, stream: NoiseStream) -> float:
    vector = evaluate(EVALUATION, there, stream)
    # In the direction in which the row moves it.
    return float(vector[7] + vector[8] / 2)


def evaluation_without_clipping(there: bool, stream: NoiseStream) -> float:
    # Forty times the bound, and the noise of the losses as it was.
    loose = replace(EVALUATION, loss_bound=80.0, sigma=EVALUATION.sigma / 40)
    return float(evaluate(loose, there, stream)[8])


def votes(there: bool, stream: NoiseStream) -> float:
    return sum(label == 1 for label in VOTES.label(np.array([[0] * 10 + [1] * 10 + [int(there)]] * 5), stream))


def votes_counted_without_noise(there: bool, stream: NoiseStream) -> float:
    return float(np.bincount([0] * 10 + [1] * 10 + [int(there)]).argmax())


def vector(there: bool, stream: NoiseStream) -> float:
    return float(VECTOR.release(FAR if there else -FAR, stream).sum())


def vector_clipped_after_the_noise(there: bool, stream: NoiseStream) -> float:
    noisy = (FAR if there else -FAR) + stream.gaussian_float(VECTOR.noise_multiplier, 4)
    return float((noisy / max(1.0, float(np.linalg.norm(noisy)))).sum())


def answer(there: bool, stream: NoiseStream) -> float:
    return float(ANSWER.release(np.array([int(there)]), stream)[0] == 1)


def answer_of_four_epsilon(there: bool, stream: NoiseStream) -> float:
    plan = RandomisedResponse.calibrate(epsilon=4 * EPSILON, categories=3)
    return float(plan.release(np.array([int(there)]), stream)[0] == 1)


@pytest.mark.parametrize("game", [count, histogram, scalar, evaluation, votes, vector, answer])
def test_a_release_leaks_no_more_than_its_epsilon(game: Game) -> None:
    assert leaked(game) <= EPSILON


@pytest.mark.parametrize(
    "game",
    [
        count_with_a_tenth_of_the_noise,
        histogram_with_its_exact_total,
        scalar_without_clipping,
        evaluation_without_clipping,
        votes_counted_without_noise,
        vector_clipped_after_the_noise,
        answer_of_four_epsilon,
    ],
)
def test_a_naive_version_leaks_more(game: Game) -> None:
    assert leaked(game) > 1.5 * EPSILON


@pytest.mark.parametrize(
    "charge", [COUNT, HISTOGRAM, SCALAR, EVALUATION, VOTES, VECTOR, ANSWER], ids=lambda c: type(c).__name__
)
def test_each_claims_the_epsilon_of_the_game(charge: CountRelease) -> None:
    assert EPSILON - 1e-4 <= charge.epsilon() <= EPSILON
