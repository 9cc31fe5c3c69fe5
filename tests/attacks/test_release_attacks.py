"""A distinguishing game for each kind of release: a naive version shows more than its ε, ours does not.

The attacker sees many releases of two neighbouring inputs, looks at half of them to choose an event, and bounds its
two probabilities with the other half (Clopper and Pearson): an ε that the mechanism certainly leaks, with a false alarm
below 1e-9 for each.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import beta

from fedinfer.privacy.evaluation import EvaluationRelease
from fedinfer.privacy.integer_noise import CELLS, Gaussian
from fedinfer.privacy.local import LocalVector, RandomisedResponse
from fedinfer.privacy.noise import NoiseStream, insecure_seeded_noise
from fedinfer.privacy.releases import CountRelease, HistogramRelease, ScalarRelease
from fedinfer.privacy.votes import ConfidentVotes

TRIALS = 4000
FALSE_ALARM = 1e-9
EPSILON, DELTA = 1.0, 1e-6
COUNT = CountRelease.calibrate(epsilon=EPSILON, delta=DELTA)
HISTOGRAM = HistogramRelease.calibrate(epsilon=EPSILON, delta=0.0, bins=4)
SCALAR = ScalarRelease.calibrate(epsilon=EPSILON, delta=DELTA, low=0.0, high=1.0, default=0.0)
EVALUATION = EvaluationRelease.calibrate(epsilon=EPSILON, delta=DELTA, bins=4, loss_bound=2.0)
VOTES = ConfidentVotes.calibrate(
    epsilon=EPSILON, delta=DELTA, classes=2, threshold=0.0, queries=20, answers=20
)
VECTOR = LocalVector.calibrate(epsilon=EPSILON, delta=DELTA, dimension=4, clip_norm=1.0)
ANSWER = RandomisedResponse.calibrate(epsilon=EPSILON, categories=3)
# What an attacker sees in one trial, as one number; the first argument says whether the one unit is there.
Game = Callable[[bool, NoiseStream], float]


def leaked(game: Game) -> float:
    """An ε that the game certainly leaks at `DELTA`."""
    seen = [
        np.array([game(there, insecure_seeded_noise(f"game {there} {trial}")) for trial in range(TRIALS)])
        for there in (False, True)
    ]
    half = TRIALS // 2
    best = (-math.inf, 0.0, 1.0)
    for cut in np.unique(np.concatenate([part[:half] for part in seen])):
        for sign in (1.0, -1.0):
            rates = [(sign * part[:half] >= sign * cut).mean() for part in seen]
            for rate, other, flip in ((rates[1], rates[0], 1.0), (1 - rates[0], 1 - rates[1], -1.0)):
                gain = math.log(max(rate - 0.02, 1e-9)) - math.log(other + 0.01)
                best = max(best, (gain, float(cut), sign * flip))
    _, cut, side = best
    counts = []
    for part in seen:
        event = part[half:] >= cut if side > 0 else part[half:] <= cut
        counts.append(int(event.sum()))
    low, high = min(counts), max(counts)
    if low == high:
        return 0.0
    least = float(beta.ppf(FALSE_ALARM, high, half - high + 1))
    most = float(beta.ppf(1 - FALSE_ALARM, low + 1, half - low)) if low < half else 1.0
    return math.log(max(least - DELTA, 1e-12) / most)
