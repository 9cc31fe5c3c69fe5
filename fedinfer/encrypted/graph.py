"""The typed graph between torch and ciphertexts: inputs, sparse affine maps, and products of values.

Everything that is linear in a network, whatever its name, is one sparse matrix; everything else is a product. A chain
of affine maps is one affine map. Values are flat vectors; `shape` remembers what torch saw, as a hint for packing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Value:
    """A vector in the graph: its torch shape without the batch axis, and its rows on the calibration data."""

    shape: tuple[int, ...]
    rows: Floats = field(repr=False)
    name: str

    @property
    def size(self) -> int:
        return int(self.rows.shape[1])

    @property
    def bound(self) -> float:
        """The largest absolute value on the calibration data."""
        return float(np.abs(self.rows).max(initial=0.0))


@dataclass(frozen=True, kw_only=True, eq=False)
class Input(Value):
    """What the client encrypts: argument number `index`."""

    index: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Affine(Value):
    """The sum over sources of matrix (size, source size) times source, plus `bias` (size,)."""

    sources: tuple[tuple[Value, sp.csr_matrix], ...] = field(repr=False)
    bias: Floats = field(repr=False)

    @property
    def elementwise(self) -> bool:
        """Each output is a multiple of the same element of each source."""
        return all(is_diagonal(matrix) for _, matrix in self.sources)


@dataclass(frozen=True, kw_only=True, eq=False)
class Product(Value):
    """Two values multiplied element by element."""

    left: Value
    right: Value


def is_diagonal(matrix: sp.csr_matrix) -> bool:
    """Whether every entry is on the diagonal of a square matrix."""
    entries = matrix.tocoo()
    return bool(matrix.shape[0] == matrix.shape[1] and (entries.row == entries.col).all())


def affine(
    sources: Sequence[tuple[Value, sp.csr_matrix]], bias: Floats, *, shape: tuple[int, ...], name: str
) -> Affine:
    """An affine map whose sources that are affine themselves are merged into it where that costs nothing.

    A source that mixes several others element by element stays apart from a map that turns: merging would turn each.
    """
    turns = any(not is_diagonal(matrix) for _, matrix in sources)
    terms: dict[Value, sp.csr_matrix] = {}
    total = np.array(bias, np.float64)
    for source, matrix in sources:
        inner: Sequence[tuple[Value, sp.csr_matrix]] = [(source, matrix)]
        if isinstance(source, Affine) and (len(source.sources) == 1 or not turns or not source.elementwise):
            inner = [(deep, sp.csr_matrix(matrix @ other)) for deep, other in source.sources]
            total = total + matrix @ source.bias
        for value, block in inner:
            terms[value] = sp.csr_matrix(terms[value] + block) if value in terms else block
    return _affine(terms, total, shape=shape, name=name)


def _affine(terms: dict[Value, sp.csr_matrix], bias: Floats, *, shape: tuple[int, ...], name: str) -> Affine:
    rows = sum((value.rows @ block.T for value, block in terms.items()), np.zeros((1, len(bias)))) + bias
    return Affine(shape=shape, rows=np.asarray(rows), name=name, sources=tuple(terms.items()), bias=bias)


def scaled(source: Value, factor: float, offset: float, name: str) -> Affine:
    """factor * source + offset, element by element."""
    matrix = sp.csr_matrix(sp.identity(source.size, format="csr") * factor)
    kept = source.name if isinstance(source, Affine) else name
    return affine([(source, matrix)], np.full(source.size, offset), shape=source.shape, name=kept)


def combined(terms: Sequence[tuple[Value, float]], offset: float, name: str) -> Affine:
    """The sum of factor * value over `terms`, all of one shape, plus offset; nothing is merged into it."""
    first = terms[0][0]
    identity = sp.identity(first.size, format="csr")
    blocks = {value: sp.csr_matrix(identity * factor) for value, factor in terms}
    return _affine(blocks, np.full(first.size, offset), shape=first.shape, name=name)


def product(left: Value, right: Value, name: str) -> Product:
    """left * right, element by element."""
    return Product(shape=left.shape, rows=left.rows * right.rows, name=name, left=left, right=right)


def polynomial(x: Value, coefficients: Sequence[float], name: str) -> Value:
    """c0 + c1 x + c2 x^2 + ..., at the least depth: a square for degree two, else Paterson-Stockmeyer by halves.

    Reference: Paterson and Stockmeyer 1973; the halving is that of Han and Ki 2020, eprint 2019/688, section 5.
    """
    c = np.trim_zeros(np.asarray(coefficients, np.float64), "b")
    if len(c) <= 2:
        return scaled(x, float(c[1]) if len(c) > 1 else 0.0, float(c[0]) if len(c) else 0.0, name)
    if len(c) == 3:
        # c2 (x + h)^2 + rest: the shift and the factor melt into the affine maps around.
        h = float(c[1] / (2 * c[2]))
        moved = scaled(x, 1.0, h, name)
        return scaled(product(moved, moved, name), float(c[2]), float(c[0] - c[2] * h * h), name)
    radius = max(x.bound, 1e-6)
    unit = scaled(x, 1.0 / radius, 0.0, name)
    c = c * radius ** np.arange(len(c))
    powers: dict[int, Value] = {1: unit}
    while (top := max(powers)) * 2 < len(c):
        powers[2 * top] = product(powers[top], powers[top], name)

    def terms(part: Floats) -> tuple[list[tuple[Value, float]], float]:
        if len(part) <= 2:
            return ([(unit, float(part[1]))] if len(part) > 1 and part[1] else []), float(part[0])
        half = max(power for power in powers if power < len(part))
        inner, rest = terms(part[half:])
        low, offset = terms(part[:half])
        if not inner:
            return [*low, (powers[half], rest)], offset
        return [*low, (product(combined(inner, rest, name), powers[half], name), 1.0)], offset

    found, offset = terms(c)
    merged: dict[Value, float] = {}
    for value, factor in found:
        merged[value] = merged.get(value, 0.0) + factor
    return combined(list(merged.items()), offset, name)


def in_order(output: Value) -> list[Value]:
    """Every value that `output` needs, sources first."""
    done: list[Value] = []
    seen: set[Value] = set()
    stack: list[tuple[Value, bool]] = [(output, False)]
    while stack:
        value, ready = stack.pop()
        if ready:
            done.append(value)
        elif value not in seen:
            seen.add(value)
            stack.append((value, True))
            stack.extend((source, False) for source in reversed(sources_of(value)))
    return done


def sources_of(value: Value) -> tuple[Value, ...]:
    """What a value is made from."""
    if isinstance(value, Affine):
        return tuple(source for source, _ in value.sources)
    if isinstance(value, Product):
        return (value.left, value.right)
    return ()


def run(output: Value, inputs: Sequence[Floats]) -> Floats:
    """The graph's own answer in floating point: inputs (n, size) each, answer (n, size)."""
    return evaluated(output, {value: inputs[value.index] for value in in_order(output) if isinstance(value, Input)})[
        output
    ]


def evaluated(output: Value, found: Mapping[Value, Floats]) -> dict[Value, Floats]:
    """The rows of every value that `output` needs, from those of its inputs."""
    every = dict(found)
    for value in in_order(output):
        if isinstance(value, Product):
            every[value] = every[value.left] * every[value.right]
        elif isinstance(value, Affine):
            total = np.zeros((1, value.size)) + value.bias
            for source, matrix in value.sources:
                total = total + every[source] @ matrix.T
            every[value] = total
    return every
