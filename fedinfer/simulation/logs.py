"""Logs of a run: CSV, JSON lines, TensorBoard, and a bar on the terminal.

A file goes on where a resumed run goes on: lines of rounds that are done again are dropped first. A run that starts
anew begins its files anew.
"""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedinfer.errors import BadInput, BadUsage
from fedinfer.files import replace_file
from fedinfer.simulation.callbacks import RoundLog

COLUMNS = ("round", "clients", "replies", "errors", "seconds", "updates_per_s", "loss")


def fields_of(record: RoundLog) -> dict[str, float | int | None]:
    """The numbers of a round by column, the metrics last.

    Raises: BadUsage for a metric with the name of a column.
    """
    if clash := set(COLUMNS) & set(record.metrics):
        raise BadUsage(f"metrics: got {', '.join(sorted(clash))}, expected other names than the columns of a log")
    return {name: getattr(record, name) for name in COLUMNS} | dict(record.metrics)


class CsvLog:
    """A table, one line a round. Its columns are those of the first round that it is told of."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._columns: list[str] = []
        self._file: TextIO | None = None

    def begin(self, done: int) -> None:
        kept = _kept_rows(self._path, done) if done else []
        self._columns = kept[0] if kept else []
        self._file = _reopened(self._path, "".join(_csv_line(row) for row in kept))

    def round(self, record: RoundLog) -> None:
        values = fields_of(record)
        if not self._columns:
            self._columns = list(values)
            self._write(self._columns)
        if unknown := set(values) - set(self._columns):
            raise BadUsage(
                f"CSV log: got {', '.join(sorted(unknown))} in round {record.round}, expected the columns of its first "
                "line; evaluate before the first round too, or log JSON lines"
            )
        self._write(["" if values.get(name) is None else values[name] for name in self._columns])

    def end(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, row: Sequence[object]) -> None:
        if self._file is None:
            raise BadUsage("CSV log: got a round before `begin`, expected it after")
        self._file.write(_csv_line(row))
        self._file.flush()


class JsonLines:
    """One JSON object a round, and a line each; a number that is not finite is null."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def begin(self, done: int) -> None:
        kept = [line for line in _lines(self._path) if _round_of_json(line) <= done] if done else []
        self._file = _reopened(self._path, "".join(f"{line}\n" for line in kept))

    def round(self, record: RoundLog) -> None:
        if self._file is None:
            raise BadUsage("JSON log: got a round before `begin`, expected it after")
        values = {
            name: None if value is None or not math.isfinite(value) else value
            for name, value in fields_of(record).items()
        }
        self._file.write(json.dumps(values, allow_nan=False) + "\n")
        self._file.flush()

    def end(self) -> None:
        if self._file is not None:
            self._file.close()


class TensorBoard:
    """Scalars in a folder for TensorBoard: `loss`, `replies`, `updates_per_s`, and the metrics by their names.

    Raises: BadUsage if `tensorboard` is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise BadUsage("TensorBoard: got no package `tensorboard`; pip install tensorboard, or log CSV") from None
        self._make = SummaryWriter
        self._folder = folder
        self._writer: Any = None

    def begin(self, done: int) -> None:
        self._writer = self._make(str(self._folder), purge_step=done + 1 if done else None)

    def round(self, record: RoundLog) -> None:
        values: Mapping[str, float | None] = {
            "loss": record.loss,
            "replies": record.replies,
            "updates_per_s": record.updates_per_s if record.replies else None,
            **record.metrics,
        }
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, record.round)
        self._writer.flush()

    def end(self) -> None:
        if self._writer is not None:
            self._writer.close()


class ProgressBar:
    """Rounds and client updates a second on standard error; nothing at all where that is not a terminal.

    `rounds` is how many there will be, if that is known.
    """

    def __init__(self, rounds: int | None = None) -> None:
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
        )
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("rounds", total=rounds, speed="")

    def begin(self, done: int) -> None:
        self._bar.update(self._task, completed=done)
        self._bar.start()

    def round(self, record: RoundLog) -> None:
        self._bar.update(self._task, completed=record.round, speed=f"{record.updates_per_s:,.0f} updates/s")

    def end(self) -> None:
        self._bar.stop()


def _lines(path: Path) -> list[str]:
    """The lines of a file that end; what was cut off is not one."""
    try:
        return path.read_text(encoding="utf-8").split("\n")[:-1]
    except FileNotFoundError:
        return []
    except UnicodeDecodeError:
        raise BadInput(f"log {path}: got a file that is not UTF-8 text; move it away to resume") from None


def _kept_rows(path: Path, done: int) -> list[list[str]]:
    """The header and the rows of the first `done` rounds."""
    rows = list(csv.reader(_lines(path)))
    return [*rows[:1], *(row for row in rows[1:] if len(row) == len(rows[0]) and _number(row[0]) <= done)]


def _csv_line(row: Sequence[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(row)
    return text.getvalue()


def _round_of_json(line: str) -> float:
    try:
        return _number(json.loads(line)["round"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _number(text: object) -> float:
    try:
        return int(str(text))
    except ValueError:
        return math.inf


def _reopened(path: Path, kept: str) -> TextIO:
    """The file with `kept` in it, open for more."""
    replace_file(path, kept.encode())
    return path.open("a", encoding="utf-8", newline="")
