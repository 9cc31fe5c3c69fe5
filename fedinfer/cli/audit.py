"""`fedinfer audit`."""

from collections.abc import Callable, Mapping
from dataclasses import asdict

from fedinfer.auditing import AUDITS, FULL, QUICK, Finding, Subject, Verdict, audit, ours
from fedinfer.auditing.mutants import mutants
from fedinfer.cli.console import note, out, progress, show_json, show_table
from fedinfer.errors import BadUsage
from fedinfer.privacy import os_noise


def audit_targets(target: str, *, with_mutants: bool, quick: bool, as_json: bool) -> bool:
    """Audit and print one table; True if ours hold and each mutant is caught."""
    if target not in TARGETS and target != "all":
        raise BadUsage(f"target: got {target!r}, expected {', '.join(TARGETS)} or all")
    mutated = mutants() if with_mutants else ()
    chosen = [name for name in TARGETS if target in (name, "all")]
    subjects = [subject for name in chosen for subject in TARGETS[name]()]
    verdicts = _audit((*subjects, *mutated), quick=quick)
    theirs, missed = verdicts[: len(subjects)], [v.subject for v in verdicts[len(subjects) :] if v.passed]
    own = {subject.name for subject in ours()}
    good = not missed and all(verdict.passed for verdict in theirs if verdict.subject in own)
    if as_json:
        named = [{**asdict(verdict), "passed": verdict.passed} for verdict in verdicts]
        show_json({"quick": quick, "verdicts": named, "missed_mutants": missed, "good": good})
        return good
    show_table(
        "bounds at 95 %, beside the ε that is stated",
        ("subject", *AUDITS),
        [(verdict.subject, *(_cell(finding) for finding in verdict.findings)) for verdict in verdicts],
    )
    for verdict in verdicts:
        for finding in verdict.findings:
            if finding.passed is False:
                out.print(f"{verdict.subject}: {finding.audit}: {finding.says}", markup=False)
    if with_mutants:
        note(f"mutants: {len(mutated) - len(missed)} of {len(mutated)} caught")
    return good


def _audit(subjects: tuple[Subject, ...], *, quick: bool) -> list[Verdict]:
    verdicts = []
    with progress() as display:
        task = display.add_task("", total=len(subjects) * len(AUDITS))
        for subject in subjects:
            display.update(task, description=subject.name)
            findings = []
            for finding in audit(subject, QUICK if quick else FULL, os_noise):
                findings.append(finding)
                display.advance(task)
            verdicts.append(Verdict(subject=subject.name, unit=subject.unit, findings=tuple(findings)))
    return verdicts


def _cell(finding: Finding) -> str:
    if finding.passed is None:
        return "-"
    return f"{'pass' if finding.passed else 'FAIL'} {finding.figure}"


def _opacus() -> tuple[Subject, ...]:
    from fedinfer.auditing.opacus_peer import opacus

    return opacus()


def _flower() -> tuple[Subject, ...]:
    from fedinfer.auditing.flower_peer import flower

    return flower()


TARGETS: Mapping[str, Callable[[], tuple[Subject, ...]]] = {"ours": ours, "opacus": _opacus, "flower": _flower}
