"""CKKS parameters, their primes, and the security table that both sides check for themselves.

Reference: Albrecht et al., Homomorphic Encryption Security Standard, 2018 (table 1: ternary, 128 bits, classical).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from fedinfer.errors import EncryptedError

MAX_BITS_128: Mapping[int, int] = {2048: 54, 4096: 109, 8192: 218, 16384: 438, 32768: 881}
MIN_PRIME_BITS = 20
MAX_PRIME_BITS = 48
_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


def is_prime(number: int) -> bool:
    """Miller and Rabin's test with bases that leave no error below 2^64."""
    if number < 2 or any(number % base == 0 for base in _WITNESSES):
        return number in _WITNESSES
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in _WITNESSES:
        x = pow(base, odd, number)
        if x not in (1, number - 1) and all((x := x * x % number) != number - 1 for _ in range(twos - 1)):
            return False
    return True


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Ring degree, bits of each prime and the scale of a query.

    `prime_bits` lists the data primes from the one that lasts longest, then, if `special`, that of key switching.
    A level is a number of data primes: a fresh query has all, an answer one.

    Guarantees: 128-bit security by `MAX_BITS_128`, whoever wrote the numbers.
    Raises: EncryptedError otherwise.
    """

    degree: int
    prime_bits: tuple[int, ...]
    special: bool
    scale_bits: float

    def __post_init__(self) -> None:
        total, allowed = sum(self.prime_bits), MAX_BITS_128.get(self.degree, 0)
        if total > allowed:
            raise EncryptedError(
                f"parameters: got {total} bits at degree {self.degree}, expected at most {allowed} (128 bits)"
            )
        if self.levels < 1 or not all(MIN_PRIME_BITS <= bits <= MAX_PRIME_BITS for bits in self.prime_bits):
            raise EncryptedError(
                f"parameters: got primes of {self.prime_bits} bits, "
                f"expected some of {MIN_PRIME_BITS} to {MAX_PRIME_BITS}"
            )
        if len(self.prime_bits) > 1 and not self.special:
            raise EncryptedError(f"parameters: got {len(self.prime_bits)} primes without one for key switching")
        if not 10 <= self.scale_bits <= sum(self.prime_bits[: self.levels]) - 2:
            raise EncryptedError(f"parameters: got a scale of {self.scale_bits} bits, expected 10 or more that fit")

    @property
    def slots(self) -> int:
        """Numbers in one ciphertext."""
        return self.degree // 2

    @property
    def levels(self) -> int:
        """Data primes."""
        return len(self.prime_bits) - self.special

    @property
    def scale(self) -> float:
        """What the numbers of a query are multiplied by."""
        return float(2.0**self.scale_bits)

    @cached_property
    def primes(self) -> tuple[int, ...]:
        """The largest primes of these sizes that are 1 modulo 2N, the first of a size the largest.

        Raises: EncryptedError if there are not as many.
        """
        step, found = 2 * self.degree, list[int]()
        below: dict[int, int] = {}
        for bits in self.prime_bits:
            candidate = below.get(bits, ((1 << bits) // step) * step + 1 + step)
            while True:
                candidate -= step
                if candidate < 1 << (bits - 1):
                    raise EncryptedError(f"parameters: got too many primes of {bits} bits for degree {self.degree}")
                if is_prime(candidate):
                    break
            below[bits] = candidate
            found.append(candidate)
        return tuple(found)
