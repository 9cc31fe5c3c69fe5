"""How large the noise of each operation is: standard deviations of a slot, in units of the ciphertext.

The clear scheme adds noise of these sizes, and the solver of `chain` adds the same up.
Reference: Cheon et al. 2017, eprint 2016/421; Costache et al. 2022, eprint 2022/162. The secret is uniform in
{-1, 0, 1}, errors have a deviation of 3.2.
"""

import math
from collections.abc import Sequence

ERROR_DEVIATION = 3.2


def fresh(degree: int) -> float:
    """Of an encryption under the secret key."""
    return ERROR_DEVIATION * math.sqrt(degree)


def rounded(degree: int) -> float:
    """Of a plaintext whose coefficients are rounded."""
    return math.sqrt(degree / 12.0)


def divided(degree: int) -> float:
    """Of a division by a prime: the rounding of the second polynomial meets the secret."""
    return degree / math.sqrt(18.0)


def switched(degree: int, prime_bits: Sequence[float], special_bits: float) -> float:
    """Of a key switch before its division by the special prime: each digit, as large as its prime, meets an error.

    In units of the ciphertext after that division. A special prime a few bits above the others makes it small.
    """
    digits = math.sqrt(sum(4.0 ** (bits - special_bits) for bits in prime_bits) / 12.0)
    return degree * ERROR_DEVIATION * digits


def answered(degree: int, outputs: int) -> float:
    """Of the mean of the slots of one of `outputs` classes, by the encryption of zero in every answer."""
    return ERROR_DEVIATION * math.sqrt(4.0 * degree / 3.0) * math.sqrt(2.0 * outputs)
