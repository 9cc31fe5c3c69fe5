"""`fedinfer ledger`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedinfer.cli.console import note, out, show_json, show_table
from fedinfer.errors import BadUsage
from fedinfer.files import replace_file
from fedinfer.privacy.filters import FilterName
from fedinfer.privacy.ledger import LedgerSummary, PrivacyLedger
from fedinfer.privacy.ledger_export import check_export, export_lines
from fedinfer.privacy.ledger_store import is_database


def init_ledger(
    path: Path,
    *,
    epsilon: float,
    delta: float,
    filter: FilterName,
    key: Path | None,
    head: Path | None,
    as_json: bool,
) -> None:
    """Make a ledger with a budget, and say its enrolment id and what to pin."""
    with PrivacyLedger.create(path, epsilon=epsilon, delta=delta, filter=filter, key=key, head=head) as ledger:
        summary = ledger.summary()
    if as_json:
        told = {"path": str(path), "enrolment": summary.enrolment, "epsilon": epsilon, "delta": delta}
        show_json({**told, "filter": summary.filter, "public_key": summary.public_key, "head": summary.head})
    else:
        out.print(f"{path}: enrolled as {summary.enrolment}, budget ε = {epsilon:g} at δ = {delta:g}")
        out.print(f"public key {summary.public_key}: give it to whoever may check the ledger")
        out.print(f"pin it where the ledger is used, in the node configuration: {_pins(summary)}")


def show_ledger(path: Path, *, as_json: bool) -> None:
    """Print budget, key, head and runs."""
    with PrivacyLedger.open(path) as ledger:
        summary = ledger.summary()
    if as_json:
        show_json(asdict(summary))
        return
    out.print(f"{path}: enrolment {summary.enrolment}")
    out.print(
        f"spent ε {summary.spent_epsilon:.4g} of {summary.budget_epsilon:g}, "
        f"δ {summary.spent_delta:.3g} of {summary.budget_delta:g} ({_rule(summary)})"
    )
    out.print(f"public key and head, as this file says, to pin: {_pins(summary)}")
    out.print(f"head: {summary.head or 'none kept, so an older copy in its place is not found out'}")
    rows = [
        (
            run.run,
            run.kind,
            f"{run.epsilon:.4g}" + (" (void)" if run.void else ""),
            f"{run.delta:g}",
            f"{run.reserved} of {run.steps}",
            str(run.reserved - run.committed),
            str(run.repeated),
        )
        for run in summary.runs
    ]
    show_table("runs charged", ("run", "kind", "ε", "δ", "releases", "unfinished", "repeated"), rows)
    if any(run.void for run in summary.runs):
        note("void: the noise of that run was seeded and can be repeated by anyone who knows the seed")


def verify_ledger(path: Path, *, head: Path | None, public_key: str | None, as_json: bool) -> None:
    """Check every entry of a ledger or an export; an error says which is not right."""
    if not path.is_file() or is_database(path):
        result = _verify_database(path, head, public_key)
    elif head is not None:
        raise BadUsage(f"--head: got the export {path}, expected a ledger; an export has no head")
    else:
        history = check_export(path, public_key=public_key)
        result = {
            "entries": history.number,
            "verified": True,
            "enrolment": history.enrolment.id,
            "public_key": history.public_key,
        }
    if as_json:
        show_json({"path": str(path), **result})
        return
    out.print(f"{path}: {result['entries']} entries, each signed and following from the one before")
    out.print(f"enrolment {result['enrolment']}, public key {result['public_key']}")
    if public_key is None:
        note("the key is the one that the file names; compare it with what you were given, or use --public-key")


def export_ledger(path: Path, *, to: Path, as_json: bool) -> None:
    """Write all entries as JSON lines."""
    with PrivacyLedger.open(path) as ledger:
        entries = ledger.entries()
    replace_file(to, export_lines(str(path), entries).encode())
    if as_json:
        show_json({"path": str(path), "out": str(to), "entries": len(entries)})
    else:
        out.print(f"{to}: {len(entries)} entries of {path}; `fedinfer ledger verify {to}` checks them anywhere")


def _verify_database(path: Path, head: Path | None, public_key: str | None) -> dict[str, Any]:
    if head is None:
        opened = PrivacyLedger.open(path, public_key=public_key)
    else:
        opened = PrivacyLedger.open_with_new_head(path, head=head, public_key=public_key)
    with opened as ledger:
        entries, summary = ledger.verify(), ledger.summary()
    return {
        "entries": entries,
        "verified": True,
        "enrolment": summary.enrolment,
        "public_key": summary.public_key,
        "head": summary.head,
    }


def _pins(summary: LedgerSummary) -> str:
    """What a node configuration takes to know this ledger from every other."""
    head = "" if summary.head is None else f' ledger-head="{summary.head}"'
    return f'ledger-public-key="{summary.public_key}"{head}'


def _rule(summary: LedgerSummary) -> str:
    rule = summary.filter
    if rule["name"] == "renyi":
        return f"Rényi filter at order {rule['order']:g}"
    return "Gaussian filter" if rule["name"] == "gdp" else "basic filter: sums"
