"""Folders of clients' CSV files, and the CSV of answers."""

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from fedinfer.cli.console import note
from fedinfer.data import Table
from fedinfer.errors import BadInput
from fedinfer.files import replace_file
from fedinfer.inference.pipeline import Answer


def client_files(folder: Path) -> list[Path]:
    """The CSV files of a folder in the order of their names, or the one file that `folder` is.

    Raises: BadInput if there is none.
    """
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise BadInput(f"{folder}: got no such folder, expected one with a CSV file per client")
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise BadInput(f"{folder}: got no *.csv in it, expected one CSV file per client")
    return files


def rows_path(rows: str) -> Path | None:
    """The path that a command line means: None for standard input."""
    return None if rows == "-" else Path(rows)


def write_answers(answers: Sequence[Answer], out: Path | None) -> None:
    """Write answers as CSV to a file, whole, or to the screen."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("row", "label", "confidence"))
    writer.writerows((index, a.label, f"{a.confidence:.4f}") for index, a in enumerate(answers, 1))
    if out is None:
        sys.stdout.write(text.getvalue())
    else:
        replace_file(out, text.getvalue().encode())


def say_clamped(name: str, table: Table) -> None:
    """Tell the holder of the rows how many values lay outside the public range, by column; counts are private."""
    if table.clamped:
        counts = ", ".join(f"{column} {count}" for column, count in table.clamped.items())
        note(f"{name}: values outside the public range were moved to its end: {counts}")
