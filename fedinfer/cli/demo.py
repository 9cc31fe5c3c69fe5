"""`fedinfer demo`: the three walks, one after another, on four real hospitals, and a report of what happened."""

import os
import platform
import resource
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from fedinfer.cli.console import note, progress, show_json, show_table
from fedinfer.cli.console import out as screen
from fedinfer.cli.evaluation import Evaluation
from fedinfer.cli.federation import Node, enlist
from fedinfer.cli.hospitals import Hospital, resume_or_start
from fedinfer.cli.main import check_rounds
from fedinfer.cli.methods import NAMES, methods
from fedinfer.cli.parts import part
from fedinfer.cli.query import start_server
from fedinfer.cli.stopping import stop_between_steps, way_on
from fedinfer.cli.train import run_result, run_rounds
from fedinfer.data import encode
from fedinfer.data.heart import SCHEMA_PATH
from fedinfer.privacy import DistributedPlan, PrivacyLedger
from fedinfer.report import write_report
from fedinfer.report.units import size
from fedinfer.settings import RunConfig

EPSILONS, FAST_EPSILONS = (8.0, 4.0, 2.0, 1.0), (2.0, 1.0)
SEEDS, FAST_SEEDS = 5, 1
QUERIES, FAST_QUERIES = 32, 8
LOCAL_REPEATS = 1000
# Of sentences on the screen; the tables are no wider.
WIDTH = 100
LEDGER_NOTE = (
    "Each run of the demo enrols the patients anew, in ledgers of its own: twenty runs are twenty budgets. That is "
    "right for a table that everybody can read. A deployment has one ledger for each data holder, for all runs. Here "
    "one machine plays the server and every hospital: its secure sums are real ones, but hide nothing from it."
)


def run_demo(*, rounds: int | None, epsilon: float, seed: int, out: Path, fast: bool, as_json: bool) -> None:
    """Train, predict, ask, report. Stopped anywhere, the same command goes on with what is done."""
    check_rounds(rounds)
    started = time.monotonic()
    torch.set_num_threads(1)
    config = RunConfig(
        schema=str(SCHEMA_PATH),
        rounds=RunConfig.rounds if rounds is None else rounds,
        epsilon=epsilon,
        min_devices=4,
        checkpoint=str(out / "checkpoint.safetensors"),
        out=str(out / "model.safetensors"),
    )
    with tempfile.TemporaryDirectory(prefix="fedinfer-members-") as place:
        config, members = enlist(config, [{}] * config.min_devices, Path(place))
        # A plan that cannot be is refused before a folder is made.
        assert config.plan is not None
        out.mkdir(parents=True, exist_ok=True)
        config, hospitals, done = resume_or_start(config, out / "devices", seed)
        try:
            report = _walk(config, hospitals, members, seed=seed, done=done, fast=fast, started=started)
            _, page = write_report(report, out)
        except KeyboardInterrupt:
            note(way_on(config, "the same command"))
            raise
    # Only now is there nothing left to go on with.
    Path(config.checkpoint).unlink()
    if as_json:
        show_json(report)
    else:
        _show(report, page)


def _walk(
    config: RunConfig,
    hospitals: Sequence[Hospital],
    members: Sequence[Node],
    *,
    seed: int,
    done: int,
    fast: bool,
    started: float,
) -> dict[str, Any]:
    """The three walks and the evaluation, as the report takes them."""
    seeds, epsilons = (FAST_SEEDS, FAST_EPSILONS) if fast else (SEEDS, EPSILONS)
    evaluation = Evaluation(seeds=range(seed, seed + seeds), methods=methods(epsilons), rounds=config.rounds)
    with progress() as display, stop_between_steps() as check:
        headline = _train(config, hospitals, members, display, done, check)
        with start_server(Path(config.out)) as wait_for_url:
            _evaluate(evaluation, display, check)
            local = _predict_locally(Path(config.out), hospitals)
            encrypted = _ask(wait_for_url(), Path(config.out), hospitals, FAST_QUERIES if fast else QUERIES)
    return {
        "title": "Four hospitals, one heart-disease model",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["fedinfer", *sys.argv[1:]]),
        "fedinfer": version("fedinfer"),
        "environment": _environment(started),
        "headline": headline,
        "ledgers": [_ledger(hospital) for hospital in hospitals],
        "ledger_note": LEDGER_NOTE,
        "evaluation": evaluation.to_json(),
        "local_inference": local,
        "encrypted_query": encrypted,
    }


def _train(
    config: RunConfig,
    hospitals: Sequence[Hospital],
    members: Sequence[Node],
    display: Progress,
    done: int,
    check: Callable[[], None],
) -> dict[str, Any]:
    started = time.monotonic()
    nodes = [hospital.node | member for hospital, member in zip(hospitals, members, strict=True)]
    title = f"training together, ε = {config.epsilon:g}"
    context = run_rounds(config, nodes, display, title, done=done, between=check)
    result = run_result(context)
    plan = config.plan
    assert isinstance(plan, DistributedPlan)
    rounds = result["rounds"]
    sent = {key: sum(record[key] for record in rounds) / len(hospitals) for key in ("bytes_up", "bytes_down")}
    return {
        "hospitals": [{"name": hospital.name, "releases": len(rounds), **sent} for hospital in hospitals],
        "epsilon": plan.epsilon(),
        "delta": plan.delta,
        "unit": "patient",
        "relation": "add or remove one patient",
        "adversary": f"the server, which sees every sum, together with {plan.colluders} of the hospitals",
        "min_honest": plan.min_honest,
        "overshoot": max(record["overshoot"] for record in rounds),
        "bits": plan.bits,
        "sampling_rate": plan.sampling_rate,
        "noise_multiplier": plan.noise_multiplier,
        "clip_norm": plan.clip_norm,
        "rounds": rounds,
        "seconds": time.monotonic() - started + sum(record["seconds"] for record in rounds[:done]),
        "resumed_from": result["resumed_from"] or None,
        "epsilon_void": any(record["void"] for record in rounds),
        "model": config.out,
    }


def _evaluate(evaluation: Evaluation, display: Progress, check: Callable[[], None]) -> None:
    task = display.add_task("evaluating on public data", total=evaluation.steps)

    def advance() -> None:
        display.advance(task)
        check()

    check()
    evaluation.run(advance)


def _predict_locally(model: Path, hospitals: Sequence[Hospital]) -> dict[str, Any]:
    local = part("clients.local").LocalModel.open(model)
    rows = [row for hospital in hospitals for row in hospital.test]
    times_ms = []
    for index in range(LOCAL_REPEATS):
        began = time.perf_counter()
        local.answer([rows[index % len(rows)]])
        times_ms.append((time.perf_counter() - began) * 1e3)
    examples = local.answer(rows[:5])
    return {
        "rows": len(rows),
        "p50_ms": statistics.median(times_ms),
        "p99_ms": float(np.percentile(times_ms, 99)),
        "threshold": local.model.threshold,
        "model_bytes": model.stat().st_size,
        "examples": [{"label": answer.label, "confidence": answer.confidence} for answer in examples],
    }


def _ask(url: str, model: Path, hospitals: Sequence[Hospital], queries: int) -> dict[str, Any]:
    """Ask the server process about held-out rows, one a query, and compare with the plain answers."""
    asking = part("clients.asking")
    served = asking.describe(url)
    rows = [row for hospital in hospitals for row in hospital.test]
    features = encode(rows[:: max(1, len(rows) // queries)][:queries], served.schema, with_target=False).features
    asked = asking.ask(url, served, features, rows_per_query=1)
    plain = part("clients.local").LocalModel.open(model).pipeline.logits(features)
    parameters = served.circuit.parameters
    primes = ", ".join(map(str, parameters.prime_bits))
    return {
        "queries": len(features),
        "p50_ms": statistics.median(asked.latency_ms),
        "p99_ms": float(np.percentile(asked.latency_ms, 99)),
        "keygen_ms": asked.keygen_ms,
        "bytes_up": asked.bytes_up / len(features),
        "bytes_down": asked.bytes_down / len(features),
        "key_bytes": asked.key_bytes,
        "max_error": float(np.abs(asked.logits - plain).max()),
        "labels_equal": bool(((asked.logits >= 0.0) == (plain >= 0.0)).all()),
        "parameters": f"CKKS, N = {parameters.degree}, primes of {primes} bits, 128-bit security",
    }


def _ledger(hospital: Hospital) -> dict[str, Any]:
    with PrivacyLedger.open(hospital.ledger) as ledger:
        entries, summary = ledger.verify(), ledger.summary()
    (run,) = summary.runs
    return {
        "device": hospital.name,
        "path": str(hospital.ledger),
        "budget_epsilon": summary.budget_epsilon,
        "budget_delta": summary.budget_delta,
        "spent_epsilon": summary.spent_epsilon,
        "spent_delta": summary.spent_delta,
        "releases": run.reserved,
        "unfinished": run.reserved - run.committed,
        "plan_releases": run.steps,
        "verified": entries > 0,
        "void": run.void,
    }


def _environment(started: float) -> dict[str, Any]:
    peak_kb = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    packages = {name: version(name) for name in ("torch", "flwr", "tenseal")}
    return {
        "python": platform.python_version(),
        **packages,
        "cores": len(os.sched_getaffinity(0)),
        "seconds_total": time.monotonic() - started,
        "peak_memory_mb": peak_kb / 1024,
    }


def _show(report: dict[str, Any], page: Path) -> None:
    """Print the table and the figures of the three walks."""
    evaluation = report["evaluation"]
    cells = {(cell["method"], cell["site"]): cell for cell in evaluation["cells"]}
    for name, title in (("auc", "AUC"), ("accuracy", "accuracy")):
        rows = [
            [method["label"], *(_score(cells[method["key"], site], name) for site in evaluation["sites"])]
            for method in evaluation["methods"]
        ]
        title = f"{title}, mean ± std over {evaluation['splits']} splits: an evaluation on public data"
        show_table(title, ["", *evaluation["sites"]], rows)
    _show_ways(evaluation)
    headline, local, encrypted = report["headline"], report["local_inference"], report["encrypted_query"]
    _print_wrapped(
        f"trained   ε = {headline['epsilon']:.4g} at δ = {headline['delta']:g} for each patient, "
        f"{len(headline['rounds'])} rounds in {headline['seconds']:.1f} s; the ledgers of this run hold it. Against "
        f"{headline['adversary']}; {headline['min_honest']} shares of the noise are counted on, "
        f"and a round had at most {headline['overshoot']:.2f} times their variance",
        indent=10,
    )
    screen.print(f"offline   p50 {local['p50_ms']:.2f} ms, p99 {local['p99_ms']:.2f} ms a patient")
    _print_wrapped(
        f"encrypted p50 {encrypted['p50_ms']:.0f} ms, p99 {encrypted['p99_ms']:.0f} ms a query; "
        f"{encrypted['bytes_up'] / 1e3:.0f} kB up, {encrypted['bytes_down'] / 1e3:.0f} kB down, "
        f"keys {size(encrypted['key_bytes'])} once; largest error {encrypted['max_error']:.1e}",
        indent=10,
    )
    environment = report["environment"]
    screen.print(f"in all    {environment['seconds_total']:.0f} s, peak memory {environment['peak_memory_mb']:.0f} MB")
    screen.print(f"report    {page}")


def _show_ways(evaluation: dict[str, Any]) -> None:
    """Print what secure sums lose to pooled rows and gain over noise by each hospital, and whose ε is whose."""
    methods = {method["key"]: method for method in evaluation["methods"]}
    rows: dict[str, list[str]] = {}
    for pair in evaluation["paired"]:
        method, against = methods[pair["method"]], methods[pair["against"]]
        if against["epsilon"] is not None:
            row = rows.setdefault(f"ε = {method['epsilon']:g}, to {NAMES[against['way']]}", [])
            row.append(_points(f"{pair['difference']:+.3f}±{pair['standard_error']:.3f}"))
    title = "AUC, together minus other ways to the same ε ± the paired standard error"
    show_table(title, ["", *evaluation["sites"]], [[label, *cells] for label, cells in rows.items()])
    for promise in evaluation["against"]:
        _print_wrapped(f"{promise['label']}, ε: against {promise['text']}", indent=4)
    screen.print()


def _print_wrapped(text: str, *, indent: int) -> None:
    screen.print(textwrap.fill(text, WIDTH, subsequent_indent=" " * indent))


def _points(text: str) -> str:
    """Scores without the zero before the point."""
    return text.replace("0.", ".").replace("-", "−")


def _score(cell: dict[str, Any], name: str) -> str:
    return _points(f"{cell[f'unsafe_{name}_mean']:.3f}±{cell[f'unsafe_{name}_std']:.3f}")
