"""`fedinfer predict`: a saved model on rows that you hold."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedinfer.cli.console import show_json
from fedinfer.cli.files import rows_path, say_clamped, write_answers
from fedinfer.cli.parts import part
from fedinfer.data import read_schema, read_table


def open_model(path: Path, schema_path: Path | None) -> Any:
    """The `clients.local.LocalModel` of a file, checked against schema.toml where one is given."""
    schema = read_schema(schema_path) if schema_path is not None else None
    return part("clients.local").LocalModel.open(path, schema=schema)


def predict_rows(model_path: Path, rows: str, *, out: Path | None, schema_path: Path | None, as_json: bool) -> None:
    """Label rows and write the answers."""
    local = open_model(model_path, schema_path)
    table = read_table(rows_path(rows), local.schema, with_target=False)
    say_clamped("rows", table)
    started = time.perf_counter()
    answers = local.pipeline.answer(table.features)
    if as_json:
        show_json({"answers": [asdict(a) for a in answers], "ms": (time.perf_counter() - started) * 1e3})
        if out is None:
            return
    write_answers(answers, out)
