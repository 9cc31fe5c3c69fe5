"""From a trained network to a public circuit and a private plan: capture, approximate, choose a chain, pack, schedule.

docs/compiler.md follows one model from its first layer to its last rotation.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedinfer.encrypted.capture import Approximation, capture
from fedinfer.encrypted.chain import Chains
from fedinfer.encrypted.choosing import DEGREES, choose
from fedinfer.encrypted.compiled import Compiled
from fedinfer.encrypted.graph import run
from fedinfer.encrypted.lowering import lower
from fedinfer.encrypted.packing import Gathered, power_of_two
from fedinfer.encrypted.polynomials import Fit, least_squares
from fedinfer.encrypted.search import depth_of
from fedinfer.errors import BadUsage, CompileError

Floats = NDArray[np.float64]
Objective = Literal["latency", "throughput"]
MAX_DISAGREEMENT = 1e-3
# Calibration rows that the noise of a new circuit is measured on, and how often a chain may be chosen again.
MEASURED = 128
ATTEMPTS = 6
MAX_SLOTS = 1 << 14
# Five deviations of a sum of uniform numbers, half of them halved, over their largest value.
UNIFORM_TAIL = 2.05


@dataclass(frozen=True, kw_only=True)
class StatisticalFlooding:
    """Noise in every answer 2^bits times larger than the circuit's own: a statistical distance of 2^-bits a number."""

    bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 30:
            raise BadUsage(f"flooding: got {self.bits} bits, expected 1 to 30")

    def growth(self, outputs: int) -> float:
        """How much larger than the circuit's own an output's noise is: each of its coefficients is flooded alike."""
        return 2.0**self.bits * min(outputs, UNIFORM_TAIL * math.sqrt(outputs + 1))


CircuitPrivacy = Literal["rerandomised"] | StatisticalFlooding


def compile_model(
    net: nn.Module,
    example: torch.Tensor | tuple[torch.Tensor, ...],
    *,
    calibration: torch.Tensor | tuple[torch.Tensor, ...],
    objective: Objective = "latency",
    precision: float = 2e-3,
    activation_degree: int = 4,
    activation_fit: Fit = least_squares,
    key_budget_mb: float = 64.0,
    circuit_privacy: CircuitPrivacy = "rerandomised",
    about: Mapping[str, Any] | None = None,
    accept_disagreement: bool = False,
) -> Compiled:
    """Compile `net` for encrypted inference.

    `example` has a batch axis of one (a tuple for several inputs); `calibration` (n, ...) shows the values to expect:
    use public data, or treat what it reveals as released. `objective` "latency" answers one row soonest, "throughput"
    thousands of rows of one client in the least time a row. `precision` is the largest error of an output as a share
    of the largest output on the calibration data. Activations become polynomials of `activation_degree` by
    `activation_fit` (`polynomials.least_squares` or `polynomials.minimax`).

    Guarantees: 128-bit parameters; an answer's slots that are not outputs are empty; the circuit agrees in its decision
    with the network on the calibration data, but for one row in a thousand whose margin is above the stated error.
    Raises: CompileError naming the layer for an operation without an encrypted form, a depth that fits no ring, or a
    circuit that decides otherwise than the network.
    """
    if objective not in ("latency", "throughput"):
        raise BadUsage(f"objective: got {objective!r}, expected 'latency' or 'throughput'")
    wide = objective == "throughput"
    examples = example if isinstance(example, tuple) else (example,)
    rows = calibration if isinstance(calibration, tuple) else (calibration,)
    _check(examples, rows)
    captured = capture(net, examples, rows, Approximation(degree=activation_degree, fit=activation_fit))
    output = captured.output
    flooding = 1.0
    if isinstance(circuit_privacy, StatisticalFlooding):
        flooding = circuit_privacy.growth(MAX_SLOTS if wide else power_of_two(output.size))
    allowed = precision * max(output.bound, 1e-6)
    target = allowed
    arguments = [row.double().reshape(len(row), -1).numpy() for row in rows]
    with torch.no_grad():
        plain = copy.deepcopy(net).double().eval()(*(row.double() for row in rows)).reshape(len(rows[0]), -1).numpy()
    known: dict[object, Gathered | None] = {}
    depths, few = depth_of(output), [row[:MEASURED] for row in arguments]
    chains = Chains(output, depths, flooding=flooding, degrees=DEGREES, wide=wide)
    share, budget = 1.0, int(key_budget_mb * 1e6)
    for _ in range(ATTEMPTS):
        chain, packing = choose(
            output,
            depths,
            chains,
            precision=target,
            share=share,
            budget=budget,
            wide=wide,
            known=known,
        )
        public, private, found = lower(output, depths, chain, packing, captured.input_shapes, flooding, about or {})
        compiled = Compiled(public=public, private=private, rows=tuple(arguments))
        noise = float(np.abs(compiled.simulate(few, noise=0) - run(output, few)).max())
        # What was measured once is stated twice as large.
        error = max(public.error, 2 * noise)
        if error <= allowed:
            break
        if found != share:
            share = found
        else:
            target *= 0.9 * allowed / error
    else:
        raise CompileError(f"precision: got errors of {error:.2g}, expected {allowed:.2g}; ask for less")
    fit = float(np.abs(run(output, arguments) - plain).max())
    public = replace(public, error=error, approximation=fit)
    if not accept_disagreement:
        _refuse_disagreement(run(output, arguments), plain, public.error)
    if isinstance(circuit_privacy, StatisticalFlooding):
        private = replace(private, flood=chain.noise(share) * 2.0**circuit_privacy.bits * public.scale)
    return replace(compiled, public=public, private=private)


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
