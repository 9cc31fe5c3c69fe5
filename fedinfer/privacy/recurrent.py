"""GRU and LSTM as two linear layers over time, with the gradients of all gates from one backward pass.

What the inputs add to the gates is one linear layer over all steps, what the states add another. The first is an
ordinary one. The second is inside the steps, so the gradients at its outputs are left at `tap`: a tensor that takes
part in nothing but has an edge in the graph. The steps have no graph of their own: what the backward pass needs of
them is computed for all steps together, and one step back is a product with the weights and a few small operations.

Gates stand as torch has them: reset, update, new (GRU); input, forget, cell, output (LSTM). Time comes first.

Reference: Cho et al. 2014, arXiv:1406.1078; Hochreiter and Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn import functional

Edge = GradientEdge | Tensor


def edge_of(output: Tensor) -> Edge:
    """Where autograd finds the gradient at what `output` is now, whatever happens to it in place."""
    return output if output.grad_fn is None else GradientEdge(output.grad_fn, output.output_nr)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A linear layer over time inside a recurrent one: its parameters, inputs (T, B, d), and where b appears."""

    weight: str
    bias: str | None
    inputs: Tensor
    edge: Edge


class _GruSteps(torch.autograd.Function):
    """From gates (T, B, 3H), which are overwritten, and the first state (B, H) to the states after all steps.

    The second result is the states before all steps, for the record: gradients go through the first alone.
    """

    @staticmethod
    def forward(
        ctx: Any, gates: Tensor, tap: Tensor, first: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        size = weight.shape[1]
        states, kept = gates.new_empty(len(gates) + 1, *first.shape), gates.new_empty(len(gates), *first.shape)
        states[0] = first
        both, new = torch.split(gates, [2 * size, size], dim=-1)
        weight_both, weight_new = torch.split(weight.T, [2 * size, size], dim=1)
        bias_new = gates.new_zeros(size)
        if bias is not None:
            both += bias[: 2 * size]
            bias_new = bias[2 * size :]
        reset, update = torch.split(both, size, dim=-1)
        state = states[0]
        for both_t, reset_t, update_t, new_t, kept_t, after in zip(
            *(part.unbind() for part in (both, reset, update, new, kept, states[1:])), strict=True
        ):
            both_t.addmm_(state, weight_both).sigmoid_()
            torch.addmm(bias_new, state, weight_new, out=kept_t)
            new_t.addcmul_(reset_t, kept_t).tanh_()
            state = torch.lerp(new_t, state, update_t, out=after)
        before = states[:-1]
        ctx.mark_non_differentiable(before)
        ctx.save_for_backward(gates, kept, before, weight)
        return states[1:], before

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gates, kept, states, weight = ctx.saved_tensors
        size = weight.shape[1]
        reset, update, new = torch.split(gates, size, dim=-1)
        # The gradients at the gates' two halves, for a gradient of 1 at the state after the step.
        by_inputs, by_states = torch.empty_like(gates), torch.empty_like(gates)
        by_new = by_inputs[..., 2 * size :]
        by_reset, by_update, by_kept = torch.split(by_states, size, dim=-1)
        torch.addcmul(new.new_ones(()), new, new, value=-1, out=by_new)
        by_new.addcmul_(by_new, update, value=-1)
        torch.mul(by_new, reset, out=by_kept)
        torch.mul(by_kept, kept, out=by_reset)
        by_reset.addcmul_(by_reset, reset, value=-1)
        torch.sub(states, new, out=by_update).mul_(update)
        by_update.addcmul_(by_update, update, value=-1)
        triples = by_states.view(*by_states.shape[:2], 3, size)
        steps = [part.unbind() for part in (triples, by_states, by_new, update, grads[0])]
        grad = grads[0].new_zeros(states.shape[1:])
        for triple, by_states_t, by_new_t, update_t, own in reversed(list(zip(*steps, strict=True))):
            grad = grad + own
            triple.mul_(grad[:, None])
            by_new_t.mul_(grad)
            grad = torch.mul(grad, update_t).addmm_(by_states_t, weight)
        by_inputs[..., : 2 * size] = by_states[..., : 2 * size]
        return by_inputs, by_states, grad, None, None


class _LstmSteps(torch.autograd.Function):
    """From gates (T, B, 4H), which are overwritten, and the first state and cell (B, H) to the states after all steps.

    The second result is the last cell, the third the states before all steps, through which no gradient goes.
    """

    @staticmethod
    def forward(
        ctx: Any, gates: Tensor, tap: Tensor, first: Tensor, first_cell: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        size = weight.shape[1]
        states, cells = (gates.new_empty(len(gates) + 1, *first.shape) for _ in range(2))
        states[0], cells[0] = first, first_cell
        state, cell, across = states[0], cells[0], weight.T
        parts = (gates, gates[..., : 2 * size], *torch.split(gates, size, dim=-1), states[1:], cells[1:])
        for gates_t, both_t, enter, forget, new_t, output_t, after, cell_after in zip(
            *(part.unbind() for part in parts), strict=True
        ):
            gates_t.addmm_(state, across)
            both_t.sigmoid_()
            new_t.tanh_()
            output_t.sigmoid_()
            cell = torch.mul(forget, cell, out=cell_after).addcmul_(enter, new_t)
            state = torch.tanh(cell, out=after).mul_(output_t)
        before = states[:-1]
        ctx.mark_non_differentiable(before)
        ctx.save_for_backward(gates, cells, weight)
        return states[1:], cells[-1].clone(), before

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gates, cells, weight = ctx.saved_tensors
        size = weight.shape[1]
        enter, forget, new, output = torch.split(gates, size, dim=-1)
        # The gradients at the gates, for a gradient of 1 at the cell (of 1 at the state: the output gate's).
        by_gates, squashed = torch.empty_like(gates), cells[1:].tanh()
        by_enter, by_forget, by_new, by_output = torch.split(by_gates, size, dim=-1)
        for gate, times, out in (
            (enter, new, by_enter),
            (forget, cells[:-1], by_forget),
            (output, squashed, by_output),
        ):
            torch.mul(gate, times, out=out)
            out.addcmul_(out, gate, value=-1)
        torch.mul(enter, new, out=by_new)
        torch.addcmul(enter, by_new, new, value=-1, out=by_new)
        by_cell = squashed.square_().neg_().add_(1).mul_(output)
        triples = by_gates.view(*by_gates.shape[:2], 4, size)[:, :, :3]
        steps = [part.unbind() for part in (triples, by_output, by_gates, by_cell, forget, grads[0])]
        grad, cell_grad = grads[1].new_zeros(grads[1].shape), grads[1]
        for triple, by_output_t, by_gates_t, by_cell_t, forget_t, own in reversed(list(zip(*steps, strict=True))):
            grad = grad + own
            cell_grad = torch.addcmul(cell_grad, grad, by_cell_t)
            triple.mul_(cell_grad[:, None])
            by_output_t.mul_(grad)
            cell_grad = cell_grad * forget_t
            grad = by_gates_t @ weight
        return by_gates, by_gates, grad, cell_grad, None


def unrolled(
    module: nn.GRU | nn.LSTM, parameters: Mapping[str, Tensor], inputs: Tensor, state: Any
) -> tuple[Tensor, Any, list[Part]]:
    """What `module` answers to inputs (B, T, d), or (T, B, d) as it says, with these parameters; and its linear parts.

    `state` is what the module takes as its second argument, or None.
    """
    sequence = inputs.transpose(0, 1) if module.batch_first else inputs
    directions, size, lstm = 1 + module.bidirectional, module.hidden_size, isinstance(module, nn.LSTM)
    if state is None:
        zeros = inputs.new_zeros(module.num_layers * directions, sequence.shape[1], size)
        state = (zeros, zeros) if lstm else zeros
    lasts: list[tuple[Tensor, ...]] = []
    parts = []
    for layer in range(module.num_layers):
        if layer and module.dropout:
            sequence = functional.dropout(sequence, module.dropout, module.training)
        ways = []
        for direction in range(directions):
            end = f"_l{layer}" + "_reverse" * direction
            names = [f"{kind}{end}" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            weight, weight_states, bias, bias_states = (parameters.get(name) for name in names)
            assert weight is not None
            assert weight_states is not None
            steps = sequence.flip(0) if direction else sequence
            tap = inputs.new_zeros(()).expand(*sequence.shape[:2], len(weight)).requires_grad_()
            index = layer * directions + direction
            if lstm:
                biases = None if bias is None or bias_states is None else bias + bias_states
                gates = functional.linear(steps, weight, biases)
                edge = edge_of(gates)
                after, cell, before = _LstmSteps.apply(  # type: ignore[no-untyped-call]
                    gates, tap, state[0][index], state[1][index], weight_states
                )
                lasts.append((after[-1], cell))
            else:
                gates = functional.linear(steps, weight, bias)
                edge = edge_of(gates)
                after, before = _GruSteps.apply(  # type: ignore[no-untyped-call]
                    gates, tap, state[index], weight_states, bias_states
                )
                lasts.append((after[-1],))
            has_bias = bias is not None
            parts.append(Part(weight=names[0], bias=names[2] if has_bias else None, inputs=steps, edge=edge))
            parts.append(Part(weight=names[1], bias=names[3] if has_bias else None, inputs=before, edge=tap))
            ways.append(after.flip(0) if direction else after)
        sequence = torch.cat(ways, dim=-1) if module.bidirectional else ways[0]
    finals = [torch.stack(each) for each in zip(*lasts, strict=True)]
    output = sequence.transpose(0, 1) if module.batch_first else sequence
    return output, tuple(finals) if lstm else finals[0], parts
