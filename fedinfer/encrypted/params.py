"""CKKS parameters and the security table that both sides check for themselves.

Reference: Albrecht et al., Homomorphic Encryption Security Standard, 2018 (table 1: ternary, 128 bits, classical).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fedinfer.errors import EncryptedError

MAX_BITS_128: Mapping[int, int] = {2048: 54, 4096: 109, 8192: 218, 16384: 438, 32768: 881}


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Ring degree, bits of each prime (the last is for key switching) and bits of the scale of a query.

    Guarantees: 128-bit security by `MAX_BITS_128`, whoever wrote the numbers.
    Raises: EncryptedError otherwise.
    """

    degree: int
    prime_bits: tuple[int, ...]
    scale_bits: int

    def __post_init__(self) -> None:
        total, allowed = sum(self.prime_bits), MAX_BITS_128.get(self.degree, 0)
        if total > allowed:
            raise EncryptedError(
                f"parameters: got {total} bits at degree {self.degree}, expected at most {allowed} (128 bits)"
            )
        if len(self.prime_bits) < 2 or not all(20 <= bits <= 60 for bits in self.prime_bits):
            raise EncryptedError(f"parameters: got primes of {self.prime_bits} bits, expected two or more of 20 to 60")
        if not 20 <= self.scale_bits < self.prime_bits[0]:
            raise EncryptedError(
                f"parameters: got a scale of {self.scale_bits} bits, expected 20 to {self.prime_bits[0] - 1}"
            )

    @property
    def slots(self) -> int:
        """Numbers in one ciphertext."""
        return self.degree // 2

    @property
    def top(self) -> int:
        """The level of a fresh query: the number of products that it can go through."""
        return len(self.prime_bits) - 2


# Products on the way: weights and mask; and for the hidden layer weights, square, weights and mask.
PARAMETERS: Mapping[str, Parameters] = {
    "logistic": Parameters(degree=8192, prime_bits=(54, 40, 40, 54), scale_bits=40),
    "mlp": Parameters(degree=8192, prime_bits=(42, 33, 33, 33, 33, 42), scale_bits=33),
}
