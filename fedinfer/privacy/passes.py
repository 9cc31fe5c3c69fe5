"""One forward and one backward pass over a batch, and what they tell of each example's gradients.

A pass over all examples tells them apart only where row i of every layer is example i. The first call with a model, a
loss and two examples or more finds out: with a weight on each loss, the gradients of row i must all be scaled by
weight i, at every layer and at the inputs. A layer that saw all examples, rows that were moved and losses that share
something fail this.
"""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedinfer.errors import ShapeMismatch
from fedinfer.privacy.layers import Recorder
from fedinfer.privacy.products import combined
from fedinfer.privacy.structure import Structure
from fedinfer.privacy.uses import Use

LossFn = Callable[[Tensor, Tensor], Tensor]
GOLDEN = 0.6180339887498949
# The state of each model, and which loss it had, when its examples were found to be apart.
_APART: WeakKeyDictionary[nn.Module, tuple[object, ...]] = WeakKeyDictionary()


def uses_by_name(
    model: nn.Module, structure: Structure, loss_fn: LossFn, inputs: Sequence[Tensor], y: Tensor
) -> dict[str, Use] | None:
    """The examples' gradients by each parameter that has any; None if these passes cannot tell.

    Raises: ShapeMismatch if there is not one loss for each example.
    """
    if not structure.known:
        return None
    # Losses made anew at each call, as lambdas are, have the same code.
    state = (*structure.state, id(getattr(loss_fn, "__code__", loss_fn)))
    unsure = y.shape[0] > 1 and _APART.get(model) != state
    watched: list[Tensor] = []
    if unsure:
        watched = [each.detach().requires_grad_() for each in inputs if each.is_floating_point()]
        # Clones, because a model may change what it gets in place.
        clones = iter([each.clone() for each in watched])
        inputs = [next(clones) if each.is_floating_point() else each for each in inputs]
    recorder = Recorder(y.shape[0])
    try:
        recorder.listen(structure.layers)
        losses = loss_fn(model(*inputs), y)
    finally:
        recorder.leave(structure.layers)
    if losses.shape != y.shape[:1]:
        raise ShapeMismatch(got=tuple(losses.shape), expected=tuple(y.shape[:1]), what="losses")
    if not losses.requires_grad:
        return {}
    runs, trained = recorder.runs, structure.trained
    seen: list[Any] = [*[run.edge for run in runs], *watched]
    ones = torch.ones_like(losses)
    found = torch.autograd.grad(losses, [*seen, *trained.values()], ones, allow_unused=True, retain_graph=unsure)
    flows = found[: len(seen)]
    # A parameter that has a gradient was used outside its layer.
    if any(outside is not None for outside in found[len(seen) :]) or not all(run.unchanged() for run in runs):
        return None
    if unsure:
        # Powers of two, which scale a backward pass without rounding; in no order that a layer would move rows in.
        places = torch.arange(len(losses), dtype=torch.float64) * GOLDEN
        weights = torch.exp2((places.frac() * 8).floor()).to(losses)
        again = torch.autograd.grad(losses, seen, weights, allow_unused=True)
        axes = [run.batch_axis for run in runs] + [0] * len(watched)
        if not all(_is_scaled(*each, weights) for each in zip(flows, again, axes, strict=True)):
            return None
        _APART[model] = state
    uses: dict[int, list[Use]] = {}
    for run, flow in zip(runs, flows, strict=False):
        if flow is not None:
            for parameter, use in run.by_parameter(flow):
                uses.setdefault(id(parameter), []).append(use)
    return {name: combined(uses[id(parameter)]) for name, parameter in trained.items() if id(parameter) in uses}


def _is_scaled(flow: Tensor | None, again: Tensor | None, axis: int, weights: Tensor) -> bool:
    """Whether weights on the losses scaled the gradients of each example by its weight, and nothing else."""
    if flow is None or again is None or flow.numel() == 0:
        return flow is again or flow is not None
    once, twice = (each.movedim(axis, 0).flatten(1) if each.dim() > 1 else each[:, None] for each in (flow, again))
    wrong, size = (once * weights[:, None] - twice).abs().amax(1), once.abs().amax(1)
    # Of an example that is not finite this says nothing, nor need it: it is left out.
    return not bool((wrong > size * torch.finfo(flow.dtype).eps ** 0.5).any())
