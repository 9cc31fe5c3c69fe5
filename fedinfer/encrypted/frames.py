"""Keys, queries and answers on the wire: frames of a few parts, bound to one circuit by its digest."""

from collections.abc import Sequence

from fedinfer.errors import EncryptedError, WireError
from fedinfer.wire import Frame, Kind, decode, encode

MAX_KEY_BYTES = 1 << 26
MAX_QUERY_BYTES = 1 << 26
MAX_ANSWER_BYTES = 1 << 25


def join(kind: Kind, digest: str, parts: Sequence[bytes]) -> bytes:
    """One frame of `parts` for the circuit of `digest`."""
    header = {"circuit": digest, "sizes": [len(part) for part in parts]}
    return encode(Frame(kind=kind, header=header, body=b"".join(parts)))


def split(data: bytes, kind: Kind, digest: str, *, max_bytes: int, max_parts: int) -> list[bytes]:
    """The parts of a frame.

    Raises: WireError if it is not such a frame; EncryptedError if it is for another circuit.
    """
    frame = decode(data, kind, max_bytes=max_bytes)
    if frame.header.get("circuit") != digest:
        raise EncryptedError(f"{kind.name.lower()}: made for another circuit; fetch the circuit again")
    sizes = frame.header.get("sizes")
    if (
        not isinstance(sizes, list)
        or not 1 <= len(sizes) <= max_parts
        or not all(type(size) is int and size >= 0 for size in sizes)
        or sum(sizes) != len(frame.body)
    ):
        raise WireError(f"{kind.name.lower()}: got sizes that do not fit, expected 1 to {max_parts} parts")
    parts, start = [], 0
    for size in sizes:
        parts.append(frame.body[start : start + size])
        start += size
    return parts
