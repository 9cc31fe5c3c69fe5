"""A plan for sums that nobody sees but in total: each device adds a share of the noise, and the sum is what is private.

A device clips, rotates (`rotation.py`), scales, rounds to integers (`rounding.py`), adds discrete Gaussian noise and
reduces modulo 2^bits. A secure sum adds these vectors up; the server turns the sum back. What it then knows is a
discrete Gaussian mechanism up to `shares.py`, whose account is that of the Gaussian mechanism:

* *Sensitivity.* Where a client is the unit, its rounded vector keeps to a norm, which is the sensitivity. Where an
  example is, it moves the sum of its device before rounding by at most the clip norm: clipping, projecting to a ball
  and rotating move no two vectors apart. After rounding it is moved by a stochastic rounding of that difference, if
  both neighbours are given the same uniform numbers; these do not depend on the rows, and are independent of the noise.
  The rounded difference is longer than `sensitivity` with a probability that `ROUNDING_SHARE` of δ pays for over all
  steps, and never longer than `sure_sensitivity`, which Rényi divergences count with. (To hold the rounded *sum* of a
  device to a norm would bound nothing: tests/attacks/test_distributed_attacks.py.)
* *Sampling.* Given the uniform numbers and everybody else's sample, one example is in the sum or not, by its own coin:
  the Poisson-subsampled Gaussian mechanism, in each step, whatever was seen before.
* *Noise.* The shares are as good as a Gaussian up to a factor exp(± slack) over all coordinates and steps, which costs
  twice the slack in ε. The modulus is applied to the sum as well, so that it costs nothing; cutting off would.

References: Kairouz, Liu and Steinke 2021, arXiv:2102.06387 (the distributed discrete Gaussian); Zhu and Wang 2019
(Poisson sampling; a bound for any mechanism, looser than the Gaussian's own, in tests/privacy/test_distributed.py).
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedinfer.errors import BadUsage, RoundFailed, ShapeMismatch
from fedinfer.privacy.accounting import (
    LEAST_NOISE,
    MOST_NOISE,
    epsilon_of,
    gaussian_epsilon,
    least_noise,
    poisson_rdp,
)
from fedinfer.privacy.checks import check_delta, check_epsilon, check_positive
from fedinfer.privacy.discrete import discrete_gaussian
from fedinfer.privacy.noise import NoiseStream
from fedinfer.privacy.plan import (
    CLIP_NORMS,
    GRID_SLACK,
    LEAST_DELTA,
    MAX_DIMENSION,
    MAX_LEAK,
    MAX_STEPS,
    Adversary,
    Unit,
)
from fedinfer.privacy.rotation import rotate, rotate_back
from fedinfer.privacy.rounding import round_up_or_down, round_within
from fedinfer.privacy.samplers import Indices, Poisson, Relation, sampler_from_json, sampler_to_json
from fedinfer.privacy.shares import LEAST_SHARE, slack
from fedinfer.privacy.sum_grid import DOUBT, MOST_CLIPS, SumGrid

MAX_CLIENTS = 100_000
# Of a coordinate.
BITS = (16, 32)
# A device's sum is projected to this many times its equal part of the divisor. Gradients seldom point one way, and
# hospitals of twice the average size still fit; a larger factor costs precision.
HEADROOM = 2.0
# Of δ, for roundings that move a sum further than `sensitivity`.
ROUNDING_SHARE = 1e-3
# Rounding may raise the noise that an ε needs by this factor, at most.
MOST_LOSS = 2.0
# An honest sum fails `check_total` with this probability.
FALSE_ALARM = 1e-9
# The ε of a draft on whose grid there is no noise: large enough to be refused, and finite for the search.
NO_PRIVACY = 1e6


@dataclass(frozen=True, kw_only=True)
class DistributedPlan:
    """At most `steps` secure sums of clipped contributions, with noise in shares.

    Unit: one example (a patient), sampled on its device by Poisson, where nobody else sees it; or one client with its
    whole clipped update, at a sampling rate of 1. Relation: add or remove one, where a removed client's vector is zero.
    Adversary: the server together with `colluders` of the clients; it sees every sum, and everybody else's rows.
    Trusted: the device, its operating system's randomness, the secure sum, and that at least `min_honest` of the
    vectors in each sum have honest noise. `colluders` is recorded and shown; what counts is `min_honest`.

    noise_multiplier: standard deviation of `min_honest` shares together, in clip norms.
    divisor: public constant that the whole sum is divided by.
    dimension, clients: of what is summed: vectors (dimension,), at most `clients` of them.

    All fields are public constants; none may be computed from private rows.

    Guarantees: `steps` sums of vectors from `encode`, of data clipped to `clip_norm` over units chosen by `sample`, are
    (epsilon(), delta)-differentially private. Honest vectors wrap in no coordinate of any step but for a
    probability of 2^-40.
    """

    unit: Unit = "example"
    clip_norm: float
    noise_multiplier: float
    sampler: Poisson
    delta: float
    steps: int
    divisor: float
    dimension: int
    clients: int
    min_honest: int
    colluders: int
    bits: int = 24

    def __post_init__(self) -> None:
        if self.unit not in ("example", "client"):
            raise BadUsage(f"privacy unit: got {self.unit!r}, expected 'example' or 'client'")
        if not isinstance(self.sampler, Poisson):
            raise BadUsage(f"sampler: got {type(self.sampler).__name__}, expected Poisson")
        if self.unit == "client" and self.sampler.rate != 1.0:
            raise BadUsage(f"sampling rate: got {self.sampler.rate} for clients, expected 1; their server knows them")
        for name, number in (
            ("clip norm", self.clip_norm),
            ("noise multiplier", self.noise_multiplier),
            ("divisor", self.divisor),
        ):
            check_positive(name, number)
        check_delta(self.delta)
        if not CLIP_NORMS[0] <= self.clip_norm <= CLIP_NORMS[1]:
            raise BadUsage(f"clip norm: got {self.clip_norm}, expected {CLIP_NORMS[0]:g} to {CLIP_NORMS[1]:g}")
        if self.delta < LEAST_DELTA:
            raise BadUsage(f"delta: got {self.delta:g}, expected at least {LEAST_DELTA:g}")
        _check_whole("steps", self.steps, 1, MAX_STEPS)
        _check_whole("dimension", self.dimension, 1, MAX_DIMENSION)
        _check_whole("clients", self.clients, 1, MAX_CLIENTS)
        _check_whole("honest devices", self.min_honest, 1, self.clients)
        _check_whole("colluders beside the honest devices", self.colluders, 0, self.clients - self.min_honest)
        _check_whole("bits", self.bits, *BITS)
        self._check_account()

    def _check_account(self) -> None:
        if not self.most_norm <= MOST_CLIPS * self.clip_norm:
            raise BadUsage(f"divisor: got {self.divisor:g} for {self.clients} clients, expected less")
        leak = self.steps * (self.sampler.rate / self.noise_multiplier) ** 2
        if not LEAST_NOISE / 2 <= self.noise_multiplier <= MOST_NOISE or leak > MAX_LEAK:
            raise BadUsage(
                f"noise multiplier: got {self.noise_multiplier:g} for {self.steps} steps, expected more (and at most "
                f"{MOST_NOISE:g}); so little noise protects nothing"
            )
        grid = self._grid
        if not grid.cells or grid.share_variance < LEAST_SHARE or grid.sensitivity > MOST_LOSS * grid.cells:
            raise BadUsage(
                f"bits: got {self.bits}, expected more for {self.clients} clients and {self.dimension} coordinates: "
                f"the clip norm is {grid.cells:.3g} cells of the grid, and rounding would count for more than the data"
            )
        if self._slack > ROUNDING_SHARE / 2:
            raise BadUsage(f"bits: got {self.bits}, expected more: a share's noise is too coarse to account for")

    @classmethod
    def calibrate(
        cls,
        *,
        epsilon: float,
        delta: float,
        steps: int,
        unit: Unit = "example",
        clip_norm: float,
        sampler: Poisson,
        divisor: float,
        dimension: int,
        clients: int,
        min_honest: int,
        colluders: int,
        bits: int = 24,
    ) -> Self:
        """The plan with the least noise whose ε is at most `epsilon`: met from below to 1e-4, on a grid fine enough.

        Raises: BadUsage for an argument that cannot be, and where the modulus is too small for `epsilon`.
        """
        check_epsilon(epsilon)
        _check_whole("bits", bits, *BITS)
        # All but the modulus is checked before the search, with the noise of one clip norm.
        draft = cls(
            unit=unit,
            clip_norm=clip_norm,
            noise_multiplier=max(1.0, sampler.rate * math.sqrt(steps)),
            sampler=sampler,
            delta=delta,
            steps=steps,
            divisor=divisor,
            dimension=dimension,
            clients=clients,
            min_honest=min_honest,
            colluders=colluders,
            bits=BITS[1],
        )
        question = {**draft.to_json(), "noise_multiplier": None, "bits": bits}

        def spent(noise: float) -> float:
            return min(NO_PRIVACY, draft._epsilon(steps, replace(draft._grid, noise=noise, bits=bits)))

        try:
            noise = least_noise(spent, epsilon, start=sampler.rate * math.sqrt(steps), question=question)
        except BadUsage as error:
            raise BadUsage(f"{error}; or more bits than {bits}") from None
        return replace(draft, noise_multiplier=noise, bits=bits)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read `to_json` back.

        Raises: BadUsage for a missing or unknown field, or one that cannot be.
        """
        rest = dict(values)
        said = {name: rest.pop(name, None) for name in ("mechanism", "relation")}
        try:
            plan = cls(**{**rest, "sampler": sampler_from_json(rest.get("sampler", {}))})
        except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
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
        return "distributed discrete Gaussian of a secure sum"

    @property
    def relation(self) -> Relation:
        return self.sampler.relation

    @property
    def adversary(self) -> Adversary:
        return "server"

    @property
    def accountant(self) -> str:
        """What `epsilon` is computed by."""
        return "analytic Gaussian (Balle and Wang 2018)" if self.sampling_rate == 1.0 else "PLD (dp-accounting)"

    @property
    def sampling_rate(self) -> float:
        """The share of the units that takes part in a step."""
        return self.sampler.rate

    @property
    def padded(self) -> int:
        """d~, the coordinates of an encoded vector: the least power of two that holds `dimension`."""
        return self._grid.padded

    @property
    def scale(self) -> float:
        """Cells of the grid per unit: the largest with which an honest sum does not wrap."""
        return self._grid.cells / self.clip_norm

    @property
    def sensitivity(self) -> float:
        """How far one neighbour moves a sum in L2, in cells; where an example is the unit, but for what δ pays for."""
        return self._grid.sensitivity

    @property
    def share_variance(self) -> Fraction:
        """The variance of one device's noise, in cells."""
        return Fraction(self._grid.share_variance)

    @property
    def most_norm(self) -> float:
        """What a device's own clipped sum is projected to, in units."""
        return self._grid.most_norm * self.clip_norm

    def overshoot(self, survivors: int) -> float:
        """The variance of the noise over what is accounted for, if all `survivors` of a sum are honest."""
        return survivors / self.min_honest

    def epsilon(self, steps: int | None = None) -> float:
        """ε at `delta` after `steps` sums (default: all of the plan)."""
        return self._epsilon(self.steps if steps is None else steps, self._grid)

    def rdp(self, order: float) -> float:
        """Rényi divergence at `order` of the whole plan; under sampling that at the next whole order.

        It grows with the order, and what is known of sampled Gaussians at fractions is looser than that.
        """
        noise = self._grid.noise_multiplier(self._grid.sure_sensitivity)
        rate = self.sampling_rate
        at = order if rate == 1.0 else math.ceil(order)
        divergence = poisson_rdp(noise_multiplier=noise, sampling_rate=rate, steps=self.steps, order=at)
        return divergence + self._slack * (2.0 * order - 1.0) / (order - 1.0)

    def gdp(self) -> float | None:
        """μ of the whole plan if it is a Gaussian mechanism, which no amplified plan is.

        It holds up to `plan.GRID_SLACK` in ε; None where the shares are further from a Gaussian than that.
        """
        if self.sampling_rate < 1.0 or 2.0 * self._slack > GRID_SLACK:
            return None
        return math.sqrt(self.steps) / self._grid.noise_multiplier(self._grid.sure_sensitivity)

    def sample(self, units: int, stream: NoiseStream, *, step: int = 1) -> Indices:
        """Who of `units` takes part in `step` (from 1): sorted indices, maybe none."""
        return self.sampler.choose(units, step, stream)

    def encode(
        self, clipped_sum: NDArray[np.floating[Any]], stream: NoiseStream, *, rotation: str
    ) -> NDArray[np.uint32]:
        """A device's vector (dimension,) as integers (padded,) modulo 2^bits, with its share of the noise.

        `clipped_sum` is a sum of clipped contributions, or a client's update. A coordinate that is not finite counts
        as zero. `rotation` is public and the same for all vectors of a sum, and another for each sum.

        Guarantees: the vector adds to the sum no more than `most_norm`, its rounding and its noise.
        Raises: ShapeMismatch for another shape.
        """
        rounded = self._rounded(clipped_sum, stream, rotation=rotation)
        noise = discrete_gaussian(stream, variance=self.share_variance, count=self.padded)
        noise += rounded.astype(np.int64)
        return np.asarray(noise & (2**self.bits - 1), np.uint32)

    def decode(self, total: NDArray[np.unsignedinteger[Any]], *, rotation: str) -> NDArray[np.float32]:
        """The noised sum (dimension,) of vectors whose encodings add up to `total` (padded,), over the divisor.

        Raises: ShapeMismatch for another shape.
        """
        found = rotate_back(self._centred(total), text=rotation, dimension=self.dimension)
        return (found / (self.scale * self.divisor)).astype(np.float32)

    def check_total(self, total: NDArray[np.unsignedinteger[Any]], *, survivors: int) -> None:
        """Raises: RoundFailed if the norm of `total` is more than `survivors` honest vectors can add up to.

        They add `most_norm` each, and roundings and noise that are sub-Gaussian in each coordinate: with v for their
        variance proxy, x for ln 1e9 and d for the coordinates, the norm of these is at most the root of
        v (d + 2 sqrt(d x) + 2 x), but for a probability of 1e-9. (Hsu, Kakade and Zhang 2012, arXiv:1110.2842.)
        A vector that wraps, such as one with a wrong mask, is random over the modulus, and several times as long.
        """
        retries = survivors * -math.log1p(-DOUBT) if self.unit == "client" else 0.0
        x = math.log(1.0 / FALSE_ALARM) + retries
        proxy = survivors * (0.25 + self._grid.share_variance)
        spread = math.sqrt(proxy * (self.padded + 2.0 * math.sqrt(self.padded * x) + 2.0 * x))
        most = survivors * self._grid.most_norm * self._grid.cells + spread
        norm = float(np.linalg.norm(self._centred(total)))
        if norm > most:
            raise RoundFailed(
                f"sum: got a norm of {norm / self.scale:.4g}, expected at most {most / self.scale:.4g} from "
                f"{survivors} honest devices; the round is of no use"
            )

    @cached_property
    def _grid(self) -> SumGrid:
        example = self.unit == "example"
        return SumGrid(
            dimension=self.dimension,
            clients=self.clients,
            min_honest=self.min_honest,
            bits=self.bits,
            steps=self.steps,
            most_norm=HEADROOM * self.divisor / self.clients if example else 1.0,
            noise=self.noise_multiplier,
            rounding_doubt=ROUNDING_SHARE * self.delta / self.steps if example else None,
        )

    @cached_property
    def _slack(self) -> float:
        return self._slack_of(self._grid, self.steps)

    def _slack_of(self, grid: SumGrid, steps: int) -> float:
        coordinates = grid.padded * steps
        return slack(share_variance=grid.share_variance, shares=self.min_honest, coordinates=coordinates)

    def _epsilon(self, steps: int, grid: SumGrid) -> float:
        if steps == 0:
            return 0.0
        apart = self._slack_of(grid, steps)
        noise = grid.noise_multiplier(grid.sensitivity) if grid.cells else 0.0
        if noise < LEAST_NOISE / 4 or apart > ROUNDING_SHARE / 2:
            return math.inf
        # What is left pays for the roundings, and for the factor exp(slack) on both.
        delta = self.delta * (1.0 - 2.0 * ROUNDING_SHARE)
        if self.sampling_rate == 1.0:
            return gaussian_epsilon(mu=math.sqrt(steps) / noise, delta=delta) + 2.0 * apart
        rate = self.sampling_rate
        return epsilon_of(noise_multiplier=noise, sampling_rate=rate, steps=steps, delta=delta) + 2.0 * apart

    def _rounded(self, vector: NDArray[np.floating[Any]], stream: NoiseStream, *, rotation: str) -> NDArray[np.float64]:
        """The vector within its ball, rotated, scaled and rounded, before any noise."""
        if vector.shape != (self.dimension,):
            raise ShapeMismatch(got=vector.shape, expected=(self.dimension,), what="vector of a sum")
        inside = _projected(vector, self.most_norm)
        cells = rotate(inside, text=rotation) * self.scale
        if self.unit == "client":
            return round_within(cells, stream, limit=self._grid.rounded_norm)
        return round_up_or_down(cells, stream)

    def _centred(self, total: NDArray[np.unsignedinteger[Any]]) -> NDArray[np.float64]:
        """Residues (padded,) as the integers nearest to zero that they stand for."""
        if total.shape != (self.padded,):
            raise ShapeMismatch(got=total.shape, expected=(self.padded,), what="sum")
        size = 2**self.bits
        residues = total.astype(np.int64) & (size - 1)
        return np.asarray(np.where(residues >= size // 2, residues - size, residues), np.float64)


def _check_whole(name: str, value: int, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise BadUsage(f"{name}: got {value}, expected a whole number from {low} to {high}")


def _projected(vector: NDArray[np.floating[Any]], norm: float) -> NDArray[np.float64]:
    """The nearest point to `vector` of the ball of radius `norm`; a coordinate that is not finite is zero first."""
    finite = np.nan_to_num(vector.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    # Divided by the largest first: the squares of finite numbers may not be finite.
    largest = float(np.abs(finite).max())
    if largest == 0.0:
        return finite
    length = float(np.linalg.norm(finite / largest))
    return finite * (norm / largest / length) if largest * length > norm else finite
