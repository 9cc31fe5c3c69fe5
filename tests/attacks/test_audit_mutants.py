"""The auditor catches every mutant by the audit that is made for it, and finds nothing in ours.

Noise is seeded, so that a run is repeated exactly. With fresh noise ours would fail with probability below 1e-6.
"""

from collections.abc import Callable
from itertools import count

import pytest

from fedinfer.auditing import AUDITS, Size, Subject, Verdict, audit, audit_training, ours
from fedinfer.auditing.mutants import mutants
from fedinfer.errors import BadUsage
from fedinfer.privacy import NoiseStream, insecure_seeded_noise
from fedinfer.settings import RunConfig

SMALL = Size(canaries=250, runs=8, whole_runs=160, one_run=2000, noise_steps=4)
EXPECTED = {
    "no noise": {"noise", "two runs", "whole runs", "one run"},
    "a quarter of the noise": {"noise", "two runs"},
    "no clipping": {"neighbours", "two runs", "whole runs", "one run"},
    "clipping after the sum": {"neighbours"},
    "accountant made anew": {"two runs"},
    "shuffled, not Poisson": {"sampling"},
    "rate and divisor from data": {"public size", "whole runs"},
    "inverted adaptive sign": {"adaptive clip"},
    "no release without rows": {"public size"},
    "noise that repeats": {"noise", "whole runs"},
}


def seeded(seed: str) -> Callable[[], NoiseStream]:
    numbers = count()
    return lambda: insecure_seeded_noise(f"{seed}/{next(numbers)}")


@pytest.mark.parametrize("subject", ours(), ids=lambda subject: subject.name)
def test_ours_pass_every_audit(subject: Subject) -> None:
    findings = tuple(audit(subject, SMALL, seeded(subject.name)))
    assert [finding.audit for finding in findings] == list(AUDITS)
    assert all(type(finding.passed) in (bool, type(None)) for finding in findings)
    assert [finding.says for finding in findings if finding.passed is False] == []
    assert Verdict(subject=subject.name, unit=subject.unit, findings=findings).passed


def test_every_mutant_has_an_audit_that_is_made_for_it() -> None:
    assert [mutant.name for mutant in mutants()] == list(EXPECTED)


@pytest.mark.parametrize("mutant", mutants(), ids=lambda subject: subject.name)
def test_a_mutant_fails_the_audits_that_are_made_for_it(mutant: Subject) -> None:
    for name in EXPECTED[mutant.name]:
        found = AUDITS[name](mutant, SMALL, seeded(mutant.name))
        assert found.passed is False, found.says


def test_what_opacus_does_is_measured() -> None:
    from fedinfer.auditing.opacus_peer import opacus

    one, anew = opacus()
    found = {
        name: AUDITS[name](one, SMALL, seeded(name)) for name in ("neighbours", "public size", "noise", "sampling")
    }
    assert [name for name, finding in found.items() if finding.passed] == ["noise", "sampling"]
    assert "NaN inf" in found["neighbours"].says
    assert "0 examples (ZeroDivisionError)" in found["neighbours"].says
    forgetful = AUDITS["two runs"](anew, SMALL, seeded("two runs"))
    assert forgetful.passed is False, forgetful.says


def test_what_flower_does_is_measured() -> None:
    from fedinfer.auditing.flower_peer import flower

    fixed, accounted, adaptive, local = flower()
    for subject in (fixed, accounted, adaptive, local):
        found = AUDITS["neighbours"](subject, SMALL, seeded(subject.name))
        assert found.passed is False
        assert "NaN inf" in found.says
        assert "zero (ZeroDivisionError)" in found.says
        # Its accountant refuses clients of unequal weight.
        assert ("1,000 examples" in found.says) == (subject in (fixed, adaptive))
    few = SMALL.fitted(fixed)
    assert AUDITS["noise"](fixed, few, seeded("noise")).passed
    assert AUDITS["adaptive clip"](adaptive, few, seeded("clip")).passed is False
    assert AUDITS["noise"](adaptive, few, seeded("noise")).passed is False


def test_a_run_carries_a_bound_below_its_claim() -> None:
    config = RunConfig(rounds=4, epsilon=4.0)
    bound = audit_training(config, canaries=400, streams=seeded("run"))
    assert 0.2 < bound.epsilon_lower <= bound.claimed == pytest.approx(4.0, abs=1e-3)
    assert (bound.canaries, bound.guesses, bound.confidence, bound.void) == (400, 40, 0.95, True)
    with pytest.raises(BadUsage):
        audit_training(RunConfig(unsafe_no_privacy=True))
