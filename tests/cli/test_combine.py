"""`fedinfer train --combine`: a robust rule trains, and one that cannot hold is refused with nothing touched."""

from pathlib import Path

from fedinfer.models import load
from tests.cli.conftest import Run


def test_a_robust_rule_trains_and_the_report_card_names_it(hospitals: Path, run: Run) -> None:
    out = hospitals.parent / "m.safetensors"
    said = ("--schema", hospitals.parent / "schema.toml", "--out", out, "--rounds", 2)
    assert run("train", hospitals, *said, "--combine", "median", "--wrong-devices", 1).code == 0
    assert load(out).privacy["tuning"]["changed"] == {"combine": "median", "wrong_devices": 1}


def test_a_rule_that_cannot_hold_is_refused_with_nothing_touched(hospitals: Path, run: Run) -> None:
    out = hospitals.parent / "m.safetensors"
    said = ("--schema", hospitals.parent / "schema.toml", "--out", out, "--rounds", 2)
    for rule, text in (
        (("krum", "--wrong-devices", 1), "got at least 3 devices a round, expected 5 or more"),
        (("median",), "wrong devices: got 0, expected at least 1"),
        (("mean", "--wrong-devices", 1), "one moves it anywhere"),
        (("mode",), "expected one of mean, median"),
    ):
        result = run("train", hospitals, *said, "--combine", *rule)
        assert result.code == 2
        assert text in result.err
    assert not list(hospitals.glob("*.ledger"))
    assert not out.exists()
