"""Keys, queries and answers on the wire: frames of a few parts, bound to one circuit by its digest."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedinfer.encrypted.kernels import from_octets
from fedinfer.errors import EncryptedError, WireError
from fedinfer.wire import Frame, Kind, decode, encode

MAX_ANSWER_BYTES = 1 << 25


def join(kind: Kind, digest: str, parts: Sequence[bytes], *, rows: int = 1) -> bytes:
    """One frame of `parts` for the circuit of `digest`; a query and its answer say of how many rows they are."""
    body, sizes = b"".join(parts), [len(part) for part in parts]
    header = {"circuit": digest, "rows": rows, "sizes": sizes, "sha256": _checksum(digest, rows, sizes, body)}
    return encode(Frame(kind=kind, header=header, body=body))


def _checksum(digest: str, rows: int, sizes: Sequence[int], body: bytes) -> str:
    """Against damage on the way, not against an enemy, who can compute it too."""
    found = hashlib.sha256(f"{digest} {rows} {sizes}".encode())
    found.update(body)
    return found.hexdigest()


def split(data: bytes, kind: Kind, digest: str, *, max_bytes: int, max_parts: int) -> list[bytes]:
    """The parts of a frame.

    Raises: WireError if it is not such a frame; EncryptedError if it is for another circuit.
    """
    return split_rows(data, kind, digest, max_bytes=max_bytes, max_parts=max_parts)[0]


def split_rows(data: bytes, kind: Kind, digest: str, *, max_bytes: int, max_parts: int) -> tuple[list[bytes], int]:
    """The parts of a frame, and of how many rows they are; raises as `split`."""
    frame = decode(data, kind, max_bytes=max_bytes)
    if frame.header.get("circuit") != digest:
        raise EncryptedError(f"{kind.name.lower()}: made for another circuit; fetch the circuit again")
    sizes, rows = frame.header.get("sizes"), frame.header.get("rows")
    if (
        not isinstance(sizes, list)
        or not 1 <= len(sizes) <= max_parts
        or not all(type(size) is int and size >= 0 for size in sizes)
        or sum(sizes) != len(frame.body)
        or type(rows) is not int
        or rows < 1
    ):
        raise WireError(f"{kind.name.lower()}: got sizes that do not fit, expected 1 to {max_parts} parts")
    if frame.header.get("sha256") != _checksum(digest, rows, sizes, frame.body):
        raise WireError(f"{kind.name.lower()}: got bytes that changed on the way, expected another checksum")
    parts, start = [], 0
    for size in sizes:
        parts.append(frame.body[start : start + size])
        start += size
    return parts, rows


def pack(residues: NDArray[Any], primes: Sequence[int]) -> bytes:
    """Residues (..., len(primes), N) in as few whole bytes each as their prime needs."""
    rows = residues.reshape(-1, len(primes), residues.shape[-1])
    out = []
    for poly in rows:
        for row, prime in zip(poly, primes, strict=True):
            octets = np.ascontiguousarray(row, "<u8").view(np.uint8).reshape(-1, 8)
            out.append(octets[:, : width(prime)].tobytes())
    return b"".join(out)


def unpack(data: bytes, primes: Sequence[int], size: int, *, polynomials: int, what: str) -> NDArray[np.uint64]:
    """The residues (polynomials, len(primes), size) of `pack`.

    Raises: WireError unless there are as many bytes as that takes, and every residue is below its prime.
    """
    expected = packed_bytes(primes, size) * polynomials
    if len(data) != expected:
        raise WireError(f"{what}: got {len(data)} bytes, expected {expected}")
    out = np.empty((polynomials, len(primes), size), np.uint64)
    octets, start = np.frombuffer(data, np.uint8), 0
    for poly in range(polynomials):
        for index, prime in enumerate(primes):
            end = start + width(prime) * size
            if not from_octets(octets[start:end], width(prime), np.uint64(prime), out[poly, index]):
                raise WireError(f"{what}: got a residue that is not below its prime")
            start = end
    return out


def width(prime: int) -> int:
    """Bytes of a residue."""
    return (prime.bit_length() + 7) // 8


def packed_bytes(primes: Sequence[int], size: int) -> int:
    """Bytes of one polynomial of `size` residues modulo each prime."""
    return size * sum(width(prime) for prime in primes)
