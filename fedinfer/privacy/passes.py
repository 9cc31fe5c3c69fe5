"""One forward and one backward pass over a batch, and what they tell of each example's gradients.

A pass over all examples tells them apart only where row i of every layer is example i. A call with two examples or
more finds out, unless an earlier one did with the same model, loss and kind of inputs. With a weight on each loss, the
gradients of row i must all be scaled by weight i, at every layer and at the inputs; and two examples, each run alone,
must bring to every layer and to their losses what they bring among the others. A layer that saw all examples, rows
that were moved and losses that share something fail this. What was found is kept only where there was something to
see: a gradient of zero is scaled by any weight.
"""

from collections import deque
from collections.abc import Callable, Sequence
from types import FunctionType, MethodType, NoneType
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from fedinfer.errors import BadUsage, ShapeMismatch
from fedinfer.privacy.layers import Recorder, Run
from fedinfer.privacy.products import combined
from fedinfer.privacy.structure import Structure
from fedinfer.privacy.uses import Use

LossFn = Callable[[Tensor, Tensor], Tensor]
GOLDEN = 0.6180339887498949
# How many states are kept of a model: batches of sequences come in several lengths.
KEPT_STATES = 32
# The states of each model, of its loss and of its inputs, in which its examples were found to be apart.
_APART: WeakKeyDictionary[nn.Module, deque[tuple[object, ...]]] = WeakKeyDictionary()


class _Held:
    """Equal to another that holds the same object, and to none once the object is gone.

    An object is kept alive only if Python has no weak references to its kind. Numbers in place of objects, as `id`
    gives them, are used again.
    """

    def __init__(self, value: object) -> None:
        try:
            self._value: Callable[[], object] = ref(value)
        except TypeError:
            self._value = lambda: value

    def __eq__(self, other: object) -> bool:
        value = self._value()
        return isinstance(other, _Held) and value is not None and other._value() is value

    __hash__ = None  # type: ignore[assignment]


def uses_by_name(
    model: nn.Module, structure: Structure, loss_fn: LossFn, inputs: Sequence[Tensor], y: Tensor
) -> dict[str, Use] | None:
    """The examples' gradients by each parameter that has any; None if these passes cannot tell.

    Raises: ShapeMismatch if there is not one loss for each example; BadUsage if a layer ran in a lower precision than
    its parameters have.
    """
    if not structure.known:
        return None
    state = (*((each.shape[1:], each.dtype) for each in (*inputs, y)), *_parts(loss_fn), *structure.state)
    unsure = y.shape[0] > 1 and state not in _APART.get(model, ())
    watched: list[Tensor] = []
    if unsure:
        # Clones, because a model may change what it gets in place.
        alone = {row: [each[row : row + 1].clone() for each in (*inputs, y)] for row in (0, len(y) - 1)}
        drawn = _random_states(structure)
        watched = [each.detach().requires_grad_() for each in inputs if each.is_floating_point()]
        clones = iter([each.clone() for each in watched])
        inputs = [next(clones) if each.is_floating_point() else each for each in inputs]
    runs, losses = _recorded(model, structure, loss_fn, inputs, y)
    if not losses.requires_grad:
        return {}
    trained = structure.trained
    seen: list[Any] = [*[run.edge for run in runs], *watched]
    ones = torch.ones_like(losses)
    found = torch.autograd.grad(losses, [*seen, *trained.values()], ones, allow_unused=True, retain_graph=unsure)
    flows = found[: len(seen)]
    # A parameter that has a gradient was used outside its layer.
    if any(outside is not None for outside in found[len(seen) :]) or not all(run.unchanged() for run in runs):
        return None
    if unsure:
        # What is drawn for an example alone is not what is drawn for it among others.
        random = not all(map(torch.equal, drawn, _random_states(structure)))
        # Powers of two, which scale a backward pass without rounding; in no order that a layer would move rows in.
        places = torch.arange(len(losses), dtype=torch.float64) * GOLDEN
        weights = torch.exp2((places.frac() * 8).floor()).to(losses)
        again = torch.autograd.grad(losses, seen, weights, allow_unused=True)
        axes = [run.batch_axis for run in runs] + [0] * len(watched)
        if not all(_is_scaled(*each, weights) for each in zip(flows, again, axes, strict=True)):
            return None
        with torch.random.fork_rng(devices=_gpus(structure)):
            for row, (*one, one_y) in {} if random else alone.items():
                if not _are_same(*_recorded(model, structure, loss_fn, one, one_y), runs, losses, row):
                    return None
        if all(bool(_rows(*each).any(1).all()) for each in zip(flows, axes, strict=True) if each[0] is not None):
            _APART.setdefault(model, deque(maxlen=KEPT_STATES)).append(state)
    uses: dict[int, list[Use]] = {}
    for run, flow in zip(runs, flows, strict=False):
        if flow is not None:
            for parameter, use in run.by_parameter(flow):
                if parameter is not None and parameter.dtype is not flow.dtype:
                    raise BadUsage(
                        f"gradients at a layer's outputs: got {flow.dtype}, expected {parameter.dtype}, which its "
                        "parameters have; run the model without autocast"
                    )
                uses.setdefault(id(parameter), []).append(use)
    return {name: combined(uses[id(parameter)]) for name, parameter in trained.items() if id(parameter) in uses}


def _recorded(
    model: nn.Module, structure: Structure, loss_fn: LossFn, inputs: Sequence[Tensor], y: Tensor
) -> tuple[list[Run], Tensor]:
    """The runs of the layers in one forward pass, and the losses."""
    recorder = Recorder(y.shape[0])
    try:
        recorder.listen(structure.layers)
        losses = loss_fn(model(*inputs), y)
    finally:
        recorder.leave(structure.layers)
    if losses.shape != y.shape[:1]:
        raise ShapeMismatch(got=tuple(losses.shape), expected=tuple(y.shape[:1]), what="losses")
    return recorder.runs, losses


def _parts(loss_fn: LossFn) -> tuple[object, ...]:
    """What tells a loss from another. Losses made anew at each call, as lambdas are, have the same code."""
    if isinstance(loss_fn, MethodType):
        return _Held(loss_fn.__self__), *_parts(loss_fn.__func__)
    if not isinstance(loss_fn, FunctionType):
        return (_Held(loss_fn),)
    cells: Sequence[Any] = loss_fn.__closure__ or ()
    try:
        cells = [cell.cell_contents for cell in cells]
    except ValueError:
        # One is still empty.
        cells = [_Held(cell) for cell in cells]
    given = [*cells, *(loss_fn.__defaults__ or ()), *(loss_fn.__kwdefaults__ or {}).values()]
    plain = (int, float, str, bool, NoneType)
    return _Held(loss_fn.__code__), *((type(each), each) if type(each) in plain else _Held(each) for each in given)


def _gpus(structure: Structure) -> list[int]:
    return sorted({parameter.get_device() for parameter in structure.trained.values() if parameter.is_cuda})


def _random_states(structure: Structure) -> list[Tensor]:
    return [torch.get_rng_state(), *[torch.cuda.get_rng_state(gpu) for gpu in _gpus(structure)]]


def _rows(flow: Tensor, axis: int) -> Tensor:
    """One row (B, ...) for each example."""
    return flow.movedim(axis, 0).reshape(flow.shape[axis], -1)


def _is_scaled(flow: Tensor | None, again: Tensor | None, axis: int, weights: Tensor) -> bool:
    """Whether weights on the losses scaled the gradients of each example by its weight, and nothing else."""
    if flow is None or again is None or flow.numel() == 0:
        return flow is again or flow is not None
    once, twice = _rows(flow, axis), _rows(again, axis)
    wrong, size = (once * weights[:, None] - twice).abs().amax(1), once.abs().amax(1)
    # Of gradients that are not finite this says nothing: one example may have made those of all so.
    return bool((size.isfinite() & (wrong <= size * torch.finfo(flow.dtype).eps ** 0.5)).all())


def _are_same(own: Sequence[Run], own_losses: Tensor, runs: Sequence[Run], losses: Tensor, row: int) -> bool:
    """Whether an example that ran alone brought to each layer, and to its loss, what it did as a row among others."""
    if len(own) != len(runs) or not _is_same(own_losses[0], losses[row], losses):
        return False
    pairs = [
        (each.inputs.select(each.batch_axis, 0), run.inputs.select(run.batch_axis, row))
        for each, run in zip(own, runs, strict=True)
    ]
    return all(_is_same(alone, among, among) for alone, among in pairs)


def _is_same(alone: Tensor, among: Tensor, scale: Tensor) -> bool:
    """Whether two tensors are the same up to rounding of numbers as large as those of `scale`."""
    if alone.shape != among.shape or not among.is_floating_point() or among.numel() == 0:
        return torch.equal(alone, among)
    wrong = (alone - among).abs().amax()
    return bool(wrong <= scale.abs().amax() * torch.finfo(among.dtype).eps ** 0.5)
