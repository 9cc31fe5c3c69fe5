"""Shamir's secret sharing of 32 bytes over the integers modulo a prime just above 2^256.

Reference: Shamir 1979, doi:10.1145/359168.359176.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache

from fedinfer.errors import BadUsage, ProtocolViolation

# The smallest prime above 2^256, so that every 32 bytes are an element of the field.
PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33
# 128 bits beyond the prime: the remainder is uniform up to 2^-128.
DRAW_BYTES = SHARE_BYTES + 16

Entropy = Callable[[int], bytes]


def split(secret: bytes, *, threshold: int, count: int, entropy: Entropy) -> list[bytes]:
    """`count` shares of `secret`, the first for x = 1, the second for x = 2, and so on.

    Guarantees: any `threshold` of them give the secret back; fewer are independent of it.
    Raises: BadUsage for another size of secret, or a threshold outside 1..count.
    """
    if len(secret) != SECRET_BYTES:
        raise BadUsage(f"secret: got {len(secret)} bytes, expected {SECRET_BYTES}")
    if not 1 <= threshold <= count:
        raise BadUsage(f"threshold: got {threshold}, expected 1 to {count} (the shares)")
    drawn = entropy(DRAW_BYTES * (threshold - 1))
    coefficients = [
        int.from_bytes(drawn[start : start + DRAW_BYTES], "big") % PRIME for start in range(0, len(drawn), DRAW_BYTES)
    ]
    constant = int.from_bytes(secret, "big")
    shares = []
    for x in range(1, count + 1):
        value = 0
        for coefficient in coefficients:
            value = (value + coefficient) * x % PRIME
        shares.append(((value + constant) % PRIME).to_bytes(SHARE_BYTES, "big"))
    return shares


def check_share(share: bytes) -> None:
    """Raises: ProtocolViolation unless `share` is an element of the field."""
    if len(share) != SHARE_BYTES or int.from_bytes(share, "big") >= PRIME:
        raise ProtocolViolation(f"share: got {len(share)} bytes that are no share, expected {SHARE_BYTES} below 2^256")


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret that `shares` (x to share) lie on, if each is genuine and there are as many as the threshold.

    Raises: ProtocolViolation for a share outside the field, or if the shares are those of no 32 bytes.

    >>> import os
    >>> shares = split(bytes(range(32)), threshold=2, count=3, entropy=os.urandom)
    >>> combine({1: shares[0], 3: shares[2]}) == bytes(range(32))
    True
    """
    for share in shares.values():
        check_share(share)
    weights = at_zero(tuple(shares))
    secret = sum(w * int.from_bytes(s, "big") for w, s in zip(weights, shares.values(), strict=True)) % PRIME
    if secret >> (8 * SECRET_BYTES):
        raise ProtocolViolation(f"shares: got {len(shares)} that fit no secret, expected genuine ones of one secret")
    return secret.to_bytes(SECRET_BYTES, "big")


def candidates(shares: Mapping[int, bytes], *, threshold: int) -> Iterator[bytes]:
    """What the secret may be if some of `shares` are bad: of each `threshold` of them in a row, the last before the
    first. Nothing if there are fewer.

    Guarantees: without bad shares the first is the secret; with one bad among more than `threshold`, one of them is.
    """
    points = sorted(shares)
    runs = len(points) if len(points) > threshold else len(points) == threshold
    for start in range(runs):
        chosen = sorted((points + points)[start : start + threshold])
        try:
            yield combine({point: shares[point] for point in chosen})
        except ProtocolViolation:
            continue


@lru_cache(maxsize=4096)
def at_zero(points: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's coefficients: the value at 0 of a polynomial is their sum with its values at `points`.

    One inversion for all of them (Montgomery's trick).

    Raises: BadUsage for points that are not distinct and in 1..PRIME - 1.
    """
    if not points or len(set(points)) != len(points) or not all(0 < x < PRIME for x in points):
        raise BadUsage(f"points: got {len(points)} that are not distinct and above 0")
    whole = 1
    for x in points:
        whole = whole * x % PRIME
    denominators = []
    for x in points:
        product = x
        for other in points:
            if other != x:
                product = product * (other - x) % PRIME
        denominators.append(product)
    prefixes = [1]
    for value in denominators:
        prefixes.append(prefixes[-1] * value % PRIME)
    inverse = pow(prefixes[-1], -1, PRIME)
    coefficients = []
    for value, prefix in zip(reversed(denominators), reversed(prefixes[:-1]), strict=True):
        coefficients.append(whole * prefix * inverse % PRIME)
        inverse = inverse * value % PRIME
    return tuple(reversed(coefficients))
