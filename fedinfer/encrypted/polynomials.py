"""Polynomials in place of activations: CKKS adds and multiplies, and nothing else.

Reference: Remez 1934 for the minimax fit, here by exchange on a grid; Chebyshev interpolation gives the first guess.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.polynomial import chebyshev
from numpy.typing import NDArray
from scipy.special import erf, expit

from fedinfer.errors import BadUsage

Floats = NDArray[np.float64]
GRID = 4001
MAX_DEGREE = 31
# Inputs at run time may leave the range of the calibration data by this much.
MARGIN = 0.1

ACTIVATIONS: Mapping[str, Callable[..., Floats]] = {
    "relu": lambda x: np.maximum(x, 0.0),
    "leaky_relu": lambda x, slope=0.01: np.where(x > 0, x, slope * x),
    "gelu": lambda x: x * 0.5 * (1.0 + erf(x / np.sqrt(2.0))),
    "silu": lambda x: x * expit(x),
    "sigmoid": lambda x: np.asarray(expit(x)),
    "tanh": lambda x: np.tanh(x),
    "exp": lambda x: np.exp(x),
    "softplus": lambda x, beta=1.0: np.logaddexp(0.0, beta * x) / beta,
    "elu": lambda x, alpha=1.0: np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0.0))),
}


def fit(function: Callable[[Floats], Floats], low: float, high: float, *, degree: int) -> Floats:
    """Coefficients by power of the minimax polynomial of at most `degree` on [low, high], widened by `MARGIN`.

    Guarantees: no polynomial of that degree is closer anywhere on the grid by more than a thousandth of the error.
    Raises: BadUsage for a degree outside 1 to 31 or a range that is none.

    >>> bool(abs(fit(lambda x: x**2, -1.0, 1.0, degree=2) - [0, 0, 1]).max() < 1e-9)
    True
    """
    if not 1 <= degree <= MAX_DEGREE:
        raise BadUsage(f"activation degree: got {degree}, expected 1 to {MAX_DEGREE}")
    if not (np.isfinite([low, high]).all() and low <= high):
        raise BadUsage(f"activation range: got {low} to {high}, expected finite numbers in order")
    middle, half = (low + high) / 2, max((high - low) / 2 * (1 + 2 * MARGIN), 1e-3)
    t = np.cos(np.linspace(np.pi, 0.0, GRID))
    y = function(middle + half * t)
    c = _remez(t, y, degree)
    in_t = chebyshev.cheb2poly(c)
    # From powers of t to powers of x = middle + half * t.
    out: Any = np.zeros(1)
    power: Floats = np.ones(1)
    for coefficient in in_t:
        out = np.polynomial.polynomial.polyadd(out, coefficient * power)
        power = np.convolve(power, [-middle / half, 1.0 / half])
    return np.asarray(out, np.float64)


def _remez(t: Floats, y: Floats, degree: int) -> Floats:
    """Chebyshev coefficients of the minimax fit to y on the grid t, which is dense in [-1, 1]."""
    picked = np.unique(np.rint((1 - np.cos(np.linspace(0, np.pi, degree + 2))) / 2 * (len(t) - 1)).astype(int))
    best: tuple[float, Floats] = (np.inf, np.zeros(degree + 1))
    for _ in range(30):
        basis = chebyshev.chebvander(t[picked], degree)
        signs = (-1.0) ** np.arange(len(picked))
        solved, *_ = np.linalg.lstsq(np.column_stack([basis, signs]), y[picked], rcond=None)
        error = y - chebyshev.chebval(t, solved[:-1])
        worst = float(np.abs(error).max())
        if worst < best[0]:
            best = (worst, solved[:-1])
        if worst <= abs(solved[-1]) * 1.001 + 1e-13:
            break
        # One extremum out of each run of one sign; then the best alternating stretch of degree + 2 of them.
        starts = np.concatenate([[0], np.nonzero(np.diff(np.sign(error)))[0] + 1, [len(t)]])
        peaks = np.array([a + int(np.abs(error[a:b]).argmax()) for a, b in itertools.pairwise(starts) if b > a])
        if len(peaks) < degree + 2:
            break
        windows = [peaks[i : i + degree + 2] for i in range(len(peaks) - degree - 1)]
        picked = max(windows, key=lambda window: float(np.abs(error[window]).min()))
    return best[1]
