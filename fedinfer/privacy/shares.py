"""Noise in shares: a sum of discrete Gaussians is the Gaussian mechanism, with something done to its answer.

Write g_v for the density of N(0, v), and N_Z(v) for the discrete Gaussian, P(x) proportional to g_v(x) on the integers.
By Poisson's summation the sum of g_v over all integers and any shift of them lies within 1 ± p(v), where p(v) is twice
the sum of exp(-2 pi² v k²) over k >= 1, less than 2.1 exp(-2 pi² v) for v >= 1/4. Two statements follow.

*Sums.* In X + Y with X ~ N_Z(a) and Y ~ N_Z(b) the weight of z is g_{a+b}(z) times such a sum with variance
v = ab / (a + b). Hence its probabilities and those of N_Z(a + b) differ by a factor within (1 + p) / (1 - p) of 1,
which is less than exp(5 exp(-2 pi² v)), either way. For m shares of variance s, one after the other, the factor is
within exp(±t), t = sum over k < m of 5 exp(-2 pi² s k / (k + 1)). (Kairouz, Liu and Steinke 2021 state it too.)

*Rounding.* Draw Y ~ N(0, v - r), then an integer x with weight g_r(x - Y), normalised by the sum over all integers.
The weight of x is g_v(x) up to the factor of that sum, so that x has the law N_Z(v) up to a factor within
exp(± 5 exp(-2 pi² r)). A Y that is moved by an integer moves x by as much: adding N_Z(v) to an integer vector *is* the
Gaussian mechanism of variance v - r, with this rounding done to its answer, up to that factor in each coordinate.

So all that is known of the Gaussian mechanism (its loss distribution, under sampling too, and its Rényi divergences)
holds for the sum of shares with `ROUNDING` less variance, and a factor that `slack` bounds. Shares beyond m are more
noise on top: something done to the answer again.

References: Kairouz, Liu and Steinke 2021, arXiv:2102.06387, section 3 (sums); Peikert 2010,
doi:10.1007/978-3-642-14623-7_5, theorem 3.1 (the rounding, over any lattice).
"""

import math

import numpy as np

# r above: its factor is within exp(± 3e-34).
ROUNDING = 4.0
# The variance of a share, at least: two shares then differ from one discrete Gaussian by exp(± 4e-17) at most.
LEAST_SHARE = 4.0


def slack(*, share_variance: float, shares: int, coordinates: int) -> float:
    """How far apart the logarithms of two probabilities may be, at most.

    They are those of `coordinates` sums of `shares` discrete Gaussians, and of rounded Gaussians.

    >>> slack(share_variance=9.0, shares=3, coordinates=10**9) < 1e-24
    True
    """
    if share_variance < LEAST_SHARE:
        return math.inf
    return coordinates * (sums_apart(share_variance, shares) + rounding_apart(ROUNDING))


def sums_apart(share_variance: float, shares: int) -> float:
    """t of the first statement, for one coordinate; `share_variance` is at least 1/2.

    >>> f"{sums_apart(4.0, 2):.1e}"
    '3.6e-17'
    """
    k = np.arange(1, shares)
    return float((5.0 * np.exp(-2.0 * math.pi**2 * share_variance * k / (k + 1))).sum())


def rounding_apart(variance: float) -> float:
    """The exponent of the second statement, for one coordinate; `variance` is r, at least 1/4."""
    return 5.0 * math.exp(-2.0 * math.pi**2 * variance)


def gaussian_variance(*, share_variance: float, shares: int) -> float:
    """The variance of the Gaussian that `shares` are as good as, 0 if they are as good as none."""
    return max(0.0, share_variance * shares - ROUNDING)
