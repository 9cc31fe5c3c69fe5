"""Sums of clipped per-example gradients, at about the cost of one ordinary gradient.

For a linear layer the gradient of example i is b_i a_i^T, where a_i is its input and b_i the gradient at its output,
so that its squared norm is |b_i|² (|a_i|² + 1) and the clipped sum is one weighted product: no per-example gradient
is ever laid out. Models of other layers go through `torch.func.vmap(grad)`, which lays them out.

Reference: Goodfellow 2015, arXiv:1510.01799; Bu et al. 2023, arXiv:2210.00038 (book-keeping).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedinfer.errors import BadUsage

LossFn = Callable[[Tensor, Tensor], Tensor]
# float32 rounding may carry a clipped gradient past its bound by about 2e-6 of it.
MARGIN = 1.0 - 4e-6


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


def clipped_gradient(model: nn.Module, loss_fn: LossFn, x: Tensor, y: Tensor, *, clip_norm: float) -> ClippedGradient:
    """Sum the gradients of `loss_fn(model(x), y)` (B,), each scaled to L2 norm at most `clip_norm`.

    Guarantees: one example changes the result by at most `clip_norm` in L2 norm; an example whose gradient is not
    finite contributes zero; no examples give zeros.
    Raises: BadUsage if a layer mixes examples, so that no example has a gradient of its own.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise BadUsage(
                f"layer {name!r}: got {type(module).__name__}, which mixes examples; use GroupNorm or LayerNorm"
            )
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if len(x) == 0:
        zeros = {name: torch.zeros_like(model.get_parameter(name)) for name in names}
        return ClippedGradient(sums=zeros, below_clip=0, nonfinite=0)
    return _by_bookkeeping(model, loss_fn, x, y, clip_norm) or _by_instances(model, loss_fn, x, y, clip_norm)


def _factors(squared_norms: Tensor, clip_norm: float) -> tuple[Tensor, Tensor]:
    norms = squared_norms.sqrt()
    finite = torch.isfinite(norms)
    factors = torch.clamp(MARGIN * clip_norm / norms.clamp_min(torch.finfo(norms.dtype).tiny), max=1.0)
    return torch.where(finite, factors, torch.zeros_like(factors)), finite


def _result(sums: dict[str, Tensor], factors: Tensor, finite: Tensor) -> ClippedGradient:
    return ClippedGradient(sums=sums, below_clip=int(((factors >= 1.0) & finite).sum()), nonfinite=int((~finite).sum()))


def _by_bookkeeping(
    model: nn.Module, loss_fn: LossFn, x: Tensor, y: Tensor, clip_norm: float
) -> ClippedGradient | None:
    """For models whose parameters all belong to linear layers that run once on (B, inputs); None for others."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }
    if not layers or not all(type(module) is nn.Linear for module in layers.values()):
        return None
    calls: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {module: [] for module in layers.values()}
    if len(calls) != len(layers):
        return None

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[module].append((inputs[0], output))

    hooks = [module.register_forward_hook(record) for module in layers.values()]
    try:
        losses = loss_fn(model(x), y)
    finally:
        for hook in hooks:
            hook.remove()
    if any(len(seen) != 1 or seen[0][0].dim() != 2 for seen in calls.values()):
        return None
    outputs = [calls[module][0][1] for module in layers.values()]
    output_grads = torch.autograd.grad(losses.sum(), outputs)
    squared = torch.zeros(len(x), dtype=losses.dtype)
    for module, output_grad in zip(layers.values(), output_grads, strict=True):
        inputs = calls[module][0][0].detach()
        reach = (inputs * inputs).sum(1) * module.weight.requires_grad
        if module.bias is not None:
            reach = reach + float(module.bias.requires_grad)
        squared = squared + (output_grad * output_grad).sum(1) * reach
    factors, finite = _factors(squared, clip_norm)
    sums: dict[str, Tensor] = {}
    for (name, module), output_grad in zip(layers.items(), output_grads, strict=True):
        inputs = calls[module][0][0].detach()
        # 0 * NaN is NaN: rows that count for nothing are emptied, not multiplied.
        weighted = torch.where(finite[:, None], output_grad * factors[:, None], 0.0)
        inputs = torch.where(finite[:, None], inputs, 0.0)
        prefix = f"{name}." if name else ""
        if module.weight.requires_grad:
            sums[f"{prefix}weight"] = weighted.T @ inputs
        if module.bias is not None and module.bias.requires_grad:
            sums[f"{prefix}bias"] = weighted.sum(0)
    return _result(sums, factors, finite)


def _by_instances(model: nn.Module, loss_fn: LossFn, x: Tensor, y: Tensor, clip_norm: float) -> ClippedGradient:
    first = {parameter: name for name, parameter in model.named_parameters()}
    trained = {name: p.detach() for p, name in first.items() if p.requires_grad}
    rest = {name: p.detach() for p, name in first.items() if not p.requires_grad}
    buffers = {name: buffer.detach() for name, buffer in model.named_buffers()}
    # Every place of every parameter, so that a shared one is the same tensor wherever it stands.
    places = {
        f"{module_name}.{name}" if module_name else name: first[parameter]
        for module_name, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    }

    def loss_of_one(parameters: dict[str, Tensor], one_x: Tensor, one_y: Tensor) -> Tensor:
        every = {**parameters, **rest}
        state = {place: every[name] for place, name in places.items()} | buffers
        output = functional_call(model, state, (one_x[None],), tie_weights=False)
        return loss_fn(output, one_y[None]).sum()

    gradients = vmap(grad(loss_of_one), in_dims=(None, 0, 0), randomness="different")(trained, x, y)
    squared = torch.stack([g.reshape(len(x), -1).square().sum(1) for g in gradients.values()]).sum(0)
    factors, finite = _factors(squared, clip_norm)
    sums = {
        name: torch.tensordot(factors, torch.where(finite.reshape(-1, *[1] * (g.dim() - 1)), g, 0.0), dims=1)
        for name, g in gradients.items()
    }
    return _result(sums, factors, finite)
