"""`fedinfer predict` and `fedinfer evaluate`: a saved model on rows that you hold."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fedinfer.cli.console import note, show_json, show_table
from fedinfer.cli.files import client_files, rows_path, say_clamped, write_answers
from fedinfer.cli.parts import part
from fedinfer.data import read_schema, read_table
from fedinfer.errors import BadInput
from fedinfer.inference import unsafe_accuracy, unsafe_auc


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


def evaluate_model(model_path: Path, folder: Path, *, schema_path: Path | None, as_json: bool) -> None:
    """Raw metrics for each client's file and for all rows together."""
    local = open_model(model_path, schema_path)
    tables = {path.stem: read_table(path, local.schema) for path in client_files(folder)}
    empty = [name for name, table in tables.items() if len(table) == 0]
    if empty:
        raise BadInput(f"{folder}: got no rows in {empty[0]}.csv, expected at least one")
    results: dict[str, dict[str, Any]] = {}
    every_label, every_p = [], []
    for name, table in tables.items():
        say_clamped(name, table)
        p = local.pipeline.predict(table.features)[:, 1]
        results[name] = _metrics(table.labels, p, local.model.threshold)
        every_label.append(table.labels)
        every_p.append(p)
    if len(tables) > 1:
        results["all"] = _metrics(np.concatenate(every_label), np.concatenate(every_p), local.model.threshold)
    if as_json:
        show_json({"clients": results, "threshold": local.model.threshold, "privacy": dict(local.model.privacy)})
        return
    rows = [(name, str(r["rows"]), _text(r["unsafe_auc"]), _text(r["unsafe_accuracy"])) for name, r in results.items()]
    show_table("raw metrics", ("client", "rows", "AUC", "accuracy"), rows)
    note("these are raw metrics of private rows: sharing them is a release that no ledger counts")


def _metrics(labels: Any, p: Any, threshold: float) -> dict[str, Any]:
    return {
        "rows": len(labels),
        "unsafe_auc": unsafe_auc(labels, p),
        "unsafe_accuracy": unsafe_accuracy(labels, p, threshold=threshold),
    }


def _text(value: float | None) -> str:
    return "one class" if value is None else f"{value:.3f}"
