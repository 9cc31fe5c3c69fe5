"""Hospitals on disk and the command line in this process."""

import csv
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

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


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
