"""Clients of large models take turns in one copy of the model, and chunks of clients run side by side.

A convolution of many clients at once is a grouped one, which runs at a fraction of the machine's rate, while the
convolution of a single client over a batch of ten images runs near it. So where a model is large, nothing is stacked
but what goes in and comes out; what a turn leaves out is what a device does besides arithmetic: copying the model,
loading its state, and finding maxima in the layout for which torch has no vector code.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedinfer.local_task import LocalTask, in_double
from fedinfer.privacy import clipped_gradient

# From here on a vectorised program over clients is no faster than one client's own (measured on LeNet and on a CNN of
# 1.6M weights; below it, it is many times as fast).
LARGE_BYTES = 1 << 20


class Turns:
    """A `Stack` for any model: its clients run one after another."""

    def __init__(self, task: LocalTask) -> None:
        self._net = copy.deepcopy(task.model).train()
        self._double = task.example_plan is not None
        if self._double:
            self._net.double()
        else:
            quicken(self._net)
        self._loss = task.loss
        self._trained = {name: p for name, p in self._net.named_parameters() if p.requires_grad}

    def use(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, own in self._net.state_dict(keep_vars=True).items():
                if not own.requires_grad:
                    own.copy_(state[name])

    def gradients(self, weights: Sequence[Tensor], x: Tensor, y: Tensor, share: Tensor) -> tuple[list[Tensor], Tensor]:
        losses = torch.zeros_like(share)
        each = []
        for client, (own_x, own_y) in enumerate(self._turns(weights, x, y, share > 0.0)):
            found = self._loss(self._net(own_x), own_y)
            weighted = (found * share[client, : len(found)]).sum()
            each.append(torch.autograd.grad(weighted, list(self._trained.values())))
            losses[client, : len(found)] = found.detach()
        return _stacked(each), losses

    def clipped(
        self, weights: Sequence[Tensor], x: Tensor, y: Tensor, present: Tensor, clip_norm: float
    ) -> list[Tensor]:
        each = []
        for own_x, own_y in self._turns(weights, x, y, present):
            sums = clipped_gradient(self._net, self._loss, own_x, own_y, clip_norm=clip_norm)
            each.append([sums[name] for name in self._trained])
        return _stacked(each)

    def _turns(
        self, weights: Sequence[Tensor], x: Tensor, y: Tensor, present: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Each client's rows that are present, which come first among its own, once its weights are in the model."""
        if self._double:
            x, y = in_double(x), in_double(y)
        for client, count in enumerate(present.sum(1).tolist()):
            for parameter, weight in zip(self._trained.values(), weights, strict=True):
                parameter.data = weight[client]
            start = client * present.shape[1]
            yield x[start : start + count], y[start : start + count]


class QuickMaxPool2d(nn.Module):
    """`nn.MaxPool2d` of batches of images, whose maxima are looked for with the channels last.

    Guarantees: the values, and the places that gradients go to, are those of the layer it was made from.
    """

    def __init__(self, layer: nn.MaxPool2d) -> None:
        super().__init__()
        pairs = (_pair(layer.kernel_size), _pair(layer.stride), _pair(layer.padding), _pair(layer.dilation))
        self._window = (*pairs, layer.ceil_mode)

    def forward(self, x: Tensor) -> Tensor:
        return _MaxPool.apply(x, self._window)  # type: ignore[no-any-return, no-untyped-call]


class _MaxPool(torch.autograd.Function):
    """Forward with the channels last, backward with the channels first, which are three times as fast as the others.

    What is kept between them is laid out anew, or the backward pass does it for itself at a third of the speed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: tuple[Any, ...]) -> Tensor:
        last = x.contiguous(memory_format=torch.channels_last)
        found, places = torch.ops.aten.max_pool2d_with_indices(last, *window)
        ctx.window = window
        ctx.save_for_backward(x, places.contiguous())
        return cast(Tensor, found.contiguous())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        x, places = ctx.saved_tensors
        (gradient,) = gradients
        return torch.ops.aten.max_pool2d_with_indices_backward(gradient.contiguous(), x, *ctx.window, places), None


def _pair(size: int | tuple[int, ...]) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)


def is_large(task: LocalTask) -> bool:
    """Whether a program over many clients is no faster than turns."""
    return sum(p.numel() * p.element_size() for p in task.model.parameters()) >= LARGE_BYTES


def quicken(net: nn.Module) -> None:
    """Put `QuickMaxPool2d` in the place of `net`'s max-pooling layers."""
    for name, module in list(net.named_modules()):
        if name and type(module) is nn.MaxPool2d and not module.return_indices:
            net.set_submodule(name, QuickMaxPool2d(module))


def _stacked(each: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Gradients (C, *shape) of C clients; a single client's are not copied."""
    if len(each) == 1:
        return [gradient[None] for gradient in each[0]]
    return [torch.stack(own) for own in zip(*each, strict=True)]
