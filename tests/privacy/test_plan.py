"""The plan does what it accounts, and the accountant is right."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedinfer import privacy
from fedinfer.errors import BadUsage, ShapeMismatch
from fedinfer.privacy import Cyclic, FixedSize, NoiseStream, Poisson, PrivacyPlan, insecure_seeded_noise
from fedinfer.privacy.accounting import epsilon_of, fixed_size_rdp, gaussian_delta, gaussian_epsilon
from fedinfer.privacy.plan import GRID_SIGMA, MAX_DIMENSION, Adversary, _on_grid
from fedinfer.privacy.samplers import Sampler, sampler_from_json

PLAN = PrivacyPlan(clip_norm=2.0, noise_multiplier=3.0, sampler=Poisson(rate=0.25), delta=1e-5, steps=10, divisor=50.0)
CLIENTS = replace(PLAN, unit="client")


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "expected"),
    # The first is the figure of the accountant's own users (dp-accounting 0.6 at an interval of 1e-4), the last is the
    # analytic Gaussian mechanism of sigma = 10 / sqrt(60) (Balle and Wang 2018, theorem 8).
    [(2.0, 0.25, 60, 4.8889), (7.0, 0.5, 60, 2.2787), (1.5, 0.5, 60, 15.6723), (10.0, 1.0, 60, None)],
)
def test_epsilon_known_answers(noise: float, rate: float, steps: int, expected: float | None) -> None:
    got = epsilon_of(noise_multiplier=noise, sampling_rate=rate, steps=steps, delta=1e-5)
    if expected is None:
        mu = np.sqrt(steps) / noise

        def delta_at(epsilon: float) -> float:
            cdf = stats.norm.cdf
            return float(cdf(mu / 2 - epsilon / mu) - np.exp(epsilon) * cdf(-mu / 2 - epsilon / mu))

        # An upper bound that is tight: delta at it is at most 1e-5, and just below it is more.
        assert delta_at(got) <= 1e-5
        assert delta_at(got - 1e-4) > 1e-5
    else:
        assert got == pytest.approx(expected, abs=2e-4)


def test_the_interval_is_fine_enough() -> None:
    from dp_accounting.pld import privacy_loss_distribution as pld

    fine = pld.from_gaussian_mechanism(
        6.46, sampling_prob=0.5, value_discretization_interval=1e-4, use_connect_dots=True
    )
    got = epsilon_of(noise_multiplier=6.46, sampling_rate=0.5, steps=42, delta=1e-5)
    assert abs(fine.self_compose(42).get_epsilon_for_delta(1e-5) - got) < 1e-4


def test_epsilon_grows_with_steps_and_falls_with_noise() -> None:
    by_steps = [PLAN.epsilon(steps) for steps in (0, 1, 2, 5, 10)]
    assert by_steps == sorted(by_steps)
    assert by_steps[0] == 0.0
    by_noise = [epsilon_of(noise_multiplier=z, sampling_rate=0.5, steps=10, delta=1e-5) for z in (1.0, 2.0, 4.0)]
    assert by_noise == sorted(by_noise, reverse=True)


@given(mu=st.floats(1e-3, 30.0), delta=st.floats(1e-12, 0.5))
def test_the_analytic_gaussian_is_met_from_above(mu: float, delta: float) -> None:
    epsilon = gaussian_epsilon(mu=mu, delta=delta)
    assert gaussian_delta(mu=mu, epsilon=epsilon) <= delta
    assert epsilon == 0.0 or gaussian_delta(mu=mu, epsilon=epsilon * (1.0 - 1e-6) - 1e-9) > delta


def test_losses_without_amplification_agree_with_their_distribution() -> None:
    from dp_accounting.pld import privacy_loss_distribution as pld

    whole = pld.from_gaussian_mechanism(10.0 / np.sqrt(60), value_discretization_interval=1e-4)
    got = epsilon_of(noise_multiplier=10.0, sampling_rate=1.0, steps=60, delta=1e-5)
    assert got == pytest.approx(whole.get_epsilon_for_delta(1e-5), abs=2e-4)


SAMPLERS: list[tuple[Sampler, Adversary]] = [
    (Poisson(rate=0.5), "server"),
    (Poisson(rate=1.0), "server"),
    (FixedSize(size=30, population=100), "outsider"),
    (FixedSize(size=30, population=100), "server"),
    (Cyclic(period=4), "server"),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("epsilon", [0.2, 2.0, 8.0])
@pytest.mark.parametrize(("sampler", "adversary"), SAMPLERS)
def test_calibrate_meets_epsilon_from_below(epsilon: float, sampler: Sampler, adversary: Adversary) -> None:
    plan = PrivacyPlan.calibrate(
        epsilon=epsilon, delta=1e-5, steps=42, clip_norm=1.0, sampler=sampler, unit="client", adversary=adversary
    )
    assert epsilon - 1e-4 <= plan.epsilon() <= epsilon


def test_a_calibration_is_kept_on_disk_and_never_believed_unseen(tmp_path: Path) -> None:
    def calibrated(epsilon: float) -> PrivacyPlan:
        return PrivacyPlan.calibrate(epsilon=epsilon, delta=1e-5, steps=42, clip_norm=1.0, sampler=Poisson(rate=0.5))

    plan = calibrated(2.0)
    (kept,) = (tmp_path / "cache" / "fedinfer" / "noise").iterdir()
    assert float(kept.read_text()) == plan.noise_multiplier
    # Another answer that is as good is taken: the file is what was read.
    as_good = plan.noise_multiplier * (1 + 1e-9)
    kept.write_text(str(as_good))
    assert calibrated(2.0).noise_multiplier == as_good
    for poison in (str(plan.noise_multiplier / 4), "nan", "-1", "text", ""):
        kept.write_text(poison)
        assert 2.0 - 1e-4 <= calibrated(2.0).epsilon() <= 2.0
    kept.parent.chmod(0o500)
    assert 1.0 - 1e-4 <= calibrated(1.0).epsilon() <= 1.0
    kept.parent.chmod(0o700)


def test_a_server_that_picks_clients_is_not_fooled_by_its_own_coins() -> None:
    # Against it each participation counts whole; an outsider does not know who took part.
    whole = gaussian_epsilon(mu=np.sqrt(10) / 3.0, delta=1e-5)
    assert CLIENTS.epsilon() == CLIENTS.epsilon(adversary="server") == pytest.approx(whole, rel=1e-3)
    assert CLIENTS.epsilon(adversary="outsider") == pytest.approx(PLAN.epsilon(), rel=1e-12)
    assert CLIENTS.epsilon(adversary="outsider") < 0.5 * whole
    # A device samples its own examples, and nobody else sees which.
    assert PLAN.epsilon(adversary="server") == PLAN.epsilon(adversary="outsider")
    assert CLIENTS.accountant.startswith("analytic")
    assert PLAN.accountant.startswith("PLD")


def test_a_cycle_pays_for_each_participation_and_amplifies_nothing() -> None:
    for unit in ("example", "client"):
        plan = replace(PLAN, sampler=Cyclic(period=4), unit=unit)
        assert plan.epsilon() == pytest.approx(gaussian_epsilon(mu=np.sqrt(3) / 3.0, delta=1e-5), rel=1e-4)
        assert plan.epsilon(adversary="outsider") == plan.epsilon()
        assert [plan.epsilon(steps) for steps in (1, 4, 5, 8)] == [plan.epsilon(s) for s in (1, 1, 5, 5)]


def test_replacing_one_counts_twice() -> None:
    # dp-accounting's Rényi accountant reports 19.05 for a plan of 46.21, because it does not double the sensitivity.
    plan = replace(CLIENTS, sampler=FixedSize(size=10, population=1000), adversary="server")
    assert plan.epsilon() == pytest.approx(gaussian_epsilon(mu=2 * np.sqrt(10) / 3.0, delta=1e-5), rel=1e-4)
    # Sampling nearly everybody is nearly no sampling, and is not accounted as less than half of it.
    settings: dict[str, Any] = {"noise_multiplier": 8.0, "population": 1000, "steps": 10, "orders": (2.0, 8.0)}
    whole, nearly = fixed_size_rdp(size=1000, **settings), fixed_size_rdp(size=999, **settings)
    assert whole == pytest.approx([10 * 2 * order / 64.0 for order in (2.0, 8.0)])
    assert all(0.9 * w <= n for w, n in zip(whole, nearly, strict=True))


@pytest.mark.parametrize("order", [1.5, 2.0, 8.0, 32.0])
def test_renyi_divergences_dominate_the_loss_distribution(order: float) -> None:
    for plan in (PLAN, CLIENTS, replace(CLIENTS, sampler=FixedSize(size=30, population=100))):
        epsilon = plan.rdp(order) + np.log1p(-1 / order) - np.log(plan.delta * order) / (order - 1)
        assert epsilon >= plan.epsilon()


def test_the_account_pays_for_the_grid() -> None:
    assert _on_grid(4.0) == 4.0 / (1.0 + 4.0 * 32 * np.sqrt(MAX_DIMENSION) / 2.0**40)
    for plan in (PLAN, CLIENTS, replace(CLIENTS, sampler=FixedSize(size=30, population=100))):
        noise, steps = _on_grid(plan.noise_multiplier), plan.steps
        assert plan.epsilon() >= 1e-8 + plan_without_grid(plan, noise)
    mu = CLIENTS.gdp()
    assert mu is not None
    assert mu >= np.sqrt(steps) / noise > np.sqrt(steps) / CLIENTS.noise_multiplier


def plan_without_grid(plan: PrivacyPlan, noise: float) -> float:
    """ε of the Gaussian mechanism itself, of that noise."""
    if isinstance(plan.sampler, FixedSize):
        return gaussian_epsilon(mu=2 * np.sqrt(plan.steps) / noise, delta=plan.delta)
    if plan.unit == "client":
        return gaussian_epsilon(mu=np.sqrt(plan.steps) / noise, delta=plan.delta)
    return epsilon_of(noise_multiplier=noise, sampling_rate=plan.sampler.rate, steps=plan.steps, delta=plan.delta)


def test_only_a_plain_gaussian_is_gdp() -> None:
    assert PLAN.gdp() is None
    assert replace(CLIENTS, adversary="outsider").gdp() is None
    mu = CLIENTS.gdp()
    assert mu is not None
    assert mu == pytest.approx(np.sqrt(10) / 3.0, rel=1e-4)
    assert gaussian_epsilon(mu=mu, delta=1e-5) == pytest.approx(CLIENTS.epsilon(), abs=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"clip_norm": 0.0},
        {"clip_norm": float("nan")},
        {"clip_norm": 1e-300},
        {"clip_norm": 1e20},
        {"delta": 1e-11},
        {"sampler": {"kind": "poisson", "rate": 1e-12}},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": 1e7},
        {"sampler": {"kind": "poisson", "rate": 0.0}},
        {"sampler": {"kind": "poisson", "rate": 1.1}},
        {"sampler": {"kind": "fixed size", "size": 3, "population": 2}},
        {"sampler": {"kind": "cyclic", "period": 0}},
        {"sampler": {"kind": "cyclic", "rate": 0.5}},
        {"sampler": {"kind": "shuffled", "rate": 0.5}},
        {"sampler": {}},
        {"sampler": 3},
        {"delta": 0.0},
        {"delta": 1.0},
        {"steps": 0},
        {"divisor": 0.0},
        {"unit": "hospital"},
        {"adversary": "nobody"},
        {"relation": "replace one"},
        {"mechanism": "Laplace"},
        {"min_honest": 0},
        {"steps": 1.5},
        {"steps": True},
        {"steps": 10**9},
        {"noise_multiplier": 1e-3},
    ],
)
def test_a_plan_that_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(BadUsage, match=r"got|sampler|plan"):
        PrivacyPlan.from_json({**PLAN.to_json(), **wrong})


def test_a_sampler_without_a_proof_is_refused() -> None:
    with pytest.raises(BadUsage, match=r"no amplification is proven here.*Shuffled batches are cyclic"):
        sampler_from_json({"kind": "shuffled", "rate": 0.5})
    with pytest.raises(BadUsage, match="expected Poisson, FixedSize or Cyclic"):
        replace(PLAN, sampler=0.5)  # type: ignore[arg-type]


def test_a_plan_round_trips_and_its_digest_sees_every_field() -> None:
    assert PrivacyPlan.from_json(PLAN.to_json()) == PLAN
    others = [
        PLAN,
        CLIENTS,
        *(replace(PLAN, **{name: getattr(PLAN, name) / 2}) for name in ("clip_norm", "noise_multiplier", "divisor")),
        replace(PLAN, delta=1e-6),
        replace(PLAN, steps=11),
        replace(PLAN, adversary="outsider"),
        replace(PLAN, min_honest=2),
        replace(PLAN, sampler=Poisson(rate=0.5)),
        *(replace(PLAN, sampler=sampler) for sampler in (FixedSize(size=1, population=4), Cyclic(period=4))),
    ]
    assert len({plan.digest() for plan in others}) == len(others)
    assert all(PrivacyPlan.from_json(plan.to_json()) == plan for plan in others)
    with pytest.raises(BadUsage, match="privacy plan"):
        PrivacyPlan.from_json({**PLAN.to_json(), "extra": 1})


def test_sampling_is_poisson() -> None:
    stream = insecure_seeded_noise("sampling")
    trials, rows = 4000, 40
    chosen = np.zeros((trials, rows), bool)
    for trial in range(trials):
        chosen[trial, PLAN.sample(rows, stream)] = True
    # Sizes of Poisson samples vary like a binomial; shuffled batches of fixed size would not vary at all.
    sizes = chosen.sum(1)
    variance = rows * PLAN.sampler.rate * (1 - PLAN.sampler.rate)
    assert abs(sizes.mean() - rows * PLAN.sampler.rate) < 5 * np.sqrt(variance / trials)
    assert abs(sizes.var() / variance - 1) < 0.15
    # Any two rows are in together as often as independence says.
    together = (chosen[:, 0] & chosen[:, 1]).mean()
    assert abs(together - PLAN.sampler.rate**2) < 5 * np.sqrt(PLAN.sampler.rate**2 / trials)
    assert len(PLAN.sample(0, stream)) == 0


def test_an_empty_sample_is_still_noised() -> None:
    stream = insecure_seeded_noise("empty")
    released = np.stack([PLAN.release(np.zeros(50), stream) for _ in range(200)])
    expected = PLAN.noise_multiplier * PLAN.clip_norm / PLAN.divisor
    assert released.std() == pytest.approx(expected, rel=0.03)
    with pytest.raises(ShapeMismatch):
        PLAN.release(np.zeros((2, 2)), stream)


def test_samples_of_a_fixed_size_are_uniform_and_need_a_public_population() -> None:
    plan = replace(PLAN, sampler=FixedSize(size=3, population=8))
    stream = insecure_seeded_noise("fixed")
    chosen = np.stack([plan.sample(8, stream) for _ in range(4000)])
    assert chosen.shape == (4000, 3)
    assert (np.diff(chosen) > 0).all()
    counts = np.bincount(chosen.ravel(), minlength=8)
    assert stats.chisquare(counts).pvalue > 1e-6
    with pytest.raises(BadUsage, match="public population of 8"):
        plan.sample(9, stream)


def test_in_a_cycle_everybody_has_one_turn() -> None:
    plan = replace(PLAN, sampler=Cyclic(period=3))
    turns = [plan.sample(7, insecure_seeded_noise("cycle"), step=step).tolist() for step in range(1, 7)]
    assert turns == [[0, 3, 6], [1, 4], [2, 5]] * 2
    assert all(plan.sampler.participations(steps) == -(-steps // 3) for steps in range(1, 10))


@pytest.fixture
def silence(monkeypatch: pytest.MonkeyPatch) -> NoiseStream:
    """No noise: what is left is the rounding."""
    monkeypatch.setattr(
        "fedinfer.privacy.plan.discrete_gaussian", lambda stream, *, variance, count: np.zeros(count, np.int64)
    )
    return insecure_seeded_noise("silence")


@given(
    first=st.lists(st.floats(-1e4, 1e4), min_size=4, max_size=4),
    second=st.lists(st.floats(-1e4, 1e4), min_size=4, max_size=4),
    noise=st.floats(0.5, 100.0),
)
def test_the_grid_adds_less_to_the_sensitivity_than_is_counted(
    first: list[float], second: list[float], noise: float
) -> None:
    plan = replace(PLAN, noise_multiplier=noise)
    cell = noise * plan.clip_norm / GRID_SIGMA
    a, b = np.array(first), np.array(second)
    on_grid = [np.rint(np.float64(1) * v / cell) for v in (a, b)]
    # In whole cells, so that the comparison itself does not round.
    assert np.linalg.norm(on_grid[0] - on_grid[1]) <= np.linalg.norm(a - b) / cell + 32 * 2.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_no_number_breaks_a_release(bad: float, silence: NoiseStream) -> None:
    released = PLAN.release(np.array([bad, 1.0, -1e4]), silence)
    assert np.isfinite(released).all()
    assert released[1:] == pytest.approx([1.0 / PLAN.divisor, -1e4 / PLAN.divisor], rel=1e-6)


def test_a_share_of_noise_is_not_released_alone() -> None:
    with pytest.raises(BadUsage, match="needs a secure sum"):
        replace(PLAN, min_honest=3).release(np.zeros(3), insecure_seeded_noise("share"))


def test_every_name_of_the_package_is_where_it_is_said_to_be() -> None:
    assert sorted(privacy.HOMES) == sorted(privacy.__all__)
    for name, home in privacy.HOMES.items():
        assert getattr(privacy, name) is getattr(import_module(f"fedinfer.privacy.{home}"), name)
    with pytest.raises(AttributeError, match="has no attribute 'plan_of'"):
        _ = privacy.plan_of
