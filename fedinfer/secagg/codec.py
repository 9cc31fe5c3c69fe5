"""Dataclasses as frames: each field by its type, sizes checked before anything is made of them.

A frame's header says nothing; its body is the fields in order, big-endian: `int` as 8 bytes, `bytes` with their length
before them, `Members` as a count and 4 bytes each, `Boxes` as a count and members with bytes, and tuples of records
with their count.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, ClassVar, Protocol, TypeVar, get_args, get_origin, get_type_hints

from fedinfer.errors import ProtocolViolation, WireError
from fedinfer.wire import Frame, Kind, decode, encode

Members = tuple[int, ...]
Boxes = Mapping[int, bytes]
MAX_MEMBER = 2**32 - 1
# A frame's prefix and the empty header.
FRAME_BYTES = 32


class Record(Protocol):
    """A dataclass of the field types above."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


class Message(Record, Protocol):
    """A record that travels by itself."""

    KIND: ClassVar[Kind]


R = TypeVar("R", bound=Record)
M = TypeVar("M", bound=Message)


def to_bytes(message: Message) -> bytes:
    """The frame of `message`."""
    out: list[bytes] = []
    _write(message, out)
    return encode(Frame(kind=message.KIND, header={}, body=b"".join(out)))


def from_bytes(cls: type[M], data: bytes, *, max_bytes: int) -> M:
    """The message of the frame `data`.

    Guarantees: memory is a small multiple of `max_bytes`; what comes out gives `data` back.
    Raises: MessageTooLarge, UnsupportedVersion, or WireError for anything else that is no such message.
    """
    reader = _Reader(decode(data, cls.KIND, max_bytes=max_bytes).body)
    try:
        found = _read(cls, reader)
    except ProtocolViolation as error:
        raise WireError(f"{cls.__name__}: {error}") from None
    reader.end()
    return found


@cache
def _types(cls: type[Record]) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def _record_of(kind: Any) -> type[Record]:
    record: type[Record] = get_args(kind)[0]
    return record


def _write(record: Record, out: list[bytes]) -> None:
    for name, kind in _types(type(record)).items():
        value = getattr(record, name)
        if kind is int:
            out.append(struct.pack(">Q", value))
        elif kind is bytes:
            out += (struct.pack(">Q", len(value)), value)
        elif kind == Members:
            out.append(struct.pack(f">I{len(value)}I", len(value), *value))
        elif get_origin(kind) is get_origin(Boxes):
            out.append(struct.pack(">I", len(value)))
            for member, box in value.items():
                out += (struct.pack(">IQ", member, len(box)), box)
        else:
            out.append(struct.pack(">I", len(value)))
            for inner in value:
                _write(inner, out)


class _Reader:
    """Takes pieces off a body and never reads beyond it."""

    def __init__(self, data: bytes) -> None:
        self._data, self._position = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self._data) - self._position:
            raise WireError(f"message: got {len(self._data)} bytes, expected more; it was cut short")
        self._position += count
        return self._data[self._position - count : self._position]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def count(self, at_least_bytes: int) -> int:
        """How many items follow, each of which takes `at_least_bytes`."""
        found = self.number(4)
        if found * at_least_bytes > len(self._data) - self._position:
            raise WireError(f"message: got a count of {found}, expected what fits {len(self._data)} bytes")
        return found

    def members(self) -> Members:
        count = self.count(4)
        return struct.unpack(f">{count}I", self.take(4 * count))

    def boxes(self) -> Boxes:
        found: dict[int, bytes] = {}
        for _ in range(self.count(12)):
            member = self.number(4)
            if member in found:
                raise WireError(f"message: got member {member} twice, expected each once")
            found[member] = self.take(self.number(8))
        return found

    def end(self) -> None:
        if self._position != len(self._data):
            raise WireError(f"message: got {len(self._data) - self._position} bytes too many at its end")


def _read(cls: type[R], reader: _Reader) -> R:
    values: dict[str, Any] = {}
    for name, kind in _types(cls).items():
        if kind is int:
            values[name] = reader.number(8)
        elif kind is bytes:
            values[name] = reader.take(reader.number(8))
        elif kind == Members:
            values[name] = reader.members()
        elif get_origin(kind) is get_origin(Boxes):
            values[name] = reader.boxes()
        else:
            record = _record_of(kind)
            values[name] = tuple(_read(record, reader) for _ in range(reader.count(8)))
    make: Callable[..., R] = cls
    return make(**values)
