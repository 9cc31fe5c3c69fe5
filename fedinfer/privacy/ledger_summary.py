"""What a ledger tells of itself. All of it is public."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedinfer.privacy.ledger_history import History, Run


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """One plan in the ledger: what it was charged, and how many of its releases were reserved and committed."""

    run: str
    kind: str
    epsilon: float
    delta: float
    steps: int
    reserved: int
    committed: int
    repeated: int
    void: bool
    plan: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class LedgerSummary:
    """The budget, and what is spent of it by the ledger's filter. Both are public; so is the random enrolment id."""

    enrolment: str
    public_key: str
    filter: Mapping[str, Any]
    head: str | None
    budget_epsilon: float
    budget_delta: float
    spent_epsilon: float
    spent_delta: float
    runs: tuple[RunSummary, ...]


def summarise(history: History) -> LedgerSummary:
    """Budget, spending and runs after the entries that were read."""
    enrolment = history.enrolment
    spent_epsilon, spent_delta = enrolment.filter.total(history.spent)
    return LedgerSummary(
        enrolment=enrolment.id,
        public_key=str(history.public_key),
        filter=enrolment.filter.to_json(),
        head=None if history.head_path is None else str(history.head_path),
        budget_epsilon=enrolment.epsilon,
        budget_delta=enrolment.delta,
        spent_epsilon=spent_epsilon,
        spent_delta=spent_delta,
        runs=tuple(_summary(name, run) for name, run in history.runs.items()),
    )


def _summary(name: str, run: Run) -> RunSummary:
    return RunSummary(
        run=name,
        kind=run.charge.kind,
        epsilon=run.charge.cost["epsilon"],
        delta=run.charge.cost["delta"],
        steps=run.charge.steps,
        reserved=run.reserved,
        committed=len(run.committed),
        repeated=run.reserved - len(run.attempts),
        void=run.void,
        plan=run.charge.plan,
    )
