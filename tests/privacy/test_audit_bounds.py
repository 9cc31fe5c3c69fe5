"""Lower bounds on ε: they are right as often as they say, near the truth, and zero where nothing leaks."""

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import binom, binomtest

from fedinfer.errors import BadUsage
from fedinfer.privacy.accounting import gaussian_epsilon
from fedinfer.privacy.audit_bounds import MOST, Game, Guesses, _upper

DELTA = 1e-5
SEED = 20230518


def gaussian_game(mu: float, runs: int, rng: np.random.Generator) -> Game:
    return Game(without=rng.normal(size=runs), present=mu + rng.normal(size=runs))


def mu_of(epsilon: float) -> float:
    return float(brentq(lambda mu: gaussian_epsilon(mu=mu, delta=DELTA) - epsilon, 0.01, 10.0))


# Of a game in which each canary's score is its coin plus Gaussian noise: Steinke et al. 2023 plot such a curve.
TABLE = {1.0: 0.40, 2.0: 0.85, 4.0: 1.85, 8.0: 3.63, 16.0: 4.91}


@pytest.mark.parametrize(("epsilon", "expected"), TABLE.items())
def test_one_run_bounds_are_those_of_the_table(epsilon: float, expected: float) -> None:
    rng = np.random.default_rng(SEED)
    bounds = []
    for _ in range(20):
        coins = rng.random(5000) < 0.5
        scores = coins + rng.normal(size=5000) / mu_of(epsilon)
        bounds.append(Guesses.from_scores(scores, coins, each_side=250).epsilon_lower(delta=DELTA, error=0.05))
    assert np.mean(bounds) == pytest.approx(expected, abs=0.1)
    assert max(bounds) <= epsilon


def test_one_run_has_a_ceiling_and_a_floor() -> None:
    assert Guesses(canaries=1000, made=1000, right=1000).epsilon_lower(delta=DELTA, error=0.05) == pytest.approx(
        5.78, abs=0.01
    )
    assert Guesses(canaries=1000, made=1000, right=500).epsilon_lower(delta=DELTA, error=0.05) == 0.0
    assert Guesses(canaries=1000, made=1000, right=0).epsilon_lower(delta=DELTA, error=0.05) == 0.0


@pytest.mark.parametrize(("made", "right", "epsilon"), [(10, 9, 0.5), (20, 20, 1.0), (7, 1, 0.1), (5, 0, 1.0)])
def test_the_chance_of_a_one_run_audit_is_the_formula(made: int, right: int, epsilon: float) -> None:
    lucky = np.exp(epsilon) / (1 + np.exp(epsilon))
    mass = [float(binom.pmf(count, made, lucky)) for count in range(made + 1)]
    beta = sum(mass[right:])
    alpha = max([sum(mass[right - back : right]) / back for back in range(1, right + 1)], default=0.0)
    got = Guesses(canaries=100, made=made, right=right).chance(epsilon, delta=0.01)
    assert got == pytest.approx(min(1.0, beta + 2 * 100 * 0.01 * alpha), rel=1e-9)


def test_guesses_are_the_highest_and_the_lowest_scores() -> None:
    scores = np.array([0.0, 5.0, 1.0, np.nan, -1.0, 2.0])
    present = np.array([False, True, True, True, True, False])
    assert Guesses.from_scores(scores, present, each_side=2) == Guesses(canaries=6, made=4, right=3)


def test_impossible_counts_are_refused() -> None:
    for made, right in ((5, 6), (0, 0), (11, 3), (5, -1)):
        with pytest.raises(BadUsage):
            Guesses(canaries=10, made=made, right=right)
    with pytest.raises(BadUsage):
        Game(without=np.zeros(3), present=np.zeros(100))


def test_rates_are_bounded_by_clopper_and_pearson() -> None:
    for count, runs in ((0, 30), (7, 30), (29, 30)):
        interval = binomtest(count, runs).proportion_ci(confidence_level=0.9, method="exact")
        assert _upper(np.array([count]), runs, 0.05)[0] == pytest.approx(interval.high, rel=1e-9)
    assert _upper(np.array([30]), 30, 0.05)[0] == 1.0


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_two_run_bounds_are_wrong_at_most_as_often_as_they_say(epsilon: float) -> None:
    rng, wrong, games = np.random.default_rng(SEED), [0, 0], 200
    for _ in range(games):
        game = gaussian_game(mu_of(epsilon), 300, rng)
        wrong[0] += game.epsilon_lower(delta=DELTA, error=0.2) > epsilon
        wrong[1] += game.gaussian_epsilon_lower(delta=DELTA, error=0.2) > epsilon
    # Three standard deviations above the promise.
    assert max(wrong) <= 0.2 * games + 3 * np.sqrt(0.16 * games)


def test_a_gaussian_game_is_tight() -> None:
    game = gaussian_game(mu_of(2.0), 200_000, np.random.default_rng(SEED))
    assert 1.85 <= game.gaussian_epsilon_lower(delta=DELTA, error=0.05) <= 2.0
    assert 1.1 <= game.epsilon_lower(delta=DELTA, error=0.05) <= 2.0


def test_a_sampled_game_is_near_the_truth_and_not_above_it() -> None:
    """Eight releases at rate 1/2; the noise multiplier 4.75 is ε = 1."""
    rng, noise, steps = np.random.default_rng(SEED), 4.75, 8

    def scores(signal: float) -> np.ndarray:
        seen = rng.normal(size=(100_000, steps)) * noise + (rng.random((100_000, steps)) < 0.5) * signal
        return np.logaddexp(0.0, (2 * seen - 1) / (2 * noise**2)).sum(1)

    game = Game(without=scores(0.0), present=scores(1.0))
    bound = game.sampled_epsilon_lower(rate=0.5, steps=steps, delta=DELTA, error=0.05)
    assert 0.8 <= bound <= 1.0
    # Who assumes less proves less.
    assert game.epsilon_lower(delta=DELTA, error=0.05) < bound


def test_nothing_is_proven_where_nothing_leaks_and_all_where_everything_does() -> None:
    rng = np.random.default_rng(SEED)
    same = gaussian_game(0.0, 20_000, rng)
    apart = Game(without=rng.normal(size=1000), present=np.full(1000, 1e9))
    poisoned = Game(without=rng.normal(size=1000), present=np.full(1000, np.nan))
    for bound in (
        lambda game: game.epsilon_lower(delta=DELTA, error=0.05),
        lambda game: game.gaussian_epsilon_lower(delta=DELTA, error=0.05),
        lambda game: game.sampled_epsilon_lower(rate=0.5, steps=8, delta=DELTA, error=0.05),
    ):
        assert bound(same) <= 0.05
        assert bound(apart) == bound(poisoned) > 4.0
        assert bound(apart) <= MOST
