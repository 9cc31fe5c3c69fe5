"""From a `torch.nn.Module` to the graph of `graph`: a linear operation becomes a matrix by being applied to a basis.

torch.export gives the operations; those that are linear in what is encrypted need no rule of their own, whatever their
stride, padding or groups. Activations become polynomials, fitted to the range that the calibration data shows.
"""

import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import nn

from fedinfer.encrypted.graph import Affine, Input, Value, affine, polynomial, product
from fedinfer.encrypted.polynomials import ACTIVATIONS, Fit
from fedinfer.errors import CompileError

Floats = NDArray[np.float64]
CHUNK = 512
MAX_FREE_DEGREE = 8

LINEAR = frozenset(
    {
        "_native_batch_norm_legit_no_training",
        "_to_copy",
        "_unsafe_view",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "add",
        "addmm",
        "alias",
        "avg_pool1d",
        "avg_pool2d",
        "batch_norm",
        "bmm",
        "cat",
        "chunk",
        "clone",
        "constant_pad_nd",
        "contiguous",
        "conv1d",
        "conv2d",
        "conv3d",
        "convolution",
        "detach",
        "div",
        "dropout",
        "einsum",
        "expand",
        "feature_dropout",
        "flatten",
        "flip",
        "identity",
        "index_select",
        "lift_fresh_copy",
        "linear",
        "matmul",
        "mean",
        "mm",
        "movedim",
        "mul",
        "narrow",
        "neg",
        "pad",
        "permute",
        "pixel_shuffle",
        "reshape",
        "roll",
        "rsub",
        "select",
        "slice",
        "split",
        "squeeze",
        "stack",
        "sub",
        "sum",
        "swapaxes",
        "t",
        "to",
        "transpose",
        "type_as",
        "unflatten",
        "unsqueeze",
        "upsample_nearest2d",
        "view",
    }
)
REFUSED = {
    "max_pool1d": "AvgPool1d",
    "max_pool2d": "AvgPool2d",
    "max_pool2d_with_indices": "AvgPool2d",
    "adaptive_max_pool2d": "AdaptiveAvgPool2d",
    "softmax": "logits (take the softmax after decryption)",
    "log_softmax": "logits (take the softmax after decryption)",
    "layer_norm": "BatchNorm",
    "group_norm": "BatchNorm",
}


@dataclass(frozen=True, kw_only=True)
class Symbol:
    """A tensor of one example that depends on the query: a polynomial, coefficient by power, of `base`.

    `layer` is the one that made it a polynomial.
    """

    base: Value
    shape: tuple[int, ...]
    coefficients: tuple[float, ...] = (0.0, 1.0)
    layer: str = ""

    def value(self, name: str) -> Value:
        if self.coefficients == (0.0, 1.0):
            return self.base
        return polynomial(self.base, self.coefficients, self.layer or name)


@dataclass(frozen=True, kw_only=True)
class Approximation:
    """How an activation becomes a polynomial: its degree, and the fit to the values on the calibration data."""

    degree: int
    fit: Fit


@dataclass(frozen=True, kw_only=True)
class Captured:
    """The graph of a network: its output and how many inputs it has, each with its shape for one example."""

    output: Value
    input_shapes: tuple[tuple[int, ...], ...]


def capture(
    net: nn.Module, example: Sequence[torch.Tensor], calibration: Sequence[torch.Tensor], approximation: Approximation
) -> Captured:
    """Take `net` apart. `example` has a batch axis of one; `calibration` rows show what values to expect.

    Raises: CompileError for an operation that is neither linear nor an activation or product.
    """
    whole = copy.deepcopy(net).double().eval()
    arguments = tuple(tensor.double() for tensor in example)
    with torch.no_grad():
        exported = torch.export.export(whole, arguments, strict=False)
    tensors = {**dict(exported.state_dict), **dict(exported.constants)}
    signature = exported.graph_signature
    kept = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    kept |= dict(signature.inputs_to_lifted_tensor_constants)
    found: dict[torch.fx.Node, Any] = {}
    count = 0
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name in kept:
            found[node] = tensors[kept[node.name]].detach()
        elif node.op == "placeholder":
            shape = tuple(arguments[count].shape)
            rows = calibration[count].double().reshape(len(calibration[count]), -1).numpy()
            value = Input(shape=shape[1:], rows=rows, name=f"input {count}", index=count)
            found[node] = Symbol(base=value, shape=shape)
            count += 1
        elif node.op == "call_function":
            try:
                with np.errstate(over="raise", invalid="raise"):
                    found[node] = _call(node, found, approximation)
            except FloatingPointError:
                raise CompileError(
                    f"layer {_layer(node)}: got values above 1e308 on the calibration data, expected finite ones"
                ) from None
        elif node.op == "output":
            (result,) = node.args
            outputs = result if isinstance(result, (tuple, list)) else (result,)
            if len(outputs) != 1 or not isinstance(found.get(outputs[0]), Symbol):
                raise CompileError(f"network: got {len(outputs)} outputs, expected one tensor that the input changes")
            output = found[outputs[0]].value("output")
    if not isinstance(output, Affine):
        # The last map empties the slots that are no outputs, so there is always one.
        output = affine(
            [(output, sp.identity(output.size, format="csr"))],
            np.zeros(output.size),
            shape=output.shape,
            name="output",
        )
    return Captured(output=output, input_shapes=tuple(tuple(tensor.shape[1:]) for tensor in arguments))


def _layer(node: torch.fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = [entry[0] for entry in stack.values() if entry[0]]
    return f"{path[-1].removeprefix('L__self___')}" if path else str(node.name)


def _call(node: torch.fx.Node, found: dict[torch.fx.Node, Any], approximation: Approximation) -> Any:
    target: Any = node.target
    operation = target.__name__ if target is operator.getitem else str(target._schema.name).split("::")[-1]
    kind = operation.rstrip("_")
    name = _layer(node)
    values = torch.fx.map_arg((node.args, dict(node.kwargs)), lambda inner: found[inner])
    symbols = _symbols(values)
    if not symbols:
        return target(*values[0], **values[1])
    if isinstance(values[0][0], (tuple, list)) and target is operator.getitem:
        parts: Any = values[0][0]
        return parts[values[0][1]]
    if kind in REFUSED:
        raise CompileError(f"layer {name}: {kind} has no encrypted form; replace it with {REFUSED[kind]}")
    if kind in ("square", "pow") or (kind == "mul" and len(symbols) == 2):
        return _multiply(kind, values[0], name)
    if kind in ACTIVATIONS:
        return _activate(kind, symbols[0], values, name, approximation)
    if kind == "div" and isinstance(values[0][1], Symbol):
        raise CompileError(f"layer {name}: got a division by an encrypted value, expected one by a constant")
    if kind in ("matmul", "bmm", "mm", "einsum", "linear") and len(symbols) > 1:
        raise CompileError(f"layer {name}: got a {kind} of two encrypted values, expected one constant")
    if kind not in LINEAR and target is not operator.getitem:
        raise CompileError(
            f"layer {name}: got {kind}, expected a linear layer, a product, or one of {', '.join(sorted(ACTIVATIONS))}"
        )
    simple = _scalar(kind, values, symbols)
    return simple if simple is not None else _linear(target, values, symbols, name)


def _symbols(values: Any) -> list[Symbol]:
    if isinstance(values, Symbol):
        return [values]
    if isinstance(values, dict):
        return [symbol for value in values.values() for symbol in _symbols(value)]
    if isinstance(values, (tuple, list)):
        return [symbol for value in values for symbol in _symbols(value)]
    return []


def _multiply(kind: str, arguments: Sequence[Any], name: str) -> Symbol:
    left = arguments[0]
    if kind == "pow":
        power = arguments[1]
        if not isinstance(power, int) and not (isinstance(power, float) and power == int(power)):
            raise CompileError(f"layer {name}: got the power {power}, expected a whole number")
        out: Symbol = left
        for _ in range(int(power) - 1):
            out = _times(out, left, name)
        return out
    return _times(left, left if kind == "square" else arguments[1], name)


def _times(left: Symbol, right: Symbol, name: str) -> Symbol:
    degree = len(left.coefficients) + len(right.coefficients) - 2
    if left.base is right.base and left.shape == right.shape and degree <= MAX_FREE_DEGREE:
        c = np.convolve(left.coefficients, right.coefficients)
        return Symbol(base=left.base, shape=left.shape, coefficients=tuple(float(x) for x in c), layer=name)
    a, b = left.value(name), right.value(name)
    shape = np.broadcast_shapes(left.shape, right.shape)
    a, b = _spread(a, left.shape, shape, name), _spread(b, right.shape, shape, name)
    return Symbol(base=product(a, b, name), shape=shape)


def _spread(value: Value, shape: tuple[int, ...], target: tuple[int, ...], name: str) -> Value:
    if shape == target:
        return value
    index = torch.arange(value.size).reshape(shape).expand(target).reshape(-1).numpy()
    entries = (np.ones(len(index)), (np.arange(len(index)), index))
    matrix = sp.csr_matrix(entries, shape=(len(index), value.size))
    return affine([(value, matrix)], np.zeros(len(index)), shape=target[1:], name=name)


def _activate(kind: str, x: Symbol, values: Any, name: str, approximation: Approximation) -> Symbol:
    base = x.value(name)
    extra = [value for value in values[0][1:] if isinstance(value, (int, float))]
    function = ACTIVATIONS[kind]
    coefficients = approximation.fit(lambda points: function(points, *extra), base.rows, approximation.degree)
    return Symbol(base=base, shape=x.shape, coefficients=tuple(float(c) for c in coefficients), layer=name)


def _scalar(kind: str, values: Any, symbols: Sequence[Symbol]) -> Symbol | None:
    """Addition and multiplication by a number keep a polynomial a polynomial of the same base."""
    arguments, named = values
    if kind not in ("add", "sub", "mul", "div", "neg") or set(named) - {"alpha"}:
        return None
    c = [np.asarray(s.coefficients) for s in symbols]
    if len(symbols) == 2 and symbols[0].base is symbols[1].base and symbols[0].shape == symbols[1].shape:
        size = max(map(len, c))
        one, two = (np.pad(part, (0, size - len(part))) for part in c)
        sign = float(named.get("alpha", 1)) * (-1 if kind == "sub" else 1)
        return Symbol(base=symbols[0].base, shape=symbols[0].shape, coefficients=tuple((one + sign * two).tolist()))
    if len(symbols) != 1:
        return None
    if kind == "neg":
        return Symbol(base=symbols[0].base, shape=symbols[0].shape, coefficients=tuple((-c[0]).tolist()))
    first, second = arguments[0], arguments[1]
    other = second if isinstance(first, Symbol) else first
    if isinstance(other, torch.Tensor):
        if other.numel() != 1 or other.dim() > len(symbols[0].shape):
            return None
        other = float(other)
    sign = float(named.get("alpha", 1))
    out = c[0].copy()
    if kind in ("mul", "div"):
        out = out * other if kind == "mul" else out / other
    elif kind == "add":
        out[0] += sign * other
    elif isinstance(first, Symbol):
        out[0] -= sign * other
    else:
        out = -sign * out
        out[0] += other
    return Symbol(base=symbols[0].base, shape=symbols[0].shape, coefficients=tuple(out.tolist()))


def _linear(target: Callable[..., Any], values: Any, symbols: Sequence[Symbol], name: str) -> Any:
    """Apply the operation to zero for the constant, and to every unit vector of each argument for its matrix."""
    unique = list({id(symbol): symbol for symbol in symbols}.values())

    def at(inputs: dict[int, torch.Tensor]) -> Any:
        def put(value: Any) -> Any:
            if isinstance(value, Symbol):
                return inputs[id(value)]
            if isinstance(value, dict):
                return {key: put(inner) for key, inner in value.items()}
            return type(value)(put(inner) for inner in value) if isinstance(value, (tuple, list)) else value

        arguments, named = put(values)
        result = target(*arguments, **named)
        return list(result) if isinstance(result, (tuple, list)) else [result]

    zeros = {id(symbol): torch.zeros(symbol.shape, dtype=torch.float64) for symbol in unique}
    offsets = [part.double() for part in at(zeros)]
    matrices: list[list[sp.csr_matrix]] = [[] for _ in offsets]
    for symbol in unique:
        size = int(np.prod(symbol.shape))
        blocks: list[list[sp.csc_matrix]] = [[] for _ in offsets]
        for start in range(0, size, CHUNK):
            width = min(CHUNK, size - start)
            basis = torch.zeros(width, size, dtype=torch.float64)
            basis[torch.arange(width), torch.arange(start, start + width)] = 1.0

            def one(row: torch.Tensor, symbol: Symbol = symbol) -> Any:
                return at({**zeros, id(symbol): row.reshape(symbol.shape)})

            for out, part, offset in zip(blocks, torch.vmap(one)(basis), offsets, strict=True):
                difference = (part - offset).reshape(width, -1)
                out.append(sp.csc_matrix(difference.numpy().T))
        for rows, parts in zip(matrices, blocks, strict=True):
            matrix = sp.csr_matrix(sp.hstack(parts))
            matrix.eliminate_zeros()
            rows.append(matrix)
    results = []
    bases = [symbol.value(name) for symbol in unique]
    for offset, blocks_of in zip(offsets, matrices, strict=True):
        shape = tuple(offset.shape)
        whole = affine(list(zip(bases, blocks_of, strict=True)), offset.reshape(-1).numpy(), shape=shape[1:], name=name)
        results.append(Symbol(base=whole, shape=shape))
    return results if len(results) > 1 else results[0]
