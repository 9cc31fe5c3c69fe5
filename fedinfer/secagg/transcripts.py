"""One way to hash and sign what was said: a label and parts, each with its length before it."""

import hashlib
import struct
from collections.abc import Sequence

DIGEST_BYTES = 32
PREFIX = b"fedinfer secure sum 1\0"


def transcript(label: str, *parts: bytes | int) -> bytes:
    """SHA-256 of `label` and `parts`; numbers count as 8 bytes.

    Guarantees: different labels or parts are different inputs of the hash: a label or length is never ambiguous.

    >>> transcript("a", b"bc", b"") == transcript("a", b"b", b"c")
    False
    """
    found = hashlib.sha256(PREFIX)
    for part in (label.encode(), *parts):
        data = struct.pack(">Q", part) if isinstance(part, int) else part
        found.update(struct.pack(">BQ", isinstance(part, int), len(data)))
        found.update(data)
    return found.digest()


def members_bytes(members: Sequence[int]) -> bytes:
    """A list of members as a part of a transcript."""
    return struct.pack(f">{len(members)}I", *members)
