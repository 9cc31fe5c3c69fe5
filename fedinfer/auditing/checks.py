"""The audits that measure: neighbours, noise, what depends on the number of units, sampling, clip rules."""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import f as f_distribution

from fedinfer.auditing.canaries import (
    CLIP_NORM,
    MANY_EXAMPLES,
    RATE,
    axes,
    neighbours,
    plan_for,
    some_present,
)
from fedinfer.auditing.findings import ERROR, Finding, Size, Streams, number
from fedinfer.auditing.subjects import Subject, Trace, Units
from fedinfer.privacy import NoiseStream, PrivacyPlan
from fedinfer.privacy.audit_clipping import settle
from fedinfer.privacy.audit_noise import repetition_chance, shape_chance, spread_chance
from fedinfer.privacy.audit_sampling import poisson_chances

# Rounding to float32, and nothing else, may carry a distance past the clip norm.
ROUNDING = 1e-5
WIDTH = 4000
NOISE_UNITS = 50
SAMPLING_CANARIES, SAMPLING_STEPS = 400, 64


def audit_neighbours(subject: Subject, size: Size, streams: Streams) -> Finding:
    """(a) With and without one unit, whatever it holds: the sums before noise are at most a clip norm apart."""
    plan = plan_for(subject, steps=1, divisor=16.0, rate=1.0)
    distances: dict[str, float] = {}
    stopped: dict[str, None] = {}
    for name, without, present in neighbours(subject, width=64):
        what = f"{len(without)} {subject.unit}s"
        try:
            first = subject.run(without, plan, streams())
            what = name
            second = subject.run(present, plan, streams())
        # Whatever a peer raises is the finding.
        except Exception as error:
            if what != MANY_EXAMPLES:
                stopped[f"{what} ({type(error).__name__})"] = None
            continue
        distances[name] = max(distances.get(name, 0.0), _distance(first, second))
    worst = max(distances.values())
    far = [f"{name} {number(distance)}" for name, distance in distances.items() if distance > 1.0 + ROUNDING]
    says = f"one {subject.unit} moves the sum by {number(worst)} of the clip norm"
    if far:
        says += f" ({', '.join(far)})"
    if stopped:
        says += f"; what stops the run: {', '.join(stopped)}"
    return Finding(audit="neighbours", passed=not far and not stopped, figure=f"{number(worst)} C", says=says)


def _distance(first: Trace, second: Trace) -> float:
    if first.released.shape != second.released.shape or first.before.shape != second.before.shape:
        return np.inf
    if not all(np.isfinite(part).all() for part in (first.before, second.before, first.released, second.released)):
        return np.inf
    return float(np.linalg.norm(first.before - second.before, axis=1).max()) / CLIP_NORM


def audit_size(subject: Subject, size: Size, streams: Streams) -> Finding:
    """(a) Noise, divisor and sampling rate are the same whatever the number of units, which is private."""
    name = "public size"
    if subject.fixed_units:
        return Finding(audit=name, passed=None, figure="-", says=f"the number of {subject.unit}s is public here")
    plan = plan_for(subject, steps=size.noise_steps, divisor=16.0, rate=1.0)
    spreads: dict[int, float] = {}
    stopped = ""
    for units in (0, 1, 2, 3):
        try:
            trace = subject.run(Units.of(np.ones((units, WIDTH))), plan, streams())
        except Exception as error:
            stopped = f"; {units} {subject.unit}s stop the run: {type(error).__name__}"
            continue
        spreads[units] = float(np.square(trace.noise).mean())
    count = size.noise_steps * (WIDTH + 1)
    pairs = {low: _ratio(spreads[low], spreads[low + 1]) for low in range(3) if {low, low + 1} <= set(spreads)}
    if not pairs:
        return Finding(audit=name, passed=False, figure="none", says=f"nothing was released{stopped}")
    low = max(pairs, key=lambda each: abs(np.log(pairs[each])))
    ratio = pairs[low]
    # The oddest of the pairs was taken, and either side of one.
    chance = 2.0 * len(pairs) * min(f_distribution.sf(ratio, count, count), f_distribution.cdf(ratio, count, count))
    canaries = SAMPLING_CANARIES // 2
    sampled = plan_for(subject, steps=8, divisor=RATE * 2 * canaries)
    taken = _taken(subject, canaries, sampled, streams())
    rate_chance = poisson_chances(taken, sampled.sampling_rate)["rate"]
    passed = bool(chance > ERROR and rate_chance > ERROR) and not stopped
    wide = number(np.sqrt(ratio))
    says = (
        f"noise is {wide} times as wide with {low} {subject.unit}s as with {low + 1}; half of the {subject.unit}s "
        f"expected are sampled at {taken.mean():.3f} for {sampled.sampling_rate:g}{stopped}"
    )
    return Finding(audit=name, passed=passed, figure=f"σ×{wide}, q {taken.mean():.2f}", says=says)


def _ratio(first: float, second: float) -> float:
    """Of two variances; numbers that rounding alone has made are no noise at all."""
    least = (ROUNDING * CLIP_NORM) ** 2
    return 1.0 if max(first, second) < least else max(first, least) / max(second, least)


def audit_noise(subject: Subject, size: Size, streams: Streams) -> Finding:
    """(b) The noise has the declared σ, is normal, and is fresh in each step, restart and device."""
    plan = plan_for(subject, steps=size.noise_steps, divisor=float(NOISE_UNITS), rate=1.0)
    units = Units.of(np.ones((NOISE_UNITS, WIDTH)))
    traces = [subject.run(units, plan, streams()) for _ in range(4)]
    noises, sigma = [trace.noise for trace in traces], traces[0].sigma
    together = np.concatenate([noise.ravel() for noise in noises])
    chances = {
        "its spread": spread_chance(together, sigma),
        "its shape": shape_chance(together, sigma),
        "its independence": repetition_chance([noise[step] for noise in noises for step in range(2)]),
    }
    ratio = float(np.sqrt(np.square(together / sigma).mean()))
    odd = [what for what, chance in chances.items() if chance <= ERROR]
    says = f"σ is {ratio:.4f} of what is declared over {len(together):,} numbers"
    if odd:
        says += f"; {' and '.join(odd)} not as declared"
    return Finding(audit="noise", passed=not odd, figure=f"σ {ratio:.3f}", says=says)


def audit_sampling(subject: Subject, size: Size, streams: Streams) -> Finding:
    """Units are sampled as is accounted: each in each step by an independent coin."""
    if not subject.sampled:
        return Finding(audit="sampling", passed=None, figure="-", says="no amplification by sampling is claimed")
    canaries = SAMPLING_CANARIES
    plan = plan_for(subject, steps=SAMPLING_STEPS, divisor=RATE * canaries)
    taken = _taken(subject, canaries, plan, streams())
    chances = poisson_chances(taken, plan.sampling_rate)
    odd = [what for what, chance in chances.items() if chance <= ERROR]
    spread = float(taken.sum(1).var() / (canaries * plan.sampling_rate * (1 - plan.sampling_rate)))
    says = f"batch sizes vary {spread:.2f} times as much as Poisson samples do"
    if odd:
        says += f"; {' and '.join(odd)} not as accounted"
    return Finding(audit="sampling", passed=not odd, figure=f"var {spread:.2f}", says=says)


def _taken(subject: Subject, canaries: int, plan: PrivacyPlan, stream: NoiseStream) -> NDArray[np.bool_]:
    """Which canaries (T, canaries) each sum of a run holds."""
    trace = subject.run(some_present(axes(canaries), np.ones(canaries, bool)), plan, stream)
    sums = np.abs(trace.before[:, :canaries])
    held: NDArray[np.bool_] = sums > np.maximum(sums.max(1, keepdims=True), CLIP_NORM / 100) / 2
    return held


def audit_clip_rule(subject: Subject, size: Size, streams: Streams) -> Finding:
    """An adaptive clip norm settles at the quantile of the norms that it is told."""
    units = 200
    rule = subject.clip_rule(units, streams())
    if rule is None:
        return Finding(audit="adaptive clip", passed=None, figure="-", says="the clip norm is fixed")
    norms = np.linspace(0.5, 1.5, units)
    ends = [settle(rule, norms, start=start, rounds=100) for start in (0.05, 20.0)]
    passed = all(abs(end.share_below - 0.5) <= 0.15 for end in ends)
    shown = ", ".join(f"{end.share_below:.0%}" for end in ends)
    says = f"after 100 rounds from far below and far above, {shown} of the norms lie within the clip norm for 50%"
    return Finding(audit="adaptive clip", passed=passed, figure=shown, says=says)
