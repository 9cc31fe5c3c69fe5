"""What people and machines see: tables and progress on a terminal, JSON where asked, errors in one line."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def show_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object for machines."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is text, the others line up on the right."""
    table = Table(
        title=title, title_justify="left", title_style="bold", header_style="bold", box=SIMPLE, padding=(0, 1, 0, 0)
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    needed = Measurement.get(out, out.options.update(width=500), table).maximum
    # A table that is wider than the screen is better wrapped by the screen than cut by us.
    Console(highlight=False, width=max(out.width, needed)).print(table)


def note(text: str) -> None:
    """Print one line of plain text to standard error, where it does not mix with results."""
    err.print(text, markup=False)


@contextmanager
def progress() -> Iterator[Progress]:
    """A live display on standard error; nothing at all where that is not a terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal) as display:
        yield display
