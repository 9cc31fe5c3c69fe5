"""`fedinfer train`: every CSV file of a folder is a device, in this process."""

import json
import secrets
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Context
from rich.progress import Progress

from fedinfer.cli.console import note, progress, show_json
from fedinfer.cli.console import out as screen
from fedinfer.cli.federation import LEAST_MEMBERS, Node, enlist
from fedinfer.cli.files import client_files, say_clamped
from fedinfer.cli.main import check_rounds
from fedinfer.cli.parts import part
from fedinfer.cli.stopping import before_rounds, stop_between_steps, way_on
from fedinfer.data import Schema, Table, read_table
from fedinfer.errors import BadInput, BadUsage, CheckpointError, ModelFileError
from fedinfer.models import load
from fedinfer.privacy import DistributedPlan, PrivacyLedger, PrivacyPlan
from fedinfer.settings import BUNDLED_SCHEMA, RunConfig
from fedinfer.simulation import run_in_process


def train_model(
    folder: Path | None,
    *,
    schema: Path | None,
    data: str,
    out: Path,
    family: str,
    epsilon: float,
    delta: float,
    unit: str,
    rounds: int | None,
    combine: str,
    wrong_devices: int,
    seed: int,
    resume: bool,
    unsafe_no_privacy: bool,
    insecure_seed: str,
    secure_sum: bool | None,
    as_json: bool,
) -> None:
    """Check everything first, then train; a refusal leaves ledgers and files as they were.

    By default (`secure_sum` None) three or more clients with a plan add up in secure sums.
    """
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
        unit=unit,
        unsafe_no_privacy=unsafe_no_privacy,
        checkpoint=str(checkpoint),
        resume=resume,
        out=str(out),
        combine=combine,
        wrong_devices=wrong_devices,
        rounds=RunConfig.rounds if rounds is None else rounds,
    )
    if folder is None:
        nodes: list[Node] = [{"partition-id": index} for index in range(4)]
    else:
        nodes = file_nodes(folder, config.public_schema, str(schema), public=unsafe_no_privacy)
    for index, node in enumerate(nodes):
        if insecure_seed:
            node["insecure-seeded-noise"] = f"{insecure_seed}/{index}"
    config = replace(config, min_devices=len(nodes))
    with tempfile.TemporaryDirectory(prefix="fedinfer-members-") as place:
        if _in_secure_sums(secure_sum, config, len(nodes)):
            config, nodes = enlist(config, nodes, Path(place))
        run, done = _run_and_round(config)
        config = replace(config, run=run)
        # Too few devices for the rule are refused here, before a ledger is made.
        config.combiner()
        ledgers = [Path(str(node["ledger"])) for node in nodes if "ledger" in node]
        check_ledgers(config, ledgers, releases=config.rounds - done)
        # A folder that cannot be made must fail before a ledger is charged.
        out.parent.mkdir(parents=True, exist_ok=True)
        for path in make_ledgers(config, ledgers):
            note(f"{path}: no ledger yet, enrolled with a budget of ε = {config.epsilon:g}, δ = {config.delta:g}")
        with progress() as display, stop_between_steps() as check:
            try:
                context = run_rounds(config, nodes, display, "training", done=done, between=check)
            except KeyboardInterrupt:
                note(way_on(config, "the same command with --resume"))
                raise
    _report(config, context, len(nodes), as_json=as_json)


def _in_secure_sums(asked: bool | None, config: RunConfig, clients: int) -> bool:
    """Whether clients add up in secure sums.

    Raises: BadUsage if they were asked to and cannot.
    """
    possible = clients >= LEAST_MEMBERS and not config.unsafe_no_privacy and config.combine == "mean"
    if asked and not possible:
        raise BadUsage(
            f"--secure-sum: got {clients} clients{', no privacy' if config.unsafe_no_privacy else ''} and --combine "
            f"{config.combine}, expected at least {LEAST_MEMBERS} clients, a plan and the mean; fewer cannot hide one "
            "among others, and robust rules read single updates"
        )
    return possible if asked is None else asked


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


def check_ledgers(config: RunConfig, paths: Sequence[Path], *, releases: int) -> None:
    """Check that every ledger can pay for `releases` more rounds of the run.

    Raises: BudgetExceeded or LedgerError, with nothing written; BadUsage for a plan that cannot be.
    """
    if config.plan is None:
        return
    for path in paths:
        if path.exists():
            with PrivacyLedger.open(path) as ledger:
                ledger.check(run=config.run, plan=config.plan, releases=releases)


def make_ledgers(config: RunConfig, paths: Sequence[Path]) -> list[Path]:
    """Make the ledgers that are not there, with the run's ε and δ as their budget; return them."""
    missing = [path for path in paths if not path.exists()] if config.plan is not None else []
    for path in missing:
        PrivacyLedger.create(path, epsilon=config.epsilon, delta=config.delta).close()
    return missing


def run_rounds(
    config: RunConfig, nodes: Sequence[Node], display: Progress, title: str, *, done: int, between: Callable[[], None]
) -> Context:
    """Run the app on the in-process grid and show its rounds; `done` of them were done before."""
    task = display.add_task(title, total=config.rounds * len(nodes), completed=done * len(nodes))
    return run_in_process(
        part("server.app").app,
        part("clients.app").app,
        nodes=nodes,
        run_config=config.to_flat(),
        # A secure sum has other waves besides the one that is named by its round.
        progress=lambda group, _node: display.advance(task) if group.isdigit() else None,
        before=before_rounds(between),
    )


def run_result(context: Context) -> dict[str, Any]:
    """What the ServerApp says of its run: `run`, `resumed_from`, `rounds`."""
    result: dict[str, Any] = json.loads(str(context.state.config_records["result"]["json"]))
    return result


def _run_and_round(config: RunConfig) -> tuple[str, int]:
    """The name of the run, and how many of its rounds are done.

    Raises: CheckpointError if the run to resume has given its model already.
    """
    if not config.resume:
        return secrets.token_hex(8), 0
    state = part("server.checkpoint").load_checkpoint(Path(config.checkpoint), config_digest=config.digest())
    if state.round >= config.rounds and _is_model_of(Path(config.out), state.run):
        raise CheckpointError(
            f"run {state.run}: got --resume, but it is finished and {config.out} is its model; "
            "start a new run without --resume"
        )
    return state.run, state.round


def _is_model_of(path: Path, run: str) -> bool:
    try:
        return load(path).privacy.get("run") == run
    except ModelFileError:
        return False


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
                "unit": config.unit,
                "plan": config.plan.to_json() if config.plan is not None else None,
                **result,
            }
        )
        return
    if config.plan is not None and protected:
        unit = "each row of each client" if config.unit == "example" else "each whole client"
        promise = f"ε = {config.plan.epsilon():.4g} at δ = {config.delta:g} for {unit}"
    else:
        promise = "no privacy: ε is void"
    screen.print(f"{config.out}: {len(result['rounds'])} rounds over {clients} clients, {promise}")
    if config.plan is not None and protected:
        screen.print(how_noised(config.plan, result["rounds"]))


def how_noised(plan: PrivacyPlan | DistributedPlan, rounds: Sequence[Mapping[str, Any]]) -> str:
    """Who adds the noise and who is assumed to work with the server, in one line."""
    if isinstance(plan, PrivacyPlan):
        return "each client adds all of its own noise; the server sees each client's release"
    most = max(record["overshoot"] for record in rounds) if rounds else 1.0
    return (
        f"secure sums: the server sees totals; {plan.min_honest} clients' shares of the noise are counted on, "
        f"{plan.colluders} may work with the server; there was up to {most:.3g} times the noise variance accounted for"
    )
