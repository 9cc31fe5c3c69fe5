"""A device's optimisers, in arithmetic that is the same for one client and for a stack of clients.

Weights and gradients are lists of tensors, one a parameter. A tensor of one client is (*shape), of a stack of clients
(clients, *shape): every operation is elementwise, so that both move in the same way.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedinfer.errors import BadUsage

Tensors = list[Tensor]


class Optimiser(Protocol):
    """From gradients to moved weights. The state begins anew in each round."""

    def start(self, weights: Sequence[Tensor]) -> list[Tensors]:
        """The state before the first step: lists of tensors that are shaped as the weights are."""

    def step(self, weights: Sequence[Tensor], gradients: Sequence[Tensor], state: list[Tensors], number: int) -> None:
        """Move `weights` and `state` in place by step `number`, from 1; `gradients` may be overwritten."""


@dataclass(frozen=True, kw_only=True)
class Sgd:
    """Gradient descent with heavy-ball momentum, as `torch.optim.SGD`."""

    lr: float
    momentum: float = 0.0

    def __post_init__(self) -> None:
        _check("lr", self.lr, 0.0 < self.lr < math.inf, "a finite number above 0")
        _check("momentum", self.momentum, 0.0 <= self.momentum < 1.0, "0 to less than 1")

    def start(self, weights: Sequence[Tensor]) -> list[Tensors]:
        return [[torch.zeros_like(weight) for weight in weights]] if self.momentum else []

    def step(self, weights: Sequence[Tensor], gradients: Sequence[Tensor], state: list[Tensors], number: int) -> None:
        for index, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
            move = state[0][index].mul_(self.momentum).add_(gradient) if self.momentum else gradient
            weight.sub_(move, alpha=self.lr)


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam with bias correction, as `torch.optim.Adam`.

    Reference: Kingma and Ba 2015, arXiv:1412.6980, algorithm 1.
    """

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _check("lr", self.lr, 0.0 < self.lr < math.inf, "a finite number above 0")
        _check("beta1", self.beta1, 0.0 <= self.beta1 < 1.0, "0 to less than 1")
        _check("beta2", self.beta2, 0.0 <= self.beta2 < 1.0, "0 to less than 1")
        _check("eps", self.eps, 0.0 < self.eps < math.inf, "a finite number above 0")

    def start(self, weights: Sequence[Tensor]) -> list[Tensors]:
        return [[torch.zeros_like(weight) for weight in weights] for _ in range(2)]

    def step(self, weights: Sequence[Tensor], gradients: Sequence[Tensor], state: list[Tensors], number: int) -> None:
        rate = self.lr / (1.0 - self.beta1**number)
        scale = math.sqrt(1.0 - self.beta2**number)
        for weight, gradient, first, second in zip(weights, gradients, *state, strict=True):
            first.mul_(self.beta1).add_(gradient, alpha=1.0 - self.beta1)
            second.mul_(self.beta2).addcmul_(gradient, gradient, value=1.0 - self.beta2)
            weight.addcdiv_(first, (second.sqrt() / scale).add_(self.eps), value=-rate)


def _check(name: str, value: float, fits: bool, expected: str) -> None:
    if not fits:
        raise BadUsage(f"{name}: got {value}, expected {expected}")
