"""Counts, histograms and sums: the account is exact where it says so, and what is released is what was asked."""

import math
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from fedinfer.errors import BadUsage, BudgetExceeded, ShapeMismatch
from fedinfer.privacy.accounting import gaussian_epsilon
from fedinfer.privacy.evaluation import EvaluationRelease
from fedinfer.privacy.filters import FilterName
from fedinfer.privacy.integer_noise import CELLS, Gaussian, Laplace, fine_epsilon, whole_delta, whole_epsilon
from fedinfer.privacy.ledger import PrivacyLedger
from fedinfer.privacy.local import LocalVector, RandomisedResponse
from fedinfer.privacy.noise import insecure_seeded_noise
from fedinfer.privacy.releases import CountRelease, HistogramRelease, ScalarRelease
from fedinfer.privacy.votes import ConfidentVotes

COUNT = CountRelease(noise=Gaussian(sigma=3.0), delta=1e-6, steps=2)
HISTOGRAM = HistogramRelease(bins=5, noise=Gaussian(sigma=3.0), delta=1e-6)
SCALAR = ScalarRelease(low=1.0, high=3.0, default=1.5, sigma=4.0, delta=1e-6)


def brute_delta(sigma: Fraction, steps: int, epsilon: Decimal) -> float:
    """δ of the joint law, by convolution in decimal arithmetic: the sum of max(0, P - e^ε Q) over the summed noise."""
    with localcontext() as context:
        context.prec = 50
        rate = -Decimal(sigma.denominator**2) / (2 * Decimal(sigma.numerator**2))
        reach = math.ceil(16 * float(sigma))
        one = {x: (rate * x * x).exp() for x in range(-reach, reach + 1)}
        total = sum(one.values())
        law = {0: Decimal(1)}
        for _ in range(steps):
            grown: dict[int, Decimal] = {}
            for at, weight in law.items():
                for x, p in one.items():
                    grown[at + x] = grown.get(at + x, Decimal(0)) + weight * p / total
            law = grown
        factor = epsilon.exp()
        return float(sum(max(Decimal(0), p - factor * law.get(x + steps, Decimal(0))) for x, p in law.items()))


@pytest.mark.parametrize(
    ("sigma", "steps", "epsilon"),
    [("0.5", 1, "6"), ("1", 1, "0"), ("1", 1, "2.7"), ("3", 1, "1"), ("1.5", 2, "1"), ("2", 4, "3"), ("1", 3, "9")],
)
def test_delta_is_that_of_the_joint_law(sigma: str, steps: int, epsilon: str) -> None:
    expected = brute_delta(Fraction(sigma), steps, Decimal(epsilon))
    got = whole_delta(sigma=float(sigma), steps=steps, epsilon=float(epsilon))
    # Of several steps the rounding of the sum's law is paid for.
    assert got >= expected * (1 - 1e-9) + (0.9e-12 if steps > 1 else 0.0)
    assert got == pytest.approx(expected, rel=1e-9, abs=2.1e-12)


@pytest.mark.parametrize(("sigma", "steps"), [(0.7, 1), (2.0, 1), (5.0, 1), (4.0, 10), (20.0, 100)])
def test_epsilon_agrees_with_an_accountant_of_others(sigma: float, steps: int) -> None:
    single = pld.from_discrete_gaussian_mechanism(sigma, value_discretization_interval=1e-4)
    theirs = single.self_compose(steps).get_epsilon_for_delta(1e-6)
    ours = whole_epsilon(sigma=sigma, steps=steps, delta=1e-6)
    # Theirs rounds losses up, ours adds 1e-6 of δ and 1e-9.
    assert ours - 1e-4 <= theirs <= ours + 2e-4 * steps


def test_large_noise_is_gaussian_and_small_noise_is_not() -> None:
    for steps in (1, 7):
        whole = whole_epsilon(sigma=200.0, steps=steps, delta=1e-6)
        assert whole == pytest.approx(gaussian_epsilon(mu=math.sqrt(steps) / 200.0, delta=1e-6), rel=1e-4)
    # At the change from one account to the other they agree.
    before, after = Gaussian(sigma=9999.9), Gaussian(sigma=10_000.1)
    assert before.epsilon(steps=1, delta=1e-7) == pytest.approx(after.epsilon(steps=1, delta=1e-7), rel=3e-3)
    # Of whole numbers the Gaussian account would promise too much here, and too little there.
    assert whole_epsilon(sigma=0.66, steps=1, delta=1e-6) > gaussian_epsilon(mu=1 / 0.66, delta=1e-6) + 0.05
    assert whole_epsilon(sigma=1.0, steps=1, delta=1e-6) < gaussian_epsilon(mu=1.0, delta=1e-6) - 0.3


@settings(deadline=None, max_examples=40)
@given(
    epsilon=st.floats(0.05, 12.0),
    steps=st.integers(1, 30),
    delta=st.sampled_from([1e-9, 1e-6, 1e-3]),
    one=st.booleans(),
)
def test_calibrate_meets_epsilon_from_below(epsilon: float, steps: int, delta: float, one: bool) -> None:
    if one:
        release = CountRelease.calibrate(epsilon=epsilon, delta=delta, steps=steps)
        assert epsilon - 1e-4 <= release.epsilon() <= epsilon
    else:
        scalar = ScalarRelease.calibrate(epsilon=epsilon, delta=delta, low=0.0, high=1.0, default=0.0, steps=steps)
        assert epsilon - 1e-4 <= scalar.epsilon() <= epsilon


def test_pure_epsilon_gets_laplace_noise() -> None:
    release = HistogramRelease.calibrate(epsilon=0.5, delta=0.0, bins=3, steps=4)
    assert isinstance(release.noise, Laplace)
    assert 0.5 - 1e-4 <= release.epsilon() <= 0.5
    values = release.release(np.zeros(0, np.int64), insecure_seeded_noise("pure"))
    assert values.shape == (3,)
    many = HistogramRelease(bins=60_000, noise=release.noise, delta=0.0).release(
        np.zeros(0, np.int64), insecure_seeded_noise("pure")
    )
    assert many.std() == pytest.approx(release.standard_error, rel=0.03)


@pytest.mark.parametrize("noise", [Gaussian(sigma=0.8), Gaussian(sigma=3.0), Laplace(scale=0.7), Laplace(scale=3.0)])
@pytest.mark.parametrize("order", [1.5, 2.0, 8.0, 40.0])
def test_renyi_divergence_is_that_of_the_law(noise: Gaussian | Laplace, order: float) -> None:
    x = np.arange(-400, 401)
    if isinstance(noise, Gaussian):
        logs, shifted = -(x**2) / (2 * noise.sigma**2), -((x - 1) ** 2) / (2 * noise.sigma**2)
    else:
        logs, shifted = -np.abs(x) / noise.scale, -np.abs(x - 1) / noise.scale
    total = np.log(np.exp(logs).sum())
    terms = order * logs + (1 - order) * shifted - total
    exact = (np.log(np.exp(terms - terms.max()).sum()) + terms.max()) / (order - 1)
    got = noise.rdp(steps=1, order=order)
    assert got >= exact - 1e-12
    assert got == pytest.approx(exact, rel=1e-9) or (isinstance(noise, Gaussian) and got < exact * 1.5)
    assert noise.rdp(steps=3, order=order) == pytest.approx(3 * got)


def test_a_histogram_counts_each_row_once() -> None:
    release = HistogramRelease(bins=4, noise=Gaussian(sigma=0.1), delta=1e-6)
    # With so little noise it is zero, nearly always.
    cells = np.array([0, 0, 3, 2, -1, 4, 99])
    assert release.release(cells, insecure_seeded_noise("cells")).tolist() == [2, 0, 1, 1]
    assert HISTOGRAM.release(np.zeros(0, np.int64), insecure_seeded_noise("cells")).dtype == np.int64
    count = CountRelease(noise=Gaussian(sigma=0.1), delta=1e-6)
    assert count.release(np.array([True, False, True]), insecure_seeded_noise("count")) == 2
    assert type(COUNT.release(np.zeros(0, bool), insecure_seeded_noise("count"))) is int


def test_noise_has_the_size_that_is_accounted() -> None:
    big = HistogramRelease(bins=50_000, noise=Gaussian(sigma=3.0), delta=1e-6)
    values = big.release(np.zeros(0, np.int64), insecure_seeded_noise("size"))
    assert values.std() == pytest.approx(3.0, rel=0.02)
    pairs = np.stack([SCALAR.release(np.zeros(0), insecure_seeded_noise(f"size {i}")) for i in range(3000)])
    assert (pairs / CELLS).std(0) == pytest.approx(np.full(2, 4.0), rel=0.08)
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.12


@settings(deadline=None, max_examples=100)
@given(
    rows=st.lists(st.floats(width=32), max_size=20),
    extra=st.one_of(st.floats(), st.sampled_from([-1.0, 1.0, 3.0, math.nan, math.inf, -math.inf])),
)
def test_one_row_moves_a_scalar_by_no_more_than_is_accounted(rows: list[float], extra: float) -> None:
    without = SCALAR.release(np.array(rows), insecure_seeded_noise("same"))
    with_row = SCALAR.release(np.array([*rows, extra]), insecure_seeded_noise("same"))
    moved = (with_row - without).astype(object)
    assert moved[1] == CELLS
    assert int(moved[0]) ** 2 + int(moved[1]) ** 2 <= 2 * CELLS**2
    assert SCALAR.gdp() == pytest.approx(math.sqrt(2) / SCALAR.sigma)


def test_a_scalar_says_sum_count_and_mean_with_their_errors() -> None:
    rng = np.random.default_rng(0)
    values = rng.uniform(-3.0, 5.0, 300)
    values[:3] = [math.nan, math.inf, -math.inf]
    known = np.clip(np.where(np.isfinite(values), values, 1.5), 1.0, 3.0)
    found = []
    for trial in range(300):
        pair = SCALAR.release(values, insecure_seeded_noise(f"scalar {trial}"))
        other = SCALAR.release(values, insecure_seeded_noise(f"other scalar {trial}"))
        found.append(SCALAR.summarise(pair + other, releases=2))
    for name, truth in (("total", 2 * known.sum()), ("count", 600.0), ("mean", known.mean())):
        estimates = [getattr(answer, name) for answer in found]
        scores = np.array([(estimate.value - truth) / estimate.standard_error for estimate in estimates])
        # Standard scores of right errors have mean 0 and variance 1.
        assert abs(scores.mean()) < 6 / math.sqrt(len(scores))
        assert 0.7 < scores.var() < 1.4
    empty = SCALAR.summarise(SCALAR.release(np.zeros(0), insecure_seeded_noise("none")))
    assert empty.mean is None
    with pytest.raises(ShapeMismatch):
        SCALAR.summarise(np.zeros(3, np.int64))


def test_a_fine_grid_costs_next_to_nothing_and_never_less_than_a_gaussian() -> None:
    for mu in (0.1, 1.0, 4.0):
        plain = gaussian_epsilon(mu=mu, delta=1e-6)
        assert plain < fine_epsilon(mu=mu, sigma=float(CELLS), delta=1e-6, coordinates=2000) < plain + 1e-5


def test_a_fine_grid_is_as_near_to_a_rounded_gaussian_as_is_paid_for() -> None:
    sigma = 1000.0
    x = np.linspace(-20 * sigma, 20 * sigma, 201).round()

    def cell_of(middle: float) -> float:
        return float(quad(lambda t: math.exp((middle**2 - t * t) / (2 * sigma**2)), middle - 0.5, middle + 0.5)[0])

    cell = np.array([cell_of(middle) for middle in x])
    # In units of the density at its middle, which is the discrete law up to 1e-300.
    off = float(np.abs(cell - 1.0).max())
    paid = fine_epsilon(mu=0.1, sigma=sigma, delta=1e-6) - fine_epsilon(mu=0.1, sigma=1e12, delta=1e-6)
    # Once in each direction, and hardly more than that.
    assert 2.0 * off <= paid <= 2.1 * off
    assert fine_epsilon(mu=30.0, sigma=float(CELLS), delta=1e-6) == math.inf


@pytest.mark.parametrize("release", [COUNT, HISTOGRAM, SCALAR])
def test_a_release_is_a_charge(release: CountRelease | HistogramRelease | ScalarRelease) -> None:
    assert release.steps >= 1
    assert release.epsilon() > 0.0
    assert release.rdp(2.0) > 0.0
    assert release.to_json()["relation"] == "add or remove one"
    assert len(release.digest()) == 64
    more = type(release)(**{**vars(release), "delta": 1e-5})
    assert more.digest() != release.digest()
    assert more.epsilon() < release.epsilon()


def test_what_cannot_be_is_refused() -> None:
    for make in (
        lambda: Gaussian(sigma=0.0),
        lambda: Gaussian(sigma=math.nan),
        lambda: Laplace(scale=0.01),
        lambda: HistogramRelease(bins=0, noise=Gaussian(sigma=1.0), delta=1e-6),
        lambda: HistogramRelease(bins=2, noise=Gaussian(sigma=1.0), delta=0.0),
        lambda: HistogramRelease(bins=2, noise=Laplace(scale=1.0), delta=1e-6),
        lambda: CountRelease(noise=Gaussian(sigma=1.0), delta=1e-6, steps=0),
        lambda: CountRelease(noise=Gaussian(sigma=1.0), delta=1e-6, steps=1.5),  # type: ignore[arg-type]
        lambda: CountRelease.calibrate(epsilon=0.0, delta=1e-6),
        lambda: CountRelease.calibrate(epsilon=1e-9, delta=1e-9),
        lambda: ScalarRelease(low=1.0, high=1.0, default=1.0, sigma=1.0, delta=1e-6),
        lambda: ScalarRelease(low=0.0, high=math.inf, default=1.0, sigma=1.0, delta=1e-6),
        lambda: ScalarRelease(low=0.0, high=5e-324, default=0.0, sigma=1.0, delta=1e-6),
        lambda: ScalarRelease(low=0.0, high=1.0, default=math.nan, sigma=1.0, delta=1e-6),
    ):
        with pytest.raises(BadUsage, match="got"):
            make()


@pytest.mark.parametrize("name", ["basic", "renyi"])
def test_a_ledger_charges_each_kind(name: FilterName, tmp_path: Path) -> None:
    pure = CountRelease.calibrate(epsilon=0.5, delta=0.0)
    evaluation = EvaluationRelease.calibrate(epsilon=0.5, delta=1e-7, loss_bound=4.0)
    answer = RandomisedResponse.calibrate(epsilon=0.5, categories=3)
    vector = LocalVector.calibrate(epsilon=0.5, delta=1e-7, dimension=3, clip_norm=1.0)
    votes = ConfidentVotes.calibrate(epsilon=0.5, delta=1e-7, classes=3, threshold=5.0, queries=10, answers=5)
    for unit, charges in (
        ("example", (pure, COUNT, HISTOGRAM, SCALAR, evaluation)),
        ("client", (answer, vector, votes)),
    ):
        with PrivacyLedger.create(tmp_path / unit, epsilon=20.0, delta=1e-4, filter=name) as ledger:
            for charge in charges:
                for number in range(charge.steps):
                    ledger.reserve(run=charge.digest(), round=number + 1, plan=charge)
                with pytest.raises(BudgetExceeded):
                    ledger.reserve(run=charge.digest(), round=charge.steps + 1, plan=charge)
            assert len(ledger.summary().runs) == len(charges)
