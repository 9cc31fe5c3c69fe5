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
Counts = NDArray[np.int64]
# From false alarms and misses at each threshold, and the runs of both worlds, to what they prove.
Bound = Callable[[Counts, Counts, tuple[int, int]], Floats]
# Nobody asks whether ε is 30 or 40.
MOST = 30.0
TAIL_POINTS = 200
# Where the trade-off curve of a sampled mechanism is looked at, as δ, and between which noise multipliers.
CURVE = (1e-1, 3e-1, 2e-2, 3e-3, 3e-4)
LEAST_SAMPLED_NOISE, MOST_SAMPLED_NOISE = 0.35, 300.0


@dataclass(frozen=True, kw_only=True)
class Game:
    """Scores of a distinguishing game: one number a run, from runs without and with the canary.

    The runs of a world must be independent of each other. Half of them choose the threshold, the rest are counted.
    """

    without: NDArray[np.floating[Any]] = field(repr=False)
    present: NDArray[np.floating[Any]] = field(repr=False)

    def __post_init__(self) -> None:
        if min(len(self.without), len(self.present)) < 4:
            raise BadUsage("game: got fewer than four runs of a world, expected more")

    def epsilon_lower(self, *, delta: float, error: float) -> float:
        """ε that any mechanism with these answers has at least: the rates are bounded by Clopper and Pearson.

        Assumes nothing. For a mechanism that is (ε, δ)-private, whichever way round the two worlds are taken,
        P[guess | present] ≤ e^ε P[guess | without] + δ.
        """

        def bound(false_alarms: Counts, misses: Counts, runs: tuple[int, int]) -> Floats:
            without, present = runs
            alarm = _upper(false_alarms, without, error / 2)
            hit = 1.0 - _upper(misses, present, error / 2)
            shy = _upper(misses, present, error / 2)
            quiet = 1.0 - _upper(false_alarms, without, error / 2)
            return np.maximum(_log_ratio(hit - delta, alarm), _log_ratio(quiet - delta, shy))

        return self._best(bound)

    def gaussian_epsilon_lower(self, *, delta: float, error: float) -> float:
        """ε of the least private Gaussian mechanism that these answers do not rule out from below.

        Assumes that the trade-off between false alarms and misses is a Gaussian mechanism's, which has one
        parameter μ: true of Gaussian noise without sampling, whatever the number of steps. It is nearly tight.
        Reference: Nasr et al. 2023, arXiv:2302.07956, section 4.
        """

        alarm, miss = self._rates(error)
        mu = float(-ndtri(alarm) - ndtri(miss))
        return min(MOST, gaussian_epsilon(mu=mu, delta=delta)) if mu > 0.0 else 0.0

    def sampled_epsilon_lower(self, *, rate: float, steps: int, delta: float, error: float) -> float:
        """ε of the least private sampled Gaussian mechanism that these answers do not rule out from below.

        Assumes `steps` Gaussian releases on Poisson samples at `rate`, and that their noise alone is not known.
        Noise is ruled out if at some δ the answers would take a larger ε than it has. It is nearly tight.
        """
        alarm, miss = self._rates(error)

        def spent(noise: float, at: float) -> float:
            return epsilon_of(noise_multiplier=noise, sampling_rate=rate, steps=steps, delta=at)

        def ruled_out(noise: float) -> bool:
            for at in CURVE:
                factor = math.exp(spent(noise, at))
                if max(1.0 - miss - factor * alarm, 1.0 - alarm - factor * miss) > at:
                    return True
            return False

        low, high = LEAST_SAMPLED_NOISE, MOST_SAMPLED_NOISE
        if ruled_out(low):
            return MOST
        if not ruled_out(high):
            return 0.0
        while high / low > 1.005:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if ruled_out(middle) else (middle, high)
        return min(MOST, spent(high, delta))

    def _rates(self, error: float) -> tuple[float, float]:
        """Upper bounds on false alarms and misses, at the threshold that is best against a Gaussian mechanism."""

        def bound(false_alarms: Counts, misses: Counts, runs: tuple[int, int]) -> Floats:
            mu: Floats = -ndtri(_upper(false_alarms, runs[0], error / 2)) - ndtri(_upper(misses, runs[1], error / 2))
            return mu

        false_alarms, misses, runs = self._counted(bound)
        alarm, miss = _upper(false_alarms, runs[0], error / 2), _upper(misses, runs[1], error / 2)
        return float(alarm[0]), float(miss[0])

    def _best(self, bound: Bound) -> float:
        return max(0.0, float(bound(*self._counted(bound))[0]))

    def _counted(self, bound: Bound) -> tuple[Counts, Counts, tuple[int, int]]:
        """What the second half answers at the threshold that is best, by `bound`, on the first."""
        choosing, counting = (self._half(start) for start in (0, 1))
        tails = np.concatenate([np.logspace(-5, -0.3, TAIL_POINTS), 1.0 - np.logspace(-5, -0.3, TAIL_POINTS)])
        pooled = np.quantile(np.concatenate(choosing), tails)
        # Halfway between all scores of one world and all of the other, should they be apart.
        gap = (max(choosing[0]) + min(choosing[1])) / 2.0
        thresholds = np.unique(np.concatenate([*(np.quantile(half, tails) for half in choosing), pooled, [gap]]))
        found = bound(*self._count(choosing, thresholds))
        return self._count(counting, thresholds[[int(np.argmax(found))]])

    def _half(self, start: int) -> tuple[Floats, Floats]:
        # A score that is not a number is a guess like any other: the run was poisoned.
        clean = [np.nan_to_num(s[start::2].astype(np.float64), nan=np.finfo(np.float64).max / 8) for s in self._worlds]
        bounded = [np.clip(s, -1e300, 1e300) for s in clean]
        return bounded[0], bounded[1]

    @property
    def _worlds(self) -> tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]:
        return self.without, self.present

    @staticmethod
    def _count(halves: tuple[Floats, Floats], thresholds: Floats) -> tuple[Counts, Counts, tuple[int, int]]:
        without, present = (np.sort(half) for half in halves)
        false_alarms = len(without) - np.searchsorted(without, thresholds, side="right")
        misses = np.searchsorted(present, thresholds, side="right")
        return false_alarms, misses, (len(without), len(present))


@dataclass(frozen=True, kw_only=True)
class Guesses:
    """The answers of a one-run audit: of `canaries` fair coins, `made` were guessed and `right` of those are right."""

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
        Reference: Steinke, Nasr and Jagielski 2023, arXiv:2305.08846, theorem 5.2 and corollary.
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


def _upper(counts: Counts, runs: int, error: float) -> Floats:
    """An upper bound on a probability of which `counts` of `runs` were seen, wrong with probability `error`."""
    some = np.minimum(counts, runs - 1)
    return np.where(counts >= runs, 1.0, betaincinv(some + 1.0, np.asarray(runs - some, np.float64), 1.0 - error))


def _log_ratio(above: Floats, below: Floats) -> Floats:
    return np.log(np.maximum(above, 1e-300) / np.maximum(below, 1e-300))
