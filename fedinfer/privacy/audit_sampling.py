"""Is it Poisson sampling that ran? Amplification is claimed for it, and shuffled batches do not have it.

Reference: Chua et al. 2024, arXiv:2403.17673; Annamalai et al. 2024, arXiv:2411.10614 (what shuffling leaks).
"""

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri
from scipy.stats import binom, binomtest, chi2

# Ties of whole numbers are broken at random; which numbers break them is no secret.
TIE_BREAKER = 0


def poisson_chances(taken: NDArray[np.bool_], rate: float) -> dict[str, float]:
    """p-values that `taken` (steps, units) are independent coins of probability `rate`.

    "rate": the number of all that were taken. "batch sizes": their spread over steps, which is none for batches of a
    fixed size. "turns": the spread over units of how often one was taken, which is none if each has its turn.
    """
    steps, units = taken.shape
    if rate == 1.0:
        return {"rate": float(taken.all())}
    return {
        "rate": float(binomtest(int(taken.sum()), taken.size, rate).pvalue),
        "batch sizes": _binomial_chance(taken.sum(1), units, rate),
        "turns": _binomial_chance(taken.sum(0), steps, rate),
    }


def _binomial_chance(counts: NDArray[np.int64], trials: int, rate: float) -> float:
    """Exact χ² test of the spread of independent binomial counts, through their randomised normal scores."""
    ties = np.random.default_rng(TIE_BREAKER).uniform(size=len(counts))
    levels = binom.cdf(counts - 1, trials, rate) + ties * binom.pmf(counts, trials, rate)
    total = float(np.square(ndtri(np.clip(levels, 1e-300, 1.0 - 1e-16))).sum())
    return min(1.0, 2.0 * min(float(chi2.cdf(total, len(counts))), float(chi2.sf(total, len(counts)))))
