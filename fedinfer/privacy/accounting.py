"""ε of Gaussian steps: by privacy loss distributions, by Rényi divergences, and exactly where there is no sampling.

References: Koskela et al. 2020, arXiv:1906.03049; Doroshenko et al. 2022, arXiv:2207.04380 ("connect the dots": the
discretised distribution dominates the true one, so that ε is an upper bound); Balle and Wang 2018, arXiv:1805.06530.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from scipy.optimize import brentq
from scipy.special import log_ndtr

from fedinfer.errors import BadUsage
from fedinfer.files import replace_file

# Halving it moves ε by less than 1e-4 for the plans in use (tests/privacy/test_plan.py).
INTERVAL = 1e-3
# Orders at which a Rényi curve is turned into ε.
ORDERS = (1.1, 1.25, 1.5, 1.75, 2.5, 3.5, *range(2, 17), 20, 24, 28, 32, 48, 64, 128, 256, 512)
TOLERANCE = 1e-4
LEAST_NOISE, MOST_NOISE = 0.1, 1e6


@lru_cache(maxsize=1024)
def epsilon_of(*, noise_multiplier: float, sampling_rate: float, steps: int, delta: float) -> float:
    """ε at `delta` of `steps` Gaussian releases, each on a Poisson sample at `sampling_rate`.

    Guarantees: an upper bound under adding or removing one; grows with `steps`, falls with the noise.
    """
    if steps == 0:
        return 0.0
    if sampling_rate == 1.0:
        return gaussian_epsilon(mu=math.sqrt(steps) / noise_multiplier, delta=delta)
    # The import takes half a second, and only the first use of a plan needs it.
    from dp_accounting.pld import privacy_loss_distribution

    step = privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier, sampling_prob=sampling_rate, value_discretization_interval=INTERVAL, use_connect_dots=True
    )
    return float(step.self_compose(steps).get_epsilon_for_delta(delta))


def gaussian_delta(*, mu: float, epsilon: float) -> float:
    """δ at `epsilon` of a Gaussian mechanism whose sensitivity is `mu` standard deviations, exactly.

    Reference: Balle and Wang 2018, arXiv:1805.06530, theorem 8.
    """
    first, second = float(log_ndtr(mu / 2 - epsilon / mu)), float(log_ndtr(-mu / 2 - epsilon / mu))
    return math.exp(first) * -math.expm1(min(0.0, epsilon + second - first))


def gaussian_epsilon(*, mu: float, delta: float) -> float:
    """The least ε, from above to 1e-12 of it, of a Gaussian mechanism whose sensitivity is `mu` standard deviations."""
    if gaussian_delta(mu=mu, epsilon=0.0) <= delta:
        return 0.0
    # By Mironov 2017, proposition 3: ε = μ²/2 + μ sqrt(2 ln 1/δ) is enough.
    most = mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta))
    root = brentq(lambda epsilon: gaussian_delta(mu=mu, epsilon=epsilon) - delta, 0.0, most, xtol=1e-13, rtol=1e-13)
    return float(root) * (1.0 + 1e-12) + 1e-12


def poisson_rdp(*, noise_multiplier: float, sampling_rate: float, steps: int, order: float) -> float:
    """Rényi divergence at `order` of `steps` Gaussian releases on Poisson samples, adding or removing one.

    Reference: Mironov, Talwar and Zhang 2019, arXiv:1908.10530.
    """
    if sampling_rate == 1.0:
        return steps * order / (2 * noise_multiplier**2)
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.rdp import RdpAccountant

    step = PoissonSampledDpEvent(sampling_rate, GaussianDpEvent(noise_multiplier))
    return float(RdpAccountant([order]).compose(SelfComposedDpEvent(step, steps)).rdp[0])


def fixed_size_rdp(
    *, noise_multiplier: float, size: int, population: int, steps: int, orders: tuple[float, ...]
) -> list[float]:
    """Rényi divergences at `orders` of Gaussian releases on samples of a fixed size, replacing one.

    Replacing one moves a sum by twice the clip norm. The accountant takes the noise as a multiple of the sensitivity
    under its own relation, which is why it is given half of the noise multiplier.
    """
    if size == population:
        return [steps * order * 2 / noise_multiplier**2 for order in orders]
    from dp_accounting import GaussianDpEvent, NeighboringRelation, SampledWithoutReplacementDpEvent
    from dp_accounting import SelfComposedDpEvent as Composed
    from dp_accounting.rdp import RdpAccountant

    step = SampledWithoutReplacementDpEvent(population, size, GaussianDpEvent(noise_multiplier / 2))
    accountant = RdpAccountant(list(orders), NeighboringRelation.REPLACE_ONE)
    return [float(value) for value in accountant.compose(Composed(step, steps)).rdp]


def rdp_epsilon(orders: tuple[float, ...], divergences: list[float], *, delta: float) -> float:
    """ε at `delta` from Rényi divergences.

    Reference: Canonne, Kamath and Steinke 2020, arXiv:2004.00010, proposition 12.
    """
    found = [
        divergence + math.log1p(-1.0 / order) - math.log(delta * order) / (order - 1.0)
        for order, divergence in zip(orders, divergences, strict=True)
    ]
    return max(0.0, min(found))


def least_noise(spent: Callable[[float], float], epsilon: float, *, start: float, question: Mapping[str, Any]) -> float:
    """The smallest noise multiplier with `spent` of it at most `epsilon`, met from below to 1e-4.

    `question` says in JSON what `spent` depends on: the answer to it is kept in the user's cache folder, and is used
    only if it still is an answer.
    Raises: BadUsage if no noise multiplier between 0.1 and 1,000,000 gives it.
    """

    def answers(noise: float) -> bool:
        return 0.0 <= epsilon - spent(noise) <= TOLERANCE

    place = _cache_file({"epsilon": epsilon, **question})
    kept = _read_number(place)
    if kept is not None and LEAST_NOISE <= kept <= MOST_NOISE and answers(kept):
        return kept
    noise = _search(spent, epsilon, start, question.get("steps", 1))
    # A cache that cannot be written costs time, and nothing else.
    with suppress(OSError):
        replace_file(place, json.dumps(noise).encode())
    return noise


def _search(spent: Callable[[float], float], epsilon: float, start: float, steps: int) -> float:
    high = max(1.0, start)
    while (at_high := spent(high)) > epsilon:
        high *= 2.0
        if high > MOST_NOISE:
            raise BadUsage(f"epsilon: got {epsilon:g}, too small for {steps} steps; use fewer, or a larger epsilon")
    low = high / 2.0
    while (at_low := spent(low)) <= epsilon:
        high, at_high, low = low, at_low, low / 2.0
        if low < LEAST_NOISE:
            raise BadUsage(f"epsilon: got {epsilon:g}, so large that it protects nothing; expected less")
    turn = 0
    while epsilon - at_high > TOLERANCE and high - low > 1e-9 * high:
        turn += 1
        middle = (low + high) / 2.0
        if turn % 3:
            # log ε is nearly linear in the noise; every third step halves, so that the search always ends.
            aim = math.log(max(epsilon - TOLERANCE / 2, epsilon / 2))
            share = (math.log(at_low) - aim) / (math.log(at_low) - math.log(max(at_high, 1e-300)))
            middle = low + min(max(share, 0.01), 0.99) * (high - low)
        at_middle = spent(middle)
        if at_middle > epsilon:
            low, at_low = middle, at_middle
        else:
            high, at_high = middle, at_middle
    return high


def _cache_file(question: Mapping[str, Any]) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedinfer" / "noise"
    return folder / hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


def _read_number(path: Path) -> float | None:
    try:
        return float(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
