"""The audits that guess: lower bounds on ε beside the ε that is stated.

Games score each canary of a run as a run of its own. That assumes that noise is independent between coordinates and
that units are sampled independently, which the audits of noise and sampling test in the same report.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedinfer.auditing.canaries import DELTA, LOUD, RATE, axes, plan_for, random_directions, some_present
from fedinfer.auditing.findings import ERROR, SHOWN_ERROR, Finding, Size, Streams
from fedinfer.auditing.subjects import Subject, Trace, Units
from fedinfer.privacy import DistributedPlan, PrivacyPlan
from fedinfer.privacy.audit_bounds import Game, Guesses

Floats = NDArray[np.float64]

# Enough steps that an accountant who forgets is far off, and a budget that few runs can tell from a larger one.
GAME_STEPS, GAME_EPSILON = 32, 4.0
ONE_RUN_STEPS = 8
# At a larger δ nothing is nearly certain from one run: it may be the δ that happened. A claim is checked at this one.
SMALL_DELTA = 1e-10
# Random directions of so many clients take 32 MB.
MOST_CLIENTS = 1000


@dataclass(frozen=True, kw_only=True)
class Proof:
    """A bound at 95 % from a game, the ε that the subject states for that run, and whether it holds at `ERROR`."""

    shown: float
    claimed: float
    holds: bool


def audit_two_runs(subject: Subject, size: Size, streams: Streams) -> Finding:
    """(c) A game on neighbours of the same size, over several steps, with sampling and without."""
    rates = (RATE, 1.0) if subject.sampled else (1.0,)
    proofs = [_canary_game(subject, size, streams, rate) for rate in rates]
    worst = max(proofs, key=lambda proof: (not proof.holds, proof.shown / proof.claimed))
    found = _finding("two runs", subject, worst)
    return replace(found, says=f"after {GAME_STEPS} steps {found.says}")


def _canary_game(subject: Subject, size: Size, streams: Streams, rate: float) -> Proof:
    """Assumes a Gaussian mechanism, sampled at the plan's rate, whose noise is not known."""
    directions = axes(size.canaries)
    plan = plan_for(subject, steps=GAME_STEPS, divisor=rate * size.canaries, rate=rate, epsilon=GAME_EPSILON)
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
    directions = random_directions(min(size.one_run, MOST_CLIENTS), 0) if clients else axes(size.one_run)
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


def canary_scores(trace: Trace, directions: Floats, plan: PrivacyPlan | DistributedPlan) -> Floats:
    """For each canary the log-likelihood ratio of the whole run, under the plan: the best score there is."""
    along = trace.along(directions) / plan.clip_norm
    step = (2.0 * along - 1.0) / (2.0 * plan.noise_multiplier**2)
    rate = plan.sampling_rate
    if rate == 1.0:
        total: Floats = step.sum(0)
        return total
    ratios: Floats = np.logaddexp(np.log1p(-rate), np.log(rate) + step).sum(0)
    return ratios


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
