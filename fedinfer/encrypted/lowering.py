"""From a graph, a chain of primes and a packing to a public circuit and the steps of its server.

Scales are followed exactly: a map's plaintexts take whatever scale brings their product to the one that the chain
wants, so nothing drifts, and a source from further up is brought down by a whole factor.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from fedinfer.encrypted.chain import STRETCH, Chain
from fedinfer.encrypted.circuit import MapStep, PrivateCircuit, ProductStep, PublicCircuit, PublicInput, Step, WideStep
from fedinfer.encrypted.evaluator import Term
from fedinfer.encrypted.graph import Affine, Input, Product, Value, in_order, sources_of
from fedinfer.encrypted.keys import KeyPlan
from fedinfer.encrypted.packing import Layout
from fedinfer.encrypted.params import Parameters
from fedinfer.encrypted.search import PackedMap, Packing

Floats = NDArray[np.float64]
Aligned = Mapping[Value, tuple[int, float]]


def lower(
    output: Value, depths: Mapping[Value, int], chain: Chain, packing: Packing | None,
    shapes: Sequence[tuple[int, ...]], flooding: float, about: Mapping[str, Any],
) -> tuple[PublicCircuit, PrivateCircuit, float]:  # fmt: skip
    """The circuit of `output`: packed into slots, or without a packing one ciphertext an element and a row a slot.

    The last number is how many slots add up to an output.
    """
    parameters = chain.parameters
    values = in_order(output)
    inputs = sorted((v for v in values if isinstance(v, Input)), key=lambda v: v.index)
    number = {v: index for index, v in enumerate([*inputs, *(v for v in values if not isinstance(v, Input))])}
    scales: dict[Value, float] = dict.fromkeys(inputs, parameters.scale)
    steps: list[Step] = []
    relinearisation = 0
    ratio = 1.0 if packing is None else _ratio(packing.maps[output], packing, output, parameters.slots)
    for value in values:
        if isinstance(value, Input):
            continue
        depth = depths[value]
        level, lowered = chain.before[depth], chain.after[depth]
        dropped = float(np.prod(np.array(parameters.primes[lowered:level], np.float64)))
        nominal = 2.0 ** chain.scale_bits[depth - 1]
        aligned = {
            source: _aligned(scales[source], chain.after[depths[source]], level, parameters, nominal)
            for source in sources_of(value)
        }
        if isinstance(value, Product):
            (one, left), (two, right) = aligned[value.left], aligned[value.right]
            scale = left * right
            relinearisation = max(relinearisation, level)
            steps.append(
                ProductStep(
                    name=value.name, target=number[value], left=number[value.left], right=number[value.right],
                    factors=(one, two), level=level, lower=lowered,
                )
            )  # fmt: skip
        elif isinstance(value, Affine):
            scale = 2.0 ** chain.scale_bits[depth] * dropped
            if packing is None:
                steps.append(_wide_step(value, aligned, scale, level, lowered, number))
            else:
                share = ratio if value is output else 1.0
                steps.append(_map_step(value, packing, aligned, scale, level, lowered, number, parameters.slots, share))
        scales[value] = scale / dropped
    packed = None if packing is None else packing.maps[output]
    rotations = () if packing is None else tuple(sorted(packing.keys.items()))
    final = scales[output] / ratio
    public = PublicCircuit(
        parameters=parameters,
        keys=KeyPlan(answer=chain.after[depths[output]], relinearisation=relinearisation, rotations=rotations),
        inputs=tuple(
            PublicInput(
                shape=shapes[v.index],
                layout=Layout(held=np.arange(v.size)[:, None]) if packing is None else packing.layouts[v],
                bound=_rounded_up(STRETCH * max(v.bound, 1e-9)),
            )
            for v in inputs
        ),
        rows=parameters.slots if packing is None else 1,
        outputs=output.size,
        classes=parameters.slots if packed is None else packed.period,
        answers=output.size if packed is None else len(packed.gathered),
        scale=final,
        error=chain.error(ratio, flooding),
        about=about,
    )
    return public, PrivateCircuit(steps=tuple(steps), flood=0.0), ratio


def _rounded_up(number: float) -> float:
    """To two bits, which say no more of the calibration data than they must."""
    unit = 2.0 ** (math.floor(math.log2(number)) - 2)
    return math.ceil(number / unit) * unit


def _ratio(packed: PackedMap, packing: Packing, output: Value, slots: int) -> float:
    """How many slots of an answer add up to an output."""
    span = max(packing.layouts[source].period for source in sources_of(output))
    tiles = slots // max(packed.period, span) if packed.gathered[0].tiled else 1
    return slots / packed.period / tiles


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


def _map_step(
    value: Affine, packing: Packing, aligned: Aligned, scale: float, level: int, lower: int,
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
        period=packed.layout.period,
    )


def _wide_step(
    value: Affine, aligned: Aligned, scale: float, level: int, lowered: int, number: Mapping[Value, int]
) -> WideStep:
    blocks = []
    for source, matrix in value.sources:
        whole = sp.csr_matrix(matrix * (scale / aligned[source][1]))
        whole.data = np.rint(whole.data)
        blocks.append(whole)
    return WideStep(
        name=value.name,
        target=number[value],
        sources=tuple(number[source] for source, _ in value.sources),
        factors=tuple(aligned[source][0] for source, _ in value.sources),
        level=level,
        lower=lowered,
        scale=scale,
        weights=sp.csr_matrix(sp.hstack(blocks)),
        constants=value.bias,
    )
