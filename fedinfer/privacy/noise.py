"""Randomness for privacy: an AES-256-CTR stream keyed by the operating system, and the numbers made from it.

What leaves a device gets integers from `fedinfer/privacy/discrete.py`. `gaussian_float` is for noise that is added in
floating point: an adversary who sees such a release bit by bit learns from the gaps between floats (Mironov 2012,
doi:10.1145/2382196.2382264; tests/attacks/test_float_noise.py does it).
"""

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedinfer.errors import PrivacyError
from fedinfer.privacy.discrete import discrete_gaussian

Floats = NDArray[np.float64]

# `gaussian_float` is a multiple of sigma / 2^40.
FLOAT_BITS = 40
ZEROS = memoryview(bytes(2**18))

_forks = 0


def _forked() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_forked)


def _process() -> tuple[int, int]:
    """Differs after a fork: the number of forks for those by Python, the process id for those it does not see."""
    return _forks, os.getpid()


class NoiseStream:
    """Pseudo-random bytes under a secret key; `void` says that the key is known, so that ε means nothing.

    Guarantees: no byte is handed out twice, by several threads or after a fork of the process either: the child's
    copy raises, because the difference of two releases with the same noise would show the rows.
    """

    def __init__(self, key: bytes, *, void: bool) -> None:
        algorithm = algorithms.AES256(key)
        self._cipher = Cipher(algorithm, modes.CTR(bytes(16))).encryptor()
        self._blocks = Cipher(algorithm, modes.ECB()).encryptor()
        self._unread = b""
        self._position = 0
        self._lock = threading.RLock()
        self._process = _process()
        self.void = void

    def __repr__(self) -> str:
        return f"NoiseStream(void={self.void})"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a noise stream holds a key and is not copied")

    @property
    def position(self) -> int:
        """How many bytes were taken and not put back."""
        return self._position

    def take(self, size_bytes: int) -> bytes:
        """The next `size_bytes` bytes of the stream.

        Raises: PrivacyError in a process that was forked from the stream's own.
        """
        with self.alone():
            unread, self._unread = self._unread[:size_bytes], self._unread[size_bytes:]
            self._position += size_bytes
            missing = size_bytes - len(unread)
            fresh = self._cipher.update(ZEROS[:missing] if missing <= len(ZEROS) else bytes(missing))
            return unread + fresh if unread else fresh

    def put_back(self, unread: bytes) -> None:
        """Return the last bytes taken, which nobody used: they come next."""
        with self.alone():
            self._unread = unread + self._unread
            self._position -= len(unread)

    def extra(self, place: int, size_bytes: int) -> bytes:
        """Further bytes that belong to the byte at `place`: the same at each call, and no part of `take`.

        They are the blocks of the cipher from 2^127 + place · 2^32 on, where `take` does not come.
        """
        with self.alone():
            start = 2**127 + (place << 32)
            counters = b"".join((start + i).to_bytes(16, "big") for i in range(-(-size_bytes // 16)))
            return self._blocks.update(counters)[:size_bytes]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other thread takes bytes meanwhile.

        Raises: PrivacyError in a process that was forked from the stream's own.
        """
        if _process() != self._process:
            raise PrivacyError("noise stream: got a forked process, expected its maker; make a new stream there")
        with self._lock:
            yield

    def uniform(self, count: int) -> Floats:
        """`count` numbers uniform on the middles of 2**52 cells of (0, 1).

        Guarantees: never 0 and never 1.
        """
        words = np.frombuffer(self.take(8 * count), "<u8") >> np.uint64(12)
        # 53 bits and a half would be rounded: the largest to 1.
        return (words.astype(np.float64) + 0.5) * 2.0**-52

    def gaussian_float(self, sigma: float, count: int) -> Floats:
        """`count` independent normal numbers of standard deviation `sigma`, in floating point.

        They are discrete Gaussian integers of standard deviation 2^40, scaled: normal up to 2^-40 sigma in the whole
        range, the tails included.
        """
        integers = discrete_gaussian(self, variance=2 ** (2 * FLOAT_BITS), count=count)
        return integers.astype(np.float64) * (sigma * 2.0**-FLOAT_BITS)


def os_noise() -> NoiseStream:
    """A stream with a fresh key from the operating system."""
    return NoiseStream(os.urandom(32), void=False)


def insecure_seeded_noise(seed: str) -> NoiseStream:
    """A stream that anyone who knows `seed` can repeat: for tests that compare runs exactly. ε is void."""
    return NoiseStream(hashlib.sha256(b"fedinfer insecure seeded noise\0" + seed.encode()).digest(), void=True)
