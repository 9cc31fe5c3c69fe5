"""The model families: each a builder in one table, from a `ModelSpec` to a `torch.nn.Module` of one logit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fedinfer.errors import BadUsage

MAX_INPUTS = 4096
MAX_HIDDEN = 1024


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The public shape of a model: its family, its number of inputs and, where it has one, its hidden width."""

    family: str
    inputs: int
    hidden: int = 16

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise BadUsage(f"model family: got {self.family!r}, expected one of {', '.join(FAMILIES)}")
        if not 1 <= self.inputs <= MAX_INPUTS:
            raise BadUsage(f"model inputs: got {self.inputs}, expected 1 to {MAX_INPUTS}")
        if not 1 <= self.hidden <= MAX_HIDDEN:
            raise BadUsage(f"hidden width: got {self.hidden}, expected 1 to {MAX_HIDDEN}")


class Quadratic(nn.Module):
    """The activation x/2 + x²/4: close to softplus near zero, and exact under CKKS (one multiplication deep)."""

    coefficients = (0.0, 0.5, 0.25)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (0.5 + 0.25 * x)


def logistic(spec: ModelSpec) -> nn.Module:
    """Logistic regression: one linear layer, started at zero. (n, inputs) -> (n, 1) logits."""
    layer = nn.Linear(spec.inputs, 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(layer)


def mlp(spec: ModelSpec) -> nn.Module:
    """One hidden layer with a quadratic activation. (n, inputs) -> (n, 1) logits."""
    return nn.Sequential(nn.Linear(spec.inputs, spec.hidden), Quadratic(), nn.Linear(spec.hidden, 1))


FAMILIES: Mapping[str, Callable[[ModelSpec], nn.Module]] = {"logistic": logistic, "mlp": mlp}


def build(spec: ModelSpec, *, seed: int = 0) -> nn.Module:
    """Build the module of `spec` with starting weights drawn from the public `seed`.

    Guarantees: the same spec and seed give the same weights; the global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FAMILIES[spec.family](spec)
