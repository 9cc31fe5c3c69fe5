"""The compiled loop behind `discrete.py`: proposals that floating point decides for certain, one after another.

A module of its own because numba takes a fifth of a second to load, and few numbers are drawn sooner without it.
"""

import math

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def fill(words, out, blocks, surely, odds, rate, power, shift, margin):  # type: ignore[no-untyped-def]
    """Write what is kept of the proposals `words` (n, 2) to `out` until it is full; how many were read and written.

    It stops before a proposal of the tail, which is the last block, and before one whose comparison is within `margin`.
    What that one proposes comes next, and its block.
    """
    tail = len(odds) - 1
    within = (np.int64(1) << shift) - np.int64(1)
    read = wrote = 0
    x = block = np.int64(0)
    while read < len(words) and wrote < len(out):
        first = np.int64(words[read, 0])
        block = np.int64(blocks[first & (len(blocks) - 1)])
        x = ((block << shift) + ((first >> 17) & within)) ^ -((first >> 16) & 1)
        if words[read, 1] >= surely[block]:
            if block == tail:
                break
            size = abs(np.float64(x))
            exponent = rate * (size * size if power == 2 else size)
            gap = odds[block] * math.exp(-exponent) - np.float64(words[read, 1]) * 2.0**-64
            if abs(gap) <= margin:
                break
            if gap < 0.0:
                read += 1
                continue
        out[wrote] = x
        wrote += 1
        read += 1
    return read, wrote, x, block
