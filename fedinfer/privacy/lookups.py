"""Per-example gradients by an embedding's weight, which are rows of gradients at the places of its tokens."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedinfer.privacy.uses import CANCELLED, CHUNK, Clippable, Doubles, squares


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
