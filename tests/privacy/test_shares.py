"""Sums of shares are as near to one Gaussian as is claimed, and no nearer than that by much."""

import math
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from scipy.integrate import quad

from fedinfer.privacy import discrete_gaussian, insecure_seeded_noise
from fedinfer.privacy.shares import LEAST_SHARE, ROUNDING, gaussian_variance, rounding_apart, slack, sums_apart

Floats = NDArray[np.float64]
HALF = 60


def law(variance: float) -> Floats:
    """The discrete Gaussian on -HALF..HALF."""
    x = np.arange(-HALF, HALF + 1)
    weights = np.exp(-(x**2) / (2.0 * variance))
    return weights / math.fsum(weights)


def sum_of(variance: float, shares: int) -> Floats:
    """The law of a sum of shares, on -HALF..HALF."""
    total = np.ones(1)
    for _ in range(shares):
        total = np.convolve(total, law(variance))
    middle = len(total) // 2
    return total[middle - HALF : middle + HALF + 1]


@pytest.mark.parametrize("shares", [2, 3, 5, 8])
@pytest.mark.parametrize("variance", [0.5, 0.75, 1.0, 1.5, 2.0])
def test_sums_of_discrete_gaussians_differ_by_the_factor_claimed(variance: float, shares: int) -> None:
    seen = np.arange(-HALF, HALF + 1) ** 2 < 25.0 * variance * shares
    apart = np.abs(np.log(sum_of(variance, shares)[seen] / law(variance * shares)[seen])).max()
    # Rounding of floats is about 1e-14.
    assert apart <= sums_apart(variance, shares) + 1e-13
    if variance <= 1.0 and shares == 2:
        assert apart > 0.1 * sums_apart(variance, shares)


@pytest.mark.parametrize("rounding", [0.25, 0.5, 0.75, 1.0])
def test_a_rounded_gaussian_has_the_law_of_a_discrete_one(rounding: float) -> None:
    variance, integers = 4.0, np.arange(-80, 81)
    spread = math.sqrt(variance - rounding)

    def weight(x: int, y: float) -> float:
        total = np.exp(-((integers - y) ** 2) / (2.0 * rounding)).sum()
        return float(stats.norm.pdf(y, scale=spread) * math.exp(-((x - y) ** 2) / (2.0 * rounding)) / total)

    for x in (0, 1, 2, 5):
        found, _ = quad(lambda y, x=x: weight(x, y), -25.0, 25.0, epsabs=1e-14, epsrel=1e-12, limit=400, points=[x])
        assert abs(math.log(found / law(variance)[HALF + x])) <= rounding_apart(rounding) + 1e-9


def test_shares_too_small_to_add_up_to_a_gaussian_are_infinitely_far_from_it() -> None:
    assert slack(share_variance=LEAST_SHARE * 0.999, shares=2, coordinates=1) == math.inf
    assert slack(share_variance=LEAST_SHARE, shares=100_000, coordinates=10**6) < 1e-10
    values = [slack(share_variance=v, shares=3, coordinates=10**9) for v in (4.0, 5.0, 6.0)]
    assert values == sorted(values, reverse=True)
    by_shares = [slack(share_variance=4.0, shares=n, coordinates=10) for n in (1, 2, 3, 10)]
    assert by_shares == sorted(by_shares)
    assert slack(share_variance=4.0, shares=3, coordinates=20) == 2 * slack(
        share_variance=4.0, shares=3, coordinates=10
    )


def test_the_rounding_is_paid_for_in_variance() -> None:
    assert gaussian_variance(share_variance=10.0, shares=3) == 30.0 - ROUNDING
    assert gaussian_variance(share_variance=1.0, shares=1) == 0.0


def test_the_shares_that_are_drawn_have_the_variance_accounted_for() -> None:
    stream, variance = insecure_seeded_noise("shares"), Fraction(17, 3)
    drawn = sum(discrete_gaussian(stream, variance=variance, count=20_000) for _ in range(3))
    assert np.var(drawn) == pytest.approx(17.0, rel=6.2 * math.sqrt(2 / 20_000))
