"""Clipped sums for any model: gradients of many examples laid out by `vmap`, or of one example after another.

`vmap(grad)` refuses some layers (`nn.GRU`, `nn.LSTM`) and what looks at values, and does not see a parameter that a
loss function holds. One example after another always is right, and as slow as it sounds.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from fedinfer.privacy.passes import LossFn

# Numbers laid out at a time.
CHUNK = 1 << 24


def per_example_gradients(
    model: nn.Module, loss_fn: LossFn, inputs: Sequence[Tensor], y: Tensor, trained: Mapping[str, nn.Parameter]
) -> Iterator[dict[str, Tensor]]:
    """The gradients (n, *shape) of all examples by the `trained` parameters, some examples at a time, in order.

    Each example runs through the model alone, so that none can tell anything of another.
    """
    size = max(1, CHUNK // max(1, sum(p.numel() for p in trained.values())))
    for start in range(0, len(y), size):
        chunk = slice(start, start + size)
        some_inputs, some_y = [each[chunk] for each in inputs], y[chunk]
        try:
            gradients = _by_vmap(model, loss_fn, some_inputs, some_y, trained)
        except RuntimeError:
            gradients = None
        yield gradients or _one_by_one(model, loss_fn, some_inputs, some_y, trained)


def _by_vmap(
    model: nn.Module, loss_fn: LossFn, inputs: Sequence[Tensor], y: Tensor, trained: Mapping[str, nn.Parameter]
) -> dict[str, Tensor] | None:
    names = {parameter: name for name, parameter in trained.items()}
    # Every place of every parameter, so that a shared one is the same tensor wherever it stands.
    places = {
        f"{module_name}.{name}" if module_name else name: parameter
        for module_name, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    }
    buffers = {name: buffer.detach() for name, buffer in model.named_buffers()}

    def loss_of_one(parameters: dict[str, Tensor], one: list[Tensor], one_y: Tensor) -> Tensor:
        state = {
            place: parameters[names[parameter]] if parameter in names else parameter.detach()
            for place, parameter in places.items()
        }
        output = functional_call(model, state | buffers, tuple(each[None] for each in one), tie_weights=False)
        return loss_fn(output, one_y[None]).sum()

    apart = {name: parameter.detach() for name, parameter in trained.items()}
    each = vmap(grad_and_value(loss_of_one), in_dims=(None, 0, 0), randomness="different")
    gradients, losses = each(apart, list(inputs), y)
    # A loss that still has a graph uses parameters that were not handed to it.
    return None if losses.requires_grad else gradients


def _one_by_one(
    model: nn.Module, loss_fn: LossFn, inputs: Sequence[Tensor], y: Tensor, trained: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    laid = {name: torch.zeros(len(y), *p.shape, dtype=p.dtype, device=p.device) for name, p in trained.items()}
    for index in range(len(y)):
        one = slice(index, index + 1)
        loss = loss_fn(model(*(each[one] for each in inputs)), y[one]).sum()
        if loss.requires_grad:
            found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
            for name, gradient in zip(trained, found, strict=True):
                if gradient is not None:
                    laid[name][index] = gradient
    return laid
