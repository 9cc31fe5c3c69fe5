"""From a trained network to a public circuit and a private plan: capture, approximate, choose a chain, pack, schedule.

ARCHITECTURE.md follows one model from its first layer to its last rotation.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedinfer.encrypted.capture import capture
from fedinfer.encrypted.chain import Chain, chains, missing_bits
from fedinfer.encrypted.circuit import MapStep, PrivateCircuit, ProductStep, PublicCircuit, PublicInput, Step, execute
from fedinfer.encrypted.evaluator import Term
from fedinfer.encrypted.frames import packed_bytes
from fedinfer.encrypted.graph import Affine, Input, Product, Value, in_order, run, sources_of
from fedinfer.encrypted.keys import KeyPlan
from fedinfer.encrypted.packing import Gathered, power_of_two
from fedinfer.encrypted.params import Parameters
from fedinfer.encrypted.scheme import InsecureClear
from fedinfer.encrypted.search import Packing, Search, depth_of
from fedinfer.errors import BadUsage, CompileError

Floats = NDArray[np.float64]
DEGREES = (2048, 4096, 8192, 16384, 32768)
# Chains whose layouts are searched: the cheapest by their levels alone, at the least degrees that fit.
PRICED = 6
PRICED_DEGREES = 2
MAX_DISAGREEMENT = 1e-3
# Calibration rows that the noise of a new circuit is measured on, and how often a chain may be chosen again.
MEASURED = 32
ATTEMPTS = 4


@dataclass(frozen=True, kw_only=True)
class StatisticalFlooding:
    """Noise in every answer 2^bits times larger than the circuit's own: a statistical distance of 2^-bits a number."""

    bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 30:
            raise BadUsage(f"flooding: got {self.bits} bits, expected 1 to 30")


CircuitPrivacy = Literal["rerandomised"] | StatisticalFlooding


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A network ready to be served: `public` for everyone, `private` for the server alone."""

    public: PublicCircuit
    private: PrivateCircuit = field(repr=False)
    layers: tuple[Mapping[str, Any], ...] = field(repr=False, default=())


def compile_model(
    net: nn.Module,
    example: torch.Tensor | tuple[torch.Tensor, ...],
    *,
    calibration: torch.Tensor | tuple[torch.Tensor, ...],
    precision: float = 1e-3,
    activation_degree: int = 4,
    key_budget_mb: float = 64.0,
    circuit_privacy: CircuitPrivacy = "rerandomised",
    about: Mapping[str, Any] | None = None,
    accept_disagreement: bool = False,
) -> Compiled:
    """Compile `net` for encrypted inference.

    `example` has a batch axis of one (a tuple for several inputs); `calibration` (n, ...) shows the values to expect:
    use public data, or treat what it reveals as released. `precision` is the largest error of an output as a share of
    the largest output on the calibration data.

    Guarantees: 128-bit parameters; an answer's slots that are not outputs are empty; the circuit agrees in its decision
    with the network on the calibration data, but for one row in a thousand whose margin is above the stated error.
    Raises: CompileError naming the layer for an operation without an encrypted form, a depth that fits no ring, or a
    circuit that decides otherwise than the network.
    """
    examples = example if isinstance(example, tuple) else (example,)
    rows = calibration if isinstance(calibration, tuple) else (calibration,)
    _check(examples, rows)
    captured = capture(net, examples, rows, degree=activation_degree)
    output = captured.output
    # How much larger than the circuit's own noise an output's may be: each of its coefficients is flooded alike.
    flooding = 1.0
    if isinstance(circuit_privacy, StatisticalFlooding):
        flooding = 2.0**circuit_privacy.bits * math.sqrt(power_of_two(output.size))
    allowed = precision * max(output.bound, 1e-6)
    target = allowed
    arguments = [row.double().reshape(len(row), -1).numpy() for row in rows]
    with torch.no_grad():
        plain = copy.deepcopy(net).double().eval()(*(row.double() for row in rows)).reshape(len(rows[0]), -1).numpy()
    for _ in range(ATTEMPTS):
        depths = depth_of(output)
        chain, packing = _cheapest(output, depths, target / flooding, int(key_budget_mb * 1e6))
        compiled = _lower(output, depths, chain, packing, captured.input_shapes, flooding, about or {})
        got = simulate(compiled, [row[:MEASURED] for row in arguments], noise=0)
        noise = float(np.abs(got - run(output, [row[:MEASURED] for row in arguments])).max())
        if noise <= allowed:
            break
        # The model of the noise was too kind to this network.
        target *= allowed / noise / 2
    fit = float(np.abs(run(output, arguments) - plain).max())
    public = replace(compiled.public, error=max(compiled.public.error, 2 * noise), approximation=fit)
    compiled = replace(compiled, public=public)
    if not accept_disagreement:
        _refuse_disagreement(run(output, arguments), plain, public.error)
    return compiled


def simulate(compiled: Compiled, arguments: Sequence[Floats], *, noise: int | None) -> Floats:
    """Answers (n, outputs) of the circuit on the clear scheme: fixed point, with noise of the size of CKKS's."""
    scheme = InsecureClear(noise)
    public, private = compiled.public, compiled.private
    side = scheme.server_side(public.parameters, public.keys, [])
    secret = scheme.secret_side(public.parameters, public.keys)
    encoded = private.encode(scheme.encoder(public.parameters), public.parameters)
    rows = []
    for row in range(len(arguments[0])):
        parts = [side.read(secret.encrypt(slots)) for slots in public.pack([argument[row] for argument in arguments])]
        inputs, at = [], 0
        for part in public.inputs:
            inputs.append(parts[at : at + len(part.layout.held)])
            at += len(part.layout.held)
        answers = execute(private, encoded, side, inputs)
        written = [side.write(answer, outputs=public.classes, flood=0.0) for answer in answers]
        numbers = [secret.decrypt(data, outputs=public.classes, scale=public.scale) for data in written]
        rows.append(np.concatenate(numbers)[: public.outputs])
    return np.stack(rows)


def _decisions(outputs: Floats) -> tuple[NDArray[np.int64], Floats]:
    """The decision for each row, and how far the outputs are from another one."""
    if outputs.shape[1] == 1:
        return (outputs[:, 0] >= 0).astype(np.int64), np.abs(outputs[:, 0])
    ordered = np.sort(outputs, axis=1)
    return outputs.argmax(axis=1), ordered[:, -1] - ordered[:, -2]


def _refuse_disagreement(circuit: Floats, plain: Floats, error: float) -> None:
    (got, _), (expected, margin) = _decisions(circuit), _decisions(plain)
    wrong = float(((got != expected) & (margin > 2 * error)).mean())
    if wrong > MAX_DISAGREEMENT:
        raise CompileError(
            f"circuit: it decides otherwise than the network on {wrong:.1%} of the calibration rows, expected at most "
            f"{MAX_DISAGREEMENT:.1%}; raise activation_degree, train with polynomials, or accept_disagreement"
        )


def _check(examples: Sequence[torch.Tensor], rows: Sequence[torch.Tensor]) -> None:
    if len(examples) != len(rows):
        raise BadUsage(f"calibration: got {len(rows)} arrays, expected {len(examples)}, one for each input")
    for one, many in zip(examples, rows, strict=True):
        if one.dim() < 2 or one.shape[0] != 1:
            raise BadUsage(f"example: got shape {tuple(one.shape)}, expected a batch axis of one")
        if many.shape[1:] != one.shape[1:] or len(many) < 1:
            raise BadUsage(
                f"calibration: got shape {tuple(many.shape)}, expected (n, {', '.join(map(str, one.shape[1:]))})"
            )
        if not bool(torch.isfinite(many).all()):
            raise BadUsage("calibration: got NaN or infinity, expected finite numbers")


def _cheapest(output: Value, depths: Mapping[Value, int], precision: float, budget: int) -> tuple[Chain, Packing]:
    found = chains(output, depths, precision=precision, degrees=DEGREES)
    if not found:
        layer = max((v for v in depths if not isinstance(v, Input)), key=lambda v: depths[v]).name
        missing = missing_bits(output, depths)
        if missing is None:
            raise CompileError(f"layer {layer}: no chain of primes gives a precision of {precision:.1g}; ask for less")
        raise CompileError(
            f"layer {layer}: got a depth of {depths[output]}, which needs {missing} bits more than a ring of degree "
            f"32768 has; use fewer layers, a lower activation_degree or a larger precision"
        )
    best: tuple[float, Chain, Packing] | None = None
    failure: CompileError | None = None
    tried: set[int] = set()
    known: dict[object, Gathered | None] = {}
    for degree in DEGREES:
        for chain in [c for c in found if c.parameters.degree == degree][:PRICED]:
            try:
                packing = _pack(output, depths, chain, budget, known)
            except CompileError as error:
                failure = error
                continue
            tried.add(degree)
            if best is None or packing.cost_us < best[0]:
                best = (packing.cost_us, chain, packing)
        if len(tried) >= PRICED_DEGREES or (best is not None and degree >= 16384):
            break
    if best is None:
        assert failure is not None
        raise failure
    return best[1], best[2]


def _pack(
    output: Value,
    depths: Mapping[Value, int],
    chain: Chain,
    budget: int,
    known: dict[object, Gathered | None],
) -> Packing:
    parameters = chain.parameters
    size = {
        level: KeyPlan(relinearisation=level, rotations=()).size_bytes(parameters)
        for level in range(1, parameters.levels + 1)
    }
    search = Search(
        output,
        {value: (chain.before[depth], chain.after[depth]) for value, depth in depths.items()},
        degree=parameters.degree,
        key_bytes=size,
        query_bytes=packed_bytes(parameters.primes[: parameters.levels], parameters.degree),
        key_budget_bytes=budget if parameters.special else 0,
        known=known,
    )
    packing = search.best()
    if not parameters.special and any(isinstance(value, Product) for value in depths):
        raise CompileError("a product needs a key-switching prime")
    return packing


def _lower(
    output: Value,
    depths: Mapping[Value, int],
    chain: Chain,
    packing: Packing,
    shapes: Sequence[tuple[int, ...]],
    flooding: float,
    about: Mapping[str, Any],
) -> Compiled:
    parameters = chain.parameters
    slots = parameters.slots
    values = in_order(output)
    inputs = sorted((v for v in values if isinstance(v, Input)), key=lambda v: v.index)
    number = {v: index for index, v in enumerate([*inputs, *(v for v in values if not isinstance(v, Input))])}
    scales: dict[Value, float] = dict.fromkeys(inputs, parameters.scale)
    steps: list[Step] = []
    layers: list[Mapping[str, Any]] = []
    ratio = 1.0
    relinearisation = 0
    for value in values:
        depth = depths[value]
        level, lower = chain.before[depth], chain.after[depth]
        dropped = float(np.prod(np.array(parameters.primes[lower:level], np.float64)))
        if isinstance(value, Input):
            continue
        nominal = 2.0 ** chain.scale_bits[depth - 1]
        aligned = {
            source: _aligned(scales[source], chain.after[depths[source]], level, parameters, nominal)
            for source in sources_of(value)
        }
        if isinstance(value, Product):
            (one, left), (two, right) = aligned[value.left], aligned[value.right]
            scales[value] = left * right / dropped
            relinearisation = max(relinearisation, level)
            steps.append(
                ProductStep(
                    name=value.name, target=number[value], left=number[value.left], right=number[value.right],
                    factors=(one, two), level=level, lower=lower,
                )
            )  # fmt: skip
        elif isinstance(value, Affine):
            scale = 2.0 ** chain.scale_bits[depth] * dropped
            if value is output:
                packed = packing.maps[value]
                tiles = slots // max(packed.period, _span(packing, value)) if packed.gathered[0].tiled else 1
                ratio = slots / packed.period / tiles
            steps.append(
                _map_step(
                    value, packing, aligned, scale, level, lower, number, slots, ratio if value is output else 1.0
                )
            )
            scales[value] = scale / dropped
    packed = packing.maps[output]
    final = scales[output] / ratio
    plan = KeyPlan(relinearisation=relinearisation, rotations=tuple(sorted(packing.keys.items())))
    public = PublicCircuit(
        parameters=parameters,
        keys=plan,
        inputs=tuple(
            PublicInput(
                shape=shapes[v.index], layout=packing.layouts[v], bound=2.0 ** np.ceil(np.log2(max(v.bound, 1e-9)) + 1)
            )
            for v in inputs
        ),
        outputs=output.size,
        classes=packed.period,
        answers=len(packed.gathered),
        scale=final,
        error=chain.error * flooding,
        about=about,
    )
    flood = chain.error * flooding / math.sqrt(packed.period) * final if flooding > 1 else 0.0
    return Compiled(public=public, private=PrivateCircuit(steps=tuple(steps), flood=flood), layers=tuple(layers))


def _aligned(scale: float, have: int, level: int, parameters: Parameters, nominal: float) -> tuple[int, float]:
    """A whole factor, and the scale after it and a division by the primes between the levels.

    A source from further up may have a larger scale than its neighbours; without this its weights would be rounded to
    what is left. The factor is one if the scale is not too large, and the primes are dropped then.
    """
    if have == level or scale <= 2 * nominal:
        return 1, scale
    dropped = float(np.prod(np.array(parameters.primes[level:have], np.float64)))
    factor = max(2, round(nominal * dropped / scale))
    return factor, scale * factor / dropped


def _span(packing: Packing, value: Affine) -> int:
    return max(packing.layouts[source].period for source, _ in value.sources)


def _map_step(
    value: Affine, packing: Packing, aligned: Mapping[Value, tuple[int, float]], scale: float, level: int, lower: int,
    number: Mapping[Value, int], slots: int, ratio: float,
) -> MapStep:  # fmt: skip
    packed = packing.maps[value]
    offsets, count = [], 0
    for source, _ in value.sources:
        offsets.append(count)
        count += len(packing.layouts[source].held)
    terms: list[tuple[Term, ...]] = []
    vectors: list[Floats] = []
    plain_scales: list[float] = []
    constants: list[Floats] = []
    for part, held in zip(packed.gathered, packed.layout.held, strict=True):
        own = []
        for (index, ciphertext), group in part.weights.items():
            for shift, weights in group.items():
                baby = shift % packed.split
                giant = shift - baby
                own.append(Term(source=offsets[index] + ciphertext, baby=baby, giant=giant, plain=len(vectors)))
                vectors.append(np.roll(weights, giant))
                plain_scales.append(scale / aligned[value.sources[index][0]][1])
        terms.append(tuple(own))
        spread = np.tile(np.where(held >= 0, value.bias[np.maximum(held, 0)], 0.0), slots // len(held))
        constants.append(spread / ratio)
    return MapStep(
        name=value.name,
        target=number[value],
        sources=tuple(number[source] for source, _ in value.sources),
        factors=tuple(aligned[source][0] for source, _ in value.sources),
        level=level,
        lower=lower,
        scale=scale,
        terms=tuple(terms),
        vectors=tuple(vectors),
        plain_scales=tuple(plain_scales),
        folds=packed.folds,
        constants=tuple(constants),
    )
