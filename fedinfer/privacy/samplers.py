"""Who takes part in a step: samplers, what each may claim, and the neighbouring relation that its claim is for.

A sampler has no private field: not the number of rows of a device, above all (`FixedSize.population` is public, and
only devices or rows whose number everybody may know can be sampled so).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedinfer.errors import BadUsage
from fedinfer.privacy.noise import NoiseStream

Relation = Literal["add or remove one", "replace one", "add or remove one, slots fixed"]
Indices = NDArray[np.int64]
# Uniform numbers have 52 bits: a rate near their last would not be what is sampled.
LEAST_RATE = 1e-9


@dataclass(frozen=True, kw_only=True)
class Poisson:
    """Each unit takes part in each step independently, with probability `rate`; a rate of 1 is everybody.

    Reference: Abadi et al. 2016, arXiv:1607.00133 (amplification under adding or removing one).
    """

    rate: float

    def __post_init__(self) -> None:
        if not LEAST_RATE <= self.rate <= 1.0:
            raise BadUsage(f"sampling rate: got {self.rate}, expected {LEAST_RATE:g} to 1")

    @property
    def relation(self) -> Relation:
        return "add or remove one"

    def participations(self, steps: int) -> int:
        return steps

    def choose(self, units: int, step: int, stream: NoiseStream) -> Indices:
        return np.flatnonzero(stream.uniform(units) < self.rate)

    def choose_each(self, units: Sequence[int], stream: NoiseStream) -> list[Indices]:
        """What `choose` gives for one device after another, with `units` of their own."""
        ends = np.cumsum(units, dtype=np.int64)
        chosen = np.flatnonzero(stream.uniform(int(ends[-1])) < self.rate)
        cuts = [0, *np.searchsorted(chosen, ends).tolist()]
        return [
            chosen[cut:next_cut] - (end - own)
            for cut, next_cut, end, own in zip(cuts[:-1], cuts[1:], ends.tolist(), units, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class FixedSize:
    """In each step `size` of `population` units, uniformly and without replacement; the population is public.

    Reference: Wang, Balle and Kasiviswanathan 2019, arXiv:1808.00087 (amplification under replacing one, by Rényi).
    """

    size: int
    population: int

    def __post_init__(self) -> None:
        if not (type(self.size) is int and type(self.population) is int and 1 <= self.size <= self.population):
            raise BadUsage(f"fixed size: got {self.size} of {self.population}, expected 1 to all of them")

    @property
    def rate(self) -> float:
        return self.size / self.population

    @property
    def relation(self) -> Relation:
        return "replace one"

    def participations(self, steps: int) -> int:
        return steps

    def choose(self, units: int, step: int, stream: NoiseStream) -> Indices:
        if units != self.population:
            raise BadUsage(f"fixed size: got {units} units, expected the public population of {self.population}")
        return np.sort(np.argsort(stream.uniform(units), kind="stable")[: self.size])


@dataclass(frozen=True, kw_only=True)
class Cyclic:
    """Each unit takes part in every `period`-th step: unit i in steps i + 1, i + 1 + period and so on.

    No amplification is claimed: everybody may know the schedule.
    """

    period: int

    def __post_init__(self) -> None:
        if type(self.period) is not int or self.period < 1:
            raise BadUsage(f"period: got {self.period}, expected a whole number of at least 1")

    @property
    def rate(self) -> float:
        return 1.0 / self.period

    @property
    def relation(self) -> Relation:
        return "add or remove one, slots fixed"

    def participations(self, steps: int) -> int:
        return math.ceil(steps / self.period)

    def choose(self, units: int, step: int, stream: NoiseStream) -> Indices:
        return np.arange((step - 1) % self.period, units, self.period, dtype=np.int64)


Sampler = Poisson | FixedSize | Cyclic
SAMPLERS: Mapping[str, type[Sampler]] = {"poisson": Poisson, "fixed size": FixedSize, "cyclic": Cyclic}


def sampler_to_json(sampler: Sampler) -> dict[str, Any]:
    """The public fields and the kind."""
    (kind,) = (kind for kind, known in SAMPLERS.items() if type(sampler) is known)
    return {"kind": kind, **asdict(sampler)}


def sampler_from_json(fields: Mapping[str, Any]) -> Sampler:
    """Read `sampler_to_json` back.

    Raises: BadUsage for a kind without a proof of what it would claim, or a field that cannot be.
    """
    rest = dict(fields)
    kind = rest.pop("kind", None)
    if kind not in SAMPLERS:
        raise BadUsage(
            f"sampler: got {kind!r}, for which no amplification is proven here; expected {', '.join(SAMPLERS)}. "
            "Shuffled batches are cyclic: their shuffling counts for nothing"
        )
    try:
        return SAMPLERS[kind](**rest)
    except TypeError as error:
        raise BadUsage(f"sampler: {error}") from None
