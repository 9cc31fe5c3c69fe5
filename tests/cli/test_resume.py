"""A run killed in mid-round goes on to the same weights, bit for bit, and every ledger has every release."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clients.app import app as client_app
from fedinfer.cli.hospitals import resume_or_start
from fedinfer.errors import RoundFailed
from fedinfer.models import load
from fedinfer.privacy import PrivacyLedger, plan_from_json
from fedinfer.settings import RunConfig
from fedinfer.simulation import run_in_process
from server.app import app as server_app
from server.checkpoint import save_checkpoint
from server.rounds import first_state
from tests.cli.conftest import Run, checkpoint_of, interrupt

ROUNDS = 150


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


def test_a_stopped_run_never_goes_on_as_the_one_before(hospitals: Path, run: Run) -> None:
    out = hospitals.parent / "model.safetensors"
    checkpoint = out.with_name(out.name + ".checkpoint")
    for name in ("cleveland", "hungary", "switzerland"):
        PrivacyLedger.create(hospitals / f"{name}.ledger", epsilon=100.0, delta=1e-3).close()
    assert run(*train_args(hospitals, out)).code == 0
    first = load(out)

    def second_started() -> bool:
        with PrivacyLedger.open(hospitals / "cleveland.ledger") as book:
            return len(book.summary().runs) == 2

    stopped = interrupt(train_args(hospitals, out), when=second_started)
    assert stopped.code == 130
    second, _ = checkpoint_of(checkpoint)
    assert second != first.privacy["run"]
    assert run(*train_args(hospitals, out, "--resume")).code == 0
    assert load(out).privacy["run"] == second
    whole = out.read_bytes()
    again = run(*train_args(hospitals, out, "--resume"))
    assert again.code == 1
    assert again.err.splitlines()[-1] == (
        f"error: run {second}: got --resume, but it is finished and {out} is its model; "
        "start a new run without --resume"
    )
    assert out.read_bytes() == whole
    # A model that was lost on the way is written again; only its audit is run anew.
    before = load(out)
    out.unlink()
    assert run(*train_args(hospitals, out, "--resume")).code == 0
    after = load(out)
    assert all(torch.equal(after.state[name], tensor) for name, tensor in before.state.items())
    assert {**after.privacy, "audit": None} == {**before.privacy, "audit": None}


def use_up(ledger: Path, releases: int) -> None:
    """What rounds that were killed and repeated leave."""
    with PrivacyLedger.open(ledger) as book:
        (charged,) = book.summary().runs
        plan = plan_from_json(charged.plan)
        for _ in range(releases):
            book.reserve(run=charged.run, round=1, plan=plan)


def test_a_run_that_cannot_be_finished_is_refused_before_anything_is_spent(hospitals: Path, run: Run) -> None:
    out = hospitals.parent / "model.safetensors"
    checkpoint, ledger = out.with_name(out.name + ".checkpoint"), hospitals / "hungary.ledger"
    interrupt(train_args(hospitals, out), when=lambda: checkpoint_of(checkpoint)[1] >= 1)
    name, done = checkpoint_of(checkpoint)
    use_up(ledger, 3)
    before = {path: PrivacyLedger.open(path).verify() for path in hospitals.glob("*.ledger")}
    result = run(*train_args(hospitals, out, "--resume"))
    assert (result.code, result.out) == (1, "")
    left = ROUNDS - done - 1
    assert result.err.splitlines()[-1] == (
        f"error: run '{name}': got {left} releases left of {ROUNDS + 2} in {ledger}, expected {left + 1} for the "
        "rounds to go; this run cannot be finished: start a new one, without --resume"
    )
    assert {path: PrivacyLedger.open(path).verify() for path in before} == before


def test_the_demo_starts_anew_where_a_run_cannot_be_finished(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = RunConfig(rounds=10, checkpoint=str(tmp_path / "checkpoint"), out=str(tmp_path / "model.safetensors"))
    first, hospitals, done = resume_or_start(config, tmp_path, seed=0)
    assert (done, first.resume) == (0, False)
    state = first_state(first, first.run)
    save_checkpoint(state, Path(config.checkpoint), config_digest=config.digest())
    again, _, _ = resume_or_start(config, tmp_path, seed=0)
    assert (again.run, again.resume) == (first.run, True)
    other_rows, _, _ = resume_or_start(config, tmp_path, seed=1)
    assert other_rows.run != first.run
    assert first.plan is not None
    with PrivacyLedger.open(hospitals[2].ledger) as book:
        for _ in range(3):
            book.reserve(run=first.run, round=1, plan=first.plan)
    capfd.readouterr()
    fresh, hospitals, done = resume_or_start(config, tmp_path, seed=0)
    assert (fresh.run != first.run, fresh.resume, done) == (True, False, 0)
    assert all(fresh.run in str(hospital.ledger) for hospital in hospitals)
    said = capfd.readouterr().err
    assert "not going on, but starting anew" in said
    assert "got 9 releases left of 12" in said
    # With one round done, the same ledgers suffice.
    save_checkpoint(replace(state, round=1), Path(config.checkpoint), config_digest=config.digest())
    assert resume_or_start(config, tmp_path, seed=0)[0].run == first.run


def test_the_server_writes_its_checkpoint_before_it_waits_for_devices(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    config = RunConfig(checkpoint=str(checkpoint), run="early", min_devices=2, timeout_s=0.01)
    with pytest.raises(RoundFailed):
        run_in_process(server_app, client_app, nodes=[{"partition-id": 0}], run_config=config.to_flat())
    assert checkpoint_of(checkpoint) == ("early", 0)
