"""The audits of one subject, each with a verdict, a figure and a sentence.

A test fails an honest subject with probability at most `ERROR`, and there are at most twelve of chance: less than 1e-6
a subject. Figures are bounds at 95 %; one that is above the claim fails only if it is so at `ERROR` too.

Games score each canary of a run as a run of its own. That assumes that noise is independent between coordinates and
that units are sampled independently, which the audits of noise and sampling test in the same report.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import f as f_distribution

from fedinfer.auditing.canaries import (
    CLIP_NORM,
    DELTA,
    LOUD,
    MANY_EXAMPLES,
    RATE,
    axes,
    neighbours,
    plan_for,
    random_directions,
    some_present,
)
from fedinfer.auditing.subjects import Subject, Trace, Units
from fedinfer.privacy import NoiseStream, PrivacyPlan
from fedinfer.privacy.audit_bounds import Game, Guesses
from fedinfer.privacy.audit_clipping import settle
from fedinfer.privacy.audit_noise import repetition_chance, shape_chance, spread_chance
from fedinfer.privacy.audit_sampling import poisson_chances

Streams = Callable[[], NoiseStream]
Floats = NDArray[np.float64]

ERROR = 5e-8
SHOWN_ERROR = 0.05
# Rounding to float32, and nothing else, may carry a distance past the clip norm.
ROUNDING = 1e-5
WIDTH = 4000
NOISE_UNITS = 50


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much an audit runs.

    `canaries` and `runs`: of each world of the two-run game. `whole_runs`: of each world of the game whose score is of
    a whole run. `one_run`: canaries of the one-run audit. `noise_steps`: releases of 4,001 numbers, four times.
    """

    canaries: int
    runs: int
    whole_runs: int
    one_run: int
    noise_steps: int
    steps: int = 8

    def fitted(self, subject: Subject) -> "Size":
        """Fewer canaries and more steps where each canary costs a message in each step."""
        if not subject.slow:
            return self
        return replace(
            self,
            canaries=self.canaries // 6,
            runs=max(3, self.runs // 20),
            one_run=self.one_run // 4,
            noise_steps=max(2, self.noise_steps // 2),
            steps=4 * self.steps,
        )


QUICK = Size(canaries=250, runs=40, whole_runs=240, one_run=2000, noise_steps=13)
FULL = Size(canaries=250, runs=400, whole_runs=2000, one_run=4000, noise_steps=50)
SAMPLING_CANARIES, SAMPLING_STEPS = 400, 64
ONE_RUN_STEPS = 8
# At a larger δ nothing is nearly certain from one run: it may be the δ that happened. A claim is checked at this one.
SMALL_DELTA = 1e-10


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one audit found: `passed` is None where it does not apply."""

    audit: str
    passed: bool | None
    figure: str
    says: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """All findings about one subject."""

    subject: str
    unit: str
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        return all(finding.passed is not False for finding in self.findings)


@dataclass(frozen=True, kw_only=True)
class Proof:
    """A bound at 95 % from a game, the ε that the subject states for that run, and whether it holds at `ERROR`."""

    shown: float
    claimed: float
    holds: bool


def audit(subject: Subject, size: Size, streams: Streams) -> Iterator[Finding]:
    """Run every audit; `streams` gives a fresh noise stream each time that it is called."""
    for each in AUDITS.values():
        yield each(subject, size.fitted(subject), streams)


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
    far = [f"{name} {_number(distance)}" for name, distance in distances.items() if distance > 1.0 + ROUNDING]
    says = f"one {subject.unit} moves the sum by {_number(worst)} of the clip norm"
    if far:
        says += f" ({', '.join(far)})"
    if stopped:
        says += f"; what stops the run: {', '.join(stopped)}"
    return Finding(audit="neighbours", passed=not far and not stopped, figure=f"{_number(worst)} C", says=says)


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
    low = max(pairs, key=lambda each: abs(np.log(pairs[each])))
    ratio = pairs[low]
    chance = 2.0 * min(f_distribution.sf(ratio, count, count), f_distribution.cdf(ratio, count, count))
    canaries = SAMPLING_CANARIES // 2
    sampled = plan_for(subject, steps=8, divisor=RATE * 2 * canaries)
    taken = _taken(subject, canaries, sampled, streams())
    rate_chance = poisson_chances(taken, sampled.sampling_rate)["rate"]
    passed = bool(chance > ERROR and rate_chance > ERROR) and not stopped
    wide = _number(np.sqrt(ratio))
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
    return sums > np.maximum(sums.max(1, keepdims=True), CLIP_NORM / 100) / 2


def audit_two_runs(subject: Subject, size: Size, streams: Streams) -> Finding:
    """(c) A game on neighbours of the same size, over several steps, with sampling and without."""
    rates = (RATE, 1.0) if subject.sampled else (1.0,)
    proofs = [_canary_game(subject, size, streams, rate) for rate in rates]
    worst = max(proofs, key=lambda proof: (not proof.holds, proof.shown / proof.claimed))
    return _finding("two runs", subject, worst)


def _canary_game(subject: Subject, size: Size, streams: Streams, rate: float) -> Proof:
    """Assumes a Gaussian mechanism, sampled at the plan's rate, whose noise is not known."""
    directions = axes(size.canaries)
    plan = plan_for(subject, steps=size.steps, divisor=rate * size.canaries, rate=rate)
    scores: list[Floats] = []
    claimed = np.inf
    for present in (False, True):
        units = some_present(directions, np.full(size.canaries, present))
        traces = [subject.run(units, plan, streams()) for _ in range(size.runs)]
        scores.append(np.concatenate([canary_scores(trace, directions, plan) for trace in traces]))
        claimed = traces[0].claim(DELTA)
    game = Game(without=scores[0], present=scores[1])

    def bound(error: float) -> float:
        if plan.sampling_rate == 1.0:
            return game.gaussian_epsilon_lower(delta=DELTA, error=error)
        return game.sampled_epsilon_lower(rate=plan.sampling_rate, steps=plan.steps, delta=DELTA, error=error)

    return Proof(shown=bound(SHOWN_ERROR), claimed=claimed, holds=bound(ERROR) <= claimed)


def audit_whole_runs(subject: Subject, size: Size, streams: Streams) -> Finding:
    """(c) A game on whole runs of one unit and of two: what the second adds in its direction, and to the spread."""
    width = 200
    plan = plan_for(subject, steps=2, divisor=4.0, rate=1.0)
    base = np.zeros((1, width))
    base[0, 0] = LOUD
    blank = np.zeros((1, width))
    blank[0, -1] = 1.0
    canary = np.zeros((1, width))
    canary[0, 0] = -LOUD * LOUD
    worlds = [np.concatenate([base, blank]) if subject.fixed_units else base, np.concatenate([base, canary])]
    along: list[Floats] = []
    spread: list[Floats] = []
    claimed = np.inf
    for rows in worlds:
        traces = [subject.run(Units.of(rows), plan, streams()) for _ in range(size.whole_runs)]
        along.append(np.array([-trace.released[:, 0].sum() for trace in traces]))
        spread.append(np.array([-np.square(trace.released[:, 1 : width - 1]).sum() for trace in traces]))
        claimed = traces[0].claim(DELTA)
    games = [Game(without=without, present=present) for without, present in (along, spread)]

    def bound(error: float) -> float:
        plain = [game.epsilon_lower(delta=DELTA, error=error / 3) for game in games]
        return max(*plain, games[0].gaussian_epsilon_lower(delta=DELTA, error=error / 3))

    proof = Proof(shown=bound(SHOWN_ERROR), claimed=claimed, holds=bound(ERROR) <= claimed)
    return _finding("whole runs", subject, proof)


def audit_one_run(subject: Subject, size: Size, streams: Streams) -> Finding:
    """(d) One run with canaries that are in or out by fair coins, and guesses which."""
    clients = subject.unit == "client"
    directions = random_directions(size.one_run, 0) if clients else axes(size.one_run)
    present = streams().uniform(len(directions)) < 0.5
    divisor = len(directions) * (RATE if subject.sampled else 1.0)
    plan = plan_for(subject, steps=ONE_RUN_STEPS, divisor=divisor)
    trace = subject.run(some_present(directions, present), plan, streams())
    guesses = Guesses.from_scores(
        canary_scores(trace, directions, plan), present, each_side=max(4, len(directions) // 20)
    )
    certain = guesses.epsilon_lower(delta=SMALL_DELTA, error=ERROR)
    proof = Proof(
        shown=guesses.epsilon_lower(delta=DELTA, error=SHOWN_ERROR),
        claimed=trace.claim(DELTA),
        holds=certain <= trace.claim(SMALL_DELTA),
    )
    return _finding("one run", subject, proof)


def canary_scores(trace: Trace, directions: Floats, plan: PrivacyPlan) -> Floats:
    """For each canary the log-likelihood ratio of the whole run, under the plan: the best score there is."""
    along = trace.along(directions) / plan.clip_norm
    step = (2.0 * along - 1.0) / (2.0 * plan.noise_multiplier**2)
    rate = plan.sampling_rate
    if rate == 1.0:
        total: Floats = step.sum(0)
        return total
    ratios: Floats = np.logaddexp(np.log1p(-rate), np.log(rate) + step).sum(0)
    return ratios


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


def _finding(name: str, subject: Subject, proof: Proof) -> Finding:
    figure = f"ε≥{proof.shown:.2f} of {proof.claimed:.2f}"
    if proof.holds:
        says = f"an attacker can prove ε ≥ {proof.shown:.2f}, and ε = {proof.claimed:.2f} is stated"
        if proof.shown > proof.claimed:
            figure, says = f"{figure}?", f"{says}: odd, and too few answers to be certain; run the long audit"
    else:
        odds = f"{np.exp(proof.shown):,.0f}" if proof.shown < 15 else "a million"
        says = (
            f"ε = {proof.claimed:.2f} is stated, and ε ≥ {proof.shown:.2f} is proven: an attacker may multiply the "
            f"odds that one {subject.unit} took part by {odds} and more"
        )
    return Finding(audit=name, passed=proof.holds, figure=figure, says=says)


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.0e}"


AUDITS: dict[str, Callable[[Subject, Size, Streams], Finding]] = {
    "neighbours": audit_neighbours,
    "public size": audit_size,
    "noise": audit_noise,
    "sampling": audit_sampling,
    "two runs": audit_two_runs,
    "whole runs": audit_whole_runs,
    "one run": audit_one_run,
    "adaptive clip": audit_clip_rule,
}
