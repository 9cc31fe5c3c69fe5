"""The layers whose per-example gradients follow from one forward and one backward pass.

Such a layer runs here in place of its own `forward`, with the same result, on stand-ins for its parameters: tensors
that share their memory and nothing else. So autograd computes no gradient of a weight, and a parameter that gets one
all the same was used outside its layer. Each run leaves a `Run`. What does not fit here is left to the layer itself,
on its own parameters, and shows in the same way.

Reference: Bu et al. 2023, arXiv:2210.00038 (book-keeping).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedinfer.privacy.lookups import Tokens
from fedinfer.privacy.products import Patches, Products, Rows, Terms
from fedinfer.privacy.recurrent import Edge, edge_of, unrolled
from fedinfer.privacy.row_by_row import RowByRow, product
from fedinfer.privacy.uses import Laid, Use

Uses = Sequence[tuple[Tensor | None, Use]]


class Run(NamedTuple):
    """One run of one layer: where the gradients at its outputs appear, and what they mean for its parameters.

    `uses` gets inputs and gradients at the outputs, the example first in both.
    """

    edge: Edge
    inputs: Tensor
    version: int
    batch_axis: int
    uses: Callable[[Tensor, Tensor], Uses]

    def unchanged(self) -> bool:
        """Whether no operation in place has changed the inputs since."""
        return self.inputs._version == self.version

    def by_parameter(self, flows: Tensor) -> Uses:
        """The gradients by each parameter, given those at the outputs."""
        if self.batch_axis:
            return self.uses(self.inputs.movedim(self.batch_axis, 0), flows.movedim(self.batch_axis, 0))
        return self.uses(self.inputs, flows)


class Recorder:
    """Runs layers for a batch of so many examples, and keeps their runs."""

    def __init__(self, examples: int) -> None:
        self.examples = examples
        self.runs: list[Run] = []

    def listen(self, layers: Sequence[nn.Module]) -> None:
        """From now on these layers run here."""
        for layer in layers:
            layer.__dict__["forward"] = partial(LAYERS[type(layer)], self, layer)

    def leave(self, layers: Sequence[nn.Module]) -> None:
        """The layers run as they did before."""
        for layer in layers:
            layer.__dict__.pop("forward", None)

    def keep(self, edge: Edge, inputs: Tensor, uses: Callable[[Tensor, Tensor], Uses], *, batch_axis: int = 0) -> None:
        """Note a run, unless no gradient can come through its output."""
        if not isinstance(edge, Tensor) or edge.requires_grad:
            run = Run(edge=edge, inputs=inputs.detach(), version=inputs._version, batch_axis=batch_axis, uses=uses)
            self.runs.append(run)


def _stand_ins(layer: nn.Module) -> dict[str, Tensor]:
    # With gradients, so that the output is inside a graph whatever the inputs are; nobody asks for them.
    return {name: p.detach().requires_grad_() for name, p in layer._parameters.items() if p is not None}


def _of_linear(weight: Tensor, bias: Tensor | None, inputs: Tensor, flows: Tensor) -> Uses:
    if inputs.dim() == 2:
        laid = Laid(flows)
        return (weight, Rows(inputs, laid)), (bias, laid)
    flows = flows.flatten(1, -2)
    return (weight, Products(Terms(inputs.flatten(1, -2), flows))), (bias, Laid(flows.sum(1)))


def _linear(recorder: Recorder, layer: nn.Linear, input: Tensor) -> Tensor:
    if input.dim() < 2 or input.shape[0] != recorder.examples:
        return nn.Linear.forward(layer, input)
    own = _stand_ins(layer)
    output = functional.linear(input, own["weight"], own.get("bias"))
    recorder.keep(edge_of(output), input, partial(_of_linear, layer.weight, layer.bias))
    return output


def _row_by_row(recorder: Recorder, layer: RowByRow, input: Tensor) -> Tensor:
    if input.dim() != 2 or input.shape[0] != recorder.examples:
        return RowByRow.forward(layer, input)
    own = _stand_ins(layer)
    output = product(input, own["weight"], own.get("bias"))
    recorder.keep(edge_of(output), input, partial(_of_linear, layer.weight, layer.bias))
    return output


def _convolution(recorder: Recorder, layer: Any, input: Tensor) -> Tensor:
    if input.dim() != layer.weight.dim() or input.shape[0] != recorder.examples:
        output: Tensor = type(layer).forward(layer, input)
        return output
    own, apply = _stand_ins(layer), functional.conv1d if isinstance(layer, nn.Conv1d) else functional.conv2d
    widths = _padding(layer)
    if layer.padding_mode != "zeros" or any(before != after for before, after in widths):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        input = functional.pad(input, [width for pair in reversed(widths) for width in pair], mode=mode)
        widths = [(0, 0)] * len(widths)
    padding = tuple(before for before, _ in widths)
    output = apply(input, own["weight"], own.get("bias"), layer.stride, padding, layer.dilation, layer.groups)

    def uses(inputs: Tensor, flows: Tensor) -> Uses:
        weight = Products(Patches(layer, inputs, flows, padding))
        return (layer.weight, weight), (layer.bias, Laid(flows.flatten(2).sum(2)))

    recorder.keep(edge_of(output), input, uses)
    return output


def _padding(layer: nn.Conv1d | nn.Conv2d) -> list[tuple[int, int]]:
    """How much to add before and after, by axis."""
    if isinstance(layer.padding, str):
        spans = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [(span // 2, span - span // 2) if layer.padding == "same" else (0, 0) for span in spans]
    return [(width, width) for width in layer.padding]


def _embedding(recorder: Recorder, layer: nn.Embedding, input: Tensor) -> Tensor:
    if input.dim() < 1 or input.shape[0] != recorder.examples:
        return nn.Embedding.forward(layer, input)
    output = functional.embedding(input, _stand_ins(layer)["weight"], layer.padding_idx)

    def uses(inputs: Tensor, flows: Tensor) -> Uses:
        count, size = inputs.shape[0], layer.embedding_dim
        return [(layer.weight, Tokens(layer, inputs.reshape(count, -1), flows.reshape(count, -1, size)))]

    recorder.keep(edge_of(output), input, uses)
    return output


def _layer_norm(recorder: Recorder, layer: nn.LayerNorm, input: Tensor) -> Tensor:
    if input.dim() <= len(layer.normalized_shape) or input.shape[0] != recorder.examples:
        return nn.LayerNorm.forward(layer, input)
    normal = functional.layer_norm(input, layer.normalized_shape, eps=layer.eps)
    output = _scaled(normal, _stand_ins(layer))

    def total(flows: Tensor) -> Laid:
        return Laid(flows.reshape(flows.shape[0], -1, *layer.normalized_shape).sum(1))

    def uses(inputs: Tensor, flows: Tensor) -> Uses:
        return (layer.weight, total(inputs * flows)), (layer.bias, total(flows))

    recorder.keep(edge_of(output), normal, uses)
    return output


def _group_norm(recorder: Recorder, layer: nn.GroupNorm, input: Tensor) -> Tensor:
    if input.dim() < 2 or input.shape[0] != recorder.examples:
        return nn.GroupNorm.forward(layer, input)
    normal = functional.group_norm(input, layer.num_groups, eps=layer.eps)
    spread = (-1, *[1] * (input.dim() - 2))
    output = _scaled(normal, {name: each.view(spread) for name, each in _stand_ins(layer).items()})

    def total(flows: Tensor) -> Laid:
        return Laid(flows.reshape(*flows.shape[:2], -1).sum(2))

    def uses(inputs: Tensor, flows: Tensor) -> Uses:
        return (layer.weight, total(inputs * flows)), (layer.bias, total(flows))

    recorder.keep(edge_of(output), normal, uses)
    return output


def _scaled(normal: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    if "bias" in own:
        return torch.addcmul(own["bias"], normal, own["weight"])
    return normal * own["weight"]


def _recurrent(recorder: Recorder, layer: Any, input: Any, hx: Any = None) -> Any:
    batch_axis = 0 if layer.batch_first else 1
    if not isinstance(input, Tensor) or input.dim() != 3 or input.shape[batch_axis] != recorder.examples:
        return type(layer).forward(layer, input, hx)
    layer.check_input(input, None)
    if hx is not None:
        layer.check_forward_args(input, hx, None)
    output, state, parts = unrolled(layer, _stand_ins(layer), input, hx)
    for part in parts:
        weight, bias = layer._parameters[part.weight], layer._parameters.get(part.bias)
        recorder.keep(part.edge, part.inputs, partial(_of_linear, weight, bias), batch_axis=1)
    return output, state


LAYERS: Mapping[type[nn.Module], Callable[..., Any]] = {
    nn.Linear: _linear,
    RowByRow: _row_by_row,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.GRU: _recurrent,
    nn.LSTM: _recurrent,
}


def is_known(layer: nn.Module) -> bool:
    """Whether a layer is of a kind in `LAYERS` and nobody has put other parameters or another `forward` into it."""
    if type(layer) not in LAYERS or "forward" in layer.__dict__:
        return False
    if isinstance(layer, nn.GRU | nn.LSTM):
        return layer.proj_size == 0 and layer._parameters.keys() == set(layer._flat_weights_names)
    return layer._parameters.keys() <= {"weight", "bias"} and isinstance(layer.weight, nn.Parameter)
