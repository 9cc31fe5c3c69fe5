"""Random numbers that can be looked up: what client 7 draws does not depend on who was asked before.

They describe a simulated world, not noise and not a sample that privacy rests on: a seed repeats them.

Reference: Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195 (the mixing function of SplitMix64).
"""

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray


def uniform(seed: int, purpose: str, *keys: ArrayLike) -> NDArray[np.float64]:
    """A number in (0, 1) for each combination of `keys`, whole numbers that broadcast together, with at least one axis.

    Guarantees: the same arguments give the same numbers, in whatever company they are asked for.

    >>> bool(uniform(0, "speed", [3, 7])[1] == uniform(0, "speed", 7)[0])
    True
    """
    start = int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "little")
    words = np.full(1, start, np.uint64)
    for key in keys:
        words = _mixed(words ^ np.asarray(key, np.int64).view(np.uint64))
    return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A permutation of 64-bit words of which every output bit depends on every input bit."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words
