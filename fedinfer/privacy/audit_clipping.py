"""Does an adaptive clip norm go where it should: to the declared quantile of the norms?

Reference: Andrew et al. 2021, arXiv:1905.03871.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# From the clip norm in use and the number of units whose norm is at most that, to the next clip norm.
ClipRule = Callable[[float, int], float]


@dataclass(frozen=True, kw_only=True)
class Settled:
    """Where a rule took the clip norm: the share of the norms below it at the end, and the clip norm."""

    share_below: float
    clip_norm: float


def settle(rule: ClipRule, norms: NDArray[np.float64], *, start: float, rounds: int) -> Settled:
    """Run `rule` for `rounds` on units whose norms stay as they are."""
    clip = start
    for _ in range(rounds):
        clip = rule(clip, int((norms <= clip).sum()))
    return Settled(share_below=float((norms <= clip).mean()), clip_norm=clip)
