"""Server rules: from the mean of the devices' gradients to new weights. Adding one is a class and a row in `RULES`.

Reference: Reddi et al. 2021, arXiv:2003.00295 (adaptive federated optimisation; the mean is its pseudo-gradient).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedinfer.arrays import Vector
from fedinfer.errors import BadUsage

RuleState = Mapping[str, Vector]


class ServerRule(Protocol):
    """From a mean to new weights. The state is vectors by name, so that a checkpoint can hold it."""

    def init(self, weights: Vector) -> RuleState: ...
    def step(self, weights: Vector, mean: Vector, state: RuleState) -> tuple[Vector, RuleState]: ...


@dataclass(frozen=True, kw_only=True)
class FedSgd:
    """Gradient descent with heavy-ball momentum.

    Reference: McMahan et al. 2017, arXiv:1602.05629 (FedSGD); Hsu et al. 2019, arXiv:1909.06335 (server momentum).
    """

    learning_rate: float
    momentum: float = 0.0

    def init(self, weights: Vector) -> RuleState:
        return {"velocity": np.zeros_like(weights)}

    def step(self, weights: Vector, mean: Vector, state: RuleState) -> tuple[Vector, RuleState]:
        velocity = np.float32(self.momentum) * state["velocity"] + mean
        return weights - np.float32(self.learning_rate) * velocity, {"velocity": velocity}


@dataclass(frozen=True, kw_only=True)
class FedAdaptive:
    """FedAdam, or FedYogi where `yogi`: steps scaled by a running second moment (Reddi et al. 2021, algorithm 2)."""

    learning_rate: float
    momentum: float = 0.9
    decay: float = 0.99
    floor: float = 1e-3
    yogi: bool = False

    def init(self, weights: Vector) -> RuleState:
        return {"first": np.zeros_like(weights), "second": np.full_like(weights, self.floor**2)}

    def step(self, weights: Vector, mean: Vector, state: RuleState) -> tuple[Vector, RuleState]:
        square = mean * mean
        first = np.float32(self.momentum) * state["first"] + np.float32(1.0 - self.momentum) * mean
        gain = np.float32(1.0 - self.decay)
        if self.yogi:
            second = state["second"] - gain * square * np.sign(state["second"] - square)
        else:
            second = np.float32(self.decay) * state["second"] + gain * square
        change = np.float32(self.learning_rate) * first / (np.sqrt(second) + np.float32(self.floor))
        return np.asarray(weights - change, np.float32), {"first": first, "second": second}


RULES: Mapping[str, Callable[[float, float], ServerRule]] = {
    "fedsgd": lambda rate, momentum: FedSgd(learning_rate=rate, momentum=momentum),
    "fedadam": lambda rate, momentum: FedAdaptive(learning_rate=rate, momentum=momentum),
    "fedyogi": lambda rate, momentum: FedAdaptive(learning_rate=rate, momentum=momentum, yogi=True),
}


def rule_named(name: str, *, learning_rate: float, momentum: float) -> ServerRule:
    """The rule of that name in `RULES`.

    Raises: BadUsage if there is none.
    """
    if name not in RULES:
        raise BadUsage(f"rule: got {name!r}, expected one of {', '.join(RULES)}")
    return RULES[name](learning_rate, momentum)
