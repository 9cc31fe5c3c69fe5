"""Is the noise that was really added the noise that was declared, and fresh each time?

Each check returns a p-value: the probability that noise as declared looks at least so odd.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincc, ndtr
from scipy.stats import chi2, kstwo

Floats = NDArray[np.float64]
# So many numbers show an error of 2 % in σ at any level down to 1e-9.
ENOUGH = 200_000


def spread_chance(noise: Floats, sigma: float) -> float:
    """Two-sided χ² test that `noise` (n,) has standard deviation `sigma` about zero, exact for normal noise."""
    if not np.isfinite(noise).all():
        return 0.0
    total = float(np.square(noise / sigma).sum())
    return min(1.0, 2.0 * min(float(chi2.cdf(total, len(noise))), float(chi2.sf(total, len(noise)))))


def shape_chance(noise: Floats, sigma: float) -> float:
    """Kolmogorov-Smirnov test that `noise` (n,) is normal with standard deviation `sigma`, exact."""
    if not np.isfinite(noise).all():
        return 0.0
    levels, count = ndtr(np.sort(noise / sigma)), len(noise)
    above, below = np.arange(1, count + 1) / count - levels, levels - np.arange(count) / count
    return float(kstwo.sf(max(float(above.max()), float(below.max())), count))


def repetition_chance(parts: Sequence[Floats]) -> float:
    """Test that noise vectors of one length, of other steps, restarts or devices, have nothing to do with each other.

    Of each pair, and of each vector with itself shifted by one, the correlation; the smallest p-value counts for all.
    """
    pairs = [*combinations(parts, 2), *((part[1:], part[:-1]) for part in parts)]
    return min(1.0, len(pairs) * min(_correlation_chance(first, second) for first, second in pairs))


def _correlation_chance(first: Floats, second: Floats) -> float:
    """Of independent normal vectors of mean zero, the squared correlation has a Beta(1/2, (n - 1)/2) distribution."""
    size = float(np.linalg.norm(first) * np.linalg.norm(second))
    if not (np.isfinite(size) and size > 0.0):
        return 0.0
    return float(betaincc(0.5, (len(first) - 1) / 2, min(1.0, (float(first @ second) / size) ** 2)))
