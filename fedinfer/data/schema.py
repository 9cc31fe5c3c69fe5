"""The public schema: what a column may hold, said by people and never learnt from private rows.

A schema turns a row of text into numbers in a fixed way. Because ranges, categories and missing-value marks are
public constants, normalising costs no privacy (facts about the rows never enter), and every device makes the same
features from the same text.
"""

import hashlib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tomli_w

from fedinfer.errors import SchemaError

Outside = Literal["clamp", "refuse"]


@dataclass(frozen=True, kw_only=True)
class Number:
    """A numeric column with its public range; a value `outside` is clamped and counted, or refused."""

    column: str
    low: float
    high: float
    missing: tuple[str, ...] = ()
    outside: Outside = "refuse"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise SchemaError(f"column {self.column!r}: got range {self.low} to {self.high}, expected low < high")
        if self.outside not in ("clamp", "refuse"):
            raise SchemaError(f"column {self.column!r}: got outside = {self.outside!r}, expected 'clamp' or 'refuse'")

    @property
    def width(self) -> int:
        return 1 + bool(self.missing)


@dataclass(frozen=True, kw_only=True)
class Category:
    """A column that holds one of a public list of values."""

    column: str
    values: tuple[str, ...]
    missing: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = self.values + self.missing
        if len(self.values) < 2 or len(set(known)) != len(known):
            raise SchemaError(f"column {self.column!r}: got values {list(known)}, expected two or more, all different")

    @property
    def width(self) -> int:
        return len(self.values) + bool(self.missing)


@dataclass(frozen=True, kw_only=True)
class Target:
    """The column to predict: which of its values mean yes, which no, and what to call the two answers."""

    column: str
    negative: tuple[str, ...]
    positive: tuple[str, ...]
    labels: tuple[str, str] = ("negative", "positive")

    def __post_init__(self) -> None:
        known = self.negative + self.positive
        if not self.negative or not self.positive or len(set(known)) != len(known):
            raise SchemaError(
                f"target {self.column!r}: got negative {list(self.negative)} and positive {list(self.positive)}, "
                "expected at least one value in each, all different"
            )
        if len(self.labels) != 2:
            raise SchemaError(f"target {self.column!r}: got {len(self.labels)} labels, expected 2")


@dataclass(frozen=True, kw_only=True)
class Schema:
    """All columns in the order of the features (in schema.toml: the numbers, then the categories), and the target."""

    name: str
    target: Target
    columns: tuple[Number | Category, ...]
    client: str | None = None

    def __post_init__(self) -> None:
        names = [column.column for column in self.columns]
        if not names:
            raise SchemaError(f"schema {self.name!r}: got no columns, expected at least one [[number]] or [[category]]")
        repeated = sorted(
            {name for name in [*names, self.target.column] if [*names, self.target.column].count(name) > 1}
        )
        if repeated:
            raise SchemaError(f"schema {self.name!r}: got column {repeated[0]!r} twice, expected each once")

    @property
    def width(self) -> int:
        """The number of features of a row."""
        return sum(column.width for column in self.columns)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """A name for each feature: a number, `column=value`, or `column missing`."""
        names: list[str] = []
        for column in self.columns:
            if isinstance(column, Number):
                names.append(column.column)
            else:
                names += [f"{column.column}={value}" for value in column.values]
            if column.missing:
                names.append(f"{column.column} missing")
        return tuple(names)

    def digest(self) -> str:
        """SHA-256 of the canonical JSON: two schemas that make the same features from the same rows, or not."""
        return hashlib.sha256(json.dumps(to_json(self), sort_keys=True).encode()).hexdigest()


def to_json(schema: Schema) -> dict[str, Any]:
    """The schema as JSON values; `from_json` reads it back."""
    fields: dict[str, Any] = {"name": schema.name, "target": _plain(schema.target)}
    if schema.client is not None:
        fields["client"] = schema.client
    # The order of columns of both kinds matters, so each says its kind in one list.
    fields["columns"] = [
        {"kind": "number" if isinstance(column, Number) else "category", **_plain(column)} for column in schema.columns
    ]
    return fields


def _plain(record: Target | Number | Category) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(record).items()}


def from_json(fields: Mapping[str, Any]) -> Schema:
    """Read a schema from JSON values.

    Raises: SchemaError if a field is missing, unknown or of the wrong type.
    """
    try:
        target = {**fields["target"]}
        for key in ("negative", "positive", "labels"):
            if key in target:
                target[key] = _texts(target[key], f"target.{key}")
        columns = tuple(_column(entry) for entry in fields["columns"])
        unknown = sorted(set(fields) - {"name", "target", "columns", "client"})
        if unknown:
            raise SchemaError(f"schema: got unknown field {unknown[0]!r}")
        return Schema(name=str(fields["name"]), target=Target(**target), columns=columns, client=fields.get("client"))
    except KeyError as error:
        raise SchemaError(f"schema: expected a field {error}, got none") from None
    except (TypeError, ValueError) as error:
        raise SchemaError(f"schema: {error}") from None


def _texts(values: object, what: str) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise SchemaError(f"schema: {what}: got {values!r}, expected a list of texts")
    return tuple(str(value) for value in values)


def _column(entry: Mapping[str, Any]) -> Number | Category:
    fields = {key: value for key, value in entry.items() if key != "kind"}
    for key in ("missing", "values"):
        if key in fields:
            fields[key] = _texts(fields[key], f"{entry.get('column')}.{key}")
    if entry["kind"] == "number":
        missing_range = [key for key in ("low", "high") if key not in fields]
        if missing_range:
            raise SchemaError(
                f"column {entry.get('column')!r}: got no {missing_range[0]!r}, expected its public range; "
                "fill in low and high from common knowledge, not from the rows"
            )
        return Number(**{**fields, "low": float(fields["low"]), "high": float(fields["high"])})
    if entry["kind"] == "category":
        return Category(**fields)
    raise SchemaError(f"column {entry.get('column')!r}: got kind {entry['kind']!r}, expected 'number' or 'category'")


def read_schema(path: Path) -> Schema:
    """Read schema.toml: `name`, `[target]`, `[[number]]` tables and `[[category]]` tables; numbers come first.

    Raises: SchemaError if there is no such file or it does not hold.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise SchemaError(
            f"schema {path}: got no readable file, expected schema.toml; see `fedinfer schema --help`"
        ) from None
    try:
        fields = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SchemaError(f"schema {path}: got a file that is not TOML ({error})") from None
    try:
        numbers, categories = fields.pop("number", []), fields.pop("category", [])
        columns = [{"kind": "number", **entry} for entry in numbers]
        columns += [{"kind": "category", **entry} for entry in categories]
    except (TypeError, AttributeError):
        raise SchemaError(f"schema {path}: expected [[number]] and [[category]] tables") from None
    try:
        return from_json({**fields, "columns": columns})
    except SchemaError as error:
        raise SchemaError(f"{path}: {error}") from None


def write_schema(schema: Schema) -> str:
    """The text of schema.toml for `schema`."""
    fields = to_json(schema)
    columns = fields.pop("columns")
    for kind in ("number", "category"):
        entries = [{k: v for k, v in entry.items() if k != "kind"} for entry in columns if entry["kind"] == kind]
        if entries:
            fields[kind] = entries
    return tomli_w.dumps(fields)
