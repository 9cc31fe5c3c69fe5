"""Sums of clipped per-example gradients, at about the cost of one ordinary gradient.

One forward and one backward pass give what went into each layer and the gradients at its outputs; the norms of the
examples' gradients follow from these (`uses.py`), and the clipped sums are products weighted by the clip factors.
Models for which this is not right, or cannot be seen to be, take the slower ways of `instances.py`.

Reference: Goodfellow 2015, arXiv:1510.01799; Bu et al. 2023, arXiv:2210.00038 (book-keeping).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fedinfer.errors import BadUsage, ShapeMismatch
from fedinfer.privacy.instances import LossFn, per_example_gradients
from fedinfer.privacy.layers import Recorder, is_known
from fedinfer.privacy.uses import Clippable, Laid, Use, combined

# float32 rounding may carry a clipped gradient past its bound by about 2e-6 of it.
MARGIN = 1.0 - 4e-6
# Norms are squared, and a square outside this range is none.
CLIP_NORMS = (1e-12, 1e12)
# The state of each model in which its examples were seen not to mix.
_SEPARATE: WeakKeyDictionary[nn.Module, tuple[object, ...]] = WeakKeyDictionary()


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

    The loss of an example, and all that the model makes of it, must come from that example alone. The first call on a
    model with two examples or more sees to that with a second backward pass; a model that mixes or moves examples on
    the way to its loss is then run on one example at a time, as are models with parameters outside the layers that
    `layers.py` knows. What no gradient shows, such as a division by a detached mean of the batch, is not seen.

    Guarantees: one example changes the result by at most `clip_norm` in L2 norm, up to the rounding of the sum; an
    example whose gradient is not finite contributes zero; no examples give zeros; the model stays as it is.
    Raises: BadUsage if a layer mixes examples or keeps what it saw of them; ShapeMismatch.
    Reference: Abadi et al. 2016, arXiv:1607.00133, algorithm 1.
    """
    inputs = tuple(each.detach() for each in (x if isinstance(x, tuple) else (x,)))
    modules = list(model.modules())
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    _check(model, modules, trained, clip_norm)
    count = _examples(inputs, y)
    clipped: list[ClippedGradient] = []
    with torch.enable_grad():
        uses = _uses(model, loss_fn, inputs, y, modules, trained) if count else {}
        if uses is not None:
            clipped.append(_clipped(uses, trained, count, clip_norm))
        else:
            for gradients in per_example_gradients(model, loss_fn, inputs, y, trained):
                laid: dict[str, Use] = {name: Laid(gradient) for name, gradient in gradients.items()}
                clipped.append(_clipped(laid, trained, len(next(iter(gradients.values()))), clip_norm))
    sums = {}
    for name, parameter in trained.items():
        parts = [part[name] for part in clipped if name in part]
        sums[name] = sum(parts[1:], parts[0]) if parts else torch.zeros_like(parameter, requires_grad=False)
    return ClippedGradient(
        sums=sums,
        below_clip=sum(part.below_clip for part in clipped),
        nonfinite=sum(part.nonfinite for part in clipped),
    )


def _check(model: nn.Module, modules: Sequence[nn.Module], trained: Mapping[str, Tensor], clip_norm: float) -> None:
    if not CLIP_NORMS[0] <= clip_norm <= CLIP_NORMS[1]:
        raise BadUsage(f"clip_norm: got {clip_norm}, expected {CLIP_NORMS[0]} to {CLIP_NORMS[1]}")
    for module in modules:
        reason = _refusal(module)
        if reason:
            name = next(name for name, other in model.named_modules() if other is module)
            raise BadUsage(f"layer {name!r}: got {type(module).__name__}, which {reason}")
    for name, parameter in trained.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise BadUsage(f"parameter {name!r}: got {parameter.dtype}, expected torch.float32 or torch.float64")
        if parameter._backward_hooks:
            raise BadUsage(
                f"parameter {name!r}: got a hook on its gradient, expected none; change the clipped sum instead"
            )


def _refusal(module: nn.Module) -> str | None:
    if isinstance(module, _BatchNorm):
        return "mixes examples; use GroupNorm or LayerNorm"
    if isinstance(module, _InstanceNorm) and module.track_running_stats:
        return "keeps statistics of the rows it saw; use track_running_stats=False"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        if module.max_norm is not None:
            return "changes the rows that examples look up, without noise; use max_norm=None"
        if module.scale_grad_by_freq:
            return "mixes examples; use scale_grad_by_freq=False"
    return None


def _examples(inputs: tuple[Tensor, ...], y: Tensor) -> int:
    for each in inputs:
        if each.dim() == 0 or y.dim() == 0 or len(each) != len(y):
            raise ShapeMismatch(got=tuple(each.shape), expected=(len(y) if y.dim() else "B", "..."), what="x")
    return len(y)


def _uses(
    model: nn.Module,
    loss_fn: LossFn,
    inputs: tuple[Tensor, ...],
    y: Tensor,
    modules: Sequence[nn.Module],
    trained: Mapping[str, nn.Parameter],
) -> dict[str, Use] | None:
    """What one forward and one backward pass tell of the gradients by each parameter; None if that is not all."""
    layers = [layer for layer in modules if any(p is not None and p.requires_grad for p in layer._parameters.values())]
    if not all(is_known(layer) for layer in layers):
        return None
    state = tuple((id(module), module.training) for module in modules)
    unsure = len(y) > 1 and _SEPARATE.get(model) != state
    if unsure:
        inputs = tuple(each.detach().requires_grad_(each.is_floating_point()) for each in inputs)
    recorder = Recorder(len(y))
    with recorder.listening(layers):
        # The model may change its arguments in place, which a leaf of the graph forbids.
        losses = loss_fn(model(*(each.clone() if each.requires_grad else each for each in inputs)), y)
    if losses.shape != y.shape[:1]:
        raise ShapeMismatch(got=tuple(losses.shape), expected=tuple(y.shape[:1]), what="losses")
    if not losses.requires_grad:
        return {}
    runs = recorder.runs
    watched = [*(run.edge for run in runs), *(each for each in inputs if each.requires_grad)]
    found = torch.autograd.grad(losses.sum(), [*watched, *trained.values()], allow_unused=True, retain_graph=unsure)
    flows, outside = found[: len(watched)], found[len(watched) :]
    if any(gradient is not None for gradient in outside) or not all(run.unchanged() for run in runs):
        return None
    axes = [run.batch_axis for run in runs] + [0] * (len(watched) - len(runs))
    if unsure:
        weights = torch.linspace(1, 2, len(y), dtype=losses.dtype, device=losses.device)
        again = torch.autograd.grad((losses * weights).sum(), watched, allow_unused=True)
        if not all(map(_scaled, flows, again, axes, [weights] * len(axes))):
            return None
        _SEPARATE[model] = state
    uses: dict[int, list[Use]] = {}
    for run, flow in zip(runs, flows, strict=False):
        if flow is not None:
            for parameter, use in run.by_parameter(flow):
                uses.setdefault(id(parameter), []).append(use)
    return {name: combined(uses[id(parameter)]) for name, parameter in trained.items() if id(parameter) in uses}


def _scaled(flow: Tensor | None, again: Tensor | None, axis: int, weights: Tensor) -> bool:
    """Whether weights on the losses scale each example's gradients, and nothing else."""
    if flow is None or again is None:
        return flow is again
    if flow.numel() == 0:
        return True
    once, twice = (each.movedim(axis, 0).reshape(len(weights), -1) for each in (flow, again))
    wrong, size = (once * weights[:, None] - twice).abs().amax(1), once.abs().amax(1)
    # An example that is not finite is counted out anyway.
    return bool((~(wrong > size * torch.finfo(flow.dtype).eps ** 0.5)).all())


def _clipped(uses: dict[str, Use], trained: Mapping[str, Tensor], count: int, clip_norm: float) -> ClippedGradient:
    squared, clippable = np.zeros(count), dict[str, Clippable]()
    with np.errstate(over="ignore", invalid="ignore"):
        for name in list(uses):
            part, clippable[name] = uses.pop(name).measured(clip_norm)
            squared += part
    bound, norms = MARGIN * clip_norm, np.sqrt(squared)
    finite = np.isfinite(norms)
    nonfinite = count - int(np.count_nonzero(finite))
    if nonfinite:
        # Rows that count for nothing are left out, because 0 * NaN is NaN.
        norms = norms[finite]
        index = torch.from_numpy(np.flatnonzero(finite))
        clippable = {name: use.rows(index) for name, use in clippable.items()}
    factors = torch.from_numpy(bound / np.maximum(norms, bound))
    sums = {}
    if len(norms):
        sums = {name: use.weighted_sum(factors.to(trained[name].dtype)) for name, use in clippable.items()}
    return ClippedGradient(sums=sums, below_clip=int(np.count_nonzero(norms <= bound)), nonfinite=nonfinite)
