"""A lower bound on ε for the run that a configuration describes: its own plan, our own training step, canary rows.

The model is as wide as there are canaries, because the noise of a release does not depend on the model: a bound from
canaries that do not disturb each other is the strongest there is, and says nothing of any real row.
"""

from dataclasses import dataclass

from fedinfer.auditing.canaries import axes, some_present
from fedinfer.auditing.findings import SHOWN_ERROR, Streams
from fedinfer.auditing.games import canary_scores
from fedinfer.auditing.subjects import ClientUpdates, Training, run_together
from fedinfer.errors import BadUsage
from fedinfer.privacy import DistributedPlan, os_noise
from fedinfer.privacy.audit_bounds import Guesses
from fedinfer.settings import RunConfig

CANARIES = 500


@dataclass(frozen=True, kw_only=True)
class AuditBound:
    """What one audited run proves beside what its plan claims, both at `delta`.

    `epsilon_lower` is wrong with probability at most 1 - `confidence`. `void` says that the noise was seeded.
    """

    epsilon_lower: float
    claimed: float
    delta: float
    confidence: float
    canaries: int
    guesses: int
    right: int
    void: bool


def audit_training(config: RunConfig, *, canaries: int = CANARIES, streams: Streams = os_noise) -> AuditBound:
    """Run the plan of `config` once on canaries that are in or out by fair coins, and guess which.

    No row and no ledger is touched: it costs no budget. The adversary is the server, which sends the weights.
    Raises: BadUsage if the configuration has no plan.
    Reference: Steinke, Nasr and Jagielski 2023, arXiv:2305.08846.
    """
    if config.plan is None:
        raise BadUsage("audit: got a run without privacy, expected one with a plan")
    directions, stream = axes(canaries), streams()
    present = stream.uniform(canaries) < 0.5
    units = some_present(directions, present)
    if isinstance(config.plan, DistributedPlan):
        trace = run_together(units, config.plan, streams())
    else:
        subject = Training() if config.plan.unit == "example" else ClientUpdates()
        trace = subject.run(units, config.plan, streams())
    each_side = max(4, canaries // 20)
    guesses = Guesses.from_scores(canary_scores(trace, directions, config.plan), present, each_side=each_side)
    return AuditBound(
        epsilon_lower=guesses.epsilon_lower(delta=config.plan.delta, error=SHOWN_ERROR),
        claimed=trace.claim(config.plan.delta),
        delta=config.plan.delta,
        confidence=1.0 - SHOWN_ERROR,
        canaries=canaries,
        guesses=guesses.made,
        right=guesses.right,
        void=stream.void,
    )
