"""Randomness for privacy: an AES-256-CTR stream keyed by the operating system, and Gaussian noise made from it.

`gaussian_float` draws in floating point. An adversary who sees a release bit by bit can learn something from the
gaps between floats (Mironov 2012, doi:10.1145/2382196.2382264); SECURITY.md says so.
"""

import hashlib
import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from scipy.special import ndtri

Floats = NDArray[np.float64]


class NoiseStream:
    """Pseudo-random bytes under a secret key; `void` says that the key is known, so that ε means nothing."""

    def __init__(self, key: bytes, *, void: bool) -> None:
        self._cipher = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
        self.void = void

    def __repr__(self) -> str:
        return f"NoiseStream(void={self.void})"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a noise stream holds a key and is not copied")

    def take(self, size_bytes: int) -> bytes:
        """The next `size_bytes` bytes of the stream."""
        return self._cipher.update(bytes(size_bytes))

    def uniform(self, count: int) -> Floats:
        """`count` numbers uniform on the middles of 2**52 cells of (0, 1).

        Guarantees: never 0 and never 1, at which noise would be infinite.
        """
        words = np.frombuffer(self.take(8 * count), "<u8") >> np.uint64(12)
        # 53 bits and a half would be rounded: the largest to 1.
        return (words.astype(np.float64) + 0.5) * 2.0**-52

    def gaussian_float(self, sigma: float, count: int) -> Floats:
        """`count` independent normal numbers of standard deviation `sigma`, by inversion, in floating point."""
        return sigma * np.asarray(ndtri(self.uniform(count)), np.float64)


def os_noise() -> NoiseStream:
    """A stream with a fresh key from the operating system."""
    return NoiseStream(os.urandom(32), void=False)


def insecure_seeded_noise(seed: str) -> NoiseStream:
    """A stream that anyone who knows `seed` can repeat: for tests that compare runs exactly. ε is void."""
    return NoiseStream(hashlib.sha256(b"fedinfer insecure seeded noise\0" + seed.encode()).digest(), void=True)
