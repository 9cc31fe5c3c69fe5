"""From one measure of privacy loss to another, in plain floating point and with nothing else loaded."""

import math


def rdp_overhead(order: float, delta: float) -> float:
    """What is added to a Rényi divergence at `order` for an ε at `delta`.

    Reference: Canonne, Kamath and Steinke 2020, arXiv:2004.00010, Proposition 12.

    >>> round(rdp_overhead(8.0, 1e-5), 3)
    1.214
    """
    return math.log1p(-1.0 / order) - (math.log(delta) + math.log(order)) / (order - 1.0)


def rdp_delta(order: float, rdp: float, epsilon: float) -> float:
    """δ at `epsilon` of a mechanism of Rényi divergence `rdp` at `order`.

    Reference: Canonne, Kamath and Steinke 2020, arXiv:2004.00010, Proposition 12.

    >>> f"{rdp_delta(8.0, rdp=1.0, epsilon=1.0 + rdp_overhead(8.0, 1e-5)):.3g}"
    '1e-05'
    """
    exponent = (order - 1.0) * (rdp - epsilon + math.log1p(-1.0 / order)) - math.log(order)
    return 1.0 if exponent >= 0.0 else math.exp(exponent)


def gdp_delta(mu: float, epsilon: float) -> float:
    """δ at `epsilon` of a μ-Gaussian mechanism.

    Reference: Balle and Wang 2018, arXiv:1805.06530, Theorem 8; Dong, Roth and Su 2019, arXiv:1905.02383.

    >>> round(gdp_delta(1.0, 1.0), 4)
    0.1269
    """
    if mu == 0.0:
        return 0.0
    below = math.erfc((epsilon / mu - mu / 2.0) / math.sqrt(2.0)) / 2.0
    above = math.erfc((epsilon / mu + mu / 2.0) / math.sqrt(2.0)) / 2.0
    # A smaller factor makes δ larger, which is the safe side.
    return below - math.exp(min(epsilon, 700.0)) * above
