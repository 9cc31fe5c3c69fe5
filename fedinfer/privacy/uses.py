"""What is known of the examples' gradients by one parameter after a forward and a backward pass, and what follows.

`products.py` has linear layers and convolutions, `lookups.py` embeddings. Whatever the layer, gradients may be laid
out, one tensor an example, and where that is small it is the simplest.
"""

from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Doubles = NDArray[np.float64]
# How far the sizes of an example's terms, added up, may exceed both the clip and the size of their sum. Rounding is
# 2**-24 of a term, so this keeps it within what `MARGIN` leaves.
CANCELLED = 64.0
# Numbers laid out at a time: they stay in a core's cache.
CHUNK = 1 << 18
# Squares that torch adds up in the tensor's own dtype: in float32 a norm of so many is off by 1e-6 of it, of a million
# by 6e-4.
PART = 1 << 10


class Clippable(Protocol):
    """The examples' gradients by one parameter, their norms known."""

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """The sum of them times `factors` (B,), in the parameter's shape."""
        ...

    def rows(self, index: Tensor) -> "Clippable":
        """The same of these examples alone."""
        ...


class Use(Protocol):
    """The examples' gradients by one parameter, as a layer's inputs and the gradients at its outputs give them."""

    def measured(self, clip_norm: float) -> tuple[Doubles, Clippable]:
        """Their squared norms (B,), and what their clipped sum is made of."""
        ...

    def per_example(self) -> Tensor:
        """The gradients themselves (B, *shape)."""
        ...


def squares(rows: Tensor) -> Doubles:
    """The squared norms (B,) of the rows of a tensor (B, ...)."""
    flat = rows if rows.dim() == 2 else rows.reshape(len(rows), -1)
    if flat.shape[1] <= PART:
        norms: Doubles = torch.linalg.vector_norm(flat, dim=1).cpu().numpy()
        return norms * norms
    parts = flat.shape[1] // PART
    laid = flat[:, : parts * PART].reshape(len(flat), parts, PART)
    norms = torch.linalg.vector_norm(laid, dim=2).cpu().numpy().astype(np.float64)
    squared: Doubles = (norms * norms).sum(1)
    return squared + squares(flat[:, parts * PART :])


class Laid:
    """Gradients laid out, (B, *shape)."""

    def __init__(self, laid: Tensor) -> None:
        self.laid = laid

    @cached_property
    def squares(self) -> Doubles:
        """The squared norms (B,)."""
        return squares(self.laid)

    def measured(self, clip_norm: float) -> tuple[Doubles, Clippable]:
        return self.squares, self

    def weighted_sum(self, factors: Tensor) -> Tensor:
        if self.laid.dim() == 2:
            return factors @ self.laid
        return (factors @ self.laid.reshape(len(factors), -1)).view(self.laid.shape[1:])

    def per_example(self) -> Tensor:
        return self.laid

    def rows(self, index: Tensor) -> "Laid":
        return Laid(self.laid[index])
