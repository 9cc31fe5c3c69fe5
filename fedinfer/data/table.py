"""Rows of text to features and labels, by a public schema and nothing else.

A number becomes its place in the public range, from -1 to 1, and 0 where it is missing, with a flag of its own; a
category becomes one-hot, with a flag for missing. An error names the line and the column, never the value: a row is
somebody's secret.
"""

import csv
import io
import math
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedinfer.data.schema import Category, Number, Schema, Target
from fedinfer.errors import SchemaError

Features = NDArray[np.float32]
Labels = NDArray[np.float32]
Row = Mapping[str, str]

MAX_FILE_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Table:
    """The rows of one data holder: `features` (n, d), `labels` (n,) of 0 and 1, empty where they were not asked for.

    `clamped` counts, by column, the values that lay outside the public range. It is private, like the rows.
    """

    features: Features = field(repr=False)
    labels: Labels = field(repr=False)
    clamped: Mapping[str, int] = field(repr=False, default_factory=dict)

    def __len__(self) -> int:
        return len(self.features)


def encode(rows: Sequence[Row], schema: Schema, *, with_target: bool, first_line: int = 2) -> Table:
    """Encode rows of text; `first_line` is the line of the first one in its file.

    Guarantees: every feature lies in [-1, 1] whatever the text, and a row's features depend on that row alone.
    Raises: SchemaError with line and column for the first value that the schema does not allow.
    """
    features = np.zeros((len(rows), schema.width), np.float32)
    labels = np.zeros(len(rows) if with_target else 0, np.float32)
    clamped: Counter[str] = Counter()
    for index, row in enumerate(rows):
        place = 0
        for column in schema.columns:
            where = f"line {first_line + index}, column {column.column!r}"
            text = (row.get(column.column) or "").strip()
            cells = features[index, place : place + column.width]
            place += column.width
            if text in column.missing:
                cells[-1] = 1.0
            elif isinstance(column, Number):
                value = _number(text, column, where)
                inside = min(max(value, column.low), column.high)
                clamped[column.column] += inside != value
                cells[0] = 2.0 * (inside - column.low) / (column.high - column.low) - 1.0
            else:
                cells[_category(text, column, where)] = 1.0
        if with_target:
            labels[index] = _label(row.get(schema.target.column), schema.target, first_line + index)
    return Table(features=features, labels=labels, clamped={name: n for name, n in clamped.items() if n})


def _number(text: str, column: Number, where: str) -> float:
    if text == "":
        raise SchemaError(
            f'{where}: got nothing, expected a number; if it may be missing, add missing = [""] to the schema'
        )
    try:
        value = float(text)
    except ValueError:
        raise SchemaError(f"{where}: got text, expected a number from {column.low:g} to {column.high:g}") from None
    if not math.isfinite(value):
        raise SchemaError(f"{where}: got NaN or infinity, expected a number from {column.low:g} to {column.high:g}")
    if column.outside == "refuse" and not column.low <= value <= column.high:
        raise SchemaError(
            f"{where}: got a value outside the public range, expected {column.low:g} to {column.high:g}; "
            'correct the row, or let the schema say outside = "clamp"'
        )
    return value


def _category(text: str, column: Category, where: str) -> int:
    try:
        return column.values.index(text)
    except ValueError:
        got = "nothing" if text == "" else "an unknown category"
        raise SchemaError(f"{where}: got {got}, expected one of {', '.join(column.values)}") from None


def _label(text: str | None, target: Target, line: int) -> float:
    text = (text or "").strip()
    if text in target.positive:
        return 1.0
    if text in target.negative:
        return 0.0
    expected = ", ".join(target.negative + target.positive)
    raise SchemaError(f"line {line}, target {target.column!r}: got another value, expected one of {expected}")


def read_rows(path: Path | None) -> list[dict[str, str]]:
    """Read a CSV file with a header line; None reads standard input.

    Raises: SchemaError if it is not there, is not text, has no header, a column twice, or a line of another length.
    """
    name = "standard input" if path is None else str(path)
    try:
        if path is not None and path.stat().st_size > MAX_FILE_BYTES:
            raise SchemaError(f"{name}: got over {MAX_FILE_BYTES} bytes, expected less; split the file")
        text = sys.stdin.read() if path is None else path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise SchemaError(f"{name}: got a file that is not UTF-8 text, expected CSV with a header line") from None
    except OSError as error:
        raise SchemaError(f"{name}: got no readable file ({error.strerror}), expected CSV with a header line") from None
    return list(_parse(text, name))


def _parse(text: str, name: str) -> Iterator[dict[str, str]]:
    if "\0" in text:
        raise SchemaError(f"{name}: got a binary file, expected CSV with a header line")
    reader = csv.reader(io.StringIO(text), strict=True)
    try:
        header = [column.strip() for column in next(reader, [])]
        if not any(header):
            raise SchemaError(f"{name}: got an empty file, expected CSV with a header line")
        repeated = [column for column, count in Counter(header).items() if count > 1]
        if repeated:
            raise SchemaError(f"{name}: got column {repeated[0]!r} twice, expected each once")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise SchemaError(f"{name}, line {reader.line_num}: got {len(cells)} cells, expected {len(header)}")
            yield dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise SchemaError(f"{name}, line {reader.line_num}: got a line that is not CSV ({error})") from None


def read_table(path: Path | None, schema: Schema, *, with_target: bool = True) -> Table:
    """Read and encode one data holder's CSV file (None: standard input).

    Raises: SchemaError for a file, a column or a value that does not fit; the message names the file.
    """
    rows = read_rows(path)
    name = "standard input" if path is None else str(path)
    check_columns(rows[0].keys() if rows else None, schema, name, with_target=with_target)
    try:
        return encode(rows, schema, with_target=with_target)
    except SchemaError as error:
        raise SchemaError(f"{name}, {error}") from None


def check_columns(got: Collection[str] | None, schema: Schema, name: str, *, with_target: bool) -> None:
    """Check that a table has the columns that `schema` reads; `got` is None for a table without rows.

    Raises: SchemaError naming the missing columns.
    """
    if got is None:
        return
    expected = [column.column for column in schema.columns] + ([schema.target.column] if with_target else [])
    missing = [column for column in expected if column not in got]
    if missing:
        raise SchemaError(f"{name}: got no column {', '.join(map(repr, missing))}, expected {', '.join(expected)}")
