"""Sums of clipped per-example gradients, at about the cost of one ordinary gradient.

One forward and one backward pass (`passes.py`) give what went into each layer and the gradients at its outputs. The
norms of the examples' gradients follow from these, and the clipped sums are products weighted by the clip factors
(`uses.py`, `products.py`, `lookups.py`). Models for which this is not right, or cannot be seen to be, take the slower
ways of `instances.py`.

Reference: Goodfellow 2015, arXiv:1510.01799; Bu et al. 2023, arXiv:2210.00038 (book-keeping).
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from fedinfer.errors import BadUsage, ShapeMismatch
from fedinfer.privacy.instances import per_example_gradients
from fedinfer.privacy.passes import LossFn, uses_by_name
from fedinfer.privacy.structure import Structure, examined
from fedinfer.privacy.uses import Clippable, Laid, Use

# float32 rounding may carry a clipped gradient past its bound by about 2e-6 of it.
MARGIN = 1.0 - 4e-6
# Norms are squared, and a square outside this range is none.
CLIP_NORMS = (1e-12, 1e12)


@dataclass(frozen=True, kw_only=True)
class ClippedGradient(Mapping[str, Tensor]):
    """The sum over examples of gradients clipped to the norm, by parameter name (frozen parameters are left out).

    `below_clip` and `nonfinite` count examples. They are private: they leave a device only with noise.
    """

    sums: Mapping[str, Tensor] = field(repr=False)
    below_clip: int = field(repr=False)
    nonfinite: int = field(repr=False)

    def __getitem__(self, name: str) -> Tensor:
        return self.sums[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sums)

    def __len__(self) -> int:
        return len(self.sums)


def clipped_gradient(
    model: nn.Module, loss_fn: LossFn, x: Tensor | tuple[Tensor, ...], y: Tensor, *, clip_norm: float
) -> ClippedGradient:
    """Sum the gradients of `loss_fn(model(x), y)` (B,), each scaled to L2 norm at most `clip_norm`.

    `x` (B, ...) is one tensor, or a tuple of them that the model takes as its arguments; `y` is (B, ...).

    The loss of an example, and all that the model makes of it, must come from that example alone. The first call with
    a model, a loss and two examples or more sees to that, by a second backward pass and by running two examples alone.
    So does each call until one had gradients that say something at every layer and for every example, and again when
    modules, training modes, trained parameters, the loss, what its function holds or the shape of an example change.
    A model that mixes or moves examples on the way to its loss is then run on each example alone, as are models with
    parameters outside the layers that `layers.py` knows.

    Not seen are mixing that shows in no gradient, such as a division by a detached mean of the batch, if the model
    draws random numbers, as dropout does; mixing that begins later by an attribute, a global or the inside of an
    object; and what a model keeps of examples elsewhere than in buffers. While this runs, no other thread may use the
    model.

        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.eye(2), model.weight[0].detach() + torch.tensor([9.0, 0.5])
        >>> sums = clipped_gradient(model, lambda out, y: (out[:, 0] - y) ** 2 / 2, x, y, clip_norm=1.0)
        >>> [round(float(each), 3) for each in sums["weight"][0]], sums.below_clip
        ([-1.0, -0.5], 1)

    Guarantees: one example changes the result by at most `clip_norm` in L2 norm, up to the rounding of the sum; an
    example whose gradient is not finite contributes zero; no examples give zeros; the model stays as it is.
    Raises: BadUsage if a layer mixes examples or keeps what it saw of them, if the model changes a buffer, for a
    parameter that is not float32 or float64, or under autocast; ShapeMismatch if inputs, targets and losses are not as
    many.
    Reference: Abadi et al. 2016, arXiv:1607.00133, algorithm 1.
    """
    if not CLIP_NORMS[0] <= clip_norm <= CLIP_NORMS[1]:
        raise BadUsage(f"clip_norm: got {clip_norm}, expected {CLIP_NORMS[0]} to {CLIP_NORMS[1]}")
    inputs = [each.detach() for each in (x if isinstance(x, tuple) else (x,))]
    for each in inputs:
        if y.dim() == 0 or each.shape[:1] != y.shape[:1]:
            raise ShapeMismatch(got=tuple(each.shape), expected=(*y.shape[:1], "..."), what="x")
    structure = examined(model)
    if y.shape[0] == 0:
        return _whole({}, structure, below_clip=0, nonfinite=0)
    with torch.enable_grad(), _keeping(structure.buffers):
        uses = uses_by_name(model, structure, loss_fn, inputs, y)
        if uses is not None:
            return _clipped(uses, structure, y.shape[0], clip_norm)
        parts = []
        for gradients in per_example_gradients(model, loss_fn, inputs, y, structure.trained):
            laid: dict[str, Use] = {name: Laid(gradient) for name, gradient in gradients.items()}
            parts.append(_clipped(laid, structure, len(next(iter(gradients.values()))), clip_norm))
    return ClippedGradient(
        sums={name: torch.stack([part[name] for part in parts]).sum(0) for name in structure.trained},
        below_clip=sum(part.below_clip for part in parts),
        nonfinite=sum(part.nonfinite for part in parts),
    )


@contextmanager
def _keeping(buffers: Mapping[str, tuple[nn.Module, str]]) -> Iterator[None]:
    """Puts back what changed of the buffers, and refuses the model for it."""
    before = {name: module._buffers[own] for name, (module, own) in buffers.items()}
    copies = {name: None if buffer is None else buffer.detach().clone() for name, buffer in before.items()}
    changed = []
    try:
        yield
    finally:
        for name, (module, own) in buffers.items():
            buffer, copy = before[name], copies[name]
            if module._buffers.get(own) is not buffer or not _is_kept(buffer, copy):
                changed.append(name)
                module._buffers[own] = buffer
                if buffer is not None and copy is not None:
                    with torch.no_grad():
                        (buffer if buffer.grad_fn is None else buffer.detach_()).resize_as_(copy).copy_(copy)
    if changed:
        raise BadUsage(
            f"buffer {changed[0]!r}: got a model that changes it when it runs, expected one that keeps nothing of its "
            "examples; leave it out, or use eval()"
        )


def _is_kept(buffer: Tensor | None, copy: Tensor | None) -> bool:
    if buffer is None or copy is None:
        return buffer is copy
    return buffer.shape == copy.shape and bool(((buffer == copy) | (buffer != buffer) & (copy != copy)).all())


def _clipped(uses: dict[str, Use], structure: Structure, count: int, clip_norm: float) -> ClippedGradient:
    squared = np.zeros(count)
    clippable: dict[str, Clippable] = {}
    with np.errstate(over="ignore", invalid="ignore"):
        for name in list(uses):
            part, clippable[name] = uses.pop(name).measured(clip_norm)
            squared += part
    bound, norms, nonfinite = MARGIN * clip_norm, np.sqrt(squared), 0
    if not math.isfinite(norms.sum()):
        # Rows that count for nothing are left out, because 0 * NaN is NaN.
        finite = np.flatnonzero(np.isfinite(norms))
        norms, nonfinite = norms[finite], count - len(finite)
        index = torch.from_numpy(finite)
        clippable = {name: each.rows(index) for name, each in clippable.items()} if len(finite) else {}
    factors = bound / np.maximum(norms, bound)
    below_clip = int(np.count_nonzero(factors == 1.0))
    by_dtype = {torch.float32: torch.from_numpy(factors.astype(np.float32)), torch.float64: torch.from_numpy(factors)}
    sums = {}
    for name, each in clippable.items():
        parameter = structure.trained[name]
        sums[name] = each.weighted_sum(by_dtype[parameter.dtype].to(parameter.device))
    return _whole(sums, structure, below_clip=below_clip, nonfinite=nonfinite)


def _whole(sums: dict[str, Tensor], structure: Structure, *, below_clip: int, nonfinite: int) -> ClippedGradient:
    """With zeros for the parameters that no example has a gradient by."""
    whole = {
        name: sums[name] if name in sums else torch.zeros_like(parameter, requires_grad=False)
        for name, parameter in structure.trained.items()
    }
    return ClippedGradient(sums=whole, below_clip=below_clip, nonfinite=nonfinite)
