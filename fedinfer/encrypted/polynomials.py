"""Polynomials in place of activations: CKKS adds and multiplies, and nothing else.

Reference: Remez 1934 for what a minimax fit is; here a linear program on Chebyshev points finds it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.polynomial import chebyshev
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.special import erf, expit

from fedinfer.errors import BadUsage

Floats = NDArray[np.float64]
GRID = 1001
MAX_DEGREE = 31
# Inputs at run time may leave the range of the calibration data by this much.
MARGIN = 0.1
MAX_VALUES = 100_000
SPREAD = 0.01
# How to find coefficients for a function on values.
Fit = Callable[[Callable[[Floats], Floats], Floats, int], Floats]

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


def minimax(function: Callable[[Floats], Floats], values: Floats, degree: int) -> Floats:
    """Coefficients by power of the polynomial of at most `degree` whose largest error on their range is least.

    The range is widened by `MARGIN`.
    Guarantees: no polynomial of that degree has a smaller largest error on a grid of Chebyshev points.
    Raises: BadUsage for a degree outside 1 to 31 or values that are not finite.

    >>> bool(abs(minimax(lambda x: x**2, np.array([-1.0, 1.0]), 2) - [0, 0, 1]).max() < 1e-9)
    True
    """
    middle, half = _range(values, degree)
    t = np.cos(np.linspace(np.pi, 0.0, GRID))
    return _powers(_smallest_largest(t, function(middle + half * t), degree), middle, half)


def least_squares(function: Callable[[Floats], Floats], values: Floats, degree: int) -> Floats:
    """Coefficients by power of the polynomial of at most `degree` nearest to the function on `values`.

    Frequent values count most, which keeps more of a network's accuracy than `minimax`; a share `SPREAD` of the weight
    lies evenly on the range, widened by `MARGIN`, so that rare values are not given up.
    Raises: as `minimax`.

    >>> bool(abs(least_squares(lambda x: x**2, np.array([-1.0, 0.5, 1.0]), 2) - [0, 0, 1]).max() < 1e-9)
    True
    """
    middle, half = _range(values, degree)
    every = values.ravel()
    seen = (every[:: -(-every.size // MAX_VALUES)] - middle) / half
    even = np.linspace(-1.0, 1.0, GRID)
    weights = np.concatenate([np.full(len(seen), 1.0 / len(seen)), np.full(GRID, SPREAD / GRID)]) ** 0.5
    points = np.concatenate([seen, even])
    basis = chebyshev.chebvander(points, degree) * weights[:, None]
    solved, *_ = np.linalg.lstsq(basis, function(middle + half * points) * weights, rcond=None)
    return _powers(np.asarray(solved, np.float64), middle, half)


def _range(values: Floats, degree: int) -> tuple[float, float]:
    if not 1 <= degree <= MAX_DEGREE:
        raise BadUsage(f"activation degree: got {degree}, expected 1 to {MAX_DEGREE}")
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise BadUsage(f"activation range: got {low} to {high}, expected finite numbers")
    return (low + high) / 2, max((high - low) / 2 * (1 + 2 * MARGIN), 1e-3)


def _powers(coefficients: Floats, middle: float, half: float) -> Floats:
    """Powers of x = middle + half * t from Chebyshev coefficients in t."""
    out: Any = np.zeros(1)
    power: Floats = np.ones(1)
    for coefficient in chebyshev.cheb2poly(coefficients):
        out = np.polynomial.polynomial.polyadd(out, coefficient * power)
        power = np.convolve(power, [-middle / half, 1.0 / half])
    return np.asarray(out, np.float64)


def _smallest_largest(t: Floats, y: Floats, degree: int) -> Floats:
    """Chebyshev coefficients of the minimax fit to y on the grid t, as a linear program: no error exceeds the last one.

    Remez's exchange finds the same, but goes astray on even and odd functions, whose best polynomial touches at more
    points than it looks for.
    """
    basis, one = chebyshev.chebvander(t, degree), np.ones((len(t), 1))
    bounds = np.block([[basis, -one], [-basis, -one]])
    cost = np.append(np.zeros(degree + 1), 1.0)
    found = linprog(cost, bounds, np.concatenate([y, -y]), bounds=(None, None), method="highs")
    return np.asarray(found.x[:-1], np.float64)
