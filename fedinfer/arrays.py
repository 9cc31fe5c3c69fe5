"""A model's state as one flat vector: the thing that a round moves."""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from fedinfer.errors import ShapeMismatch

Vector = NDArray[np.float32]
State = Mapping[str, torch.Tensor]


def flatten(state: State) -> Vector:
    """Lay the tensors of `state` end to end, in its order, as float32 (d,)."""
    if not state:
        return np.zeros(0, np.float32)
    parts = [tensor.detach().cpu().to(torch.float32).reshape(-1) for tensor in state.values()]
    return torch.cat(parts).numpy().astype(np.float32, copy=True)


def unflatten(vector: Vector, like: State) -> dict[str, torch.Tensor]:
    """Cut `vector` (d,) into tensors of the names, shapes and dtypes of `like`.

    Guarantees: `unflatten(flatten(s), s)` equals `s` for float32 states.
    Raises: ShapeMismatch if the sizes differ.
    """
    size = sum(tensor.numel() for tensor in like.values())
    if vector.shape != (size,):
        raise ShapeMismatch(got=vector.shape, expected=(size,), what="weights")
    parts: dict[str, torch.Tensor] = {}
    start = 0
    for name, tensor in like.items():
        end = start + tensor.numel()
        parts[name] = torch.from_numpy(vector[start:end].copy()).reshape(tensor.shape).to(tensor.dtype)
        start = end
    return parts


def digest(vector: Vector) -> str:
    """SHA-256 of the vector's little-endian float32 bytes, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(vector, dtype="<f4").tobytes()).hexdigest()
