"""`fedinfer schema`: a draft that a human completes with public knowledge."""

from collections.abc import Sequence
from pathlib import Path

import tomli_w

from fedinfer.cli.console import note, show_json
from fedinfer.cli.console import out as screen
from fedinfer.cli.files import client_files
from fedinfer.data.table import Row, read_rows
from fedinfer.errors import BadInput, SchemaError
from fedinfer.files import replace_file

HEADER = """\
# A draft of the public schema, made from column names and types.
# Fill in what everybody may know: ranges that are possible, categories that exist. Do not read them off the rows.
# A value outside its range is refused; outside = "clamp" moves it to the nearer end and counts it.
"""
UNSAFE_HEADER = """\
# UNSAFE: ranges and categories below were read off the rows. Publishing this file releases them without any privacy.
# Replace them with what everybody may know before this schema leaves the building.
"""


def draft_schema(folder: Path, *, target: str, out: Path, unsafe_from_data: bool, as_json: bool) -> None:
    """Write a draft of schema.toml for the CSV files in `folder`.

    Raises: BadInput if `out` exists; SchemaError if the files' columns differ or hold no target.
    """
    if out.exists():
        raise BadInput(f"{out}: got an existing file, expected none; move it away or name another with --out")
    tables = {path: read_rows(path) for path in client_files(folder)}
    rows = [row for table in tables.values() for row in table]
    columns = list(rows[0]) if rows else []
    for path, table in tables.items():
        if table and list(table[0]) != columns:
            raise SchemaError(f"{path}: got columns {', '.join(table[0])}, expected {', '.join(columns)}")
    if target not in columns:
        raise SchemaError(f"target: got {target!r}, expected one of the columns {', '.join(columns) or '(no rows)'}")
    features = [column for column in columns if column != target]
    numbers = [column for column in features if all(_is_number(row[column]) for row in rows if row[column].strip())]
    draft = _unsafe_draft if unsafe_from_data else _draft
    text = draft(folder.name, target, features, numbers, rows)
    replace_file(out, text.encode())
    if as_json:
        show_json({"schema": str(out), "numbers": numbers, "categories": [c for c in features if c not in numbers]})
        return
    screen.print(f"{out}: {len(numbers)} numbers, {len(features) - len(numbers)} categories, target {target}")
    if unsafe_from_data:
        note("unsafe: its ranges and categories were read off the rows; look at each before you publish it")
    else:
        note("a draft: fill in each low, high and values from public knowledge, then `fedinfer train`")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _draft(name: str, target: str, features: list[str], numbers: list[str], rows: Sequence[Row]) -> str:
    lines = [HEADER, f"name = {_toml(name)}", "", "[target]", f"column = {_toml(target)}"]
    lines += ['negative = []                # for example ["0"]', 'positive = []                # for example ["1"]']
    lines += ['labels = ["negative", "positive"]']
    for column in features:
        kind = "number" if column in numbers else "category"
        lines += ["", f"[[{kind}]]", f"column = {_toml(column)}"]
        lines += ["# low =", "# high ="] if kind == "number" else ["values = []"]
        lines += ['# missing = [""]             # if it may be left empty']
    return "\n".join(lines) + "\n"


def _unsafe_draft(name: str, target: str, features: list[str], numbers: list[str], rows: Sequence[Row]) -> str:
    values = {column: sorted({row[column].strip() for row in rows}) for column in [*features, target]}
    known = [value for value in values[target] if value]
    fields = {"name": name, "target": {"column": target, "negative": known[:1], "positive": known[1:]}}
    entries: dict[str, list[dict[str, object]]] = {"number": [], "category": []}
    for column in features:
        present = [value for value in values[column] if value]
        missing: dict[str, object] = {"missing": [""]} if "" in values[column] else {}
        if column in numbers:
            found = [float(value) for value in present] or [0.0]
            low, high = min(found), max(found)
            entry = {"column": column, "low": low, "high": high if high > low else low + 1.0, "outside": "clamp"}
            entries["number"].append(entry | missing)
        else:
            entries["category"].append({"column": column, "values": present} | missing)
    return UNSAFE_HEADER + tomli_w.dumps(fields | {kind: list_ for kind, list_ in entries.items() if list_})


def _toml(text: str) -> str:
    return tomli_w.dumps({"x": text}).removeprefix("x = ").rstrip("\n")
