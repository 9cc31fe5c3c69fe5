"""Framed binary messages: magic, version, kind, size limits; no pickle anywhere.

A frame is ``b"FEDI" | version u8 | kind u8 | header bytes u32 | body bytes u64 | header (JSON) | body``,
all integers big-endian. The size is checked before anything is parsed.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from fedinfer.errors import MessageTooLarge, UnsupportedVersion, WireError

MAGIC = b"FEDI"
VERSION = 1
PREFIX = struct.Struct(">4sBBIQ")
MAX_HEADER_BYTES = 1 << 20


class Kind(IntEnum):
    """What a frame carries. A number is never used again for something else."""

    CIRCUIT = 1
    EVALUATION_KEYS = 2
    QUERY = 3
    ANSWER = 4
    ERROR = 5
    KEY_STORE = 6
    SUM_COMMIT = 16
    SUM_ROSTER = 17
    SUM_OPENING = 18
    SUM_OPENINGS = 19
    SUM_OFFER = 20
    SUM_INBOX = 21
    SUM_MASKED = 22
    SUM_SURVIVORS = 23
    SUM_ENDORSEMENT = 24
    SUM_QUORUM = 25
    SUM_REVEAL = 26
    SUM_HELD = 27


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One message: `header` is public JSON, `body` is opaque bytes."""

    kind: Kind
    header: Mapping[str, Any]
    body: bytes = b""


def encode(frame: Frame) -> bytes:
    """Write `frame` as bytes.

    Raises: MessageTooLarge if the header is over `MAX_HEADER_BYTES`.

    >>> decode(encode(Frame(kind=Kind.QUERY, header={"n": 1}, body=b"x")), Kind.QUERY, max_bytes=100).body
    b'x'
    """
    header = json.dumps(dict(frame.header), sort_keys=True, separators=(",", ":")).encode()
    if len(header) > MAX_HEADER_BYTES:
        raise MessageTooLarge(f"header: got {len(header)} bytes, expected at most {MAX_HEADER_BYTES}")
    return PREFIX.pack(MAGIC, VERSION, frame.kind, len(header), len(frame.body)) + header + frame.body


def decode(data: bytes, kind: Kind, *, max_bytes: int) -> Frame:
    """Read one frame of `kind` that fills `data` exactly.

    Raises: MessageTooLarge, UnsupportedVersion, or WireError for anything else that is not such a frame.
    """
    if len(data) > max_bytes:
        raise MessageTooLarge(f"{kind.name.lower()} message: got {len(data)} bytes, expected at most {max_bytes}")
    if len(data) < PREFIX.size:
        raise WireError(f"message: got {len(data)} bytes, expected at least {PREFIX.size}")
    magic, version, number, header_bytes, body_bytes = PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise WireError(f"message: got first bytes {magic!r}, expected {MAGIC!r}")
    if version != VERSION:
        raise UnsupportedVersion(f"message: got version {version}, expected {VERSION}; update the older side")
    if number != kind:
        raise WireError(f"message: got kind {number}, expected {kind.value} ({kind.name.lower()})")
    if header_bytes > MAX_HEADER_BYTES or PREFIX.size + header_bytes + body_bytes != len(data):
        raise WireError(f"message: got {len(data)} bytes, expected {PREFIX.size + header_bytes + body_bytes}")
    try:
        header = json.loads(data[PREFIX.size : PREFIX.size + header_bytes])
    except (ValueError, RecursionError):
        raise WireError("message: the header is not JSON") from None
    if not isinstance(header, dict):
        raise WireError("message: the header is not a JSON object")
    return Frame(kind=kind, header=header, body=data[PREFIX.size + header_bytes :])
