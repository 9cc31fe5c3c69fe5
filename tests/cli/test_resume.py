"""A run killed in mid-round goes on to the same weights, bit for bit, and every ledger has every release."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from fedinfer.models import load
from fedinfer.privacy import PrivacyLedger
from tests.cli.conftest import Run

ROUNDS = 400


def train_args(hospitals: Path, out: Path, *extra: object) -> list[str]:
    schema = hospitals.parent / "schema.toml"
    args = ["train", hospitals, "--schema", schema, "--out", out, "--rounds", ROUNDS, "--epsilon", 8, *extra]
    return [str(arg) for arg in args]


def kill_in_a_round(args: list[str], checkpoint: Path, ledger: Path, after_round: int) -> None:
    """Start a run in a process of its own and kill -9 it while a round after `after_round` is reserved."""
    command = [sys.executable, "-m", "fedinfer.cli", *args]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(Path.cwd())})
    try:
        while process.poll() is None:
            if checkpoint.exists() and ledger.exists():
                with PrivacyLedger.open(ledger) as book:
                    runs = book.summary().runs
                if runs and runs[0].reserved > after_round:
                    break
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL


def test_a_killed_run_resumes_to_bit_identical_weights(hospitals: Path, run: Run) -> None:
    whole, broken = hospitals.parent / "whole.safetensors", hospitals.parent / "broken.safetensors"
    seeded = ("--insecure-seeded-noise", "test")
    assert run(*train_args(hospitals, whole, *seeded)).code == 0
    for path in hospitals.glob("*.ledger*"):
        path.unlink()
    checkpoint = broken.with_name(broken.name + ".checkpoint")
    kill_in_a_round(train_args(hospitals, broken, *seeded), checkpoint, hospitals / "hungary.ledger", 20)
    assert not broken.exists()
    result = run(*train_args(hospitals, broken, *seeded, "--resume"))
    assert result.code == 0, result.err
    assert "ε is void" in result.out
    expected, got = load(whole), load(broken)
    assert all(got.state[name].equal(tensor) for name, tensor in expected.state.items())
    assert got.privacy["void"] is True
    assert got.privacy["epsilon"] is None


def test_real_noise_is_drawn_afresh_and_the_repeated_round_is_charged(hospitals: Path, run: Run) -> None:
    out = hospitals.parent / "model.safetensors"
    checkpoint = out.with_name(out.name + ".checkpoint")
    kill_in_a_round(train_args(hospitals, out), checkpoint, hospitals / "cleveland.ledger", 5)
    with PrivacyLedger.open(hospitals / "cleveland.ledger") as book:
        before = book.summary().runs[0]
    assert run(*train_args(hospitals, out, "--resume")).code == 0
    with PrivacyLedger.open(hospitals / "cleveland.ledger") as book:
        book.verify()
        after = book.summary().runs[0]
    assert after.reserved == ROUNDS + after.repeated
    assert after.reserved - after.committed <= 1
    assert after.repeated <= 1
    assert (before.run, before.epsilon) == (after.run, after.epsilon)
    assert load(out).privacy["void"] is False


def test_resume_refuses_other_settings_and_a_missing_checkpoint(hospitals: Path, run: Run) -> None:
    out = hospitals.parent / "model.safetensors"
    missing = run(*train_args(hospitals, out, "--resume"))
    assert missing.code == 1
    assert "got no such file; run once without --resume" in missing.err
    schema = hospitals.parent / "schema.toml"
    common = ("train", hospitals, "--schema", schema, "--out", out)
    assert run(*common, "--rounds", 3).code == 0
    other = run(*common, "--rounds", 4, "--resume")
    assert other.code == 1
    assert "a run with other settings" in other.err
    (out.with_name(out.name + ".checkpoint")).write_bytes(b"torn")
    torn = run(*common, "--rounds", 3, "--resume")
    assert torn.code == 1
    assert "got a file that is not a checkpoint" in torn.err
