"""Checks of what is in a message, whoever made it."""

from collections.abc import Iterable

from fedinfer.errors import ProtocolViolation
from fedinfer.secagg.codec import MAX_MEMBER

MAX_ROUND = 2**32 - 1


def check_bytes(what: str, value: bytes, size: int) -> None:
    """Raises: ProtocolViolation unless `value` has `size` bytes."""
    if len(value) != size:
        raise ProtocolViolation(f"{what}: got {len(value)} bytes, expected {size}")


def check_members(what: str, members: Iterable[int]) -> None:
    """Raises: ProtocolViolation unless each member is there once, in order."""
    before = -1
    for member in members:
        if not before < member <= MAX_MEMBER:
            raise ProtocolViolation(f"{what}: got member {member} after {before}, expected each once and in order")
        before = member


def check_round(round: int) -> None:
    """Raises: ProtocolViolation unless `round` is the number of a round."""
    if not 1 <= round <= MAX_ROUND:
        raise ProtocolViolation(f"round: got {round}, expected 1 to {MAX_ROUND}")
