"""Stochastic rounding to integers, and how far it may move a vector.

A coordinate x goes up with the probability of its fraction, so that rounding is unbiased: it is the ceiling of x - u,
u uniform. Its squared norm is a sum of independent numbers of two values each, 2 floor(x) + 1 apart. The mean of that
sum is at most |x|² + d/4, and by Hoeffding's inequality it is above |x|² + d/4 + sqrt(2 ln 1/b) (|x| + sqrt(d)/2) with
probability b at most. In no case is the norm above |x| + sqrt(d).

Two uses, and they are not the same. One vector can be rounded again until it keeps to the bound (`round_within`). The
*difference* of two neighbouring sums is rounded too, because under the same u it is a stochastic rounding of the
difference, but nobody sees it to try again: there the bound fails with probability b, and δ pays.

Reference: Kairouz, Liu and Steinke 2021, arXiv:2102.06387, section 4 (one vector).
"""

import math

import numpy as np
from numpy.typing import NDArray

from fedinfer.privacy.noise import NoiseStream

Floats = NDArray[np.float64]


def surely_within(norm: float, dimension: int) -> float:
    """What the norm of a rounded vector (dimension,) of `norm` never exceeds.

    >>> surely_within(10.0, 4)
    12.0
    """
    return norm + math.sqrt(dimension)


def likely_within(norm: float, dimension: int, *, doubt: float) -> float:
    """What it exceeds with a probability of at most `doubt`.

    >>> round(likely_within(100.0, 10_000, doubt=1e-9), 1)
    116.0
    """
    spread = math.sqrt(2.0 * math.log(1.0 / doubt)) * (norm + math.sqrt(dimension) / 2.0)
    return min(surely_within(norm, dimension), math.sqrt(norm**2 + dimension / 4.0 + spread))


def round_up_or_down(vector: Floats, stream: NoiseStream) -> Floats:
    """Each coordinate of `vector` (d,) to one of the two integers around it, unbiased."""
    low = np.floor(vector)
    low += stream.uniform(len(vector)) < vector - low
    return low


def round_within(vector: Floats, stream: NoiseStream, *, limit: float) -> Floats:
    """Round `vector` (d,) as above, again and again until its norm is at most `limit`.

    It ends soon if `limit` is what `likely_within` gives for a doubt well below one.
    """
    while True:
        rounded = round_up_or_down(vector, stream)
        if float(rounded @ rounded) <= limit**2:
            return rounded
