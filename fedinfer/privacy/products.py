"""Per-example gradients by one parameter, from a layer's inputs and the gradients at its outputs.

A linear layer's gradient for example i is sum_t b_it a_it^T, with inputs a (B, T, d) and gradients b (B, T, p) at its
outputs; a convolution's is the same with patches for inputs. Where T is 1, its norm is |b_i| |a_i|. Otherwise it is
had from two Gram matrices, at T² (d + p) products, or from the gradients themselves, at T d p, some examples at a
time; these are kept where they are smaller than a and b. The clipped sum is one product with the factors in it.

A Gram matrix cancels badly where the terms of the sum do: an example made for that would pass its clip. So Gram
matrices are in float64, and where the terms of one example cancel past `CANCELLED`, the sum is made of gradients that
were laid out.

Reference: Goodfellow 2015, arXiv:1510.01799; Li et al. 2021, arXiv:2110.05679 (ghost norm); Bu et al. 2023,
arXiv:2210.00038 (book-keeping, and the choice per layer).
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv1d_weight, conv2d_weight

from fedinfer.privacy.uses import CANCELLED, CHUNK, Clippable, Doubles, Laid, Use, squares

# How much larger than a and b the gradients may be that are kept.
KEPT = 1
# A product in float64 takes as long as two, and making float64 of its factors as long as two more.
GRAM_COST = 4


class Rows:
    """A linear layer's weight, where each example is one row: inputs a (B, d), gradients b (B, p)."""

    def __init__(self, inputs: Tensor, flows: Laid) -> None:
        self._inputs, self._flows = inputs, flows

    def measured(self, clip_norm: float) -> tuple[Doubles, Clippable]:
        # A square below the smallest number is lost, and the other factor may be large enough for it to matter.
        lost = torch.finfo(self._inputs.dtype).tiny * max(self._inputs.shape[1], self._flows.laid.shape[1])
        return (squares(self._inputs) + lost) * (self._flows.squares + lost), self

    def weighted_sum(self, factors: Tensor) -> Tensor:
        return (self._flows.laid * factors[:, None]).T @ self._inputs

    def per_example(self) -> Tensor:
        return self._flows.laid[:, :, None] * self._inputs[:, None]

    def terms(self) -> "Terms":
        """The same as a sequence of one step."""
        return Terms(self._inputs[:, None], self._flows.laid[:, None])

    def rows(self, index: Tensor) -> "Rows":
        return Rows(self._inputs[index], self._flows.rows(index))


class Source(Protocol):
    """Where sums of products come from. `sizes`: B examples, G groups in each, T terms, d inputs, p outputs."""

    sizes: tuple[int, int, int, int, int]

    def terms(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """a (n G, T, d) and b (n G, p, T) of these examples."""
        ...

    def shaped(self, products: Tensor) -> Tensor:
        """Gradients (..., G p d) as the weight has them."""
        ...

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """The sum of all terms, times their example's factor, as the weight has it."""
        ...

    def rows(self, index: Tensor) -> "Source":
        """The same of these examples alone."""
        ...


class Terms:
    """A linear layer's weight over steps: inputs (B, T, d), gradients (B, T, p)."""

    def __init__(self, inputs: Tensor, flows: Tensor) -> None:
        self.inputs, self.flows = inputs, flows
        self.sizes = (inputs.shape[0], 1, inputs.shape[1], inputs.shape[2], flows.shape[2])

    def terms(self, chunk: slice) -> tuple[Tensor, Tensor]:
        return self.inputs[chunk].contiguous(), self.flows[chunk].contiguous().transpose(1, 2)

    def shaped(self, products: Tensor) -> Tensor:
        return products.view(*products.shape[:-1], self.sizes[4], self.sizes[3])

    def weighted_sum(self, factors: Tensor) -> Tensor:
        inputs, flows, factors = self.inputs, self.flows, factors[:, None, None]
        if flows.stride(0) < flows.stride(1):
            inputs, flows, factors = (each.transpose(0, 1) for each in (inputs, flows, factors))
        sums = flows.new_zeros(self.sizes[4], self.sizes[3])
        step = max(1, CHUNK // max(1, flows[0].numel()))
        for start in range(0, len(flows), step):
            chunk = slice(start, start + step)
            weighted = flows[chunk] * (factors if len(factors) == 1 else factors[chunk])
            sums.addmm_(weighted.flatten(0, 1).T, inputs[chunk].flatten(0, 1))
        return sums

    def rows(self, index: Tensor) -> "Terms":
        return Terms(self.inputs[index], self.flows[index])


class Patches:
    """A convolution's weight: inputs (B, channels, ...), gradients (B, outputs, ...), in one or two dimensions."""

    def __init__(self, layer: nn.Conv1d | nn.Conv2d, inputs: Tensor, flows: Tensor, padding: tuple[int, ...]) -> None:
        self._layer, self._inputs, self._flows, self._padding = layer, inputs, flows, padding
        outputs, depth = layer.weight.shape[:2]
        size = depth * int(np.prod(layer.kernel_size))
        self.sizes = (inputs.shape[0], layer.groups, flows[0, 0].numel(), size, outputs // layer.groups)

    def terms(self, chunk: slice) -> tuple[Tensor, Tensor]:
        _, groups, steps, size, outputs = self.sizes
        layer, inputs, flows = self._layer, self._inputs[chunk], self._flows[chunk]
        spans, strides, dilations, padding = layer.kernel_size, layer.stride, layer.dilation, self._padding
        places = tuple(flows.shape[2:])
        if len(spans) == 1:
            inputs, places = inputs[:, :, None], (1, *places)
            spans, strides, dilations, padding = (1, *spans), (1, *strides), (1, *dilations), (0, *padding)
        # With channels last a patch is made of runs of kernel width by channels, which copy fast.
        padded = (
            functional.pad(inputs, (padding[1], padding[1], padding[0], padding[0])).permute(0, 2, 3, 1).contiguous()
        )
        count, _, width, channels = padded.shape
        row, depth = width * channels, channels // groups
        patches = padded.as_strided(
            (count, groups, *places, *spans, depth),
            (
                padded.stride(0),
                depth,
                strides[0] * row,
                strides[1] * channels,
                dilations[0] * row,
                dilations[1] * channels,
                1,
            ),
        )
        return patches.reshape(-1, steps, size), flows.reshape(-1, outputs, steps)

    def shaped(self, products: Tensor) -> Tensor:
        shape = self._layer.weight.shape
        patches = products.view(*products.shape[:-1], shape[0], *shape[2:], shape[1])
        return patches.movedim(-1, 1 - len(shape))

    def weighted_sum(self, factors: Tensor) -> Tensor:
        layer, weighted = self._layer, self._flows * factors.view(-1, *[1] * (self._flows.dim() - 1))
        of_weight = conv1d_weight if isinstance(layer, nn.Conv1d) else conv2d_weight
        return of_weight(  # type: ignore[no-untyped-call, no-any-return]
            self._inputs, layer.weight.shape, weighted, layer.stride, self._padding, layer.dilation, layer.groups
        )

    def rows(self, index: Tensor) -> "Patches":
        return Patches(self._layer, self._inputs[index], self._flows[index], self._padding)


class Products:
    """A weight whose gradients are sums of products, by whichever way is the cheapest."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def measured(self, clip_norm: float) -> tuple[Doubles, Clippable]:
        _, _, steps, d, p = self.source.sizes
        if d * p <= KEPT * steps * (d + p):
            kept = Laid(self.per_example())
            return kept.squares, kept
        squared, sizes = self._by_gram() if GRAM_COST * steps * (d + p) <= d * p else self._by_parts()
        if (sizes > CANCELLED * np.maximum(np.sqrt(squared), clip_norm)).any():
            return self._by_parts()[0], self
        return squared, self.source

    def weighted_sum(self, factors: Tensor) -> Tensor:
        sums = [factors[chunk] @ torch.bmm(b, a).view(chunk.stop - chunk.start, -1) for chunk, a, b in self._chunks()]
        return self.source.shaped(torch.stack(sums).sum(0))

    def per_example(self) -> Tensor:
        count, groups, _, d, p = self.source.sizes
        laid = None
        for chunk, a, b in self._chunks():
            laid = a.new_empty(count * groups, p, d) if laid is None else laid
            torch.bmm(b, a, out=laid[chunk.start * groups : chunk.stop * groups])
        assert laid is not None
        return self.source.shaped(laid.view(count, -1))

    def rows(self, index: Tensor) -> "Products":
        return Products(self.source.rows(index))

    def _chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        count, groups, steps, d, p = self.source.sizes
        size = max(1, CHUNK // max(1, groups * (steps * (d + p) + d * p)))
        for start in range(0, count, size):
            chunk = slice(start, min(start + size, count))
            yield chunk, *self.source.terms(chunk)

    def _by_parts(self) -> tuple[Doubles, Doubles]:
        """Squared norms (B,), and what the sums over terms of |b| |a| are at most, from gradients laid out in parts."""
        squared, sizes = [], []
        for chunk, a, b in self._chunks():
            count = chunk.stop - chunk.start
            squared.append(squares(torch.bmm(b, a).view(count, -1)))
            sizes.append(np.sqrt(squares(a.reshape(count, -1))) * np.sqrt(squares(b.reshape(count, -1))))
        return np.concatenate(squared), np.concatenate(sizes)

    def _by_gram(self) -> tuple[Doubles, Doubles]:
        """The same from Gram matrices."""
        squared, sizes = [], []
        for chunk, a, b in self._chunks():
            count = chunk.stop - chunk.start
            a, b = a.double(), b.double()
            of_inputs, of_flows = torch.bmm(a, a.mT), torch.bmm(b.mT, b)
            squared.append((of_inputs * of_flows).view(count, -1).sum(1).clamp_min_(0).cpu().numpy())
            terms = of_inputs.diagonal(dim1=1, dim2=2) * of_flows.diagonal(dim1=1, dim2=2)
            sizes.append(terms.sqrt().reshape(count, -1).sum(1).cpu().numpy())
        return np.concatenate(squared), np.concatenate(sizes)


def combined(uses: Sequence[Use]) -> Use:
    """One use of a parameter in place of several: the gradient of an example is the sum of theirs."""
    if len(uses) == 1:
        return uses[0]
    terms = [_terms(use) for use in uses]
    linear = [each for each in terms if each is not None]
    if len(linear) == len(uses):
        return Products(
            Terms(torch.cat([each.inputs for each in linear], 1), torch.cat([each.flows for each in linear], 1))
        )
    return Laid(torch.stack([use.per_example() for use in uses]).sum(0))


def _terms(use: Use) -> Terms | None:
    if isinstance(use, Rows):
        return use.terms()
    if isinstance(use, Products) and isinstance(use.source, Terms):
        return use.source
    return None
