"""Masks: AES-128-CTR words added modulo 2^bits, in pieces, so that memory stays that of the vector.

A mask is the cipher's stream under 32 bytes of HKDF-SHA256: a key of 16 bytes and a first counter of 16. The counter is
secret too, so that one search of the key space does not serve against many masks at once.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedinfer.errors import BadUsage, ProtocolViolation, ShapeMismatch
from fedinfer.secagg.transcripts import transcript

Words = NDArray[np.unsignedinteger[Any]]

SEED_BYTES = 32
PIECE_BYTES = 1 << 18
ZEROS = memoryview(bytes(PIECE_BYTES))
MAX_LENGTH = 1 << 28


@dataclass(frozen=True, kw_only=True)
class SumSpec:
    """What is summed: vectors of `length` integers from 0 to `bound`, modulo 2^bits.

    Without a bound they are residues: whoever makes them sees to it that what they stand for fits (a noised vector
    has no bound that always holds: `fedinfer.privacy.distributed` makes it hold but for 2^-40).

    Guarantees: with a bound, the sum of as many vectors as `check_clients` accepts is exact: nothing wraps.
    """

    length: int
    bits: int
    bound: int | None = None

    def __post_init__(self) -> None:
        bounds = [("length", self.length, MAX_LENGTH), ("bits", self.bits, 64)]
        if self.bound is not None:
            largest = 2**self.bits - 1 if type(self.bits) is int and 1 <= self.bits <= 64 else 1
            bounds.append(("bound", self.bound, largest))
        for name, value, high in bounds:
            if type(value) is not int or not 1 <= value <= high:
                raise BadUsage(f"{name}: got {value}, expected a whole number from 1 to {high}")

    @property
    def word(self) -> np.dtype[np.unsignedinteger[Any]]:
        """The type of a coordinate in memory."""
        return np.dtype("<u4") if self.bits <= 32 else np.dtype("<u8")

    @property
    def width(self) -> int:
        """Bytes of a coordinate on the wire."""
        return (self.bits + 7) // 8

    def check_clients(self, clients: int) -> None:
        """Raises: BadUsage if the sum of `clients` vectors could pass the modulus by their bound."""
        if self.bound is not None and clients * self.bound >= 2**self.bits:
            raise BadUsage(
                f"modulus: got 2^{self.bits} for {clients} clients with values up to {self.bound}, expected more; "
                f"take {(clients * self.bound).bit_length()} bits"
            )

    def check_vector(self, vector: Words) -> None:
        """Raises: ShapeMismatch or BadUsage unless `vector` is one of these, every value in its range."""
        if vector.shape != (self.length,):
            raise ShapeMismatch(got=vector.shape, expected=(self.length,), what="vector")
        if vector.dtype != self.word:
            raise BadUsage(f"vector: got {vector.dtype}, expected {self.word} for {self.bits} bits")
        most = 2**self.bits - 1 if self.bound is None else self.bound
        if int(vector.max()) > most:
            raise BadUsage(f"vector: got a value above {most}, expected 0 to {most}; clip before the sum")

    def digest(self) -> bytes:
        """What a round's context holds of this."""
        return transcript("sum", self.length, self.bits, 0 if self.bound is None else self.bound)

    def reduce(self, words: Words) -> None:
        """Bring `words` to 0..2^bits - 1, in place."""
        if self.bits < 8 * self.word.itemsize:
            np.bitwise_and(words, words.dtype.type(2**self.bits - 1), out=words)

    def pack(self, words: Words) -> bytes:
        """Reduced words as `width` bytes each."""
        if self.width == self.word.itemsize:
            return words.astype(self.word, copy=False).tobytes()
        octets = words.astype(self.word, copy=False).view(np.uint8).reshape(self.length, self.word.itemsize)
        return octets[:, : self.width].tobytes()

    def unpack(self, data: bytes) -> Words:
        """The words of `pack`; those above the modulus come out reduced.

        Raises: ProtocolViolation for another number of bytes.
        """
        if len(data) != self.length * self.width:
            raise ProtocolViolation(f"masked vector: got {len(data)} bytes, expected {self.length * self.width}")
        if self.width == self.word.itemsize:
            words = np.frombuffer(data, self.word)
        else:
            octets = np.zeros((self.length, self.word.itemsize), np.uint8)
            octets[:, : self.width] = np.frombuffer(data, np.uint8).reshape(self.length, self.width)
            words = octets.reshape(-1).view(self.word)
        if self.bits % 8:
            words = words & words.dtype.type(2**self.bits - 1)
        return words


def add_mask(words: Words, seed: bytes, *, sign: int) -> None:
    """Add (`sign` 1) or take away (-1) the mask of `seed`, in place, modulo the word.

    Guarantees: `add_mask(w, s, sign=1)` and then `sign=-1` leave `w` as it was.
    Raises: BadUsage for a seed that is not 32 bytes or another sign.
    """
    if len(seed) != SEED_BYTES or sign not in (1, -1):
        raise BadUsage(f"mask: got a seed of {len(seed)} bytes and sign {sign}, expected {SEED_BYTES} and 1 or -1")
    cipher = Cipher(algorithms.AES128(seed[:16]), modes.CTR(seed[16:])).encryptor()
    size = words.dtype.itemsize
    buffer = bytearray(min(PIECE_BYTES, words.nbytes) + 15)
    change = np.add if sign == 1 else np.subtract
    for start in range(0, len(words), PIECE_BYTES // size):
        piece = words[start : start + PIECE_BYTES // size]
        cipher.update_into(ZEROS[: piece.nbytes], buffer)
        change(piece, np.frombuffer(buffer, words.dtype, count=len(piece)), out=piece)
