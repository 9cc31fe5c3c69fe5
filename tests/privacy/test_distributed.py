"""Sums of shares: what is encoded adds up, moves by no more than is accounted for, never wraps, and costs its ε."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom

from fedinfer.errors import BadUsage, BudgetExceeded, RoundFailed, ShapeMismatch
from fedinfer.privacy import DistributedPlan, Poisson, PrivacyPlan, insecure_seeded_noise
from fedinfer.privacy.accounting import epsilon_of, gaussian_epsilon, poisson_rdp, rdp_epsilon
from fedinfer.privacy.filters import Charge, choose_filter
from fedinfer.privacy.rotation import rotate
from fedinfer.privacy.rounding import likely_within, round_up_or_down, round_within, surely_within
from tests.privacy.exact_sums import worst_epsilon

Floats = NDArray[np.float64]

EXAMPLES = DistributedPlan(
    clip_norm=2.0,
    noise_multiplier=6.0,
    sampler=Poisson(rate=0.5),
    delta=1e-5,
    steps=10,
    divisor=100.0,
    dimension=50,
    clients=5,
    min_honest=3,
    colluders=1,
    bits=20,
)
CLIENTS = replace(EXAMPLES, unit="client", sampler=Poisson(rate=1.0), clients=40, min_honest=30, dimension=300)
PLANS = [EXAMPLES, CLIENTS]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """No noise: what is left is the rounding."""
    monkeypatch.setattr(
        "fedinfer.privacy.distributed.discrete_gaussian", lambda stream, *, variance, count: np.zeros(count, np.int64)
    )


def vectors(plan: DistributedPlan, *, share: float = 1.0, seed: int = 0) -> list[Floats]:
    """One vector a client, each of `share` of the norm that it is projected to."""
    rng = np.random.default_rng(seed)
    drawn = [rng.normal(size=plan.dimension) for _ in range(plan.clients)]
    return [v * (share * plan.most_norm / np.linalg.norm(v)) for v in drawn]


def total_of(plan: DistributedPlan, parts: list[Floats], *, rotation: str = "run/1", seed: str = "a") -> NDArray[Any]:
    """The sum modulo 2^bits of the encodings, as a secure sum gives it."""
    total = np.zeros(plan.padded, np.uint32)
    for place, part in enumerate(parts):
        total += plan.encode(part, insecure_seeded_noise(f"{seed} {place}"), rotation=rotation)
    return total & np.uint32(2**plan.bits - 1)


# %% What a sum says
@pytest.mark.parametrize("plan", PLANS)
def test_the_decoded_sum_is_the_true_one_and_noise_of_the_size_accounted_for(plan: DistributedPlan) -> None:
    parts, errors = vectors(plan), []
    for repeat in range(20):
        total = total_of(plan, parts, rotation=f"run/{repeat}", seed=f"{repeat}")
        plan.check_total(total, survivors=plan.clients)
        errors.append(plan.decode(total, rotation=f"run/{repeat}") * plan.divisor - np.sum(parts, axis=0))
    found, count = np.array(errors), 20 * plan.dimension
    expected = plan.noise_multiplier * plan.clip_norm * math.sqrt(plan.overshoot(plan.clients))
    assert abs(found.mean()) < 6.2 * expected / math.sqrt(count)
    assert found.std() == pytest.approx(expected, rel=6.2 / math.sqrt(2 * count))
    assert plan.decode(total, rotation="run/19").dtype == np.float32


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("bits", [16, 24, 32])
def test_without_noise_only_the_rounding_is_left_and_it_is_unbiased(
    plan: DistributedPlan, bits: int, silence: None
) -> None:
    plan = replace(plan, bits=bits)
    parts, errors = vectors(plan, share=0.7), []
    for repeat in range(40):
        total = total_of(plan, parts, seed=f"{repeat}")
        errors.append(plan.decode(total, rotation="run/1").astype(np.float64) * plan.divisor - np.sum(parts, axis=0))
    found = np.array(errors) * plan.scale
    floats = 1e-6 * plan.scale * float(np.abs(np.sum(parts, axis=0)).max())
    assert math.sqrt((found**2).mean()) <= math.sqrt(plan.clients) / 2 + floats
    assert np.abs(found.mean(0)).max() <= 6.8 * math.sqrt(plan.clients / 4 / 40) + floats


def test_numbers_that_are_none_count_as_zero(silence: None) -> None:
    bad = np.array([math.nan, math.inf, -math.inf, 1.0, *np.zeros(46)])
    found = EXAMPLES.decode(EXAMPLES.encode(bad, insecure_seeded_noise("a"), rotation="r"), rotation="r")
    assert found * EXAMPLES.divisor == pytest.approx(np.eye(50)[3], abs=8 / EXAMPLES.scale)


@given(factor=st.floats(1.0, 1e300), seed=st.integers(0, 50))
def test_a_device_adds_no_more_than_its_ball(factor: float, seed: int) -> None:
    for plan in PLANS:
        vector = vectors(plan, seed=seed)[0] * factor
        rounded = plan._rounded(vector, insecure_seeded_noise(str(seed)), rotation="r")
        most = plan.most_norm * plan.scale
        limit = surely_within(most, plan.padded) if plan.unit == "example" else plan.sensitivity
        assert np.linalg.norm(rounded) <= limit * (1 + 1e-12)
        # It is the nearest point of the ball: longer vectors of one direction are all the same.
        exact = rotate(vectors(plan, seed=seed)[0], text="r") * plan.scale
        assert np.abs(rounded - exact).max() <= 1 + 1e-6


@given(
    first=st.lists(st.floats(-1e3, 1e3), min_size=4, max_size=4),
    second=st.lists(st.floats(-1e3, 1e3), min_size=4, max_size=4),
)
def test_projecting_moves_no_two_vectors_apart(first: list[float], second: list[float]) -> None:
    from fedinfer.privacy.distributed import _projected

    a, b = np.array(first), np.array(second)
    apart = np.linalg.norm(_projected(a, 3.0) - _projected(b, 3.0))
    assert apart <= np.linalg.norm(a - b) + 1e-12
    assert np.linalg.norm(_projected(a, 3.0)) <= 3.0 + 1e-12


# %% How far one unit moves it
@given(seed=st.integers(0, 10**6), share=st.floats(0.0, 2.0), bits=st.integers(16, 24))
def test_one_example_moves_a_rounded_sum_by_no_more_than_the_sensitivity(seed: int, share: float, bits: int) -> None:
    plan = replace(EXAMPLES, bits=bits)
    rng = np.random.default_rng(seed)
    others, example = rng.normal(size=(2, plan.dimension))
    others *= share * plan.most_norm / np.linalg.norm(others)
    example *= plan.clip_norm / np.linalg.norm(example)
    one, other = (
        plan._rounded(sums, insecure_seeded_noise(f"{seed}"), rotation=f"{seed}") for sums in (others, others + example)
    )
    assert np.linalg.norm(one - other) <= plan.sensitivity


def test_the_rounding_of_a_difference_is_as_long_as_its_bound_lets_it_be() -> None:
    # The bound is not far from what happens: of many small coordinates, most of the length is rounding.
    stream, difference = insecure_seeded_noise("a"), np.full(4096, 20.0 / 64.0)
    lengths = [float(np.linalg.norm(round_up_or_down(difference, stream))) for _ in range(200)]
    likely, surely = likely_within(20.0, 4096, doubt=1e-9), surely_within(20.0, 4096)
    assert 0.75 * likely < np.mean(lengths) < max(lengths) < likely < 0.7 * surely


@pytest.mark.parametrize("doubt", [0.5, 0.1, 0.01])
def test_rounding_exceeds_its_bound_as_seldom_as_it_says(doubt: float) -> None:
    stream = insecure_seeded_noise("doubt")
    for vector in (np.full(16, 0.5), np.array([3.5]), np.array([0.5, 20.0]), np.linspace(-3.0, 3.0, 40)):
        limit = likely_within(float(np.linalg.norm(vector)), len(vector), doubt=doubt)
        beyond = sum(np.linalg.norm(round_up_or_down(vector, stream)) > limit for _ in range(1000))
        assert beyond <= 1000 * doubt + 6.2 * math.sqrt(1000 * doubt)


@pytest.mark.parametrize("doubt", [0.1, 1e-3, 1e-6, 1e-9])
def test_the_bound_holds_exactly_where_the_law_is_known(doubt: float) -> None:
    # Coordinates between 0 and 1 round to one or nothing: their squared norm is binomial.
    for dimension in (4, 16, 64, 1024):
        for place in (0.01, 0.1, 0.3, 0.5, 0.7, 0.99):
            limit = likely_within(place * math.sqrt(dimension), dimension, doubt=doubt)
            assert binom.sf(math.floor(limit**2), dimension, place) <= doubt


def test_a_client_rounds_until_its_norm_is_within_the_limit() -> None:
    stream, vector = insecure_seeded_noise("again"), np.full(64, 0.5)
    free = [float(np.linalg.norm(round_up_or_down(vector, stream))) for _ in range(100)]
    limit = float(np.median(free))
    assert max(free) > limit
    assert all(np.linalg.norm(round_within(vector, stream, limit=limit)) <= limit for _ in range(100))


def test_a_clients_encoded_vector_keeps_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    # A limit that a quarter of all roundings exceed, so that it shows whether they are tried again.
    monkeypatch.setattr("fedinfer.privacy.sum_grid.DOUBT", 0.9)
    plan, vector = replace(CLIENTS, bits=16), vectors(CLIENTS)[0]
    cells = rotate(vector, text="r") * plan.scale
    stream, limit = insecure_seeded_noise("limit"), plan._grid.rounded_norm
    assert limit < plan.sensitivity < limit * (1 + 1e-4)
    assert max(float(np.linalg.norm(round_up_or_down(cells, stream))) for _ in range(100)) > limit
    assert all(np.linalg.norm(plan._rounded(vector, stream, rotation="r")) <= limit for _ in range(100))


def test_rounding_is_unbiased_and_goes_to_a_neighbour() -> None:
    stream, values = insecure_seeded_noise("unbiased"), np.array([-2.75, -0.5, 0.0, 0.25, 7.0, 1e9 + 0.5])
    drawn = np.array([round_up_or_down(values, stream) for _ in range(4000)])
    assert np.abs(drawn - values).max() < 1.0
    assert np.abs((drawn - values).mean(0)).max() < 6.2 * 0.5 / math.sqrt(4000)
    assert (drawn[:, [2, 4]] == [0.0, 7.0]).all()


# %% No wrapping
@pytest.mark.parametrize("bits", [16, 18, 20, 24, 32])
@pytest.mark.parametrize("plan", PLANS)
def test_an_honest_sum_of_the_largest_vectors_does_not_wrap(plan: DistributedPlan, bits: int) -> None:
    plan = replace(plan, bits=bits)
    for repeat, vector in enumerate((np.eye(plan.dimension)[0], np.ones(plan.dimension))):
        whole = np.zeros(plan.padded, np.int64)
        for client in range(plan.clients):
            stream = insecure_seeded_noise(f"{repeat} {client}")
            residues = plan.encode(vector * 1e6, stream, rotation=f"run/{repeat}").astype(np.int64)
            whole += np.where(residues >= 2 ** (bits - 1), residues - 2**bits, residues)
        assert np.abs(whole).max() < 2 ** (bits - 1)
        assert np.array_equal(plan._centred(whole.astype(np.uint64)), whole)


@pytest.mark.parametrize("plan", PLANS)
def test_the_scale_uses_the_modulus_and_grows_with_it(plan: DistributedPlan) -> None:
    scales = [replace(plan, bits=bits).scale for bits in (16, 18, 20, 24, 32)]
    assert scales == sorted(scales)
    # Of the room of half the modulus not much is left by what six or seven deviations take.
    grid = plan._grid
    data = (plan.clients * grid.most_norm) ** 2 / plan.padded
    deviation = math.sqrt(data + plan.clients * grid.noise**2 / plan.min_honest) * grid.cells
    assert 6.5 < 2.0 ** (plan.bits - 1) / deviation < 10.0
    # Twenty binary digits: devices with other mathematical libraries come to the same.
    assert math.ldexp(grid.cells, 20 - math.frexp(grid.cells)[1]).is_integer()


def test_rounding_again_is_paid_for_in_the_odds_of_wrapping() -> None:
    # Rounding that is conditioned on what happens with probability p is 1 / p times as likely to be anything.
    plan = replace(CLIENTS, bits=32, clients=10_000, min_honest=5_000)
    free = replace(plan._grid, rounding_doubt=1e-9)
    exponent = math.log(2.0 * plan.padded * plan.steps * 2.0**40)
    retries = -10_000 * math.log(0.999)
    assert plan._grid.cells / free.cells == pytest.approx(math.sqrt(exponent / (exponent + retries)), rel=1e-4)


# %% The check at the server
@pytest.mark.parametrize("plan", PLANS)
def test_the_check_passes_the_longest_honest_sum_and_stops_garbage(plan: DistributedPlan) -> None:
    same = [np.ones(plan.dimension)] * plan.clients
    total = total_of(plan, [v * 1e6 for v in same])
    plan.check_total(total, survivors=plan.clients)
    with pytest.raises(RoundFailed, match=r"got a norm of .*, expected at most .* from 1 honest devices"):
        plan.check_total(total, survivors=1)
    garbage = np.random.default_rng(0).integers(0, 2**plan.bits, plan.padded, dtype=np.uint32)
    with pytest.raises(RoundFailed, match="of no use"):
        plan.check_total(garbage, survivors=plan.clients)
    # What one device can put in place of its vector at most, if it is not honest.
    lone = np.zeros(plan.padded, np.uint32)
    lone[:] = 2 ** (plan.bits - 1) - 1
    with pytest.raises(RoundFailed):
        plan.check_total(total + lone, survivors=plan.clients)
    for shape in (plan.padded + 1, (plan.padded, 1)):
        with pytest.raises(ShapeMismatch):
            plan.check_total(np.zeros(shape, np.uint32), survivors=1)


# %% The account
@pytest.mark.parametrize(("epsilon", "rate"), [(1.0, 0.3), (4.0, 0.3), (4.0, 1.0)])
@pytest.mark.parametrize(
    ("dimension", "steps", "divisor", "room"),
    # On a grid as coarse as is allowed the rounding costs much more than it has to, on finer ones less and less.
    [(1, 1, 400.0, 0.4), (1, 2, 400.0, 0.4), (1, 1, 100.0, 0.1), (1, 1, 10.0, 0.01), (2, 1, 400.0, 0.4)],
)
def test_epsilon_is_above_that_of_the_exact_law_and_near_it(
    epsilon: float, rate: float, dimension: int, steps: int, divisor: float, room: float
) -> None:
    plan = DistributedPlan.calibrate(
        epsilon=epsilon, delta=1e-5, steps=steps, clip_norm=1.0, sampler=Poisson(rate=rate), divisor=divisor,
        dimension=dimension, clients=4, min_honest=3, colluders=1, bits=16,
    )  # fmt: skip
    exact = worst_epsilon(plan, steps=steps)
    assert (1.0 - room) * plan.epsilon() <= exact <= plan.epsilon()


def test_rounding_that_is_not_counted_is_found_out() -> None:
    plan = DistributedPlan.calibrate(
        epsilon=0.5, delta=1e-5, steps=1, clip_norm=1.0, sampler=Poisson(rate=1.0), divisor=1450.0,
        dimension=1, clients=4, min_honest=3, colluders=1, bits=16,
    )  # fmt: skip
    cells = plan.scale * plan.clip_norm
    deviation = math.sqrt(plan.min_honest * plan.share_variance - 4)
    # A clip norm of one and a half cells: half of the time it is two.
    assert 1.4 < cells < 1.5
    naive = epsilon_of(noise_multiplier=deviation / cells, sampling_rate=1.0, steps=1, delta=plan.delta)
    assert 1.005 * naive < worst_epsilon(plan) <= plan.epsilon()


def zhu_wang(*, noise: float, rate: float, steps: int, order: int) -> float:
    """Rényi divergence of Poisson-sampled Gaussians by the bound for any mechanism: Zhu and Wang 2019."""

    def term(l: int) -> float:  # noqa: E741
        inner = (l - 1) * l / (2.0 * noise**2)
        return math.comb(order, l) * (1.0 - rate) ** (order - l) * rate**l * math.exp(inner)

    first = (1.0 - rate) ** (order - 1) * (order * rate - rate + 1.0)
    rest = term(2) + 3.0 * sum(term(l) for l in range(3, order + 1))  # noqa: E741
    return steps * math.log(first + rest) / (order - 1)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("bits", [16, 24])
def test_loss_distributions_are_below_renyi_and_that_below_the_general_bound(plan: DistributedPlan, bits: int) -> None:
    plan = replace(plan, bits=bits)
    orders = tuple(range(2, 20))
    ours = [plan.rdp(order) for order in orders]
    noise = plan._grid.noise_multiplier(plan._grid.sure_sensitivity)
    general = [zhu_wang(noise=noise, rate=plan.sampling_rate, steps=plan.steps, order=order) for order in orders]
    if plan.unit == "example":
        assert all(mine <= theirs * (1 + 1e-9) for mine, theirs in zip(ours, general, strict=True))
    assert plan.epsilon() <= rdp_epsilon(orders, ours, delta=plan.delta)
    assert ours == sorted(ours)
    assert plan.rdp(1.01) <= plan.rdp(2) * (1.0 + 1e-12)
    assert plan.rdp(2.5) <= plan.rdp(3) * (1.0 + 1e-12)


def test_epsilon_is_that_of_the_gaussian_at_what_roundings_leave_of_delta() -> None:
    deviation = math.sqrt(3 * float(EXAMPLES.share_variance) - 4.0)
    noise, doubt = deviation / EXAMPLES.sensitivity, EXAMPLES._grid.rounding_doubt
    assert doubt is not None
    left = 1e-5 - 2.0 * doubt * EXAMPLES.steps
    assert 0.998e-5 <= left < 0.999e-5
    expected = epsilon_of(noise_multiplier=noise, sampling_rate=0.5, steps=10, delta=left)
    assert EXAMPLES.epsilon() == pytest.approx(expected, rel=1e-9)


def test_renyi_divergences_are_those_of_the_gaussian_with_the_sure_sensitivity() -> None:
    sure = surely_within(EXAMPLES.scale * 2.0, EXAMPLES.padded)
    assert EXAMPLES._grid.sure_sensitivity == pytest.approx(sure, rel=1e-4)
    assert EXAMPLES.sensitivity < sure
    variance = 3 * float(EXAMPLES.share_variance) - 4.0
    expected = poisson_rdp(noise_multiplier=math.sqrt(variance) / sure, sampling_rate=0.5, steps=10, order=8.0)
    assert EXAMPLES.rdp(8.0) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("plan", PLANS)
def test_what_parts_the_shares_from_a_gaussian_is_paid_for(
    plan: DistributedPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, renyi = plan.epsilon(), plan.rdp(3.0)
    apart: dict[str, float] = {}

    def large(*, share_variance: float, shares: int, coordinates: int) -> float:
        apart.update(share_variance=share_variance, shares=shares, coordinates=coordinates)
        return 1e-4

    monkeypatch.setattr("fedinfer.privacy.distributed.slack", large)
    again = replace(plan)
    assert again.epsilon() - before == pytest.approx(2e-4, rel=1e-6)
    assert again.rdp(3.0) - renyi == pytest.approx(2.5e-4, rel=1e-6)
    assert apart == {
        "share_variance": float(plan.share_variance),
        "shares": plan.min_honest,
        "coordinates": plan.padded * plan.steps,
    }
    monkeypatch.setattr("fedinfer.privacy.distributed.slack", lambda **_: 6e-4)
    with pytest.raises(BadUsage, match="too coarse to account for"):
        replace(plan)


@pytest.mark.parametrize("plan", PLANS)
def test_on_a_fine_grid_it_costs_what_the_central_plan_costs(plan: DistributedPlan) -> None:
    central = PrivacyPlan(
        unit=plan.unit, clip_norm=2.0, noise_multiplier=6.0, sampler=plan.sampler, delta=1e-5, steps=10
    )
    by_bits = [replace(plan, bits=bits).epsilon() for bits in (16, 18, 20, 24, 32)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert by_bits[-1] == pytest.approx(central.epsilon(), rel=1e-3)
    # The rounding never comes for free.
    assert by_bits[-1] > central.epsilon()
    by_steps = [plan.epsilon(steps) for steps in (0, 1, 5, 10)]
    assert by_steps == sorted(by_steps)
    assert by_steps[0] == 0.0
    by_noise = [replace(plan, noise_multiplier=z).epsilon() for z in (3.0, 6.0, 12.0)]
    assert by_noise == sorted(by_noise, reverse=True)


def test_only_clients_without_sampling_are_gdp(monkeypatch: pytest.MonkeyPatch) -> None:
    assert EXAMPLES.gdp() is None
    mu = CLIENTS.gdp()
    assert mu is not None
    assert mu == pytest.approx(math.sqrt(10) / 6.0, rel=2e-3)
    assert gaussian_epsilon(mu=mu, delta=1e-5) == pytest.approx(CLIENTS.epsilon(), rel=1e-3)
    coarse = replace(CLIENTS, bits=16)
    deviation = math.sqrt(CLIENTS.min_honest * coarse.share_variance - 4)
    assert coarse.gdp() == pytest.approx(math.sqrt(10) * coarse.sensitivity / deviation, rel=1e-9)
    assert coarse.sensitivity > 1.003 * coarse.scale * coarse.clip_norm
    assert CLIENTS.accountant.startswith("analytic")
    assert EXAMPLES.accountant.startswith("PLD")
    assert EXAMPLES.adversary == "server"
    # Nor are they where the shares are further from a Gaussian than a filter has room for.
    monkeypatch.setattr("fedinfer.privacy.distributed.GRID_SLACK", CLIENTS._slack)
    assert CLIENTS.gdp() is None


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("bits", [16, 20])
def test_calibrate_meets_epsilon_from_below(plan: DistributedPlan, bits: int) -> None:
    settings = {**plan.to_json(), "bits": bits, "sampler": plan.sampler}
    for name in ("noise_multiplier", "mechanism", "relation"):
        del settings[name]
    for epsilon in (1.0, 6.0):
        found = DistributedPlan.calibrate(epsilon=epsilon, **settings)
        assert epsilon - 1e-4 <= found.epsilon() <= epsilon
        assert replace(found, noise_multiplier=plan.noise_multiplier, bits=plan.bits) == plan
    with pytest.raises(BadUsage, match="or more bits than"):
        DistributedPlan.calibrate(epsilon=1e-3, **settings)


def test_the_share_is_that_of_the_least_number_of_honest_devices() -> None:
    total = EXAMPLES.min_honest * EXAMPLES.share_variance
    assert float(total) == pytest.approx((6.0 * 2.0 * EXAMPLES.scale) ** 2, rel=1e-12)
    assert EXAMPLES.overshoot(5) == 5 / 3


@pytest.mark.parametrize("plan", PLANS)
def test_a_ledger_may_charge_it_by_any_filter_that_takes_its_kind(plan: DistributedPlan) -> None:
    charge: Charge = plan
    assert choose_filter("basic", epsilon=5.0, delta=1e-4).cost(charge)["epsilon"] == plan.epsilon()
    renyi = choose_filter("renyi", epsilon=5.0, delta=1e-4)
    assert renyi.cost(charge)["rdp"] == plan.rdp(renyi.to_json()["order"])
    gaussian = choose_filter("gdp", epsilon=5.0, delta=1e-4)
    if plan.unit == "client":
        assert gaussian.cost(charge)["mu"] == plan.gdp()
    else:
        with pytest.raises(BudgetExceeded, match="no Gaussian mechanism"):
            gaussian.cost(charge)


# %% The plan as an object
@pytest.mark.parametrize(
    "wrong",
    [
        {"unit": "hospital"},
        {"clip_norm": 0.0},
        {"clip_norm": 1e20},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": 1e-3},
        {"delta": 1e-11},
        {"delta": 1.0},
        {"steps": 0},
        {"steps": 10**9},
        {"steps": 1.5},
        {"divisor": 0.0},
        {"divisor": 1e9},
        {"dimension": 0},
        {"dimension": 2**27},
        {"clients": 0},
        {"clients": True},
        {"min_honest": 0},
        {"min_honest": 6},
        {"colluders": -1},
        {"colluders": 3},
        {"bits": 15},
        {"bits": 33},
        {"sampler": {"kind": "cyclic", "period": 2}},
        {"unit": "client"},
        {"mechanism": "Gaussian"},
        {"relation": "replace one"},
        {"extra": 1},
    ],
)
def test_a_plan_that_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(BadUsage, match=r"got|plan"):
        DistributedPlan.from_json({**EXAMPLES.to_json(), **wrong})


@pytest.mark.parametrize(
    "coarse", [{"clients": 100_000}, {"divisor": 1e6}, {"noise_multiplier": 1e4}, {"dimension": 2**24}]
)
def test_a_modulus_too_small_is_refused_by_name(coarse: dict[str, object]) -> None:
    with pytest.raises(BadUsage, match="bits: got 16, expected more"):
        DistributedPlan.from_json({**EXAMPLES.to_json(), "bits": 16, **coarse})


def test_it_round_trips_and_its_digest_sees_every_field() -> None:
    others = [
        *PLANS,
        *(replace(EXAMPLES, **{n: getattr(EXAMPLES, n) / 2}) for n in ("clip_norm", "noise_multiplier", "divisor")),
        replace(EXAMPLES, delta=1e-6),
        replace(EXAMPLES, sampler=Poisson(rate=0.25)),
        *(replace(EXAMPLES, **{n: getattr(EXAMPLES, n) + 1}) for n in ("steps", "dimension", "clients", "bits")),
        replace(EXAMPLES, min_honest=4),
        replace(EXAMPLES, colluders=2),
    ]
    assert len({plan.digest() for plan in others}) == len(others)
    assert all(DistributedPlan.from_json(plan.to_json()) == plan for plan in others)


def test_shapes_that_do_not_fit_are_refused() -> None:
    stream = insecure_seeded_noise("a")
    for shape in ((49,), (50, 1)):
        with pytest.raises(ShapeMismatch):
            EXAMPLES.encode(np.zeros(shape), stream, rotation="r")
    with pytest.raises(ShapeMismatch):
        EXAMPLES.decode(np.zeros(50, np.uint32), rotation="r")


def test_examples_are_sampled_and_clients_all_take_part() -> None:
    stream = insecure_seeded_noise("a")
    assert 20 < len(EXAMPLES.sample(100, stream)) < 80
    assert CLIENTS.sample(7, stream, step=3).tolist() == list(range(7))
