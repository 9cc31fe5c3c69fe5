"""`fedinfer train`: every CSV file of a folder is a device, in this process."""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Context

from fedinfer.cli.console import note, progress, show_json
from fedinfer.cli.console import out as screen
from fedinfer.cli.files import client_files, say_clamped
from fedinfer.cli.main import check_rounds
from fedinfer.cli.parts import part
from fedinfer.data import Schema, Table, read_table
from fedinfer.errors import BadInput, BadUsage
from fedinfer.privacy import PrivacyLedger
from fedinfer.settings import BUNDLED_SCHEMA, RunConfig
from fedinfer.simulation import run_in_process

Node = dict[str, bool | float | int | str]


def train_model(
    folder: Path | None,
    *,
    schema: Path | None,
    data: str,
    out: Path,
    family: str,
    epsilon: float,
    delta: float,
    rounds: int | None,
    seed: int,
    resume: bool,
    unsafe_no_privacy: bool,
    insecure_seed: str,
    as_json: bool,
) -> None:
    """Check everything first, then train; a refusal leaves ledgers and files as they were."""
    check_rounds(rounds)
    if (folder is None) == (data == ""):
        raise BadUsage(f"data: got {'neither' if folder is None else 'both'} DIR and --data, expected one of them")
    if data and data != BUNDLED_SCHEMA:
        raise BadUsage(f"--data: got {data!r}, expected {BUNDLED_SCHEMA!r}")
    if folder is not None and schema is None:
        raise BadUsage(
            "schema: got none, expected --schema schema.toml; `fedinfer schema DIR --target COLUMN` drafts one"
        )
    if out.is_dir():
        raise BadUsage(f"--out: got the folder {out}, expected a file to write the model to")
    checkpoint = out.with_name(out.name + ".checkpoint")
    config = RunConfig(
        schema=str(schema) if schema is not None else BUNDLED_SCHEMA,
        model=family,
        model_seed=seed,
        epsilon=epsilon,
        delta=delta,
        unsafe_no_privacy=unsafe_no_privacy,
        checkpoint=str(checkpoint),
        resume=resume,
        out=str(out),
        rounds=RunConfig.rounds if rounds is None else rounds,
    )
    if folder is None:
        nodes: list[Node] = [{"partition-id": index} for index in range(4)]
    else:
        nodes = file_nodes(folder, config.public_schema, str(schema), public=unsafe_no_privacy)
    for index, node in enumerate(nodes):
        if insecure_seed:
            node["insecure-seeded-noise"] = f"{insecure_seed}/{index}"
    config = replace(config, run=_run_name(config, checkpoint), min_devices=len(nodes))
    # A folder that cannot be made must fail before a ledger is charged.
    out.parent.mkdir(parents=True, exist_ok=True)
    open_ledgers(config, [Path(str(node["ledger"])) for node in nodes if "ledger" in node])
    context = run_with_progress(config, nodes)
    _report(config, context, len(nodes), as_json=as_json)


def file_nodes(folder: Path, schema: Schema, schema_path: str, *, public: bool) -> list[Node]:
    """A node for each CSV file, after reading each: one data holder checks its own rows before anything is spent.

    Raises: SchemaError or BadInput for a file that cannot be trained on.
    """
    nodes: list[Node] = []
    moved: list[tuple[str, Table]] = []
    for path in client_files(folder):
        table = read_table(path, schema)
        if len(table) < 2:
            raise BadInput(f"{path}: got {len(table)} rows, expected at least 2; leave this client out")
        if table.labels.min() == table.labels.max():
            raise BadInput(f"{path}: got rows of one class only, expected both; leave this client out")
        moved.append((str(path), table))
        node: Node = {"data": str(path), "schema": schema_path}
        nodes.append(node | ({"public-data": True} if public else {"ledger": str(path.with_suffix(".ledger"))}))
    for name, table in moved:
        say_clamped(name, table)
    return nodes


def open_ledgers(config: RunConfig, paths: Sequence[Path], *, announce: bool = True) -> None:
    """Check that every ledger can pay for the run, and only then make the ones that are not there.

    Raises: BudgetExceeded or LedgerError, with nothing written.
    """
    if config.plan is None:
        return
    for path in paths:
        if path.exists():
            with PrivacyLedger.open(path) as ledger:
                ledger.check(run=config.run, plan=config.plan)
    for path in paths:
        if not path.exists():
            PrivacyLedger.create(path, epsilon=config.epsilon, delta=config.delta).close()
            if announce:
                note(f"{path}: no ledger yet, enrolled with a budget of ε = {config.epsilon:g}, δ = {config.delta:g}")


def run_with_progress(config: RunConfig, nodes: Sequence[Mapping[str, bool | float | int | str]]) -> Context:
    """Run the app on the in-process grid and show its rounds.

    Raises: what the run raises; KeyboardInterrupt after saying how to go on.
    """
    with progress() as display:
        task = display.add_task("training", total=config.rounds * len(nodes))
        try:
            return run_in_process(
                part("server.app").app,
                part("clients.app").app,
                nodes=nodes,
                run_config=config.to_flat(),
                progress=lambda _round, _node: display.advance(task),
            )
        except KeyboardInterrupt:
            note(f"stopped; {config.checkpoint} holds the last whole round: the same command with --resume goes on")
            raise


def run_result(context: Context) -> dict[str, Any]:
    """What the ServerApp says of its run: `run`, `resumed_from`, `rounds`."""
    result: dict[str, Any] = json.loads(str(context.state.config_records["result"]["json"]))
    return result


def _run_name(config: RunConfig, checkpoint: Path) -> str:
    if not config.resume:
        return secrets.token_hex(8)
    return str(part("server.checkpoint").load_checkpoint(checkpoint, config_digest=config.digest()).run)


def _report(config: RunConfig, context: Context, clients: int, *, as_json: bool) -> None:
    result = run_result(context)
    void = any(record["void"] for record in result["rounds"])
    protected = config.plan is not None and not void
    if as_json:
        epsilon = config.plan.epsilon() if config.plan is not None and protected else None
        show_json(
            {
                "model": config.out,
                "clients": clients,
                "epsilon": epsilon,
                "delta": config.delta if protected else None,
                "epsilon_void": not protected,
                "unit": "example",
                **result,
            }
        )
        return
    if config.plan is not None and protected:
        promise = f"ε = {config.plan.epsilon():.4g} at δ = {config.delta:g} for each row of each client"
    else:
        promise = "no privacy: ε is void"
    screen.print(f"{config.out}: {len(result['rounds'])} rounds over {clients} clients, {promise}")
