"""Hospitals on disk and the command line in this process."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors import safe_open

from fedinfer.cli import main
from fedinfer.data import heart_rows
from fedinfer.data.heart import SCHEMA_PATH


@dataclass(frozen=True)
class Result:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `fedinfer ARGS` in this process."""

    def command(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["fedinfer", *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capfd.readouterr()
        return Result(int(ended.value.code or 0), printed.out, printed.err)

    return command


@pytest.fixture
def hospitals(tmp_path: Path) -> Path:
    """A folder with forty rows of three hospitals and their schema."""
    folder = tmp_path / "hospitals"
    folder.mkdir()
    for name, rows in list(heart_rows().items())[:3]:
        write(folder / f"{name.lower()}.csv", [dict(row) for row in rows[:: len(rows) // 40][:40]])
    (tmp_path / "schema.toml").write_bytes(SCHEMA_PATH.read_bytes())
    return folder


def interrupt(args: list[object], *, when: Callable[[], bool], how: signal.Signals = signal.SIGINT) -> Result:
    """Run `fedinfer ARGS` as a terminal does, and signal its whole process group as soon as `when()`."""
    command = [sys.executable, "-m", "fedinfer.cli", *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        # Whoever runs the tests in the background of a shell has it ignored, and a child inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            while process.poll() is None and not when():
                time.sleep(0.001)
            if process.poll() is None:
                os.killpg(process.pid, how)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    return Result(process.returncode, out, err)


def checkpoint_of(path: Path) -> tuple[str, int]:
    """The run and the round of a checkpoint; nothing and -1 where there is none."""
    try:
        with safe_open(str(path), framework="np") as file:
            header = json.loads(file.metadata()["fedinfer-checkpoint"])
    except OSError:
        return "", -1
    return header["run"], header["round"]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
