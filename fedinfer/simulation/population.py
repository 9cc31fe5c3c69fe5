"""Who is in a federation: when its devices are there, how long they take, and how often they fail.

Everything is looked up by client and time from one seed, so that a population of a million costs nothing.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from fedinfer.errors import BadUsage
from fedinfer.privacy import PrivacyPlan
from fedinfer.privacy.checks import check_positive
from fedinfer.simulation.availability import Always, Availability, Clients, Floats
from fedinfer.simulation.draws import uniform


class Seconds(Protocol):
    """How long clients take for a task."""

    def of(self, clients: Clients, *, seed: int) -> Floats:
        """Each client's seconds, from being asked to having answered."""


@dataclass(frozen=True, kw_only=True)
class SameSeconds:
    """Everybody takes `seconds`."""

    seconds: float = 1.0

    def __post_init__(self) -> None:
        check_positive("seconds", self.seconds)

    def of(self, clients: Clients, *, seed: int) -> Floats:
        return np.full(len(clients), self.seconds)


@dataclass(frozen=True, kw_only=True)
class LogNormalSeconds:
    """Each client has a speed of its own: half take longer than `median_s`, and log(seconds) deviates by `sigma`."""

    median_s: float
    sigma: float

    def __post_init__(self) -> None:
        check_positive("median", self.median_s)
        if not 0.0 <= self.sigma < math.inf:
            raise BadUsage(f"sigma: got {self.sigma}, expected a finite number of at least 0")

    def of(self, clients: Clients, *, seed: int) -> Floats:
        normal: Floats = ndtri(uniform(seed, "speed", clients))
        return self.median_s * np.exp(self.sigma * normal)


class Answers(NamedTuple):
    """What becomes of tasks: `heard_s` is when the server hears from each client, be it only that it has gone."""

    heard_s: Floats
    answered: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Population:
    """When clients are there, how long they take, and with what probability one that is there fails at a task.

    A client that goes away before it is done has done nothing, and so has one that fails. `seed` decides all of it.
    None of it may depend on private rows: a server sees who answers, and when.
    """

    availability: Availability = field(default_factory=Always)
    seconds: Seconds = field(default_factory=SameSeconds)
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.dropout < 1.0:
            raise BadUsage(f"dropout: got {self.dropout}, expected 0 to less than 1")

    def there(self, clients: Clients, at_s: float) -> NDArray[np.bool_]:
        """Which clients are there."""
        return self.availability.stays_s(clients, np.asarray(at_s), seed=self.seed) > 0.0

    def ask(self, clients: Clients, at_s: Floats, numbers: Clients) -> Answers:
        """What becomes of a task for each client that begins at its `at_s`; `numbers` are the tasks' own."""
        stays = self.availability.stays_s(clients, at_s, seed=self.seed)
        takes = self.seconds.of(clients, seed=self.seed)
        fails = uniform(self.seed, "dropout", clients, numbers) < self.dropout
        return Answers(heard_s=at_s + np.minimum(stays, takes), answered=(stays >= takes) & ~fails)


def check_claim(plan: PrivacyPlan, population: Population) -> None:
    """Refuse a plan that claims privacy from a sample of clients which this population does not let a server draw.

    Amplification holds for a secret, uniform sample of the whole population. A server that picks from those it finds
    there picks each of them more often than the plan's rate, and the few who are there at a quiet hour in every round.
    (A sample of everybody, from which the absent are then missing, would keep the claim as long as absence depends on
    neither rows nor the sample; whether a server draws so cannot be seen from here.)

    Raises: BadUsage.
    """
    if plan.unit == "client" and plan.gdp() is None and not isinstance(population.availability, Always):
        raise BadUsage(
            "plan: got an ε that rests on sampling the whole population secretly, for one that is not always there; "
            "expected adversary='server' or a Cyclic sampler, which claim nothing for sampling"
        )
