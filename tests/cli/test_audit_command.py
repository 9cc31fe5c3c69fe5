"""`fedinfer audit`: the table, its JSON and its exit code."""

import json

import pytest

from fedinfer.auditing import Size, Subject, Training
from fedinfer.auditing.mutants import unsafe_no_noise
from fedinfer.cli import audit
from tests.cli.conftest import Run

SMALL = Size(canaries=60, runs=6, whole_runs=120, one_run=400, noise_steps=3)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "QUICK", SMALL)


def test_ours_are_audited_and_pass(run: Run) -> None:
    done = run("audit", "--quick", "--json")
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    assert answer["good"] is True
    assert answer["verdicts"][0]["subject"] == "fedinfer"
    for verdict in answer["verdicts"]:
        assert {finding["audit"] for finding in verdict["findings"]} == set(audit.AUDITS)


def test_a_fault_of_ours_and_a_mutant_that_passes_are_errors(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> tuple[Subject, ...]:
        return (Training(step=unsafe_no_noise),)

    monkeypatch.setattr(audit, "ours", broken)
    monkeypatch.setattr(audit, "TARGETS", {"ours": broken})
    done = run("audit", "--quick")
    assert done.code == 1
    assert "fedinfer: noise: σ is 0.0000 of what is declared" in done.out
    assert "FAIL σ 0.000" in done.out
    monkeypatch.setattr(audit, "TARGETS", {"ours": lambda: ()})
    monkeypatch.setattr(audit, "mutants", lambda: (Training(name="nothing wrong"),))
    done = run("audit", "--quick", "--mutants")
    assert done.code == 1
    assert "mutants: 0 of 1 caught" in done.err


def test_an_unknown_target_is_bad_usage(run: Run) -> None:
    done = run("audit", "--target", "everything")
    assert done.code == 2
    assert "expected ours, opacus, flower or all" in done.err
