"""Encrypted inference of trained networks: `compile_model` beside stock TenSEAL and, where installed, its peers.

Every side answers the same rows of a test set with the same weights. The sides take turns within one run, a turn is a
few queries, and a figure is the median over turns. Ours is timed from bytes to bytes with all its defences on: checked
parsing, emptied slots, a fresh encryption of zero in every answer. The others have none. A CKKS side whose answers are
off by more than 5 % of the largest fails the run: a fast wrong answer is no figure.

`--peers` names the Python of an environment that has Orion or Concrete-ML:

    python -m venv orion; orion/bin/pip install orion-fhe==1.0.2; orion/bin/pip install torch==2.13.0
    python -m venv concrete; concrete/bin/pip install concrete-ml==1.9.0
    python -m experiments.benchmarks.encrypted [--quick] [--only NAME ...] [--peers PYTHON ...] [--json FILE]
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from experiments.benchmarks import encrypted_peers
from experiments.benchmarks.encrypted_cases import (
    CASES,
    CNN,
    DATA,
    QUERIES_PER_S,
    QUICK,
    THROUGHPUT,
    Case,
    Rows,
    decisions,
    plain,
    trained,
)
from experiments.benchmarks.encrypted_peers import (
    TURN_QUERIES,
    Floats,
    Network,
    installed,
    measure,
    turn,
)
from fedinfer.cli.console import note, show_table
from fedinfer.encrypted import Compiled, EncryptedClient, EncryptedEngine, compile_model
from fedinfer.errors import BadUsage, FedinferError

TOLERANCE = 0.05
EXACT = ("fedinfer", "tenseal", "orion")
NAMES = {"fedinfer": "fedinfer", "tenseal": "stock TenSEAL", "orion": "Orion", "concrete": "Concrete-ML"}
# A peer gets turns until it has had so many seconds; its first is a warm-up, unless a query takes longer than this.
BUDGET_S = 60.0
WARM_UP_MS = 20e3
CALIBRATION_ROWS = 512
QUERIES = 64
BATCH = 4096
GOALS = ("goals", "moonshots", "up_kb", "keys_mb")
FIGURES = ("encrypt_ms", "server_ms", "server_cpu_ms", "decrypt_ms", "total_ms", "up_bytes", "down_bytes")


class Ours:
    """A client and a server of fedinfer, who exchange bytes."""

    def __init__(self, compiled: Compiled) -> None:
        started = time.perf_counter()
        self._client = EncryptedClient.generate(compiled.public)
        keys = self._client.evaluation_keys()
        engine = EncryptedEngine(compiled)
        self._session = engine.open(keys)
        parameters = compiled.public.parameters
        self._facts = {
            "parameters": f"N={parameters.degree} {list(parameters.prime_bits)}",
            "keys_bytes": len(keys),
            "threads": engine.workers,
            "stated_error": compiled.public.error,
            "rotation_keys": len(compiled.public.keys.rotations),
            "ready_s": time.perf_counter() - started,
        }

    def facts(self) -> dict[str, Any]:
        return self._facts

    def encrypt(self, features: Floats) -> bytes:
        return self._client.encrypt(features)

    def serve(self, query: bytes) -> bytes:
        return self._session.run(query)

    def decrypt(self, answer: bytes) -> Floats:
        return self._client.decrypt(answer)


class PeerRefused(FedinferError):
    """A peer cannot run this network, or its process ended."""


class Peer:
    """The process of a peer: makes its keys at the start, then answers a turn whenever it is asked to."""

    def __init__(self, python: str, name: str, folder: Path) -> None:
        command = [python, encrypted_peers.__file__, name, str(folder)]
        self._log = folder / f"{name}.log"
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def start(self) -> dict[str, Any]:
        """What it says of itself, once it has keys.

        Raises: PeerRefused.
        """
        facts: dict[str, Any] = self._line()
        if "refused" in facts:
            raise PeerRefused(facts["refused"])
        return facts

    def turn(self, start: int) -> list[dict[str, Any]]:
        """A few measured queries, from number `start` on.

        Raises: PeerRefused.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(f"{start}\n")
        self._process.stdin.flush()
        measured: list[dict[str, Any]] = self._line()
        return measured

    def _line(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            said = self._log.read_text(encoding="utf-8", errors="replace").strip().split("\n")
            raise PeerRefused(f"its process ended: {said[-1]}")
        return json.loads(line)


def summary(facts: Mapping[str, Any], measured: Sequence[Mapping[str, Any]], expected: Floats) -> dict[str, Any]:
    """Medians of one side, its largest error, and the share of rows it decides as the network does."""
    answers = np.array([one["answer"] for one in measured])
    wanted = expected[[one["query"] for one in measured]]
    medians: dict[str, Any] = {}
    for name in FIGURES:
        values = [one[name] for one in measured if one[name] is not None]
        medians[name] = statistics.median(values) if values else None
    return {
        **facts,
        **medians,
        "fastest_server_ms": min(one["server_ms"] for one in measured),
        "slowest_server_ms": max(one["server_ms"] for one in measured),
        "queries": len(measured),
        "error": float(np.abs(answers - wanted).max()),
        "answer_scale": float(np.abs(wanted).max()),
        "agreement": float((decisions(answers) == decisions(wanted)).mean()),
    }


def ratios(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, float]:
    """How much longer they take; the fastest queries tell what other work on the machine did to the medians."""
    parts = ("server", "total", "fastest_server", "server_cpu")
    return {part: theirs[f"{part}_ms"] / ours[f"{part}_ms"] for part in parts}


@dataclass(frozen=True, kw_only=True)
class Race:
    """What every side said of itself and measured, and the peers that did not start, with the reason."""

    facts: Mapping[str, dict[str, Any]]
    measured: Mapping[str, list[dict[str, Any]]]
    refused: Mapping[str, str]


def race(ours: Ours, network: Network, peers: Mapping[str, str], *, turns: int, budget_s: float) -> Race:
    """The sides answer the same queries, ours between any two turns of others."""
    facts, refused = {"fedinfer": ours.facts()}, {}
    measured: dict[str, list[dict[str, Any]]] = {"fedinfer": []}
    turn(ours, network.queries, 0)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedinfer-bench-")))
        network.save(folder)
        running: dict[str, Peer] = {}
        for name, python in peers.items():
            peer = stack.enter_context(Peer(python, name, folder))
            try:
                facts[name] = peer.start()
                first = peer.turn(0)
            except PeerRefused as error:
                refused[name] = str(error)
                continue
            slow = first[0]["total_ms"] > WARM_UP_MS
            measured[name] = first if slow else []
            if not slow:
                running[name] = peer
        spent_s = dict.fromkeys(running, 0.0)
        for start in range(0, turns * TURN_QUERIES, TURN_QUERIES):
            measured["fedinfer"] += turn(ours, network.queries, start)
            for name in [name for name in running if spent_s[name] < budget_s]:
                answers = running[name].turn(start)
                spent_s[name] += sum(answer["total_ms"] for answer in answers) / 1e3
                measured[name] += answers
                measured["fedinfer"] += turn(ours, network.queries, start)
    return Race(facts=facts, measured=measured, refused=refused)


def run(case: Case, peers: Mapping[str, str], *, quick: bool) -> dict[str, Any]:
    """All figures of one network."""
    rows = DATA[case.data]()
    net = trained(case.layers, rows, case.epochs)
    calibration, outputs = rows.train_x[:CALIBRATION_ROWS], plain(net, rows.test_x)
    started = time.perf_counter()
    compiled = compile_model(net, rows.test_x[:1], calibration=calibration)
    compile_s = time.perf_counter() - started
    network = Network(
        layers=case.layers,
        bound=float(np.abs(outputs).max()),
        arrays={name: value.double().numpy() for name, value in net.state_dict().items()},
        queries=rows.test_x[:QUERIES].double().numpy(),
        calibration=calibration.double().numpy(),
    )
    turns, budget_s = (3, BUDGET_S / 8) if quick else (case.turns, BUDGET_S)
    raced = race(Ours(compiled), network, peers, turns=turns, budget_s=budget_s)
    sides = {name: summary(raced.facts[name], measured, outputs) for name, measured in raced.measured.items()}
    return {
        "title": case.title,
        "compile_s": compile_s,
        "sides": sides,
        "refused": raced.refused,
        "ratios": {name: ratios(side, sides["fedinfer"]) for name, side in sides.items() if name != "fedinfer"},
        "goals": {name: value for name, value in asdict(case).items() if name in GOALS},
        "accuracy": accuracy(compiled, rows, outputs, 200 if quick else len(outputs)),
        "wrong": wrong(case.title, sides, network.bound),
    }


def wrong(title: str, sides: Mapping[str, Mapping[str, Any]], largest: float) -> list[str]:
    """The sides that should compute as the network does and did not."""
    return [
        f"{title}, {NAMES[name]}: got errors of {sides[name]['error']:.2g} in answers up to {largest:.2g}, "
        f"expected at most {TOLERANCE:.0%} of that"
        for name in EXACT
        if name in sides and not sides[name]["error"] <= TOLERANCE * largest
    ]


def accuracy(compiled: Compiled, rows: Rows, outputs: Floats, limit: int) -> dict[str, Any]:
    """The share of test rows that the network, and the circuit on the clear scheme with noise, classify correctly."""
    labels = rows.test_y.numpy()
    flat = rows.test_x[:limit].double().flatten(1).numpy()
    simulated = compiled.simulate([flat], noise=0)
    return {
        "plain": float((decisions(outputs) == labels).mean()),
        "simulated": float((decisions(simulated) == labels[:limit]).mean()),
        "simulated_rows": len(flat),
        "agreement": float((decisions(simulated) == decisions(outputs[:limit])).mean()),
    }


def throughput(*, quick: bool) -> dict[str, Any]:
    """The tutorial CNN with 4,096 rows in one query under one key."""
    rows = DATA["mnist"]()
    net = trained(CNN, rows, CASES["cnn"].epochs)
    started = time.perf_counter()
    compiled = compile_model(net, rows.test_x[:1], calibration=rows.train_x[:CALIBRATION_ROWS], objective="throughput")
    compile_s = time.perf_counter() - started
    features = torch.cat([rows.test_x, rows.train_x])[:BATCH]
    expected, ours = plain(net, features), Ours(compiled)
    measured = [{"query": 0} | measure(ours, features.double().numpy()) for _ in range(1 if quick else 3)]
    figures = summary(ours.facts(), measured, expected.reshape(1, -1))
    answers = np.array(measured[-1]["answer"]).reshape(expected.shape)
    figures["agreement"] = float((decisions(answers) == decisions(expected)).mean())
    title = f"CNN throughput, one key, {BATCH:,} queries"
    return {
        "title": title,
        "compile_s": compile_s,
        "sides": {"fedinfer": figures},
        "queries_per_s": BATCH / (figures["server_ms"] / 1e3),
        "queries_per_s_total": BATCH / (figures["total_ms"] / 1e3),
        "goal_queries_per_s": QUERIES_PER_S,
        "wrong": wrong(title, {"fedinfer": figures}, figures["answer_scale"]),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def verdict(holds: bool) -> str:
    return "holds" if holds else "MISSED"


def _bytes(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value / 1e6:,.2f} MB" if value >= 1e6 else f"{value / 1e3:,.1f} KB"


def show(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Two tables: times with ratios, then bytes with errors."""
    times, sizes, notes = [], [], []
    for key, result in results.items():
        for name, side in result["sides"].items():
            label = f"{result['title']}: {NAMES[name]}"
            ratio = fastest = goal = ""
            if name in result.get("ratios", {}):
                slower = result["ratios"][name]
                ratio = f"{slower['server']:.1f}× ({slower['total']:.1f}×)"
                fastest = f"{slower['fastest_server']:.1f}×"
                goal = _goal(result["goals"], name, slower["server"])
            elif key == THROUGHPUT:
                ratio = f"{result['queries_per_s']:,.0f} queries/s ({result['queries_per_s_total']:,.0f})"
                goal = f"≥ {QUERIES_PER_S:,.0f}/s {verdict(result['queries_per_s'] >= QUERIES_PER_S)}"
            busy = side["server_cpu_ms"] / side["server_ms"]
            milliseconds = [side[f"{part}_ms"] for part in ("encrypt", "server", "decrypt", "total")]
            times.append([label, *(f"{value:,.2f}" for value in milliseconds), f"{busy:.1f}", ratio, fastest, goal])
            wanted = result.get("goals", {}) if name == "fedinfer" else {}
            up, keys = side["up_bytes"], side["keys_bytes"]
            limits = [
                f"{text} ≤ {limit:g} {unit} {verdict(value <= limit * factor)}"
                for text, value, limit, unit, factor in (
                    ("up", up, wanted.get("up_kb"), "KB", 1e3),
                    ("keys", keys, wanted.get("keys_mb"), "MB", 1e6),
                )
                if limit is not None
            ]
            sizes.append(
                [label, _bytes(up), _bytes(side["down_bytes"]), _bytes(keys), f"{side['error']:.1e}",
                 f"{side['answer_scale']:.2g}", f"{side['agreement']:.1%}", ", ".join(limits)]
            )  # fmt: skip
        if "accuracy" in result:
            scores = result["accuracy"]
            notes.append(
                f"{result['title']}: accuracy {scores['plain']:.1%} in the clear; circuit with noise "
                f"{scores['simulated']:.1%} on {scores['simulated_rows']} test rows, decides alike on "
                f"{scores['agreement']:.1%}; compiled in {result['compile_s']:.1f} s, "
                f"{result['sides']['fedinfer']['threads']} threads"
            )
        notes += [f"{result['title']}, {NAMES[name]}: {why}" for name, why in result.get("refused", {}).items()]
    columns = [
        "milliseconds, medians",
        "encrypt",
        "server",
        "decrypt",
        "total",
        "cores",
        "server (total)",
        "fastest",
        "goal",
    ]
    show_table("Time of one query; ratios are theirs over ours", columns, times)
    columns = ["", "up", "down", "keys", "largest error", "of answers to", "decides alike", "goal"]
    show_table("Bytes and errors", columns, sizes)
    for line in notes:
        print(line)


def _goal(goals: Mapping[str, Any], name: str, ratio: float) -> str:
    if name not in goals["goals"]:
        return ""
    text = f"≥ {goals['goals'][name]:g}× {verdict(ratio >= goals['goals'][name])}"
    if name in goals["moonshots"]:
        text += f", moonshot {goals['moonshots'][name]:g}× {verdict(ratio >= goals['moonshots'][name])}"
    return text


def processor() -> str:
    """The name of the processor, as the operating system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def busy_s() -> tuple[float, float]:
    """Processor seconds that the whole machine has spent, and that we and our ended children have."""
    mine = os.times()
    own = mine.user + mine.system + mine.children_user + mine.children_system
    try:
        first = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
    except OSError:
        return own, own
    # user, nice, system, idle, waiting, interrupts, soft interrupts, stolen by other machines
    spent = [int(ticks) for index, ticks in enumerate(first[:8]) if index not in (3, 4)]
    return sum(spent) / os.sysconf("SC_CLK_TCK"), own


def found(pythons: Sequence[str]) -> dict[str, str]:
    """The Python of each peer: stock TenSEAL in ours, the others where they are installed."""
    peers = {"tenseal": sys.executable}
    for python in pythons:
        asked = subprocess.run([python, encrypted_peers.__file__], capture_output=True, text=True, check=False)
        names = json.loads(asked.stdout) if asked.returncode == 0 else {}
        others = [name for name in names if name != "tenseal"]
        if not others:
            raise BadUsage(f"--peers: got {python}, which has neither orion-fhe nor concrete-ml, expected one of them")
        peers |= dict.fromkeys(others, python)
    return peers


def main(argv: Sequence[str] | None = None) -> None:
    """Print what a query costs on every side, beside the goals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"few turns; unless --only says more: {', '.join(QUICK)}")
    parser.add_argument("--only", action="append", choices=[*CASES, THROUGHPUT], help="this network; may be repeated")
    parser.add_argument("--peers", action="append", default=[], metavar="PYTHON", help="the Python of a peer")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(argv)
    # Compiling is quicker with torch on one thread, and the engine has threads of its own.
    torch.set_num_threads(1)
    peers = found(options.peers)
    started, before = time.perf_counter(), busy_s()
    results: dict[str, Any] = {}
    for name in options.only or (QUICK if options.quick else [*CASES, THROUGHPUT]):
        note(f"{name} …")
        results[name] = (
            throughput(quick=options.quick) if name == THROUGHPUT else run(CASES[name], peers, quick=options.quick)
        )
    spent, own = (after - then for after, then in zip(busy_s(), before, strict=True))
    others = max(0.0, spent - own) / (time.perf_counter() - started)
    arguments = " ".join(sys.argv[1:] if argv is None else argv)
    command = f"python -m experiments.benchmarks.encrypted {arguments}".strip()
    print(f"{command}\n{processor()}, {os.cpu_count()} cores, of which other work took {others:.2f}")
    show(results)
    if options.json:
        machine = {
            "processor": processor(),
            "cores": os.cpu_count(),
            "cores_taken_by_others": others,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "installed": installed(),
        }
        whole = {"command": command, "machine": machine, "results": results}
        options.json.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    if failed := [line for result in results.values() for line in result["wrong"]]:
        raise FedinferError("; ".join(failed))


if __name__ == "__main__":
    main()
