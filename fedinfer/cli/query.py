"""`fedinfer compile`, `fedinfer serve` and `fedinfer ask`: the encrypted query over HTTP."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from fedinfer.cli.console import note, show_json, show_table
from fedinfer.cli.files import rows_path, say_clamped, write_answers
from fedinfer.cli.local import open_model
from fedinfer.cli.parts import part
from fedinfer.data import read_schema, read_table
from fedinfer.errors import ModelFileError, RemoteError
from fedinfer.inference.pipeline import answers

START_TIMEOUT_S = 60.0


def compile_plan(
    path: Path,
    *,
    out: Path | None,
    explain: bool,
    throughput: bool,
    precision: float,
    flooding_bits: int,
    as_json: bool,
) -> None:
    """Compile a model, check the circuit and write its plan."""
    from fedinfer.encrypted import StatisticalFlooding, compile_served
    from fedinfer.encrypted.explain import COLUMNS

    compiled = compile_served(
        open_model(path, None).model,
        objective="throughput" if throughput else "latency",
        precision=precision,
        circuit_privacy=StatisticalFlooding(bits=flooding_bits) if flooding_bits else "rerandomised",
    )
    checked, explained = compiled.verify(), compiled.explain()
    if out is not None:
        compiled.save(out)
    if as_json:
        public = {"digest": compiled.public.digest, "plan": None if out is None else str(out)}
        show_json({**public, "verification": asdict(checked), "holds": checked.holds, **explained.as_json()})
        return
    if explain:
        show_table(explained.summary, COLUMNS, explained.rows())
    note(
        f"circuit {compiled.public.digest[:8]}: error {checked.clear_error:.1e} over {checked.rows} rows with noise, "
        f"{checked.encrypted_error:.1e} over {checked.encrypted_rows} under CKKS, {checked.stated_error:.1e} stated"
    )
    note(f"plan in {out}: private, for the server alone" if out is not None else "no --out: no plan was written")


def serve_model(path: Path, *, host: str, port: int, as_json: bool) -> None:
    """Serve until interrupted; say the address once it listens."""
    from fedinfer.encrypted import Compiled, compile_served
    from fedinfer.encrypted.plan_file import is_plan

    compiled = Compiled.load(path) if is_plan(path) else compile_served(open_model(path, None).model)

    def ready(url: str) -> None:
        if as_json:
            sys.stdout.write(json.dumps({"url": url, "model": str(path)}) + "\n")
        else:
            sys.stdout.write(f"serving {path} at {url}; ask with: fedinfer ask {url} FILE.csv   (Ctrl-C stops)\n")
        sys.stdout.flush()

    part("server.inference").serve(compiled, host=host, port=port, on_ready=ready)


def ask_rows(url: str, rows: str, *, out: Path | None, schema_path: Path | None, as_json: bool) -> None:
    """Encode rows by the served model's public schema, ask under encryption, decrypt and label here."""
    asking = part("clients.asking")
    served = asking.describe(url)
    if schema_path is not None and read_schema(schema_path).digest() != served.schema.digest():
        raise ModelFileError(
            f"{url}: got a model for the schema {served.schema.name!r}, expected that of {schema_path}"
        )
    table = read_table(rows_path(rows), served.schema, with_target=False)
    say_clamped("rows", table)
    asked = asking.ask(url, served, table.features)
    labelled = answers(asked.probabilities, threshold=served.threshold, labels=served.labels)
    if as_json:
        figures = ("keygen_ms", "latency_ms", "bytes_up", "bytes_down", "key_bytes")
        show_json({"answers": [asdict(a) for a in labelled], **{name: getattr(asked, name) for name in figures}})
        if out is None:
            return
    write_answers(labelled, out)
    note(f"{len(labelled)} rows asked under encryption: {asked.bytes_up} bytes up, {asked.bytes_down} down")


@contextmanager
def start_server(model: Path) -> Iterator[Callable[[], str]]:
    """Run `fedinfer serve` as a process of its own on a free port; the value waits for it and gives its URL."""
    command = [sys.executable, "-m", "fedinfer.cli", "serve", str(model), "--port", "0", "--json"]
    # Ctrl-C on a terminal goes to a whole process group; this server is the caller's to stop.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )

    def wait_for_url() -> str:
        assert process.stdout is not None
        assert process.stderr is not None
        # A server that neither listens nor ends must not hold the caller for ever.
        watch = threading.Timer(START_TIMEOUT_S, process.kill)
        watch.start()
        line = process.stdout.readline()
        watch.cancel()
        if not line:
            raise RemoteError(f"server process: it ended before it listened ({process.stderr.read().strip()[-500:]})")
        return str(json.loads(line)["url"])

    try:
        yield wait_for_url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
