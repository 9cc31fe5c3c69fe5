"""Lower bounds on ε, proven by guessing: from pairs of runs, and from a single run with many canaries.

Every bound is wrong, which is above the true ε, with probability at most `error`. None assumes anything of the code
under audit but what its docstring says.

References: Nasr et al. 2023, arXiv:2302.07956; Steinke, Nasr and Jagielski 2023, arXiv:2305.08846.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, ndtri
from scipy.stats import binom

from fedinfer.errors import BadUsage
from fedinfer.privacy.accounting import epsilon_of, gaussian_epsilon

Floats = NDArray[np.float64]
# From bounds on false alarms and misses, one for each threshold, to what they prove.
Bound = Callable[[Floats, Floats], Floats]
# Nobody asks whether ε is 30 or 40.
MOST = 30.0
TAIL_POINTS = 200
FAR = 1e300
# Where the trade-off curve of a sampled mechanism is looked at, as δ, and for which noise multipliers.
CURVE = (1e-1, 1e-2, 1e-3)
SAMPLED_NOISES = tuple(0.5 * 1.015**power for power in range(357))


@dataclass(frozen=True, kw_only=True)
class Game:
    """Scores of a distinguishing game: one number a run, from runs without and with the canary.

    The runs of a world must be independent of each other. Half of them choose the threshold, the rest are counted. A
    score that is not a number is a guess like any other: the run was poisoned.
    """

    without: NDArray[np.floating[Any]] = field(repr=False)
    present: NDArray[np.floating[Any]] = field(repr=False)

    def __post_init__(self) -> None:
        if min(len(self.without), len(self.present)) < 4:
            raise BadUsage("game: got fewer than four runs of a world, expected more")

    def epsilon_lower(self, *, delta: float, error: float) -> float:
        """ε that any mechanism with these answers has at least: the rates are bounded by Clopper and Pearson.

        Assumes nothing: an (ε, δ)-private mechanism has P[guess | present] ≤ e^ε P[guess | without] + δ, whichever
        way round the worlds are taken.
        """

        def bound(alarm: Floats, miss: Floats) -> Floats:
            return np.maximum(_log_ratio(1.0 - miss - delta, alarm), _log_ratio(1.0 - alarm - delta, miss))

        return min(MOST, max(0.0, float(bound(*self._rates(bound, error))[0])))

    def gaussian_epsilon_lower(self, *, delta: float, error: float) -> float:
        """ε of the most private Gaussian mechanism that these answers do not rule out. It is nearly tight.

        Assumes that false alarms and misses trade off as a Gaussian mechanism's do, which has one parameter μ: true
        of Gaussian noise without sampling, whatever the number of steps.
        Reference: Nasr et al. 2023, arXiv:2302.07956.
        """
        mu = float(_gaussian_mu(*self._rates(_gaussian_mu, error))[0])
        return min(MOST, gaussian_epsilon(mu=mu, delta=delta)) if mu > 0.0 else 0.0

    def sampled_epsilon_lower(self, *, rate: float, steps: int, delta: float, error: float) -> float:
        """ε of the most private sampled Gaussian mechanism that these answers do not rule out. It is nearly tight.

        Assumes `steps` Gaussian releases on Poisson samples at `rate`, of which the noise alone is not known. Some
        noise, and all above it, is ruled out if at some δ the answers would take a larger ε than it has.
        """
        rates = self._rates(_gaussian_mu, error)
        alarm, miss = (float(rate_of[0]) for rate_of in rates)

        def spent(noise: float, at: float) -> float:
            return epsilon_of(noise_multiplier=noise, sampling_rate=rate, steps=steps, delta=at)

        def ruled_out(noise: float) -> bool:
            factors = ((at, math.exp(spent(noise, at))) for at in CURVE)
            return any(max(1.0 - miss - e * alarm, 1.0 - alarm - e * miss) > at for at, e in factors)

        # The same few multipliers for every game, so that their accounts are made once.
        low, high = 0, len(SAMPLED_NOISES) - 1
        if not ruled_out(SAMPLED_NOISES[high]):
            return 0.0
        if not ruled_out(SAMPLED_NOISES[low]):
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if ruled_out(SAMPLED_NOISES[middle]) else (middle, high)
            low = high
        return min(MOST, spent(SAMPLED_NOISES[low], delta))

    def _rates(self, bound: Bound, error: float) -> tuple[Floats, Floats]:
        """Upper bounds (1,) on false alarms and misses, at the threshold where `bound` is largest on the first half."""
        choosing, counting = ([_finite(world[start::2]) for world in (self.without, self.present)] for start in (0, 1))
        tails = np.logspace(-5, -0.3, TAIL_POINTS)
        levels = np.concatenate([tails, 1.0 - tails])
        # Halfway between all scores of one world and all of the other, should they be apart.
        gap = (choosing[0].max() / 2.0 + choosing[1].min() / 2.0)[None]
        thresholds = np.concatenate([*(np.quantile(half, levels) for half in choosing), gap])
        best = int(np.argmax(bound(*_upper_rates(choosing, thresholds, error))))
        return _upper_rates(counting, thresholds[[best]], error)


@dataclass(frozen=True, kw_only=True)
class Guesses:
    """The answers of a one-run audit: of `canaries` fair coins, `made` were guessed and `right` of those are right.

    >>> round(Guesses(canaries=1000, made=100, right=90).epsilon_lower(delta=1e-5, error=0.05), 2)
    1.63
    """

    canaries: int
    made: int
    right: int

    def __post_init__(self) -> None:
        if not 0 <= self.right <= self.made <= self.canaries or self.made == 0:
            raise BadUsage(f"guesses: got {self.right} right of {self.made} of {self.canaries} canaries")

    @classmethod
    def from_scores(cls, scores: Floats, present: NDArray[np.bool_], *, each_side: int) -> "Guesses":
        """Guess the `each_side` highest scores present and the `each_side` lowest absent.

        `each_side` must be fixed before the scores are looked at.
        """
        order = np.argsort(np.nan_to_num(scores, nan=np.inf), kind="stable")
        right = int(present[order[-each_side:]].sum() + (~present[order[:each_side]]).sum())
        return cls(canaries=len(scores), made=2 * each_side, right=right)

    def epsilon_lower(self, *, delta: float, error: float) -> float:
        """The largest ε at which so many right guesses have probability at most `error`.

        Assumes nothing but that each canary was in or out by a fair coin of its own.
        Reference: Steinke, Nasr and Jagielski 2023, arXiv:2305.08846.
        """
        if self.chance(0.0, delta=delta) > error:
            return 0.0
        low, high = 0.0, MOST
        while high - low > 1e-4:
            middle = (low + high) / 2.0
            low, high = (middle, high) if self.chance(middle, delta=delta) <= error else (low, middle)
        return low

    def chance(self, epsilon: float, *, delta: float) -> float:
        """A bound on the probability of so many right guesses against an (ε, δ)-private mechanism."""
        lucky = 1.0 / (1.0 + math.exp(-epsilon))
        at_least = binom.sf(np.arange(self.right, -1, -1) - 1, self.made, lucky)
        steps = np.arange(1, self.right + 1)
        slope = float(np.max((at_least[1:] - at_least[0]) / steps)) if len(steps) else 0.0
        return min(1.0, float(at_least[0]) + 2.0 * self.canaries * delta * slope)


def _finite(scores: NDArray[np.floating[Any]]) -> Floats:
    return np.nan_to_num(scores.astype(np.float64), nan=FAR, posinf=FAR, neginf=-FAR)


def _gaussian_mu(alarm: Floats, miss: Floats) -> Floats:
    mu: Floats = -ndtri(alarm) - ndtri(miss)
    return mu


def _upper_rates(worlds: list[Floats], thresholds: Floats, error: float) -> tuple[Floats, Floats]:
    """Upper bounds on false alarms and misses at each threshold, both right with probability 1 - `error`."""
    without, present = (np.sort(world) for world in worlds)
    false_alarms = len(without) - np.searchsorted(without, thresholds, side="right")
    misses = np.searchsorted(present, thresholds, side="right")
    return _upper(false_alarms, len(without), error / 2), _upper(misses, len(present), error / 2)


def _upper(counts: NDArray[np.int64], runs: int, error: float) -> Floats:
    """An upper bound on a probability of which `counts` of `runs` were seen, wrong with probability `error`.

    Reference: Clopper and Pearson 1934, doi:10.1093/biomet/26.4.404.
    """
    some = np.minimum(counts, runs - 1)
    return np.where(counts >= runs, 1.0, betaincinv(some + 1.0, np.asarray(runs - some, np.float64), 1.0 - error))


def _log_ratio(above: Floats, below: Floats) -> Floats:
    ratio: Floats = np.log(np.maximum(above, 1e-300)) - np.log(np.maximum(below, 1e-300))
    return ratio
