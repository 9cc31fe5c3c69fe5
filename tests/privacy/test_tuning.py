"""Choosing the best of several private runs: its account against exact computations, and what is refused."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from decimal import localcontext
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from fedinfer.errors import BadUsage
from fedinfer.privacy.ledger import PrivacyLedger
from fedinfer.privacy.noise import insecure_seeded_noise, os_noise
from fedinfer.privacy.repetition import ORDERS, PoissonRuns, Runs, TruncatedNegativeBinomial, draw_number
from fedinfer.privacy.tuning import Tuned, stopped_early
from tests.privacy.charges import Light

FREE = Light(steps=1, delta=0.0, epsilon_=0.0, mu=0.0)
GEOMETRIC = TruncatedNegativeBinomial(eta=1.0, gamma=0.1)
LOGARITHMIC = TruncatedNegativeBinomial(eta=0.0, gamma=0.05)
RUNS = [
    GEOMETRIC,
    LOGARITHMIC,
    TruncatedNegativeBinomial(eta=-0.5, gamma=1e-2),
    TruncatedNegativeBinomial(eta=0.5, gamma=0.3),
    TruncatedNegativeBinomial(eta=3.0, gamma=0.2),
    PoissonRuns(mean=1.0),
    PoissonRuns(mean=10.0),
]


@dataclass(frozen=True, kw_only=True)
class Pair(Light):
    """A mechanism of finitely many outcomes, best last, by its probabilities on two neighbours."""

    here: tuple[float, ...]
    there: tuple[float, ...]

    def rdp(self, order: float) -> float:
        return max(divergence(self.here, self.there, order), divergence(self.there, self.here, order))


class Pure(Light):
    """A charge of pure ε."""

    def rdp(self, order: float) -> float:
        return self.epsilon_


def divergence(p: tuple[float, ...], q: tuple[float, ...], order: float) -> float:
    """The Rényi divergence, in logarithms: orders go into the thousands."""
    terms = [order * math.log(a) + (1.0 - order) * math.log(b) for a, b in zip(p, q, strict=True) if a > 0.0]
    return float(np.logaddexp.reduce(terms)) / (order - 1.0)


def generating(runs: Runs, x: float) -> float:
    """E[x^K], in closed form."""
    if isinstance(runs, PoissonRuns):
        return math.exp(runs.mean * (x - 1.0))
    assert isinstance(runs, TruncatedNegativeBinomial)
    rest = 1.0 - (1.0 - runs.gamma) * x
    if runs.eta == 0.0:
        return math.log(rest) / math.log(runs.gamma)
    return (rest**-runs.eta - 1.0) / (runs.gamma**-runs.eta - 1.0)


def best(runs: Runs, single: tuple[float, ...]) -> tuple[float, ...]:
    """The distribution of the best outcome of K runs; with no run at all, an outcome of its own."""
    sums = [generating(runs, min(1.0, total)) for total in (0.0, *np.cumsum(single))]
    return (max(sums[0], 0.0), *(b - a for a, b in pairwise(sums)))


def response(epsilon: float, rare: float) -> Pair:
    """Three outcomes: a rare best one and a common worst one, each as likely as ε allows on the other table."""
    factor = math.exp(epsilon)
    here = (0.5 - rare, 0.5, rare)
    low, high = (0.5 - rare) / factor, rare * factor
    return Pair(here=here, there=(low, 1.0 - low - high, high))


def hidden(epsilon: float, rare: float) -> Pair:
    """Three outcomes: a rare middle one that is likelier on the other table, where the best one is less likely too.

    Choosing the best makes the middle one count twice: it is drawn more often, and hidden less often by the best.
    """
    factor = math.exp(epsilon)
    middle, top = rare * factor, 0.5 / factor
    return Pair(here=(0.5 - rare, rare, 0.5), there=(1.0 - middle - top, middle, top))


@pytest.mark.parametrize("runs", RUNS, ids=str)
@pytest.mark.parametrize("make", [response, hidden])
@pytest.mark.parametrize("epsilon", [0.1, 0.5])
@pytest.mark.parametrize("rare", [1e-6, 1e-3, 0.05])
def test_the_bound_holds_for_a_mechanism_computed_exactly(
    runs: Runs, make: Callable[[float, float], Pair], epsilon: float, rare: float
) -> None:
    base = make(epsilon, rare)
    tuned = Tuned(training=base, score=FREE, runs=runs, delta=1e-6)
    here, there = best(runs, base.here), best(runs, base.there)
    assert sum(here) == pytest.approx(1.0)
    for order in (1.5, 2.0, 5.0, 16.0, 64.0, 2000.0):
        exact = max(divergence(here, there, order), divergence(there, here, order))
        assert exact <= tuned.rdp(order) + 1e-9


@pytest.mark.parametrize(("runs", "times"), [(GEOMETRIC, 3.0), (LOGARITHMIC, 2.0)])
def test_the_bound_is_not_idle_and_the_choice_is_not_free(runs: Runs, times: float) -> None:
    base = hidden(0.5, 1e-6)
    exact = divergence(best(runs, base.there), best(runs, base.here), 2000.0)
    tuned = Tuned(training=base, score=FREE, runs=runs, delta=1e-6)
    # One run costs 0.5; the bound of the paper is two or three times that.
    assert 0.8 * 0.5 * times < exact <= tuned.rdp(2000.0) < 1.02 * 0.5 * times


def test_the_best_of_a_fixed_number_costs_more_than_the_bound_of_a_random_one() -> None:
    base = hidden(0.5, 1e-6)

    def fixed(single: tuple[float, ...]) -> tuple[float, ...]:
        sums = [min(1.0, total) ** 10 for total in np.cumsum(single)]
        return (sums[0], *(b - a for a, b in pairwise(sums)))

    exact = divergence(fixed(base.there), fixed(base.here), 2000.0)
    tuned = Tuned(training=base, score=FREE, runs=GEOMETRIC, delta=1e-6)
    assert GEOMETRIC.mean == 10.0
    assert exact > 2.0 * tuned.rdp(2000.0)


@pytest.mark.parametrize(("eta", "times"), [(1.0, 3.0), (0.0, 2.0), (-0.5, 1.5)])
def test_pure_epsilon_grows_by_two_plus_eta(eta: float, times: float) -> None:
    # Papernot and Steinke: an (ε, 0)-private run gives (2 + η) ε, whatever the number of runs.
    tuned = Tuned(
        training=Pure(epsilon_=0.3), score=FREE, runs=TruncatedNegativeBinomial(eta=eta, gamma=1e-3), delta=1e-6
    )
    assert tuned.rdp(ORDERS[-1]) == pytest.approx(times * 0.3, abs=0.01)


@pytest.mark.parametrize(("eta", "shape"), [(1.0, 1.0), (0.0, 0.0), (0.5, 0.5)])
@pytest.mark.parametrize("mean", [3.0, 30.0])
def test_it_agrees_with_googles_accountant(eta: float, shape: float, mean: float) -> None:
    low, high = 1e-6, 0.99
    while high - low > 1e-12:
        gamma = (low + high) / 2.0
        low, high = (gamma, high) if TruncatedNegativeBinomial(eta=eta, gamma=gamma).mean > mean else (low, gamma)
    ours = Tuned(
        training=Light(mu=0.5), score=FREE, runs=TruncatedNegativeBinomial(eta=eta, gamma=low), delta=1e-6
    ).epsilon()
    accountant = RdpAccountant(orders=list(ORDERS))
    accountant.compose(RepeatAndSelectDpEvent(GaussianDpEvent(2.0), mean, shape))
    assert ours == pytest.approx(accountant.get_epsilon(1e-6), rel=1e-3)


@pytest.mark.parametrize("mean", [1.0, 20.0])
def test_poisson_agrees_with_googles_accountant(mean: float) -> None:
    ours = Tuned(training=Light(mu=0.5), score=FREE, runs=PoissonRuns(mean=mean), delta=1e-6).epsilon()
    accountant = RdpAccountant(orders=list(ORDERS))
    accountant.compose(RepeatAndSelectDpEvent(GaussianDpEvent(2.0), mean, np.inf))
    assert ours == pytest.approx(accountant.get_epsilon(1e-6), rel=1e-3)


def test_the_score_of_each_run_is_paid_for() -> None:
    both = Tuned(training=Light(mu=0.3), score=Light(mu=0.4), runs=GEOMETRIC, delta=1e-6)
    one = Tuned(training=Light(mu=0.5), score=FREE, runs=GEOMETRIC, delta=1e-6)
    assert both.epsilon() == pytest.approx(one.epsilon())
    assert both.rdp(5.0) == pytest.approx(one.rdp(5.0))


@pytest.mark.parametrize("runs", RUNS, ids=str)
def test_probabilities_are_those_of_the_distribution(runs: Runs) -> None:
    terms = []
    for number, probability in runs.probabilities():
        terms.append((number, float(probability)))
        if number > 3000:
            break
    assert math.fsum(p for _, p in terms) == pytest.approx(1.0)
    assert math.fsum(n * p for n, p in terms) == pytest.approx(runs.mean)
    for x in (0.2, 0.9):
        assert math.fsum(x**n * p for n, p in terms) == pytest.approx(generating(runs, x))


@pytest.mark.parametrize("runs", RUNS[:3] + RUNS[-1:], ids=str)
def test_draws_follow_the_distribution(runs: Runs) -> None:
    draws, cells = 4000, 12
    stream = os_noise()
    counts = Counter(min(draw_number(runs, stream), cells) for _ in range(draws))
    expected = {n: draws * float(p) for n, p in zip(range(cells), _table(runs), strict=False)}
    expected[cells] = draws - sum(expected.values())
    merged = [(counts[n], e) for n, e in expected.items() if e > 5.0]
    statistic = sum((got - e) ** 2 / e for got, e in merged)
    assert statistic < chi2.isf(1e-10, len(merged))
    assert sum(got for got, _ in merged) > 0.95 * draws


def _table(runs: Runs) -> list[float]:
    known = {n: float(p) for (n, p), _ in zip(runs.probabilities(), range(40), strict=False)}
    return [known.get(n, 0.0) for n in range(40)]


class Bits:
    """A stream of given bytes."""

    void = False

    def __init__(self, words: list[int]) -> None:
        self.words = words

    def take(self, size_bytes: int) -> bytes:
        return self.words.pop(0).to_bytes(size_bytes, "big")


def test_a_draw_at_the_border_takes_more_bits() -> None:
    # P[K = 1] is close to 0.1 and no multiple of 2^-64: the first 64 bits of it decide nothing.
    runs = TruncatedNegativeBinomial(eta=0.5, gamma=0.1)
    with localcontext() as context:
        context.prec = 80
        word = int(next(p for _, p in runs.probabilities()) * 2**64)
    assert draw_number(runs, Bits([word, 0])) == 1  # type: ignore[arg-type]
    assert draw_number(runs, Bits([word, 2**64 - 1])) == 2  # type: ignore[arg-type]
    assert draw_number(runs, Bits([word - 1])) == 1  # type: ignore[arg-type]
    assert draw_number(runs, Bits([word + 1])) == 2  # type: ignore[arg-type]


@given(st.floats(1.01, 500.0), st.floats(0.01, 3.0))
def test_the_bound_grows_with_the_order_and_is_above_one_run(order: float, mu: float) -> None:
    tuned = Tuned(training=Light(mu=mu), score=FREE, runs=GEOMETRIC, delta=1e-6)
    above = [tuned.rdp(other) for other in ORDERS if other >= order]
    assert Light(mu=mu).rdp(order) < tuned.rdp(order) <= min(above)


def test_what_has_no_account_is_refused_by_name() -> None:
    plan = Light()
    with pytest.raises(BadUsage, match="best of a fixed number of runs has no account"):
        Tuned(training=plan, score=FREE, runs=10, delta=1e-6)  # type: ignore[arg-type]
    with pytest.raises(BadUsage, match="score: got float, expected a charge: a raw value"):
        Tuned(training=plan, score=0.93, runs=GEOMETRIC, delta=1e-6)  # type: ignore[arg-type]
    for metric in (None, 0.93, partial(max, 1)):
        with pytest.raises(BadUsage, match=r"metric: got .*expected a charge: a raw value"):
            stopped_early(training=plan, metric=metric)  # type: ignore[arg-type]
    with pytest.raises(BadUsage, match="must be a secret"):
        Tuned(training=plan, score=FREE, runs=GEOMETRIC, delta=1e-6).draw_runs(insecure_seeded_noise("x"))
    with pytest.raises(BadUsage, match="expected one unit and relation"):
        stopped_early(training=plan, metric=Light(unit="client")).to_json()


@pytest.mark.parametrize(
    "make",
    [
        lambda: TruncatedNegativeBinomial(eta=-1.0, gamma=0.5),
        lambda: TruncatedNegativeBinomial(eta=1e-9, gamma=0.5),
        lambda: TruncatedNegativeBinomial(eta=1.0, gamma=1.0),
        lambda: TruncatedNegativeBinomial(eta=math.nan, gamma=0.5),
        lambda: PoissonRuns(mean=0.5),
        lambda: PoissonRuns(mean=math.inf),
    ],
)
def test_distributions_that_cannot_be_are_refused(make: object) -> None:
    with pytest.raises(BadUsage):
        make()  # type: ignore[operator]


def test_early_stopping_pays_for_all_steps_and_all_looks() -> None:
    both = stopped_early(training=Light(steps=40, mu=0.3), metric=Light(steps=8, mu=0.4, delta=1e-7))
    assert (both.steps, both.epsilon()) == (48, 0.2)
    assert both.delta == pytest.approx(1.01e-7)
    assert both.gdp() == pytest.approx(0.5)
    assert both.rdp(4.0) == pytest.approx(2.0 * 0.25)
    assert stopped_early(training=Light(), metric=Light(mu=None)).gdp() is None


def test_a_tuning_is_one_release_in_a_ledger() -> None:
    tuned = Tuned(training=Light(mu=0.5), score=Light(mu=0.1), runs=GEOMETRIC, delta=1e-6)
    with PrivacyLedger.scratch(epsilon=10.0, delta=1e-5) as ledger:
        ledger.commit(ledger.reserve(run="tuning/1", round=1, plan=tuned))
        (run,) = ledger.summary().runs
    assert (run.kind, run.steps, run.epsilon) == ("tuned", 1, tuned.epsilon())
    assert run.plan["runs"] == {"distribution": "truncated negative binomial", "eta": 1.0, "gamma": 0.1}
    assert tuned.draw_runs(os_noise()) >= 1
