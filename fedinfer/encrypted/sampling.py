"""The server's own randomness for an answer, all of it from the operating system.

Reference: SEAL 4 for the distributions: u uniform in {-1, 0, 1}; errors centred binomial of 21 bits (deviation 3.24).
"""

import os
import secrets

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

Floats = NDArray[np.float64]
HALF_BITS = 21


def ternary_and_errors(degree: int) -> tuple[Floats, Floats, Floats]:
    """A ternary polynomial (N,) and two error polynomials (N,)."""
    return _ternary(degree), _binomial(degree), _binomial(degree)


def _ternary(count: int) -> Floats:
    out = np.zeros(0)
    while len(out) < count:
        # A byte below 243 is five uniform digits to base three.
        octets = np.frombuffer(os.urandom(count // 4 + 64), np.uint8)
        octets = octets[octets < 243].astype(np.int64)
        digits = np.stack([octets // 3**k % 3 for k in range(5)], axis=1).reshape(-1)
        out = np.concatenate([out, digits - 1.0])
    return out[:count]


def _binomial(count: int) -> Floats:
    words = np.frombuffer(os.urandom(8 * count), "<u8")
    mask = np.uint64((1 << HALF_BITS) - 1)
    low, high = words & mask, (words >> np.uint64(HALF_BITS)) & mask
    out: Floats = np.bitwise_count(low).astype(np.float64) - np.bitwise_count(high)
    return out


def wide_noise(count: int, largest: float) -> list[int]:
    """Uniform whole numbers from -largest to largest, of any size; zeros if that is below one."""
    half = int(largest)
    return [secrets.randbelow(2 * half + 1) - half for _ in range(count)] if half else [0] * count


def gaussian(count: int) -> Floats:
    """Standard normal numbers, by the inverse of their distribution function."""
    words = np.frombuffer(os.urandom(8 * count), "<u8") >> np.uint64(12)
    out: Floats = ndtri((words.astype(np.float64) + 0.5) * 2.0**-52)
    return out
