"""Blake2Xb, the generator behind SEAL's seeds: half of a fresh ciphertext or key is 64 bytes that say how to draw it.

Reference: Aumasson et al., BLAKE2X (2016); RFC 7693. SEAL draws 4,096 bytes a counter, keyed by the seed.
"""

import struct

import numpy as np
from numba import njit
from numpy.typing import NDArray

from fedinfer.errors import WireError

BLOCK = 4096
# Nodes of a block, which are hashed side by side in the lanes of vector registers.
NODES = 64
SEED_BYTES = 64
_IV = np.array(
    [
        0x6A09E667F3BCC908,
        0xBB67AE8584CAA73B,
        0x3C6EF372FE94F82B,
        0xA54FF53A5F1D36F1,
        0x510E527FADE682D1,
        0x9B05688C2B3E6C1F,
        0x1F83D9ABFB41BD6B,
        0x5BE0CD19137E2179,
    ],
    np.uint64,
)
_SIGMA = np.array(
    [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
        [14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3],
        [11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4],
        [7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8],
        [9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13],
        [2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9],
        [12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11],
        [13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10],
        [6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5],
        [10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0],
    ]
    * 2,
    np.int64,
)[:12]


@njit(cache=True, inline="always")
def _mix(v, m, a, b, c, d, x, y):  # type: ignore[no-untyped-def]
    for k in range(v.shape[1]):
        t = v[a, k] + v[b, k] + m[x]
        w = v[d, k] ^ t
        w = (w >> np.uint64(32)) | (w << np.uint64(32))
        z = v[c, k] + w
        u = v[b, k] ^ z
        u = (u >> np.uint64(24)) | (u << np.uint64(40))
        t = t + u + m[y]
        w = w ^ t
        w = (w >> np.uint64(16)) | (w << np.uint64(48))
        z = z + w
        u = u ^ z
        v[a, k], v[b, k], v[c, k], v[d, k] = t, (u >> np.uint64(63)) | (u << np.uint64(1)), z, w


@njit(cache=True, nogil=True)
def _compress(h, m, count, last, iv, sigma, v):  # type: ignore[no-untyped-def]
    """One block for states `h` (8, k) that hash the same message `m` (16,)."""
    for i in range(8):
        for k in range(h.shape[1]):
            v[i, k], v[i + 8, k] = h[i, k], iv[i]
    for k in range(h.shape[1]):
        v[12, k] ^= np.uint64(count)
        if last:
            v[14, k] = ~v[14, k]
    for r in range(12):
        s = sigma[r]
        _mix(v, m, 0, 4, 8, 12, s[0], s[1])
        _mix(v, m, 1, 5, 9, 13, s[2], s[3])
        _mix(v, m, 2, 6, 10, 14, s[4], s[5])
        _mix(v, m, 3, 7, 11, 15, s[6], s[7])
        _mix(v, m, 0, 5, 10, 15, s[8], s[9])
        _mix(v, m, 1, 6, 11, 12, s[10], s[11])
        _mix(v, m, 2, 7, 8, 13, s[12], s[13])
        _mix(v, m, 3, 4, 9, 14, s[14], s[15])
    for i in range(8):
        for k in range(h.shape[1]):
            h[i, k] ^= v[i, k] ^ v[i + 8, k]


@njit(cache=True, nogil=True)
def _stream(seed, first, out, iv, sigma, root_word, root_length, node_words):  # type: ignore[no-untyped-def]
    """Fill `out` (blocks, 512) with the blocks of counters first, first + 1, ..."""
    root, spare = np.empty((8, 1), np.uint64), np.empty((16, 1), np.uint64)
    h, m, v = np.empty((8, NODES), np.uint64), np.zeros(16, np.uint64), np.empty((16, NODES), np.uint64)
    for block in range(out.shape[0]):
        root[:, 0] = iv
        root[0, 0] ^= root_word
        root[1, 0] ^= root_length
        m[:8], m[8:] = seed, 0
        _compress(root, m, 128, False, iv, sigma, spare)
        m[:] = 0
        m[0] = np.uint64(first + block)
        _compress(root, m, 136, True, iv, sigma, spare)
        m[:8], m[8:] = root[:, 0], 0
        for i in range(8):
            h[i] = iv[i]
        for k in range(NODES):
            h[0, k] ^= node_words[0]
            h[1, k] ^= root_length ^ np.uint64(k)
            h[2, k] ^= node_words[1]
        _compress(h, m, 64, True, iv, sigma, v)
        for k in range(NODES):
            for i in range(8):
                out[block, 8 * k + i] = h[i, k]


def _words(data: bytes) -> list[np.uint64]:
    return [np.uint64(word) for word in struct.unpack("<2Q" if len(data) == 16 else "<Q", data)]


# Parameter blocks: of the root (64 bytes out, 64-byte key, fanout 1, depth 1) and of a node (no key, leaves of 64).
(_ROOT,) = _words(bytes([64, 64, 1, 1, 0, 0, 0, 0]))
_LENGTH = np.uint64(BLOCK << 32)
_NODE = np.array([*_words(bytes([64, 0, 0, 0]) + struct.pack("<I", 64)), np.uint64(64 << 8)], np.uint64)


class Stream:
    """Random words from a seed of 64 bytes, as SEAL draws them.

    Raises: WireError for a seed of another size.
    """

    def __init__(self, seed: bytes) -> None:
        if len(seed) != SEED_BYTES:
            raise WireError(f"seed: got {len(seed)} bytes, expected {SEED_BYTES}")
        self._seed = np.frombuffer(seed, "<u8").astype(np.uint64)
        self._next = 0
        self._left = np.zeros(0, np.uint64)

    def words(self, count: int) -> NDArray[np.uint64]:
        """The next `count` words of 64 bits."""
        missing = count - len(self._left)
        if missing > 0:
            blocks = np.empty((-(-missing * 8 // BLOCK), BLOCK // 8), np.uint64)
            _stream(self._seed, self._next, blocks, _IV, _SIGMA, _ROOT, _LENGTH, _NODE)
            self._next += len(blocks)
            self._left = np.concatenate([self._left, blocks.reshape(-1)])
        drawn, self._left = self._left[:count], self._left[count:]
        return drawn


def uniform_residues(seed: bytes, primes: tuple[int, ...], size: int) -> NDArray[np.uint64]:
    """The polynomial (primes, size) of uniform residues that `seed` stands for.

    Reference: SEAL 4, `sample_poly_uniform`: all words first, then a fresh one for each that would bias.
    """
    stream = Stream(seed)
    words = stream.words(len(primes) * size).reshape(len(primes), size).copy()
    largest = (1 << 64) - 1
    for row, prime in zip(words, primes, strict=True):
        bound = np.uint64(largest - largest % prime - 1)
        for index in np.nonzero(row >= bound)[0]:
            while row[index] >= bound:
                row[index] = stream.words(1)[0]
        row %= np.uint64(prime)
    return words
