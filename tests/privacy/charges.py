"""Charges that cost nothing to compute."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Light:
    """A charge with the numbers it is given. Its Rényi divergence is that of a Gaussian with `mu`."""

    steps: int = 1000
    delta: float = 1e-9
    epsilon_: float = 0.1
    mu: float | None = 0.1
    unit: str = "example"
    relation: str = "add or remove one"

    def epsilon(self) -> float:
        return self.epsilon_

    def rdp(self, order: float) -> float:
        return math.inf if self.mu is None else order * self.mu**2 / 2.0

    def gdp(self) -> float | None:
        return self.mu

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
