"""A saved model as a compiled circuit: what `fedinfer serve` answers with and `fedinfer compile` explains."""

import torch

from fedinfer.encrypted.compiled import Compiled
from fedinfer.encrypted.compiler import CircuitPrivacy, Objective, compile_model
from fedinfer.models import Model

ROWS = 256
SEED = 0


def public_rows(width: int) -> torch.Tensor:
    """Rows (2 * ROWS, width) over the range that a schema maps every column to, its corners among them: public."""
    generator = torch.Generator().manual_seed(SEED)
    inside = torch.rand(ROWS, width, generator=generator) * 2 - 1
    corners = torch.randint(0, 2, (ROWS, width), generator=generator) * 2.0 - 1
    return torch.cat([inside, corners])


def compile_served(
    model: Model, *, objective: Objective = "latency", precision: float = 2e-3,
    circuit_privacy: CircuitPrivacy = "rerandomised",
) -> Compiled:  # fmt: skip
    """Compile `model`; the circuit carries its schema, labels and threshold for the client.

    Raises: CompileError if it has no encrypted form.
    """
    net = model.module()
    rows = public_rows(model.spec.inputs)
    # The rows that drive the units of the first layer furthest: random ones do not come near.
    first = next(iter(model.state.values()))
    extreme = torch.sign(first.reshape(len(first), -1))
    if extreme.shape[1] == model.spec.inputs:
        rows = torch.cat([rows, extreme, -extreme])
    return compile_model(
        net,
        rows[:1],
        calibration=rows,
        objective=objective,
        precision=precision,
        circuit_privacy=circuit_privacy,
        about={
            "schema": dict(model.schema),
            "schema_digest": model.schema_digest,
            "labels": list(model.labels),
            "threshold": model.threshold,
        },
    )
