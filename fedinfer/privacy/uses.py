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
from functools import cached_property
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
# How much larger than a and b the gradients may be that are kept.
KEPT = 1
# A product in float64 takes as long as two, and making float64 of its factors as long as two more.
GRAM_COST = 4
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


def squares(rows: Tensor) -> Doubles:
    """The squared norms (B,) of the rows of a tensor (B, ...)."""
    flat = rows if rows.dim() == 2 else rows.flatten(1)
    norms: Doubles = torch.linalg.vector_norm(flat, dim=1).cpu().numpy()
    return norms * norms


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
        return (factors @ self.laid.flatten(1)).view(self.laid.shape[1:])

    def per_example(self) -> Tensor:
        return self.laid

    def rows(self, index: Tensor) -> "Laid":
        return Laid(self.laid[index])


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


class Lookups:
    """Rows of an embedding's weight that examples looked up: tokens (B, T), gradients (B, T, p)."""

    def __init__(self, layer: nn.Embedding, tokens: Tensor, flows: Tensor) -> None:
        self._layer, self._tokens, self._flows = layer, tokens, flows

    def weighted_sum(self, factors: Tensor) -> Tensor:
        sums = torch.zeros_like(self._layer.weight, requires_grad=False)
        size = max(1, CHUNK // max(1, self._flows[0].numel()))
        for start in range(0, len(factors), size):
            chunk = slice(start, start + size)
            weighted = self._flows[chunk] * factors[chunk, None, None]
            sums.index_add_(0, self._tokens[chunk].flatten(), weighted.flatten(0, 1))
        if self._layer.padding_idx is not None:
            sums[self._layer.padding_idx] = 0.0
        return sums

    def rows(self, index: Tensor) -> "Lookups":
        return Lookups(self._layer, self._tokens[index], self._flows[index])


class Tokens:
    """An embedding's weight: tokens (B, T), gradients (B, T, p).

    What an example has at one token in several places is one gradient, their sum.
    """

    def __init__(self, layer: nn.Embedding, tokens: Tensor, flows: Tensor) -> None:
        self._layer, self._tokens, self._flows = layer, tokens, flows

    def measured(self, clip_norm: float) -> tuple[Doubles, Clippable]:
        heads, later, sums = self._repeated()
        squared = squares(self._flows.flatten(0, 1))
        sizes = np.zeros_like(squared)
        for places in (heads, later):
            sizes[places] = np.sqrt(squared[places])
        squared[heads], squared[later] = squares(sums), 0.0
        if self._layer.padding_idx is not None:
            squared[self._tokens.flatten().cpu().numpy() == self._layer.padding_idx] = 0.0
        shape, flows = tuple(self._tokens.shape), self._flows
        squared, sizes = squared.reshape(shape).sum(1), sizes.reshape(shape).sum(1)
        if (sizes > CANCELLED * np.maximum(np.sqrt(squared), clip_norm)).any():
            flat = flows.flatten(0, 1).clone()
            flat[torch.from_numpy(heads)], flat[torch.from_numpy(later)] = sums, 0.0
            flows = flat.view(flows.shape)
        return squared, Lookups(self._layer, self._tokens, flows)

    def per_example(self) -> Tensor:
        one = torch.ones(1, dtype=self._flows.dtype, device=self._flows.device)
        each = zip(torch.split(self._tokens, 1), torch.split(self._flows, 1), strict=True)
        return torch.stack([Lookups(self._layer, *parts).weighted_sum(one) for parts in each])

    def _repeated(self) -> tuple[NDArray[np.int64], NDArray[np.int64], Tensor]:
        """Of tokens that an example has more than once: the first places, the others, and the sums over both."""
        steps = self._tokens.shape[1]
        # Sorted with their places in the low bits, which is faster than to sort places by tokens.
        bits = steps.bit_length()
        keys = np.sort((self._tokens.cpu().numpy() << bits) + np.arange(steps), axis=1)
        again = np.zeros(keys.shape, bool)
        words = keys >> bits
        np.equal(words[:, 1:], words[:, :-1], out=again[:, 1:])
        found = np.flatnonzero(again)
        starts = np.ones(len(found), bool)
        starts[1:] = found[1:] != found[:-1] + 1
        flat = keys.ravel()
        heads, later = (at - at % steps + (flat[at] & ((1 << bits) - 1)) for at in (found[starts] - 1, found))
        flows = self._flows.flatten(0, 1)
        sums = flows[torch.from_numpy(heads)]
        sums.index_add_(0, torch.from_numpy(np.cumsum(starts) - 1).to(flows.device), flows[torch.from_numpy(later)])
        return heads, later, sums


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
