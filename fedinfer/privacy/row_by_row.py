"""Linear layers that compute each row by itself, bit for bit, whatever stands beside it in the batch.

A fast matrix product takes the last few rows of a batch by other instructions, which add up in another order. So one
row more or less changes the last bits of up to three *other* rows, and whoever chooses the weights can make such a bit
decide everything: the sum then moves by several clip norms. Here a row's terms are added in pairs, by single additions
and multiplications, which IEEE 754 rounds in one way only.

Reference: Casacuberta et al. 2022, arXiv:2207.10635 (sensitivity that floating point breaks).
"""

from typing import Any

import torch
from torch import Tensor, nn

# Numbers laid out at once.
CHUNK = 1 << 22


class RowByRow(nn.Linear):
    """A linear layer on rows (n, inputs), each computed as if it were alone."""

    def forward(self, input: Tensor) -> Tensor:
        return product(input, self.weight, self.bias)


def row_by_row(net: nn.Module) -> nn.Module:
    """Make every plain linear layer of `net` one that computes row by row; its parameters stay. Returns `net`."""
    for module in net.modules():
        if type(module) is nn.Linear:
            module.__class__ = RowByRow
    return net


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (n, inputs) times weight (outputs, inputs) transposed, plus the bias (outputs,).

    Guarantees: a row of the result depends on that row of `x` alone, to the last bit.
    """
    result: Tensor = _Product.apply(x, weight)  # type: ignore[no-untyped-call]
    return result if bias is None else result + bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        width = 1 << (x.shape[1] - 1).bit_length()
        rows = max(1, CHUNK // (len(weight) * width))
        parts = [_sums(x[start : start + rows], weight, width) for start in range(0, len(x), rows)]
        return torch.cat(parts) if parts else x.new_zeros(0, len(weight))

    @staticmethod
    def backward(ctx: Any, *flows: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        (flow,) = flows
        return (
            flow @ weight if ctx.needs_input_grad[0] else None,
            flow.T @ x if ctx.needs_input_grad[1] else None,
        )


def _sums(x: Tensor, weight: Tensor, width: int) -> Tensor:
    """x (n, inputs) times weight transposed, its terms filled up with zeros to `width`, a power of two."""
    terms = x.new_zeros(len(x), len(weight), width)
    torch.mul(x[:, None, :], weight, out=terms[..., : x.shape[1]])
    while width > 1:
        width //= 2
        terms = terms[..., :width] + terms[..., width:]
    return terms[..., 0]
