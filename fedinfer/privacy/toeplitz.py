"""Lower-triangular Toeplitz matrices for correlated noise: sensitivity, error, and the best coefficients.

The model after round t is a prefix sum of noisy updates: A = BC with A the prefix sums, and what is released is
A(x + C⁻¹z) for white noise z. C is given by its first column c, of which `bands` entries are not zero.

Reference: Choquette-Choo et al. 2023, arXiv:2306.08153 (bands, minimal separation); Kalinin and Lampert 2024,
arXiv:2405.13763, theorem 2 (the worst schedule).
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.signal import correlate, lfilter

from fedinfer.errors import BadUsage

Floats = NDArray[np.float64]
Objective = Literal["max", "mean"]
MAX_ROUNDS = 10_000
LEAST_DROP = 1e-12


def sensitivity(coefficients: Sequence[float], *, rounds: int, separation: int, participations: int) -> float:
    """How far one client moves Cx in L2 norm: at most `participations` updates of norm 1, `separation` rounds apart.

    Guarantees: exact for coefficients that are not negative and do not grow. With them the inner product of columns
    i ≤ j is a sum of products that shrinks as j or j - i grows; the client's updates enter by inner products of at
    most 1 (all equal is worst), and of all schedules 0, b, 2b, … has the smallest j and the smallest j - i at once.
    Raises: BadUsage for other coefficients.

    >>> round(sensitivity((1.0, 0.5), rounds=8, separation=4, participations=2) ** 2, 9)
    2.5
    """
    return float(np.linalg.norm(_worst_sum(_checked(coefficients), rounds, separation, participations)))


def error(coefficients: Sequence[float], *, rounds: int, momentum: float = 0.0, objective: Objective = "max") -> float:
    """Standard deviation of the noise in a prefix sum, for white noise z of deviation 1.

    The largest over rounds ("max"), or the root of the mean square ("mean"). With `momentum`, of the heavy-ball sums.
    """
    decoder = lfilter([1.0], np.asarray(coefficients, np.float64), _workload(rounds, momentum))
    return float(np.sqrt(_row_weights(rounds, objective) @ decoder**2))


@lru_cache(maxsize=64)
def optimal_coefficients(
    *,
    rounds: int,
    bands: int,
    separation: int,
    participations: int,
    momentum: float = 0.0,
    objective: Objective = "max",
) -> tuple[float, ...]:
    """The coefficients (bands,) with the least sensitivity times error among those of `sensitivity`; the first is 1.

    More bands than `separation` rarely help, because a client's own columns then overlap.

    Guarantees: never worse than the square root of the workload cut to `bands`, where the search starts.
    Raises: BadUsage for sizes that cannot be.

    >>> [round(c, 3) for c in optimal_coefficients(rounds=4, bands=4, separation=4, participations=1)]
    [1.0, 0.5, 0.375, 0.312]
    """
    if not 1 <= bands <= rounds <= MAX_ROUNDS:
        raise BadUsage(f"bands: got {bands} of {rounds} rounds, expected 1 to the rounds, of at most {MAX_ROUNDS}")
    if separation < 1 or participations < 1:
        raise BadUsage(f"participation: got {participations} at {separation} rounds apart, expected at least 1 of both")
    if not 0.0 <= momentum < 1.0:
        raise BadUsage(f"momentum: got {momentum}, expected at least 0 and less than 1")
    workload, weights = _workload(rounds, momentum), _row_weights(rounds, objective)

    def loss(drops: Floats) -> tuple[float, Floats]:
        c = _suffix_sums(drops)
        decoder = lfilter([1.0], c, workload)
        worst = _worst_sum(c, rounds, separation, participations)
        squared_error, squared_reach = weights @ decoder**2, worst @ worst
        # The decoder is the power series a(x) / c(x), so that c_j moves it by -x^j times decoder(x) / c(x).
        lagged = correlate(2.0 * weights * decoder, lfilter([1.0], c, decoder), "full")[rounds - 1 :][:bands]
        gradient = -lagged / squared_error
        for start in _starts(rounds, separation, participations):
            part = worst[start : start + bands]
            gradient[: len(part)] += 2.0 * part / squared_reach
        return float(np.log(squared_error) + np.log(squared_reach)), np.cumsum(gradient)

    root = _square_root(rounds, momentum)[:bands]
    # The loss knows no scale; without a floor a long step could end at all zeros.
    start = np.maximum(np.append(-np.diff(root), root[-1]), LEAST_DROP)
    options = {"maxiter": 500, "maxfun": 2000, "maxcor": 30, "ftol": 1e-11, "gtol": 1e-9}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(LEAST_DROP, None)] * bands, options=options)
    best = found.x if found.fun <= loss(start)[0] else start
    c = _suffix_sums(best)
    return tuple(float(value) for value in c / c[0])


def _checked(coefficients: Sequence[float]) -> Floats:
    c = np.asarray(coefficients, np.float64)
    if c.ndim != 1 or len(c) == 0 or c[0] != 1.0 or not (np.diff(c) <= 0.0).all() or not c[-1] >= 0.0:
        raise BadUsage("coefficients: got some that grow or are negative, expected 1 first, then none larger, none < 0")
    return c


def _starts(rounds: int, separation: int, participations: int) -> range:
    return range(0, min(rounds, participations * separation), separation)


def _worst_sum(c: Floats, rounds: int, separation: int, participations: int) -> Floats:
    total = np.zeros(rounds)
    for start in _starts(rounds, separation, participations):
        column = c[: rounds - start]
        total[start : start + len(column)] += column
    return total


def _workload(rounds: int, momentum: float) -> Floats:
    """First column of A: how much of an update is in the model that many rounds later."""
    return np.cumsum(momentum ** np.arange(rounds, dtype=np.float64))


def _row_weights(rounds: int, objective: Objective) -> Floats:
    """How much each squared entry of B's first column counts: it stands in the last row, and in a share of all rows."""
    if objective == "max":
        return np.ones(rounds)
    return 1.0 - np.arange(rounds) / rounds


def _square_root(rounds: int, momentum: float) -> Floats:
    """First column of the square root of A: 1 / sqrt((1 - x)(1 - momentum x)) as a power series.

    Reference: Fichtenberger, Henzinger and Upadhyay 2022, arXiv:2202.11205; Kalinin and Lampert 2024, theorem 1.
    """
    index = np.arange(1, rounds)
    root = np.cumprod(np.concatenate([[1.0], (2 * index - 1) / (2 * index)]))
    return np.asarray(np.convolve(root, root * momentum ** np.arange(rounds))[:rounds], np.float64)


def _suffix_sums(drops: Floats) -> Floats:
    return np.cumsum(drops[::-1])[::-1]
