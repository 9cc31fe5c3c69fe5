"""`fedinfer evaluate`: how good a model is, by noised counts that ledgers pay for, or raw for the holder's eyes."""

import json
import secrets
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedinfer.cli.console import note, show_json, show_table
from fedinfer.cli.console import out as screen
from fedinfer.cli.federation import LEAST_MEMBERS, Node, enlist
from fedinfer.cli.files import client_files, say_clamped
from fedinfer.cli.local import open_model
from fedinfer.cli.parts import part
from fedinfer.cli.train import make_ledgers
from fedinfer.data import heart_schema, read_schema, read_table
from fedinfer.errors import BadInput, BadUsage
from fedinfer.inference import unsafe_accuracy, unsafe_auc
from fedinfer.models import load
from fedinfer.privacy import PrivacyLedger
from fedinfer.settings import BUNDLED_SCHEMA, RunConfig
from fedinfer.simulation import run_in_process


def measure_model(
    model_path: Path, folder: Path, *, schema_path: Path | None, epsilon: float, delta: float, as_json: bool
) -> None:
    """Every CSV file is a device that answers once with noised counts; a refusal spends nothing."""
    model = load(model_path)
    if schema_path is None and model.schema_digest != heart_schema().digest():
        raise BadUsage("schema: got none, expected --schema schema.toml, the one that the model was trained with")
    schema = heart_schema() if schema_path is None else read_schema(schema_path)
    if schema.digest() != model.schema_digest:
        raise BadInput(f"{schema_path}: got another schema than the model's, expected the one it was trained with")
    config = RunConfig(
        schema=BUNDLED_SCHEMA if schema_path is None else str(schema_path),
        epsilon=epsilon,
        delta=delta,
        evaluate=str(model_path),
        run=f"evaluation-{secrets.token_hex(4)}",
    )
    nodes: list[Node] = []
    for path in client_files(folder):
        say_clamped(str(path), read_table(path, schema))
        nodes.append({"data": str(path), "schema": config.schema, "ledger": str(path.with_suffix(".ledger"))})
    ledgers = [Path(str(node["ledger"])) for node in nodes]
    config = replace(config, min_devices=len(nodes))
    with tempfile.TemporaryDirectory(prefix="fedinfer-members-") as place:
        if len(nodes) >= LEAST_MEMBERS:
            config, nodes = enlist(config, nodes, Path(place))
        for path in ledgers:
            if path.exists():
                with PrivacyLedger.open(path) as ledger:
                    ledger.check(run=config.run, plan=config.evaluation)
        for path in make_ledgers(config, ledgers):
            note(f"{path}: no ledger yet, enrolled with a budget of ε = {epsilon:g}, δ = {delta:g}")
        flat = config.to_flat()
        context = run_in_process(part("server.app").app, part("clients.app").app, nodes=nodes, run_config=flat)
    result = json.loads(str(context.state.config_records["evaluation"]["json"]))
    if as_json:
        show_json(result)
        return
    rows = [(name, *_estimate(result["metrics"][name])) for name in ("accuracy", "auc", "loss", "examples")]
    show_table("from noised counts", ("metric", "estimate", "standard error of the noise"), rows)
    screen.print(
        f"{result['devices']} clients, ε = {result['epsilon']:.4g} at δ = {delta:g} for each row of each; "
        f"their ledgers have it as {config.run}"
    )


def _estimate(told: dict[str, float] | None) -> tuple[str, str]:
    return ("hidden by the noise", "") if told is None else (f"{told['value']:.4g}", f"{told['standard_error']:.2g}")


def unsafe_measure_model(model_path: Path, folder: Path, *, schema_path: Path | None, as_json: bool) -> None:
    """Raw metrics for each client's file and for all rows together, for whoever holds them."""
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
