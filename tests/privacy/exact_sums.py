"""The exact law of a plan's noised sum in one or two rotated coordinates, and the ε of it, by summing up."""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from fedinfer.privacy.distributed import DistributedPlan

Floats = NDArray[np.float64]


def noise_law(variance: float, shares: int) -> Floats:
    """The law of a sum of `shares` discrete Gaussians, on -half..half; beyond lies less than 1e-20."""
    half = math.ceil(10.0 * math.sqrt(variance)) + 1
    x = np.arange(-half, half + 1)
    one = np.exp(-(x**2) / (2.0 * variance))
    one /= math.fsum(one)
    total = np.ones(1)
    for _ in range(shares):
        total = np.convolve(total, one)
    keep = math.ceil(10.0 * math.sqrt(variance * shares)) + 1
    middle = len(total) // 2
    return total[max(0, middle - keep) : middle + keep + 1]


def moved_law(noise: Floats, place: float, width: int) -> Floats:
    """The law of noise plus the stochastic rounding of `place`, on -width..width."""
    half, low = len(noise) // 2, math.floor(place)
    out = np.zeros(2 * width + 1)
    for integer, weight in ((low, 1.0 - (place - low)), (low + 1, place - low)):
        out[width + integer - half : width + integer + half + 1] += weight * noise
    return out


def neighbours(plan: DistributedPlan, *, place: float, shares: int | None = None) -> tuple[Floats, Floats]:
    """The laws of one sum with and without one unit, all else at `place` in each rotated coordinate, in cells.

    The unit is of the clip norm, in the direction of the first coordinate. Laws of several coordinates are flattened.
    """
    noise = noise_law(float(plan.share_variance), plan.min_honest if shares is None else shares)
    cells = plan.scale * plan.clip_norm
    width = len(noise) // 2 + math.ceil(cells + abs(place)) + 2
    without = moved_law(noise, place, width)
    with_unit = moved_law(noise, place + cells, width)
    for _ in range(plan.padded - 1):
        beside = moved_law(noise, place, width)
        without, with_unit = np.outer(without, beside).ravel(), np.outer(with_unit, beside).ravel()
    rate = plan.sampling_rate
    return (1.0 - rate) * without + rate * with_unit, without


def exact_epsilon(first: Floats, second: Floats, *, delta: float, steps: int = 1) -> float:
    """The least ε at `delta` of `steps` outcomes of one of two laws, in the worse direction."""
    if steps > 1:
        firsts, seconds = first, second
        for _ in range(steps - 1):
            firsts, seconds = np.outer(firsts, first).ravel(), np.outer(seconds, second).ravel()
        first, second = firsts, seconds

    def spent(one: Floats, other: Floats) -> float:
        def excess(epsilon: float) -> float:
            return float(np.maximum(one - math.exp(epsilon) * other, 0.0).sum()) - delta

        return 0.0 if excess(0.0) <= 0.0 else float(brentq(excess, 0.0, 60.0, xtol=1e-9))

    return max(spent(a, b) for a, b in ((first, second), (second, first)))


def worst_epsilon(plan: DistributedPlan, *, steps: int = 1, shares: int | None = None) -> float:
    """The largest exact ε over some places of everybody else's sum between two integers."""
    return max(
        exact_epsilon(*neighbours(plan, place=place, shares=shares), delta=plan.delta, steps=steps)
        for place in (0.0, 0.3, 0.5)
    )
