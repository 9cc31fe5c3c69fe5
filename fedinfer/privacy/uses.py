"""Per-example gradients by one parameter, from a layer's inputs and the gradients at its outputs.

A linear layer's gradient for example i is sum_t b_it a_it^T, with inputs a (B, T, d) and gradients b (B, T, p) at its
outputs; a convolution's is the same with patches for inputs. Where T is 1 the norm is |b_i| |a_i|. Otherwise it is had
from two Gram matrices (T² (d + p) products), or from the gradients themselves (T d p) where these are smaller than
a and b, and then they are kept. The clipped sum is one product weighted by the examples' factors.

A Gram matrix cancels badly where the terms of the sum do: an example made for that would pass its clip. So Gram
matrices are in float64, and where the terms of one example cancel past `CANCELLED`, gradients are laid out after all.

Reference: Goodfellow 2015, arXiv:1510.01799; Li et al. 2021, arXiv:2110.05679 (ghost norm); Bu et al. 2023,
arXiv:2210.00038 (book-keeping, and the choice per layer).
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv1d_weight, conv2d_weight

Doubles = NDArray[np.float64]
# How far the sizes of an example's terms, added up, may exceed both the clip and the size of their sum. Rounding is
# 2**-24 of a term, so this keeps it within what `MARGIN` leaves.
CANCELLED = 64.0
# Numbers laid out at a time: they stay in a core's cache.
CHUNK = 1 << 18


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


def squares(laid: Tensor) -> Doubles:
    """The squared norms (B,) of the rows of a tensor (B, ...)."""
    norms = torch.linalg.vector_norm(laid.reshape(len(laid), -1), dim=1).cpu().numpy().astype(np.float64)
    return norms * norms


class Laid:
    """Gradients laid out, (B, *shape)."""

    def __init__(self, laid: Tensor) -> None:
        self._laid = laid

    def measured(self, clip_norm: float) -> tuple[Doubles, Clippable]:
        return squares(self._laid), self

    def weighted_sum(self, factors: Tensor) -> Tensor:
        return (factors @ self._laid.reshape(len(factors), -1)).reshape(self._laid.shape[1:])

    def per_example(self) -> Tensor:
        return self._laid

    def rows(self, index: Tensor) -> "Laid":
        return Laid(self._laid[index])


class Rows:
    """A linear layer's weight, where each example is one row: inputs a (B, d), gradients b (B, p)."""

    def __init__(self, inputs: Tensor, flows: Tensor) -> None:
        self.inputs, self.flows = inputs, flows

    def measured(self, clip_norm: float) -> tuple[Doubles, Clippable]:
        # A square below the smallest number is lost, and the other factor may be large enough for it to matter.
        tiny = torch.finfo(self.flows.dtype).tiny
        a, b = (squares(rows) + rows.shape[1] * tiny for rows in (self.inputs, self.flows))
        return a * b, self

    def weighted_sum(self, factors: Tensor) -> Tensor:
        return (self.flows * factors[:, None]).T @ self.inputs

    def per_example(self) -> Tensor:
        return self.flows[:, :, None] * self.inputs[:, None]

    def as_terms(self) -> "Terms":
        """The same, as steps of a sequence of one."""
        return Terms(self.inputs[:, None], self.flows[:, None])

    def rows(self, index: Tensor) -> "Rows":
        return Rows(self.inputs[index], self.flows[index])


class Source(Protocol):
    """The terms of sums of products: T of them an example, each of d inputs and p outputs, in G groups."""

    shape: tuple[int, ...]
    sizes: tuple[int, int, int, int, int]

    def terms(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """a (n G, T, d) and b (n G, T, p) of examples `start` to `stop`."""
        ...

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """All terms, times their example's factor, added up in the weight's shape."""
        ...

    def rows(self, index: Tensor) -> "Source":
        """The same of these examples alone."""
        ...


class Terms:
    """A linear layer's weight over steps: inputs (B, T, d), gradients (B, T, p)."""

    def __init__(self, inputs: Tensor, flows: Tensor) -> None:
        self.inputs, self.flows = inputs, flows
        (count, steps, d), p = inputs.shape, flows.shape[2]
        self.shape, self.sizes = (p, d), (count, 1, steps, d, p)

    def terms(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return self.inputs[start:stop].contiguous(), self.flows[start:stop].contiguous()

    def weighted_sum(self, factors: Tensor) -> Tensor:
        weighted = self.flows * factors[:, None, None]
        if self.inputs.stride(0) < self.inputs.stride(1):
            # Time first: the other order would copy both.
            weighted, inputs = weighted.transpose(0, 1), self.inputs.transpose(0, 1)
        else:
            inputs = self.inputs
        return weighted.flatten(0, 1).T @ inputs.flatten(0, 1)

    def rows(self, index: Tensor) -> "Terms":
        return Terms(self.inputs[index], self.flows[index])


class Patches:
    """A convolution's weight: padded inputs (B, channels, ...), gradients (B, outputs, ...), in one or two dimensions."""

    def __init__(self, layer: nn.Conv1d | nn.Conv2d, inputs: Tensor, flows: Tensor, padding: tuple[int, ...]) -> None:
        self._layer, self._inputs, self._flows, self._padding = layer, inputs, flows, padding
        self.shape = tuple(layer.weight.shape)
        p, d = self.shape[0] // layer.groups, layer.weight[0].numel()
        self.sizes = (len(inputs), layer.groups, flows[0, 0].numel(), d, p)

    def terms(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        layer, inputs, flows = self._layer, self._inputs[start:stop], self._flows[start:stop]
        _, groups, steps, d, p = self.sizes
        flat = (1,) * (2 - len(layer.kernel_size))
        columns = functional.unfold(
            inputs[:, :, None] if flat else inputs,
            kernel_size=flat + layer.kernel_size,
            dilation=flat + layer.dilation,
            padding=(0,) * len(flat) + self._padding,
            stride=flat + layer.stride,
        )
        a, b = columns.view(-1, d, steps), flows.reshape(-1, p, steps)
        return a.transpose(1, 2), b.transpose(1, 2)

    def weighted_sum(self, factors: Tensor) -> Tensor:
        layer, weighted = self._layer, self._flows * factors.reshape(-1, *[1] * (self._flows.dim() - 1))
        gradient = conv1d_weight if isinstance(layer, nn.Conv1d) else conv2d_weight
        return gradient(self._inputs, self.shape, weighted, layer.stride, self._padding, layer.dilation, layer.groups)

    def rows(self, index: Tensor) -> "Patches":
        return Patches(self._layer, self._inputs[index], self._flows[index], self._padding)


class Products:
    """A weight whose gradients are sums of products, by whichever way is the cheapest."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def measured(self, clip_norm: float) -> tuple[Doubles, Clippable]:
        _, _, steps, d, p = self.source.sizes
        if d * p <= steps * (d + p):
            laid = self.per_example()
            return squares(laid), Laid(laid)
        squared, sizes = self._by_gram()
        if (sizes > CANCELLED * np.maximum(np.sqrt(squared), clip_norm)).any():
            return np.concatenate([squares(gradients) for _, gradients in self._gradients()]), self
        return squared, self.source

    def weighted_sum(self, factors: Tensor) -> Tensor:
        sums = [factors[chunk] @ gradients for chunk, gradients in self._gradients()]
        return torch.stack(sums).sum(0).reshape(self.source.shape)

    def per_example(self) -> Tensor:
        laid = torch.cat([gradients for _, gradients in self._gradients()])
        return laid.unflatten(1, self.source.shape)

    def rows(self, index: Tensor) -> "Products":
        return Products(self.source.rows(index))

    def _chunks(self, numbers: int) -> Iterator[slice]:
        count = self.source.sizes[0]
        size = max(1, CHUNK // max(1, numbers))
        return (slice(start, min(start + size, count)) for start in range(0, count, size))

    def _gradients(self) -> Iterator[tuple[slice, Tensor]]:
        _, groups, steps, d, p = self.source.sizes
        for chunk in self._chunks(groups * (steps * (d + p) + d * p)):
            a, b = self.source.terms(chunk.start, chunk.stop)
            yield chunk, torch.bmm(b.transpose(1, 2), a).view(chunk.stop - chunk.start, -1)

    def _by_gram(self) -> tuple[Doubles, Doubles]:
        """Squared norms (B,), and the sums over terms of |a| |b|."""
        _, groups, steps, d, p = self.source.sizes
        squared, sizes = [], []
        for chunk in self._chunks(2 * groups * steps * (d + p + 2 * steps)):
            terms = [each.double() for each in self.source.terms(chunk.start, chunk.stop)]
            grams = [torch.bmm(each, each.transpose(1, 2)) for each in terms]
            own = torch.stack([gram.diagonal(dim1=1, dim2=2) for gram in grams]).prod(0)
            squared.append((grams[0] * grams[1]).sum((1, 2)).reshape(-1, groups).sum(1))
            sizes.append(own.sqrt().reshape(-1, groups * steps).sum(1))
        return torch.cat(squared).clamp_min(0).cpu().numpy(), torch.cat(sizes).cpu().numpy()


class Tokens:
    """An embedding's weight: tokens (B, T), gradients (B, T, p). Rows of one token in one example are merged."""

    def __init__(self, layer: nn.Embedding, tokens: Tensor, flows: Tensor) -> None:
        self._layer, self._tokens, self._flows = layer, tokens, flows
        steps = torch.arange(len(tokens), device=tokens.device)[:, None] * layer.num_embeddings + tokens
        keys, places = torch.unique(steps, return_inverse=True)
        self._owner = torch.div(keys, layer.num_embeddings, rounding_mode="floor")
        self._token = keys - self._owner * layer.num_embeddings
        self._merged = flows.new_zeros(len(keys), flows.shape[2])
        self._merged.index_add_(0, places.flatten(), flows.flatten(0, 1))
        if layer.padding_idx is not None:
            self._merged[self._token == layer.padding_idx] = 0.0

    def measured(self, clip_norm: float) -> tuple[Doubles, Clippable]:
        owners = self._owner.cpu().numpy()
        return np.bincount(owners, weights=squares(self._merged), minlength=len(self._tokens)), self

    def weighted_sum(self, factors: Tensor) -> Tensor:
        sums = torch.zeros_like(self._layer.weight, requires_grad=False)
        return sums.index_add_(0, self._token, self._merged * factors[self._owner, None])

    def per_example(self) -> Tensor:
        laid = self._merged.new_zeros(len(self._tokens), *self._layer.weight.shape)
        laid[self._owner, self._token] = self._merged
        return laid

    def rows(self, index: Tensor) -> "Tokens":
        return Tokens(self._layer, self._tokens[index], self._flows[index])


def combined(uses: Sequence[Use]) -> Use:
    """One use of a parameter in place of several: the gradient of an example is the sum of theirs."""
    if len(uses) == 1:
        return uses[0]
    terms = [use.source if isinstance(use, Products) else use for use in uses]
    linear = [use if isinstance(use, Terms) else use.as_terms() for use in terms if isinstance(use, Terms | Rows)]
    if len(linear) == len(uses):
        return Products(
            Terms(torch.cat([use.inputs for use in linear], 1), torch.cat([use.flows for use in linear], 1))
        )
    return Laid(torch.stack([use.per_example() for use in uses]).sum(0))
