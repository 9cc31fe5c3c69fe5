"""The discrete laws are exact: probabilities in integers, the slow path, chi-square tests that see 2 % of sigma."""

from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from fedinfer.privacy.discrete import discrete_gaussian, discrete_laplace
from fedinfer.privacy.noise import insecure_seeded_noise

FALSE_ALARM = 1e-9


def exact_law(rate: Fraction, power: int) -> dict[int, Decimal]:
    """P(x) ∝ exp(-rate |x|^power) to 60 digits, for all x whose weight is not below 10^-65."""
    with localcontext() as context:
        context.prec = 70
        negative_rate = -Decimal(rate.numerator) / Decimal(rate.denominator)
        weights = [Decimal(1)]
        while weights[-1] > Decimal(10) ** -65:
            weights.append((negative_rate * len(weights) ** power).exp())
        total = weights[0] + 2 * sum(weights[1:])
        return {x: weights[abs(x)] / total for x in range(1 - len(weights), len(weights))}


def gaussian_rate(variance: Fraction) -> Fraction:
    return 1 / (2 * variance)


def follows(values: np.ndarray, law: dict[int, Decimal]) -> bool:
    """A chi-square test of the law over all integers, those expected fewer than ten times together."""
    seen = dict(zip(*(part.tolist() for part in np.unique(values, return_counts=True)), strict=True))
    expected = {x: float(p) * len(values) for x, p in law.items()}
    often = [x for x, mean in expected.items() if mean >= 10.0]
    got = [seen.get(x, 0) for x in often]
    means = [expected[x] for x in often]
    got.append(len(values) - sum(got))
    means.append(len(values) - sum(means))
    if means[-1] < 10.0:
        got[-2:], means[-2:] = [got[-2] + got[-1]], [means[-2] + means[-1]]
    statistic = sum((g - m) ** 2 / m for g, m in zip(got, means, strict=True))
    return bool(stats.chi2.sf(statistic, len(got) - 1) > FALSE_ALARM)


@pytest.mark.parametrize("variance", [Fraction(1, 4), Fraction(1), Fraction(22, 7), Fraction(100), Fraction(10**6, 37)])
def test_the_discrete_gaussian_is_exact_and_the_test_sees_two_per_cent(variance: Fraction) -> None:
    values = discrete_gaussian(insecure_seeded_noise(f"gaussian {variance}"), variance=variance, count=10**6)
    assert follows(values, exact_law(gaussian_rate(variance), 2))
    for factor in (Fraction(102, 100), Fraction(98, 100)):
        assert not follows(values, exact_law(gaussian_rate(variance * factor**2), 2))


@pytest.mark.parametrize("scale", [Fraction(1, 2), Fraction(1), Fraction(10, 3), Fraction(50)])
def test_the_discrete_laplace_is_exact_and_the_test_sees_two_per_cent(scale: Fraction) -> None:
    values = discrete_laplace(insecure_seeded_noise(f"laplace {scale}"), scale=scale, count=10**6)
    assert follows(values, exact_law(1 / scale, 1))
    for factor in (Fraction(102, 100), Fraction(98, 100)):
        assert not follows(values, exact_law(1 / (scale * factor), 1))
