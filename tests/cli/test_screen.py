"""What people see: help at once, whole tables, and a way on after Ctrl-C."""

import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from flwr.app import Message

from fedinfer.cli.console import show_table
from fedinfer.cli.stopping import before_rounds, stop_between_steps, way_on
from fedinfer.models import load
from fedinfer.privacy import PrivacyLedger
from fedinfer.settings import RunConfig
from fedinfer.simulation.grid import SimulatedGrid
from server.checkpoint import save_checkpoint
from server.rounds import first_state
from tests.cli.conftest import Run, checkpoint_of, interrupt

ROOT = Path(__file__).parents[2]


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; sys.argv = ['fedinfer', '--help']\nfrom fedinfer.cli import main\n"
    code += "heavy = {'torch', 'flwr', 'numpy', 'tenseal'}\n"
    code += "try:\n    main()\nfinally:\n    print('LOADED', sorted(heavy & set(sys.modules)))"
    times = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
        times.append(time.perf_counter() - began)
    assert done.returncode == 0
    assert "LOADED []" in done.stdout
    # Half a second is the promise; the machine that runs this may be busy.
    assert statistics.median(times) < 2.0


def test_a_table_is_never_cut(capfd: pytest.CaptureFixture[str]) -> None:
    cells = [f"cell-{i:02d}" for i in range(30)]
    show_table("title", cells, [cells])
    printed = capfd.readouterr().out
    assert all(printed.count(cell) == 2 for cell in cells)
    assert "…" not in printed


def test_ctrl_c_ends_the_round_and_the_run_goes_on_from_there(hospitals: Path, run: Run) -> None:
    out, schema = hospitals.parent / "model.safetensors", hospitals.parent / "schema.toml"
    args = ["train", hospitals, "--schema", schema, "--out", out, "--rounds", 200]
    checkpoint = out.with_name(out.name + ".checkpoint")
    stopped = interrupt(args, when=lambda: checkpoint_of(checkpoint)[1] >= 2)
    assert stopped.code == 130
    assert "stopping after this step; Ctrl-C again: now" in stopped.err
    assert stopped.err.endswith("the same command with --resume goes on\ninterrupted\n")
    assert "Traceback" not in stopped.err
    assert not out.exists()
    (whole,) = re.findall(r"holds round (\d+) of 200", stopped.err)
    for path in hospitals.glob("*.ledger"):
        with PrivacyLedger.open(path) as ledger:
            ledger.verify()
            (charged,) = ledger.summary().runs
        assert (charged.reserved, charged.committed, charged.repeated) == (int(whole), int(whole), 0)
    assert run(*args, "--resume").code == 0
    assert load(out).privacy["rounds"] == 200


@pytest.mark.parametrize(
    ("how", "expected"),
    # The set-up of secure sums is three waves, and so is each of their rounds.
    [("--secure-sum", [0] * 3 + [0] + [1] * 3 + [2] * 3), ("--no-secure-sum", [0, 1, 2])],
)
def test_no_release_is_lost_to_ctrl_c_at_any_wave(
    how: str, expected: list[int], hospitals: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    deliver, waves_left = SimulatedGrid.push_messages, 0

    def press(grid: SimulatedGrid, messages: Iterable[Message]) -> Iterable[str]:
        nonlocal waves_left
        waves_left -= 1
        if waves_left == 0:
            signal.raise_signal(signal.SIGINT)
        return deliver(grid, messages)

    monkeypatch.setattr(SimulatedGrid, "push_messages", press)
    for wave, done in enumerate(expected, start=1):
        waves_left = wave
        folder = hospitals.parent / str(wave)
        shutil.copytree(hospitals, folder)
        out, schema = folder / "model.safetensors", hospitals.parent / "schema.toml"
        assert run("train", folder, "--schema", schema, "--out", out, "--rounds", 3, how).code == 130
        assert checkpoint_of(out.with_name(out.name + ".checkpoint"))[1] == done
        for path in folder.glob("*.ledger"):
            with PrivacyLedger.open(path) as ledger:
                charged = [(it.reserved, it.committed, it.repeated) for it in ledger.summary().runs]
            assert charged == [(done, done, 0)] * (done > 0)


def test_a_sum_that_is_asked_for_again_is_the_same_round() -> None:
    asked: list[str] = []
    before = before_rounds(lambda: asked.append(group))
    for group in ["set-up 1", "set-up 3", "1", "sum 1, signing", "set-up 1", "1", "sum 1, revealing", "2"]:
        before(group)
    assert asked == ["1", "2"]


def test_a_second_ctrl_c_interrupts_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_between_steps() as check:
        check()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_what_is_said_of_a_stopped_run_is_true(tmp_path: Path) -> None:
    config = RunConfig(rounds=5, run="mine", checkpoint=str(tmp_path / "checkpoint"))
    nothing = "stopped before the first round; nothing was spent"
    assert way_on(config, "this") == nothing
    save_checkpoint(first_state(config, "other"), Path(config.checkpoint), config_digest=config.digest())
    assert way_on(config, "this") == nothing
    save_checkpoint(first_state(config, "mine"), Path(config.checkpoint), config_digest=config.digest())
    assert way_on(config, "this") == f"stopped; {config.checkpoint} holds round 0 of 5: this goes on"


def test_an_interrupted_command_says_so(tmp_path: Path, run: Run) -> None:
    # It waits for rows that never come.
    rows = tmp_path / "rows"
    os.mkfifo(rows)
    model = tmp_path / "model.safetensors"
    assert run("train", "--data", "heart-disease", "--rounds", 1, "--out", model).code == 0
    writers: list[int] = []

    def reading() -> bool:
        # A pipe opens for writing as soon as somebody has it open for reading, and not before.
        try:
            writers.append(os.open(rows, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            return False
        return True

    stopped = interrupt(["predict", model, rows], when=reading)
    os.close(writers[0])
    assert (stopped.code, stopped.out, stopped.err) == (130, "", "interrupted\n")
