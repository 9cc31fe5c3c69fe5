"""Private training rounds of four devices: the in-process grid beside Flower's own simulation, the same two apps.

Floor: 40 rounds of four devices are 160 gradients of about 230 rows by 36 weights, a few microseconds each; what is
left is the cost of messages, records and the ledger.

    python -m experiments.benchmarks.rounds [--quick] [--json FILE]
"""

import argparse
import json
import logging
import os
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import flwr.simulation
import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from clients.app import app as client_app
from fedinfer.settings import RunConfig
from fedinfer.simulation import run_in_process
from server.app import app as server_app

DEVICES = 4


def round_seconds(context: Context) -> list[float]:
    """The seconds of each round but the first, which opens files and calibrates."""
    result = json.loads(str(context.state.config_records["result"]["json"]))
    return [record["seconds"] for record in result["rounds"]][1:]


def ours(config: RunConfig) -> tuple[list[float], float]:
    """Seconds of the rounds, and of all, on the in-process grid."""
    started = time.perf_counter()
    nodes = [{"partition-id": index} for index in range(DEVICES)]
    context = run_in_process(server_app, client_app, nodes=nodes, run_config=config.to_flat())
    return round_seconds(context), time.perf_counter() - started


def flowers(config: RunConfig) -> tuple[list[float], float]:
    """The same on Flower's simulation: Ray, one CPU a client, which is its best setting on two cores."""
    seen: list[float] = []
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        context.run_config.update(config.to_flat())
        server_app(grid, context)
        seen.extend(round_seconds(context))

    started = time.perf_counter()
    resources: dict[str, Any] = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    flwr.simulation.run_simulation(app, client_app, num_supernodes=DEVICES, backend_config=resources)
    return seen, time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> None:
    """Print device-rounds a second of both, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 rounds instead of 200")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    config = RunConfig(rounds=20 if options.quick else 200, min_devices=DEVICES)
    figures = {}
    for name, run in (("fedinfer in-process grid", ours), ("Flower simulation (Ray)", flowers)):
        seconds, total = run(config)
        figures[name] = {"device_rounds_per_s": DEVICES / statistics.median(seconds), "total_s": total}
    mine, peer = figures.values()
    ratio = mine["device_rounds_per_s"] / peer["device_rounds_per_s"]
    print(f"{'':28}{'device-rounds/s':>16}{'all, with start-up':>20}")
    for name, figure in figures.items():
        print(f"{name:28}{figure['device_rounds_per_s']:16.0f}{figure['total_s']:18.1f} s")
    print(f"ratio of the medians of a round: {ratio:.0f}×")
    if options.json:
        options.json.write_text(json.dumps(figures | {"ratio": ratio}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
