"""Filters: each limit is as tight as its theory, holds when charges are chosen by the answers, and is never passed."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from fedinfer.errors import BadUsage, BudgetExceeded, LedgerError
from fedinfer.privacy.conversions import gdp_delta, rdp_overhead
from fedinfer.privacy.filters import (
    BasicFilter,
    Charge,
    Filter,
    GaussianFilter,
    RenyiFilter,
    Spent,
    choose_filter,
    exact,
    filter_from_json,
)
from tests.privacy.charges import Light

BUDGETS = st.tuples(st.floats(0.05, 20.0), st.floats(1e-12, 1e-3))
NAMES = ("basic", "renyi", "gdp")


def fill(rule: Filter, charge: Charge, most: int = 100_000) -> tuple[int, Spent]:
    """How many equal charges fit, and what they spend."""
    cost, spent, count = rule.cost(charge), Spent(), 0
    while count < most:
        try:
            rule.check(spent, cost)
        except BudgetExceeded:
            break
        spent, count = spent.plus(cost), count + 1
    return count, spent


def gaussian(mu: float, delta: float) -> Light:
    """A Gaussian release with the ε that it has at `delta`."""
    low, high = 0.0, 100.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if gdp_delta(mu, middle) > delta else (low, middle)
    return Light(steps=1, mu=mu, delta=delta, epsilon_=high)


def test_decimals_fill_a_decimal_budget_and_not_a_hair_more() -> None:
    rule = BasicFilter.of(0.3, 1e-5)
    tenth = Light(epsilon_=0.1, delta=1e-7)
    spent = Spent().plus(rule.cost(tenth)).plus(rule.cost(tenth))
    rule.check(spent, rule.cost(tenth))
    assert spent.plus(rule.cost(tenth)).epsilon == exact(0.3)
    with pytest.raises(
        BudgetExceeded, match=r"epsilon: got a plan of 0\.1 with 0\.2 of 0\.3 spent; nothing was released"
    ):
        rule.check(spent, rule.cost(Light(epsilon_=math.nextafter(0.1, 1.0), delta=1e-7)))
    assert fill(rule, Light(epsilon_=1e-6, delta=1e-6))[0] == 10
    assert rule.total(spent.plus(rule.cost(tenth))) == (0.3, 3e-7)


@given(st.lists(st.floats(0.0, 10.0), max_size=30))
def test_sums_are_exact_and_totals_are_rounded_up(values: list[float]) -> None:
    spent = Spent()
    for value in values:
        spent = spent.plus({"epsilon": value, "delta": 0.0})
    assert spent.epsilon == sum((Fraction(repr(value)) for value in values), Fraction(0))
    total, _ = BasicFilter.of(1.0, 1e-5).total(spent)
    assert exact(total) >= spent.epsilon
    assert total <= math.nextafter(math.fsum(values), math.inf) * (1 + 1e-15)


@given(BUDGETS)
def test_the_renyi_limit_is_the_budget(budget: tuple[float, float]) -> None:
    epsilon, delta = budget
    rule = RenyiFilter.of(epsilon, delta)
    assert 0.0 <= epsilon - (rule.limit + rdp_overhead(rule.order, delta)) <= 2e-8 * max(1.0, epsilon)
    full = Spent().plus({"epsilon": 0.0, "delta": 0.0, "rdp": rule.limit})
    assert rule.total(full)[0] <= epsilon


@given(BUDGETS)
def test_the_renyi_order_admits_nearly_the_most_gaussian_releases_of_any_order(budget: tuple[float, float]) -> None:
    epsilon, delta = budget
    rule = RenyiFilter.of(epsilon, delta)
    orders = 1.0 + np.geomspace(1e-2, 1e5, 20_000)
    overheads = np.log1p(-1.0 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1.0)
    assert rule.limit / rule.order >= 0.999 * float(np.max((epsilon - overheads) / orders))


@given(BUDGETS)
def test_the_gaussian_limit_is_the_budget(budget: tuple[float, float]) -> None:
    epsilon, delta = budget
    limit = GaussianFilter.of(epsilon, delta).limit

    def reference(mu: float) -> float:
        tail = norm.logcdf(-epsilon / mu - mu / 2)
        return float(norm.cdf(-epsilon / mu + mu / 2) - math.exp(epsilon + tail))

    assert reference(limit) <= delta < reference(limit * (1 + 1e-3))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 1e-6), (3.0, 1e-5), (10.0, 1e-9)])
def test_what_fits_is_private_by_the_tight_account(name: str, epsilon: float, delta: float) -> None:
    rule = choose_filter(name, epsilon=epsilon, delta=delta)
    mu = epsilon / 100
    count, spent = fill(rule, gaussian(mu, delta / 1000))
    assert gdp_delta(mu * math.sqrt(count), epsilon) <= delta
    total, total_delta = rule.total(spent)
    assert total <= epsilon * (1 + 1e-12)
    assert total_delta <= delta
    # The total is an upper bound on the truth.
    assert gdp_delta(mu * math.sqrt(count), total) <= delta


def test_how_many_gaussian_releases_each_filter_takes() -> None:
    charge = gaussian(0.05, 1e-8)
    counts = {name: fill(choose_filter(name, epsilon=3.0, delta=1e-5), charge)[0] for name in NAMES}
    assert counts["gdp"] > counts["renyi"] > 10 * counts["basic"]
    # The largest number for which the truth is within the budget.
    assert gdp_delta(0.05 * math.sqrt(counts["gdp"] + 1), 3.0) > 1e-5
    tiny = fill(choose_filter("gdp", epsilon=3.0, delta=1e-5), Light(mu=1e-4))[0]
    assert tiny == 1000, "there is room for the grids of so many charges"
    assert counts["renyi"] > 0.8 * counts["gdp"]


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("upward", [True, False])
@pytest.mark.parametrize("name", ["renyi", "gdp"])
def test_the_budget_holds_when_the_first_answer_decides_on_the_rest(name: str, upward: bool, threshold: float) -> None:
    epsilon, delta = 1.0, 1e-3
    rule = choose_filter(name, epsilon=epsilon, delta=delta)
    first = 0.2
    left = _largest(rule, first)
    # The answer is y ~ N(first, 1) on one table and N(0, 1) on the other; the rest is spent, or nothing more.
    y = np.linspace(-12.0, 12.0, 24_001)
    loss = first * y - first**2 / 2
    goes_on = (y > threshold) == upward
    conditional = [
        gdp_delta(left, epsilon - x) if go else max(0.0, -math.expm1(epsilon - x))
        for x, go in zip(loss, goes_on, strict=True)
    ]
    spent = float(np.trapezoid(norm.pdf(y - first) * np.array(conditional), y))
    assert spent <= delta * (1 + 1e-6)


def _largest(rule: Filter, first: float) -> float:
    """The largest μ that still fits beside `first`."""
    spent = Spent().plus(rule.cost(Light(mu=first)))
    low, high = 0.0, 10.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        try:
            rule.check(spent, rule.cost(Light(mu=middle)))
            low = middle
        except BudgetExceeded:
            high = middle
    return low


def test_a_charge_that_a_filter_cannot_take_is_refused_with_the_way_out() -> None:
    subsampled = Light(mu=None)
    with pytest.raises(BudgetExceeded, match=r"which is no Gaussian mechanism.*filter basic or renyi"):
        choose_filter("gdp", epsilon=1.0, delta=1e-5).cost(subsampled)
    with pytest.raises(BudgetExceeded, match=r"got no bound at order .* filter basic"):
        choose_filter("renyi", epsilon=1.0, delta=1e-5).cost(subsampled)
    assert choose_filter("basic", epsilon=1.0, delta=1e-5).cost(subsampled) == {"epsilon": 0.1, "delta": 1e-9}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrong", [math.nan, -0.1, math.inf])
def test_numbers_that_cannot_be_are_refused(name: str, wrong: float) -> None:
    rule = choose_filter(name, epsilon=1.0, delta=1e-5)
    with pytest.raises(LedgerError, match="expected a finite number of at least 0; nothing was spent"):
        rule.cost(Light(epsilon_=wrong))
    with pytest.raises(LedgerError, match="expected a finite number"):
        rule.cost(Light(delta=wrong))


@pytest.mark.parametrize("name", NAMES)
def test_a_filter_is_written_down_with_its_numbers(name: str) -> None:
    rule = choose_filter(name, epsilon=2.0, delta=1e-6)
    assert filter_from_json(rule.to_json(), epsilon=2.0, delta=1e-6) == rule
    assert rule.total(Spent()) == (0.0, 0.0)


def test_filters_that_are_none() -> None:
    with pytest.raises(BadUsage, match="expected basic, renyi or gdp"):
        choose_filter("zcdp", epsilon=1.0, delta=1e-5)
    with pytest.raises(LedgerError, match="update fedinfer"):
        filter_from_json({"name": "zcdp"}, epsilon=1.0, delta=1e-5)
    with pytest.raises(BadUsage, match=r"expected 0\.001 to 500"):
        choose_filter("gdp", epsilon=501.0, delta=1e-5)
