"""The commands and their options: parsed here, done elsewhere."""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import click
import typer

from fedinfer import __version__
from fedinfer.errors import BadUsage, FedinferError

app = typer.Typer(
    name="fedinfer",
    help="Train together under differential privacy, predict on the device, ask under encryption.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
ledger_app = typer.Typer(
    help="The privacy ledger: the data holder's budget and what was released against it.",
    epilog="Example:  fedinfer ledger show cleveland.ledger",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.add_typer(ledger_app, name="ledger")

pki_app = typer.Typer(
    help="Who takes part in secure sums: the devices' public keys, in a file that each device pins by its digest.",
    epilog="Example:  fedinfer pki show federation.pki",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.add_typer(pki_app, name="pki")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="A model file made by `fedinfer train`.")]
Rows = Annotated[str, typer.Argument(metavar="FILE.csv|-", help="Rows with a header line; - reads standard input.")]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="Write CSV here instead of to the screen.")]
SchemaPath = Annotated[
    Path | None,
    typer.Option("--schema", help="Check that the model is for this schema.toml."),
]


def main() -> None:
    """Run the command line; exit 1 for what went wrong, 2 for bad usage, 130 when interrupted."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    try:
        code = app(standalone_mode=False)
        if code == 130:
            # Typer turns Ctrl-C into an exit code of its own.
            raise KeyboardInterrupt
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except FedinferError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        sys.stderr.write(f"error: {error.filename or 'file'}: {error.strerror or error}; choose another place\n")
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"fedinfer {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and exit.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example:  fedinfer demo --fast --out demo-out")
def demo(
    rounds: Annotated[int | None, typer.Option(help="Training rounds; 40 unless said.")] = None,
    epsilon: Annotated[float, typer.Option(help="Privacy budget ε of the headline run, per patient.")] = 2.0,
    seed: Annotated[int, typer.Option(help="Which rows are held out. Never seeds noise or sampling.")] = 0,
    out: Annotated[Path, typer.Option("--out", help="Folder for the report, the model and the ledgers.")] = Path(
        "demo-out"
    ),
    fast: Annotated[
        bool, typer.Option("--fast", help="Four splits and two ε instead of twenty and four: under half a minute.")
    ] = False,
    json: Json = False,
) -> None:
    """Four real hospitals train one model, a device predicts offline, a query is answered under encryption."""
    from fedinfer.cli.demo import run_demo

    run_demo(rounds=rounds, epsilon=epsilon, seed=seed, out=out, fast=fast, as_json=json)


@app.command(epilog="Example:  fedinfer schema hospitals/ --target num --out schema.toml")
def schema(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder with one CSV file per client.")],
    target: Annotated[str, typer.Option(help="The column to predict.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Where to write the draft.")] = Path("schema.toml"),
    unsafe_from_data: Annotated[
        bool, typer.Option("--unsafe-from-data", help="Read ranges and categories off the rows, which releases them.")
    ] = False,
    json: Json = False,
) -> None:
    """Draft schema.toml from column names and types; a human fills in the public ranges and categories."""
    from fedinfer.cli.draft import draft_schema

    draft_schema(folder, target=target, out=out, unsafe_from_data=unsafe_from_data, as_json=json)


@app.command(epilog="Example:  fedinfer train hospitals/ --schema schema.toml --out model.safetensors --epsilon 2")
def train(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="[DIR]", help="A folder with one CSV file per client, each with its NAME.ledger."),
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Where to write the model.")] = Path("model.safetensors"),
    schema: Annotated[Path | None, typer.Option(help="The public schema.toml.")] = None,
    data: Annotated[str, typer.Option(help="Bundled public data instead of DIR: heart-disease.")] = "",
    model: Annotated[str, typer.Option(help="Model family: logistic or mlp.")] = "logistic",
    epsilon: Annotated[float, typer.Option(help="ε per unit, for the whole run.")] = 2.0,
    delta: Annotated[float, typer.Option(help="δ of the guarantee.")] = 1e-5,
    unit: Annotated[
        str, typer.Option(help="What ε protects: one example, or a whole client (needs very many clients).")
    ] = "example",
    rounds: Annotated[int | None, typer.Option(help="Training rounds; 40 unless said.")] = None,
    combine: Annotated[
        str,
        typer.Option(
            help="How a round's updates become one: mean, or a robust rule (median, trimmed-mean, krum, multi-krum, "
            "geometric-median). Robust rules read each device's own noised update, so that each device adds all the "
            "noise itself; they need the clear mode and cost accuracy."
        ),
    ] = "mean",
    wrong_devices: Annotated[int, typer.Option(help="How many devices a robust rule must stand.")] = 0,
    seed: Annotated[int, typer.Option(help="Starting weights. Never seeds noise or sampling.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from OUT.checkpoint.")] = False,
    unsafe_no_privacy: Annotated[
        bool, typer.Option("--unsafe-no-privacy", help="No clipping, no noise, no ledger: for public data.")
    ] = False,
    insecure_seeded_noise: Annotated[
        str, typer.Option(help="Repeatable noise from this text, for exact comparisons: ε is void.")
    ] = "",
    secure_sum: Annotated[
        bool | None,
        typer.Option(
            "--secure-sum/--no-secure-sum",
            help="Clients add shares of one noise under masks, and the server sees only totals. "
            "On for three or more clients; without it each adds all of the noise itself.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Train one model over many clients' CSV files under differential privacy, in this process."""
    from fedinfer.cli.train import train_model

    train_model(
        folder,
        schema=schema,
        data=data,
        out=out,
        family=model,
        epsilon=epsilon,
        delta=delta,
        unit=unit,
        rounds=rounds,
        combine=combine,
        wrong_devices=wrong_devices,
        seed=seed,
        resume=resume,
        unsafe_no_privacy=unsafe_no_privacy,
        insecure_seed=insecure_seeded_noise,
        secure_sum=secure_sum,
        as_json=json,
    )


@app.command(epilog="Example:  fedinfer evaluate model.safetensors hospitals/ --schema schema.toml --epsilon 0.5")
def evaluate(
    model: ModelPath,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder of CSV files, each with its NAME.ledger, or one file.")
    ],
    schema: Annotated[Path | None, typer.Option("--schema", help="The public schema.toml of the rows.")] = None,
    epsilon: Annotated[float, typer.Option(help="ε per example of each client, for this evaluation.")] = 0.5,
    delta: Annotated[float, typer.Option(help="δ of the guarantee.")] = 1e-6,
    unsafe_raw: Annotated[
        bool, typer.Option("--unsafe-raw", help="Exact figures of each client, and no ledger: for your own eyes.")
    ] = False,
    json: Json = False,
) -> None:
    """Accuracy, AUC and loss of a model from noised counts, charged to each client's ledger."""
    from fedinfer.cli.measuring import measure_model, unsafe_measure_model

    if unsafe_raw:
        unsafe_measure_model(model, folder, schema_path=schema, as_json=json)
    else:
        measure_model(model, folder, schema_path=schema, epsilon=epsilon, delta=delta, as_json=json)


@app.command(epilog="Example:  fedinfer predict model.safetensors patients.csv -o answers.csv")
def predict(model: ModelPath, rows: Rows, out: Out = None, schema: SchemaPath = None, json: Json = False) -> None:
    """Label rows with a saved model, on this machine alone."""
    from fedinfer.cli.local import predict_rows

    predict_rows(model, rows, out=out, schema_path=schema, as_json=json)


@app.command("compile", epilog="Example:  fedinfer compile model.safetensors --explain --out model.plan")
def compile_(
    model: ModelPath,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write the server's private plan here.")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show each layer: layout, level, scale, rotations, time, error.")
    ] = False,
    throughput: Annotated[
        bool, typer.Option("--throughput", help="Thousands of rows of one client at once, instead of one row soonest.")
    ] = False,
    precision: Annotated[float, typer.Option(help="Largest error, as a share of the largest output.")] = 2e-3,
    flooding_bits: Annotated[
        int, typer.Option(help="Noise in every answer, 2^bits times the circuit's own; 0 for none.", min=0, max=30)
    ] = 0,
    json: Json = False,
) -> None:
    """Compile a model for encrypted queries, and check the circuit on 1,000 rows."""
    from fedinfer.cli.query import compile_plan

    compile_plan(
        model, out=out, explain=explain, throughput=throughput, precision=precision, flooding_bits=flooding_bits,
        as_json=json,
    )  # fmt: skip


@app.command(epilog="Example:  fedinfer serve model.safetensors --port 8080")
def serve(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL|PLAN", help="A model file, or a plan made by `fedinfer compile`.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8080,
    json: Json = False,
) -> None:
    """Answer encrypted queries over HTTP: the server sees neither the question nor the answer."""
    from fedinfer.cli.query import serve_model

    serve_model(model, host=host, port=port, as_json=json)


@app.command(epilog="Example:  fedinfer ask http://127.0.0.1:8080 patients.csv -o answers.csv")
def ask(
    url: Annotated[str, typer.Argument(metavar="URL", help="Where `fedinfer serve` listens.")],
    rows: Rows,
    out: Out = None,
    schema: Annotated[
        Path | None,
        typer.Option(help="Check that the server's model is for this schema.toml."),
    ] = None,
    json: Json = False,
) -> None:
    """Ask a served model about rows, under encryption; keys and answers stay here."""
    from fedinfer.cli.query import ask_rows

    ask_rows(url, rows, out=out, schema_path=schema, as_json=json)


@app.command(epilog="Example:  fedinfer audit --quick --mutants")
def audit(
    target: Annotated[str, typer.Option(help="What to audit: ours, opacus, flower or all.")] = "ours",
    mutants: Annotated[
        bool, typer.Option("--mutants", help="Audit versions of ours with a mistake each, which must all fail.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer runs: at most a minute for one target.")] = False,
    json: Json = False,
) -> None:
    """Try to prove that training leaks more than it states: lower bounds on ε, and what they are gained from."""
    from fedinfer.cli.audit import audit_targets

    if not audit_targets(target, with_mutants=mutants, quick=quick, as_json=json):
        raise typer.Exit(1)


@app.command(
    epilog="Example:  fedinfer simulate --config experiments/configs/digits.toml;  "
    "goes on after Ctrl-C:  fedinfer simulate --config experiments/configs/digits.toml --resume"
)
def simulate(
    config: Annotated[
        Path, typer.Option("--config", metavar="FILE.toml", help="Data, model, task, cohort, rule, privacy, output.")
    ],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint beside the weights, to the same weights.")
    ] = False,
    json: Json = False,
) -> None:
    """Train with many simulated clients on this machine, as a TOML file says; docs/simulation.md lists its keys."""
    from fedinfer.cli.simulate import run_simulation

    run_simulation(config, resume=resume, as_json=json)


LedgerPath = Annotated[Path, typer.Argument(metavar="PATH", help="A ledger file.")]


class FilterChoice(StrEnum):
    """The values of --filter."""

    basic = "basic"
    renyi = "renyi"
    gdp = "gdp"


@ledger_app.command(
    "init",
    epilog="Example:  fedinfer ledger init cleveland.ledger --epsilon 4 --delta 1e-5 --head /mnt/other/cleveland.head",
)
def ledger_init(
    path: LedgerPath,
    epsilon: Annotated[float, typer.Option(help="The whole budget ε that may ever be spent.")],
    delta: Annotated[float, typer.Option(help="The whole budget δ.")],
    filter: Annotated[
        FilterChoice,
        typer.Option(
            help="How charges add up: basic (ε and δ; a few large plans), renyi (many small charges), "
            "gdp (Gaussian mechanisms without sampling only)."
        ),
    ] = FilterChoice.basic,
    key: Annotated[
        Path | None, typer.Option(help="Where the signing key is, or is made; PATH.key unless said.")
    ] = None,
    head: Annotated[
        Path | None,
        typer.Option(help="Keep a head file here, on another disk if you can: it finds an older copy of the ledger."),
    ] = None,
    json: Json = False,
) -> None:
    """Enrol a data set: set its budget, once. Its id is random and says nothing about the rows.

    Prints the public key: pin it, and the head, where the ledger is used, or another ledger in its place is believed.
    """
    from fedinfer.cli.books import init_ledger

    init_ledger(path, epsilon=epsilon, delta=delta, filter=filter.value, key=key, head=head, as_json=json)


@ledger_app.command("show", epilog="Example:  fedinfer ledger show cleveland.ledger")
def ledger_show(path: LedgerPath, json: Json = False) -> None:
    """Print the budget, the public key and the head to pin, and each run charged to the budget."""
    from fedinfer.cli.books import show_ledger

    show_ledger(path, as_json=json)


@ledger_app.command("verify", epilog="Example:  fedinfer ledger verify cleveland.ledger")
def ledger_verify(
    path: Annotated[Path, typer.Argument(metavar="PATH|EXPORT", help="A ledger, or an export of one.")],
    head: Annotated[
        Path | None,
        typer.Option(
            help="After the check, keep the ledger's head in this file from now on: for a head that was lost, moved "
            "or never there. Refused if a head that is still there knows of more entries."
        ),
    ] = None,
    public_key: Annotated[
        str | None, typer.Option(metavar="HEX", help="The public key that the ledger must have.")
    ] = None,
    json: Json = False,
) -> None:
    """Check the file, its head, and hash and signature of each entry."""
    from fedinfer.cli.books import verify_ledger

    verify_ledger(path, head=head, public_key=public_key, as_json=json)


@ledger_app.command("export", epilog="Example:  fedinfer ledger export cleveland.ledger -o cleveland.jsonl")
def ledger_export(
    path: LedgerPath,
    out: Annotated[Path, typer.Option("-o", "--out", help="Where to write the JSON lines.")],
    json: Json = False,
) -> None:
    """Write all entries with hashes and signatures; `ledger verify` checks the file anywhere."""
    from fedinfer.cli.books import export_ledger

    export_ledger(path, to=out, as_json=json)


@ledger_app.command("report", epilog="Example:  fedinfer ledger report model.safetensors")
def ledger_report(model: ModelPath, json: Json = False) -> None:
    """Print the report card of a trained model: what is promised, against whom, and what an audit could prove."""
    from fedinfer.cli.cards import report_model

    report_model(model, as_json=json)


PkiPath = Annotated[Path, typer.Argument(metavar="PATH", help="A PKI file.")]


@pki_app.command("init", epilog="Example:  fedinfer pki init federation.pki")
def pki_init(path: PkiPath, json: Json = False) -> None:
    """Make a PKI file without members."""
    from fedinfer.cli.pki import init_pki

    init_pki(path, as_json=json)


@pki_app.command("identity", epilog="Example:  fedinfer pki identity clinic.identity")
def pki_identity(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Where to write the device's own key.")],
    json: Json = False,
) -> None:
    """Make a device's own key, on the device, and print its public half."""
    from fedinfer.cli.pki import new_identity

    new_identity(path, as_json=json)


@pki_app.command("add", epilog="Example:  fedinfer pki add federation.pki clinic 5f2c...")
def pki_add(
    path: PkiPath,
    name: Annotated[str, typer.Argument(help="The device's name.")],
    key: Annotated[str, typer.Argument(metavar="KEY", help="Its public key, 64 hexadecimal digits.")],
    json: Json = False,
) -> None:
    """Add a device, and print the new digest, which every device pins."""
    from fedinfer.cli.pki import add_member

    add_member(path, name, key, as_json=json)


@pki_app.command("simulate", epilog="Example:  fedinfer pki simulate members/ --count 4")
def pki_simulate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder to make, for this machine alone.")],
    count: Annotated[int, typer.Option(help="How many devices are simulated.")] = 4,
    epsilon: Annotated[float | None, typer.Option(help="Make a ledger with this budget for each, too.")] = None,
    delta: Annotated[float, typer.Option(help="δ of the ledgers.")] = 1e-5,
    json: Json = False,
) -> None:
    """Identities for devices that Flower simulates on this machine: all of them in one place, so they hide nothing."""
    from fedinfer.cli.pki import simulate_members

    simulate_members(folder, count=count, epsilon=epsilon, delta=delta, as_json=json)


@pki_app.command("show", epilog="Example:  fedinfer pki show federation.pki")
def pki_show(path: PkiPath, json: Json = False) -> None:
    """Print the members and the digest to pin."""
    from fedinfer.cli.pki import show_pki

    show_pki(path, as_json=json)


def check_rounds(rounds: int | None) -> None:
    """Raises: BadUsage for a number of rounds below one."""
    if rounds is not None and rounds < 1:
        raise BadUsage(f"rounds: got {rounds}, expected at least 1")
