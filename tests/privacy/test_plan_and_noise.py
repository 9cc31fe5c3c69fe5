"""The plan does what it accounts; the accountant is right; the noise has the shape it claims."""

import pickle

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from fedinfer.errors import BadUsage, ShapeMismatch
from fedinfer.privacy import NoiseStream, PrivacyPlan, insecure_seeded_noise, os_noise
from fedinfer.privacy.accounting import epsilon_of

PLAN = PrivacyPlan(clip_norm=2.0, noise_multiplier=3.0, sampling_rate=0.25, delta=1e-5, steps=10, divisor=50.0)


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


@pytest.mark.parametrize("epsilon", [0.2, 1.0, 2.0, 4.0, 8.0])
def test_calibrate_meets_epsilon_from_below(epsilon: float) -> None:
    plan = PrivacyPlan.calibrate(epsilon=epsilon, delta=1e-5, steps=42, sampling_rate=0.5, clip_norm=1.0, divisor=100.0)
    assert epsilon - 1e-4 <= plan.epsilon() <= epsilon


@pytest.mark.parametrize(
    "wrong",
    [
        {"clip_norm": 0.0},
        {"clip_norm": float("nan")},
        {"noise_multiplier": -1.0},
        {"sampling_rate": 0.0},
        {"sampling_rate": 1.1},
        {"delta": 0.0},
        {"delta": 1.0},
        {"steps": 0},
        {"divisor": 0.0},
        {"unit": "client"},
        {"steps": 1.5},
        {"steps": True},
        {"steps": 10**9},
        {"noise_multiplier": 1e-3},
    ],
)
def test_a_plan_that_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(BadUsage, match="got"):
        PrivacyPlan.from_json({**PLAN.to_json(), **wrong})


def test_a_plan_round_trips_and_its_digest_sees_every_field() -> None:
    assert PrivacyPlan.from_json(PLAN.to_json()) == PLAN
    fields = PLAN.to_json()
    halved = [key for key, value in fields.items() if isinstance(value, float)]
    others = [fields, *({**fields, key: fields[key] / 2} for key in halved), {**fields, "steps": 11}]
    digests = {PrivacyPlan.from_json(other).digest() for other in others}
    assert len(digests) == len(others) == 7
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
    variance = rows * PLAN.sampling_rate * (1 - PLAN.sampling_rate)
    assert abs(sizes.mean() - rows * PLAN.sampling_rate) < 5 * np.sqrt(variance / trials)
    assert abs(sizes.var() / variance - 1) < 0.15
    # Any two rows are in together as often as independence says.
    together = (chosen[:, 0] & chosen[:, 1]).mean()
    assert abs(together - PLAN.sampling_rate**2) < 5 * np.sqrt(PLAN.sampling_rate**2 / trials)
    assert len(PLAN.sample(0, stream)) == 0


def test_an_empty_sample_is_still_noised() -> None:
    stream = insecure_seeded_noise("empty")
    released = np.stack([PLAN.release(np.zeros(50), stream) for _ in range(200)])
    expected = PLAN.noise_multiplier * PLAN.clip_norm / PLAN.divisor
    assert released.std() == pytest.approx(expected, rel=0.03)
    with pytest.raises(ShapeMismatch):
        PLAN.release(np.zeros((2, 2)), stream)


def looks_gaussian(values: np.ndarray, sigma: float) -> bool:
    """A chi-square test of the variance and a KS test of the shape, each with a false alarm below 1e-6."""
    statistic = float((values**2).sum() / sigma**2)
    tail = 2 * min(stats.chi2.cdf(statistic, len(values)), stats.chi2.sf(statistic, len(values)))
    return tail > 1e-6 and stats.kstest(values / sigma, "norm").pvalue > 1e-6


def test_noise_is_gaussian_and_the_test_sees_two_per_cent() -> None:
    values = insecure_seeded_noise("gaussian").gaussian_float(3.0, 200_000)
    assert looks_gaussian(values, 3.0)
    assert not looks_gaussian(values * 1.02, 3.0)
    assert not looks_gaussian(values * 0.98, 3.0)
    assert not looks_gaussian(np.random.default_rng(0).laplace(scale=3.0 / np.sqrt(2), size=200_000), 3.0)


def test_noise_is_fresh_each_time_and_across_streams() -> None:
    stream = os_noise()
    first, second = stream.gaussian_float(1.0, 1000), stream.gaussian_float(1.0, 1000)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.2
    assert not np.array_equal(os_noise().gaussian_float(1.0, 10), os_noise().gaussian_float(1.0, 10))
    assert not os_noise().void


def test_seeded_noise_repeats_and_says_that_it_is_void() -> None:
    one, two = insecure_seeded_noise("a"), insecure_seeded_noise("a")
    assert np.array_equal(one.gaussian_float(1.0, 10), two.gaussian_float(1.0, 10))
    assert one.void


def test_the_stream_is_aes_256_ctr_by_nist() -> None:
    # NIST SP 800-38A, F.5.5 CTR-AES256.Encrypt, key and first block; the standard's counter is not zero, so the
    # cipher is checked with it and the stream against the cipher at zero.
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    plain, expected = "6bc1bee22e409f96e93d7e117393172a", "601ec313775789a5b7a7f504bbf3d228"
    standard = Cipher(algorithms.AES256(key), modes.CTR(counter)).encryptor()
    assert standard.update(bytes.fromhex(plain)).hex() == expected
    at_zero = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    assert NoiseStream(key, void=False).take(64) == at_zero.update(bytes(64))


def test_a_stream_is_not_copied_and_its_key_is_not_shown() -> None:
    stream = os_noise()
    with pytest.raises(TypeError, match="is not copied"):
        pickle.dumps(stream)
    assert repr(stream) == "NoiseStream(void=False)"


def test_uniform_numbers_are_uniform() -> None:
    assert stats.kstest(os_noise().uniform(100_000), "uniform").pvalue > 1e-6


class OneWord(NoiseStream):
    """A stream of one word, again and again."""

    def __init__(self, word: int) -> None:
        super().__init__(bytes(32), void=True)
        self._word = word

    def take(self, size_bytes: int) -> bytes:
        return self._word.to_bytes(8, "little") * (size_bytes // 8)


@pytest.mark.parametrize("word", [0, 1, 2**11, 2**12, 2**63, 2**64 - 2**12, 2**64 - 2**11, 2**64 - 1])
def test_uniform_numbers_are_never_zero_or_one(word: int) -> None:
    stream = OneWord(word)
    (value,) = stream.uniform(1)
    assert 0.0 < value < 1.0
    # No rounding: the number is the middle of its cell, so that a rate of k / 2**52 is met exactly.
    assert value == (word >> 12) * 2.0**-52 + 2.0**-53
    assert np.isfinite(stream.gaussian_float(1.0, 1)).all()
