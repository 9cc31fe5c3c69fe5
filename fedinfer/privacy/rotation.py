"""The randomised Hadamard rotation: a vector's length spread over all coordinates, by signs that everybody may know.

Before a sum modulo 2^bits it makes each coordinate about as large as any other, so that few bits are enough. It hides
nothing, and no privacy rests on it.

Reference: Ailon and Chazelle 2009, doi:10.1137/060673096; Suresh et al. 2017, arXiv:1611.00429 (before rounding).
"""

import hashlib
import math
from functools import lru_cache
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedinfer.errors import ShapeMismatch

Floats = NDArray[np.float64]

# The transform is taken in products with Hadamard matrices of this size: the fastest of 16, 32, 64 and 128.
WIDTH = 32


def padded_size(dimension: int) -> int:
    """The least power of two that is at least `dimension`."""
    return 1 << (dimension - 1).bit_length()


def rotate(vector: NDArray[np.floating[Any]], *, text: str) -> Floats:
    """Pad `vector` (d,) with zeros to a power of two, flip the signs that `text` stands for, and transform.

    Guarantees: the norm is kept but for 1e-13 of it; another text gives independent signs.
    Raises: ShapeMismatch for an array that is not a vector of at least one coordinate.

    >>> [round(float(x), 3) for x in rotate(np.array([3.0, 4.0, 0.0]), text="run/1")]
    [-3.5, 0.5, -3.5, 0.5]
    """
    if vector.ndim != 1 or not len(vector):
        raise ShapeMismatch(got=vector.shape, expected="(d,), d at least 1", what="vector to rotate")
    wide = np.zeros(padded_size(len(vector)))
    wide[: len(vector)] = vector
    return _transformed(wide * signs(len(wide), text=text))


def rotate_back(rotated: NDArray[np.floating[Any]], *, text: str, dimension: int) -> Floats:
    """The vector (dimension,) of which `rotate` with the same text made `rotated` (d~,).

    Raises: ShapeMismatch unless d~ is what `dimension` is padded to.
    """
    if rotated.shape != (padded_size(dimension),):
        raise ShapeMismatch(got=rotated.shape, expected=(padded_size(dimension),), what="rotated vector")
    return (_transformed(rotated.astype(np.float64)) * signs(len(rotated), text=text))[:dimension]


def signs(count: int, *, text: str) -> Floats:
    """`count` signs from AES-128-CTR under SHA-256 of `text`."""
    seed = hashlib.sha256(b"fedinfer rotation\0" + text.encode()).digest()
    cipher = Cipher(algorithms.AES128(seed[:16]), modes.CTR(seed[16:])).encryptor()
    bits = np.unpackbits(np.frombuffer(cipher.update(bytes((count + 7) // 8)), np.uint8), count=count)
    return np.where(bits, -1.0, 1.0)


def _transformed(wide: Floats) -> Floats:
    """The normalised Walsh-Hadamard transform of `wide` (a power of two,): its own inverse."""
    left, out = len(wide), wide
    while left > 1:
        width = min(WIDTH, left)
        left //= width
        matrix = _hadamard(width)
        # Products of a matrix with many columns are faster than with one.
        out = matrix @ out.reshape(-1, width, left) if left > 1 else out.reshape(-1, width) @ matrix
    return np.asarray(out.reshape(-1))


@lru_cache(maxsize=8)
def _hadamard(size: int) -> Floats:
    """Sylvester's matrix (size, size), normalised."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix /= math.sqrt(size)
    matrix.flags.writeable = False
    return matrix
