"""The arrays of somebody's own app as one vector, and a message of its training as something to be summed.

What moves is every array of floats; others, such as counters, stay what the server sent.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
from numpy.typing import NDArray

from fedinfer.errors import ShapeMismatch, WireError
from fedinfer.sums.messages import SUM

Floats = NDArray[np.float64]
Arrays = Mapping[str, NDArray[Any]]


def arrays_of(record: ArrayRecord) -> Arrays:
    """The arrays of a record by name."""
    return {name: array.numpy() for name, array in record.items()}


def floats_in(arrays: Arrays) -> Floats:
    """All floats (d,) of `arrays` in their order.

    Raises: WireError if there are none.
    """
    parts = [array.reshape(-1).astype(np.float64) for array in arrays.values() if _moves(array)]
    if not parts:
        raise WireError("arrays: got no floats, expected weights")
    return np.concatenate(parts)


def update_of(before: Arrays, after: Arrays) -> Floats:
    """How far training moved the floats (d,).

    Raises: ShapeMismatch if `after` has other names or shapes; WireError if there are no floats, or other arrays are.
    """
    for name, array in before.items():
        other = after.get(name)
        if other is None or other.shape != array.shape or len(after) != len(before):
            got = None if other is None else other.shape
            raise ShapeMismatch(got=got, expected=array.shape, what=f"array {name!r} after training")
        if _moves(other) != _moves(array):
            raise WireError(f"array {name!r} after training: got {other.dtype}, expected {array.dtype} as before")
    return floats_in({name: after[name] for name in before}) - floats_in(before)


def with_floats(arrays: Arrays, floats: NDArray[np.floating[Any]]) -> ArrayRecord:
    """`arrays` with other floats (d,) in the same places, in their own types."""
    found, start = {}, 0
    for name, array in arrays.items():
        if _moves(array):
            piece = floats[start : start + array.size]
            found[name] = Array(np.asarray(piece.reshape(array.shape), array.dtype))
            start += array.size
        else:
            found[name] = Array(array)
    return ArrayRecord(found)


def content_digest(content: RecordDict) -> bytes:
    """SHA-256 of all that a message says but for its `SUM`: devices that were told other things do not add up.

    Guarantees: it is another for other names, types, values or arrays, and for another order of them.
    Raises: WireError for a value that cannot be written down.
    """
    digest = hashlib.sha256()
    for name, record in content.items():
        if name == SUM:
            continue
        arrays = list(record.values()) if isinstance(record, ArrayRecord) else []
        heads = [(array.dtype, array.shape, array.stype, len(array.data)) for array in arrays]
        values = heads if isinstance(record, ArrayRecord) else list(record.values())
        text = json.dumps([name, type(record).__name__, list(record), values], default=_written)
        digest.update(text.encode() + b"\0")
        for array in arrays:
            digest.update(array.data)
    return digest.digest()


def _written(value: object) -> Mapping[str, str]:
    """Bytes as what no record can hold, so that they are no text of the same digits."""
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    raise WireError(f"message: got a {type(value).__name__}, expected numbers, text or bytes")


def _moves(array: NDArray[Any]) -> bool:
    return bool(np.issubdtype(array.dtype, np.floating))
