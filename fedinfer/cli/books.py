"""`fedinfer ledger`."""

from dataclasses import asdict
from pathlib import Path

from fedinfer.cli.console import note, out, show_json, show_table
from fedinfer.privacy.ledger import PrivacyLedger


def init_ledger(path: Path, *, epsilon: float, delta: float, as_json: bool) -> None:
    """Make a ledger with a budget and say its enrolment id."""
    with PrivacyLedger.create(path, epsilon=epsilon, delta=delta) as ledger:
        enrolment = ledger.summary().enrolment
    if as_json:
        show_json({"path": str(path), "enrolment": enrolment, "epsilon": epsilon, "delta": delta})
    else:
        out.print(f"{path}: enrolled as {enrolment}, budget ε = {epsilon:g} at δ = {delta:g}")


def show_ledger(path: Path, *, as_json: bool) -> None:
    """Print budget and runs."""
    with PrivacyLedger.open(path) as ledger:
        summary = ledger.summary()
    if as_json:
        show_json(asdict(summary))
        return
    out.print(f"{path}: enrolment {summary.enrolment}")
    out.print(
        f"spent ε {summary.spent_epsilon:.4g} of {summary.budget_epsilon:g}, "
        f"δ {summary.spent_delta:.3g} of {summary.budget_delta:g}"
    )
    rows = [
        (
            run.run,
            f"{run.epsilon:.4g}" + (" (void)" if run.void else ""),
            f"{run.delta:g}",
            f"{run.reserved} of {run.steps}",
            str(run.reserved - run.committed),
            str(run.repeated),
        )
        for run in summary.runs
    ]
    show_table("runs charged", ("run", "ε", "δ", "releases", "unfinished", "repeated"), rows)
    if any(run.void for run in summary.runs):
        note("void: the noise of that run was seeded and can be repeated by anyone who knows the seed")


def verify_ledger(path: Path, *, as_json: bool) -> None:
    """Check every entry; an error says which does not follow."""
    with PrivacyLedger.open(path) as ledger:
        entries = ledger.verify()
    if as_json:
        show_json({"path": str(path), "entries": entries, "verified": True})
    else:
        out.print(f"{path}: {entries} entries, each follows from the one before")
