"""A privacy plan: one object samples, clips, adds noise *and* accounts, so that they cannot disagree.

A release is made on an integer grid: the clipped sum is rounded to it, and the noise is an exact discrete Gaussian of
2**40 cells. Three things follow, and the account pays for each. Rounding makes the sensitivity of a vector (d,) larger
by sqrt(d) cells (32 times as much is counted, because floats far from zero are coarser than a cell). The discrete
Gaussian has, in each cell, the probability of a rounded Gaussian up to a factor within 1e-21 of 1 (both tails beyond 50
standard deviations are less than exp(-1000)): over 2**26 coordinates and 100,000 releases less than `GRID_SLACK` in ε.
And a rounded Gaussian is the Gaussian mechanism with something done to its answer, whose loss distribution is known.

References: Abadi et al. 2016, arXiv:1607.00133 (DP-SGD); Canonne, Kamath and Steinke 2020, arXiv:2004.00010.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from fedinfer.errors import BadUsage, ShapeMismatch
from fedinfer.privacy.accounting import (
    LEAST_NOISE,
    MOST_NOISE,
    ORDERS,
    epsilon_of,
    fixed_size_rdp,
    gaussian_epsilon,
    least_noise,
    poisson_rdp,
    rdp_epsilon,
)
from fedinfer.privacy.checks import check_delta, check_epsilon, check_positive
from fedinfer.privacy.discrete import discrete_gaussian
from fedinfer.privacy.noise import NoiseStream
from fedinfer.privacy.samplers import (
    Cyclic,
    FixedSize,
    Indices,
    Poisson,
    Relation,
    Sampler,
    sampler_from_json,
    sampler_to_json,
)

Unit = Literal["example", "client"]
Adversary = Literal["server", "outsider"]
MAX_STEPS = 100_000
MAX_DIMENSION = 1 << 26
# Steps times (rate / noise)²: ε is in the hundreds here, and a device would spend minutes accounting for much more.
MAX_LEAK = 1000.0
CLIP_NORMS = (1e-12, 1e12)
# The Fourier transforms behind a loss distribution round at about 1e-13.
LEAST_DELTA = 1e-10
GRID_SIGMA = 1 << 40
GRID_SLACK = 1e-8
# A sum further out is cut off there. Below it floats are at most 16 cells apart.
GRID_LIMIT = float(1 << 56)
GRID_ERROR = 32


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """At most `steps` noised sums of clipped contributions, each over a fresh sample.

    Unit: one example (a patient), sampled on the device, where nobody else sees it; or one client, sampled by a
    server. Relation: what `sampler` is proven for (`relation`). Adversary: "server" knows who takes part in a step
    and sees every release; "outsider" sees every release and trusts whoever samples. They differ for clients alone:
    a server that picks devices knows the cohort, so that against it nothing is amplified and a client pays for each
    of its participations in full. `epsilon` is against `adversary` unless it is asked for the other.
    Trusted: the device and its operating system's randomness; against the server too, if `min_honest` is 1. With
    more, a device adds its share of the noise only, and the sum of at least `min_honest` honest devices is what is
    private: such a plan needs a secure sum.

    All fields are public constants; none may be computed from private rows, `divisor` above all.

    Guarantees: `steps` calls of `release` on sums clipped to `clip_norm` over units chosen by `sample` are
    (epsilon(), delta)-differentially private, the grid and its noise included.
    """

    unit: Unit = "example"
    clip_norm: float
    noise_multiplier: float
    sampler: Sampler
    delta: float
    steps: int
    divisor: float = 1.0
    adversary: Adversary = "server"
    min_honest: int = 1

    def __post_init__(self) -> None:
        if self.unit not in ("example", "client"):
            raise BadUsage(f"privacy unit: got {self.unit!r}, expected 'example' or 'client'")
        if not isinstance(self.sampler, Poisson | FixedSize | Cyclic):
            raise BadUsage(f"sampler: got {type(self.sampler).__name__}, expected Poisson, FixedSize or Cyclic")
        _check_adversary(self.adversary)
        check_positive("clip norm", self.clip_norm)
        check_positive("noise multiplier", self.noise_multiplier)
        check_positive("divisor", self.divisor)
        check_delta(self.delta)
        if not CLIP_NORMS[0] <= self.clip_norm <= CLIP_NORMS[1]:
            raise BadUsage(f"clip norm: got {self.clip_norm}, expected {CLIP_NORMS[0]:g} to {CLIP_NORMS[1]:g}")
        if self.delta < LEAST_DELTA:
            raise BadUsage(
                f"delta: got {self.delta:g}, expected at least {LEAST_DELTA:g}; below it rounding tells more"
            )
        if type(self.steps) is not int or not 1 <= self.steps <= MAX_STEPS:
            raise BadUsage(f"steps: got {self.steps}, expected a whole number from 1 to {MAX_STEPS}")
        if type(self.min_honest) is not int or self.min_honest < 1:
            raise BadUsage(f"honest devices: got a minimum of {self.min_honest}, expected a whole number of at least 1")
        if not LEAST_NOISE / 2 <= self.noise_multiplier <= MOST_NOISE or self._leak() > MAX_LEAK:
            raise BadUsage(
                f"noise multiplier: got {self.noise_multiplier:g} for {self.steps} steps, expected more (and at most "
                f"{MOST_NOISE:g}); so little noise protects nothing"
            )

    @classmethod
    def calibrate(
        cls,
        *,
        epsilon: float,
        delta: float,
        steps: int,
        unit: Unit = "example",
        clip_norm: float,
        sampler: Sampler,
        divisor: float = 1.0,
        adversary: Adversary = "server",
        min_honest: int = 1,
    ) -> Self:
        """The plan with the least noise whose ε against `adversary` is at most `epsilon`, met from below to 1e-4.

        Raises: BadUsage for an argument that cannot be.
        """
        check_epsilon(epsilon)
        draft = cls(
            unit=unit,
            clip_norm=clip_norm,
            noise_multiplier=MOST_NOISE,
            sampler=sampler,
            delta=delta,
            steps=steps,
            divisor=divisor,
            adversary=adversary,
            min_honest=min_honest,
        )

        def spent(noise: float) -> float:
            return draft._epsilon(steps, adversary, noise)

        question = {key: draft.to_json()[key] for key in ("unit", "sampler", "delta", "steps", "adversary")}
        start = draft._rate(adversary) * math.sqrt(steps)
        return replace(draft, noise_multiplier=least_noise(spent, epsilon, start=start, question=question))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read `to_json` back.

        Raises: BadUsage for a missing or unknown field, or one that cannot be.
        """
        rest = dict(values)
        said = {name: rest.pop(name, None) for name in ("mechanism", "relation")}
        try:
            plan = cls(**{**rest, "sampler": sampler_from_json(rest.get("sampler", {}))})
        except (TypeError, AttributeError) as error:
            raise BadUsage(f"privacy plan: {error}") from None
        if said != {"mechanism": plan.mechanism, "relation": plan.relation}:
            raise BadUsage(f"privacy plan: got {said}, expected {plan.mechanism!r} and {plan.relation!r}")
        return plan

    def to_json(self) -> dict[str, Any]:
        """The public fields as JSON values, with the names of mechanism and relation."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        names = {"mechanism": self.mechanism, "relation": self.relation}
        return {**values, "sampler": sampler_to_json(self.sampler), **names}

    def digest(self) -> str:
        """SHA-256 of the fields: two plans are the same, or not."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    @property
    def mechanism(self) -> str:
        return "discrete Gaussian of a clipped sum"

    @property
    def relation(self) -> Relation:
        return self.sampler.relation

    @property
    def accountant(self) -> str:
        """What `epsilon` is computed by, against `adversary`."""
        if self._rate(self.adversary) == 1.0:
            return "analytic Gaussian (Balle and Wang 2018)"
        return "PLD (dp-accounting)" if isinstance(self.sampler, Poisson) else "Rényi (dp-accounting)"

    @property
    def sampling_rate(self) -> float:
        """The share of the units that takes part in a step, amplified or not."""
        return self.sampler.rate

    def epsilon(self, steps: int | None = None, *, adversary: Adversary | None = None) -> float:
        """ε at `delta` after `steps` releases (default: all of the plan)."""
        against = self.adversary if adversary is None else adversary
        _check_adversary(against)
        return self._epsilon(self.steps if steps is None else steps, against, self.noise_multiplier)

    def rdp(self, order: float) -> float:
        """Rényi divergence at `order` of the whole plan, against `adversary`."""
        slack = 2 * GRID_SLACK * order / (order - 1.0)
        noise, rate = _on_grid(self.noise_multiplier), self._rate(self.adversary)
        if isinstance(self.sampler, FixedSize):
            size = self.sampler.size if rate < 1.0 else self.sampler.population
            (divergence,) = fixed_size_rdp(
                noise_multiplier=noise,
                size=size,
                population=self.sampler.population,
                steps=self.steps,
                orders=(order,),
            )
            return divergence + slack
        steps = self.sampler.participations(self.steps)
        return poisson_rdp(noise_multiplier=noise, sampling_rate=rate, steps=steps, order=order) + slack

    def gdp(self) -> float | None:
        """μ of the whole plan if it is a Gaussian mechanism against `adversary`, which no amplified plan is.

        It holds up to `GRID_SLACK` in ε.
        """
        return self._mu(self.steps, self.noise_multiplier) if self._rate(self.adversary) == 1.0 else None

    def sample(self, units: int, stream: NoiseStream, *, step: int = 1) -> Indices:
        """Who of `units` takes part in `step` (from 1): sorted indices, maybe none."""
        return self.sampler.choose(units, step, stream)

    def release(self, clipped_sum: NDArray[np.floating[Any]], stream: NoiseStream) -> NDArray[np.float32]:
        """Round a sum (d,) of clipped contributions to the grid, add the noise, divide by the public divisor.

        A coordinate that is not finite counts as zero.
        Raises: ShapeMismatch if it is not a vector of at most 2**26; BadUsage for a plan that needs a secure sum.
        """
        if clipped_sum.ndim != 1 or len(clipped_sum) > MAX_DIMENSION:
            raise ShapeMismatch(got=clipped_sum.shape, expected="(d,), at most 2**26", what="clipped sum")
        if self.min_honest > 1:
            raise BadUsage(f"release: got a plan for {self.min_honest} honest devices, whose noise needs a secure sum")
        cell = self.noise_multiplier * self.clip_norm / GRID_SIGMA
        with np.errstate(over="ignore"):
            scaled = clipped_sum.astype(np.float64) / cell
        if not max(scaled.max(initial=0.0), -scaled.min(initial=0.0)) <= GRID_LIMIT:
            # Infinities and what is not a number are not within it either.
            scaled = np.where(np.isfinite(clipped_sum), scaled.clip(-GRID_LIMIT, GRID_LIMIT), 0.0)
        np.rint(scaled, out=scaled)
        cells = scaled.astype(np.int64)
        cells += discrete_gaussian(stream, variance=GRID_SIGMA**2, count=len(cells))
        np.multiply(cells, cell / self.divisor, out=scaled)
        return scaled.astype(np.float32)

    def _leak(self) -> float:
        participations = self.sampler.participations(self.steps)
        return participations * (self._rate("outsider") / self.noise_multiplier) ** 2

    def _rate(self, adversary: Adversary) -> float:
        """The sampling rate that counts against `adversary`."""
        secret = self.unit == "example" or adversary == "outsider"
        return self.sampler.rate if secret and not isinstance(self.sampler, Cyclic) else 1.0

    def _mu(self, steps: int, noise: float) -> float:
        sensitivity = 2.0 if self.relation == "replace one" else 1.0
        return sensitivity * math.sqrt(self.sampler.participations(steps)) / _on_grid(noise)

    def _epsilon(self, steps: int, adversary: Adversary, noise: float) -> float:
        if steps == 0:
            return 0.0
        rate, delta = self._rate(adversary), self.delta * (1.0 - GRID_SLACK)
        if rate == 1.0:
            return gaussian_epsilon(mu=self._mu(steps, noise), delta=delta) + GRID_SLACK
        if isinstance(self.sampler, FixedSize):
            size, population = self.sampler.size, self.sampler.population
            divergences = fixed_size_rdp(
                noise_multiplier=_on_grid(noise), size=size, population=population, steps=steps, orders=ORDERS
            )
            return rdp_epsilon(ORDERS, divergences, delta=delta) + GRID_SLACK
        return epsilon_of(noise_multiplier=_on_grid(noise), sampling_rate=rate, steps=steps, delta=delta) + GRID_SLACK


def _on_grid(noise_multiplier: float) -> float:
    """The noise as a multiple of a sensitivity that rounding has made larger in every coordinate."""
    return noise_multiplier / (1.0 + noise_multiplier * GRID_ERROR * math.sqrt(MAX_DIMENSION) / GRID_SIGMA)


def _check_adversary(adversary: str) -> None:
    if adversary not in ("server", "outsider"):
        raise BadUsage(f"adversary: got {adversary!r}, expected 'server' or 'outsider'")
