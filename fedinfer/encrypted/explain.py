"""A compiled network, layer by layer: what each costs, where its values lie, and how exact they are."""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedinfer.encrypted.circuit import MapStep, ProductStep, PublicCircuit, Step, WideStep, run_step
from fedinfer.encrypted.clear import InsecureClear
from fedinfer.encrypted.compiled import Compiled, Encoded
from fedinfer.encrypted.costs import Costs
from fedinfer.encrypted.scheme import Scheme, ServerSide, TenSeal

Floats = NDArray[np.float64]
REPEATS = 5
COLUMNS = ("layer", "operation", "layout", "level", "scale", "rotations", "predicted ms", "measured ms", "error")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One step: `rotations` are key switches but for products; `error` is the largest by noise in one of its values."""

    layer: str
    operation: str
    layout: str
    level: str
    scale_bits: float
    rotations: int
    predicted_ms: float
    measured_ms: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """The layers of a compiled network in the order they run, and what is public of it in a line."""

    summary: str
    layers: tuple[Layer, ...]

    def rows(self) -> list[tuple[str, ...]]:
        """The cells of the table, as text, without its head (`COLUMNS`)."""
        return [
            (
                one.layer, one.operation, one.layout, one.level, f"2^{one.scale_bits:.1f}", str(one.rotations),
                f"{one.predicted_ms:.2f}", f"{one.measured_ms:.2f}", f"{one.error:.1e}",
            )
            for one in self.layers
        ]  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        return {"summary": self.summary, "layers": [asdict(layer) for layer in self.layers]}

    def __str__(self) -> str:
        table = [COLUMNS, *self.rows()]
        widths = [max(len(row[k]) for row in table) for k in range(len(COLUMNS))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        return "\n".join([self.summary, "", lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def explain(compiled: Compiled) -> Explanation:
    """Run one row (or as many as have a slot) under CKKS and in the clear, step by step, and take the time of each."""
    public, costs = compiled.public, Costs(degree=compiled.public.parameters.degree)
    arguments = compiled.sample(public.rows)
    real, milliseconds = _steps(compiled, arguments, TenSeal(), repeats=1 if public.rows > 1 else REPEATS)
    exact, _ = _steps(compiled, arguments, InsecureClear(), repeats=1)
    noisy, _ = _steps(compiled, arguments, InsecureClear(noise=0), repeats=1)
    layers = []
    for step in compiled.private.steps:
        one, other = exact[step.target], noisy[step.target]
        layers.append(
            Layer(
                layer=step.name,
                operation=_operation(step),
                layout=_layout(step, public),
                level=f"{step.level}" if step.lower == step.level else f"{step.level} > {step.lower}",
                scale_bits=math.log2(real[step.target][0].scale),
                rotations=_rotations(step),
                predicted_ms=predicted_us(step, costs, len(real[step.target])) / 1e3,
                measured_ms=milliseconds[step.target],
                error=max(float(np.abs(a.slots - b.slots).max()) for a, b in zip(one, other, strict=True)),
            )
        )
    return Explanation(summary=_summary(public), layers=tuple(layers))


def _steps(
    compiled: Compiled, arguments: Sequence[Floats], scheme: Scheme, *, repeats: int
) -> tuple[dict[int, Sequence[Any]], dict[int, float]]:
    """The ciphertexts of every value, and the milliseconds of every step."""
    public = compiled.public
    secret = scheme.secret_side(public.parameters, public.keys)
    side: ServerSide = scheme.server_side(public.parameters, public.keys, secret.public_keys())
    encoded: Encoded = compiled.encode(scheme)
    parts = [side.read(secret.encrypt(slots)) for slots in public.pack(arguments)]
    values: dict[int, Sequence[Any]] = dict(enumerate(public.split(parts)))
    took: dict[int, float] = {}
    for step in compiled.private.steps:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            values[step.target] = run_step(step, encoded.get(step.target), side, values, map)
            times.append(time.perf_counter() - start)
        took[step.target] = statistics.median(times) * 1e3
    return values, took


def predicted_us(step: Step, costs: Costs, ciphertexts: int) -> float:
    """What the cost model says of one step, in microseconds."""
    dropped = sum(costs.divide(to) for to in range(step.lower, step.level))
    if isinstance(step, ProductStep):
        return ciphertexts * (costs.multiply(step.level) + dropped)
    if isinstance(step, WideStep):
        return int(step.weights.nnz) * costs.weigh(step.level, turned=False) + ciphertexts * dropped
    terms = [term for part in step.terms for term in part]
    babies = {(term.source, term.baby) for term in terms if term.baby}
    giants = sum(len({term.giant for term in part if term.giant}) for part in step.terms)
    linear = costs.linear(step.level, len(babies), giants, len(terms), len({source for source, _ in babies}))
    return linear + ciphertexts * (dropped + sum(costs.fold(step.lower, len(group)) for group in step.folds))


def _operation(step: Step) -> str:
    if isinstance(step, ProductStep):
        return "square" if step.left == step.right else "product"
    if isinstance(step, WideStep):
        return f"map, {step.weights.nnz} weights"
    return f"map, {sum(map(len, step.terms))} products"


def _layout(step: Step, public: PublicCircuit) -> str:
    if isinstance(step, WideStep):
        return f"{len(step.constants)} ct, a row a slot"
    if isinstance(step, MapStep):
        folds = " ".join(str(len(group) + 1) for group in step.folds)
        return f"{len(step.terms)} ct, period {step.period}" + (f", folds {folds}" if folds else "")
    return "as its sources" if public.rows == 1 else "a row a slot"


def _rotations(step: Step) -> int:
    if not isinstance(step, MapStep):
        return 0
    terms: Mapping[tuple[int, int], None] = {(t.source, t.baby): None for part in step.terms for t in part if t.baby}
    giants = sum(len({term.giant for term in part if term.giant}) for part in step.terms)
    return len(terms) + giants + len(step.terms) * sum(map(len, step.folds))


def _summary(public: PublicCircuit) -> str:
    parameters = public.parameters
    primes = " ".join(str(bits) for bits in parameters.prime_bits)
    last = " (the last for key switching)" if parameters.special else ""
    return (
        f"N = {parameters.degree}, primes of {primes} bits{last}"
        f"; a query of {public.max_query_bytes // public.groups(public.max_rows)} bytes, keys of {public.max_key_bytes}"
        f"; error {public.error:.1e} at most, of activations {public.approximation:.1e}"
    )
