"""What robust rules hold against a wrong device, and what they cost when there is none: heart disease, five devices.

Four hospitals, the largest on two devices, so that Krum has the five updates that it needs for one wrong device. Each
device adds all of its noise itself. A wrong device is a ClientApp around ours that answers with what it likes.
AUC over all hospitals' held-out rows.

Rules: Blanchard et al. 2017 (Krum); Yin et al. 2018, arXiv:1803.01498 (median, trimmed mean); Pillutla et al. 2022,
arXiv:1912.13445 (geometric median).

    python -m experiments.robust_rules [--quick] [--json FILE]
"""

import argparse
import csv
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients.app import app as honest_app
from fedinfer.arrays import Vector, unflatten
from fedinfer.cli.methods import Split, splits, write_rows
from fedinfer.combiners import COMBINERS, combiner_named
from fedinfer.inference import unsafe_auc
from fedinfer.models import build
from fedinfer.settings import RunConfig
from fedinfer.simulation import run_in_process
from server.app import app as server_app

LARGEST = "Cleveland"
Lie = Callable[[Vector], Vector]
# The last one is as long as an honest update.
LIES: Mapping[str, Lie] = {
    "nobody": lambda update: update,
    "flipped, 10 times": lambda update: -10.0 * update,
    "a million times": lambda update: 1e6 * update,
    "flipped": lambda update: -update,
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """AUC of one rule under one attack, mean over splits, with its standard deviation."""

    epsilon: float | None
    attack: str
    rule: str
    unsafe_auc_mean: float
    unsafe_auc_std: float
    difference: float
    standard_error: float


def wrong_app(lie: Lie, wrong: str) -> ClientApp:
    """Our ClientApp, but the device whose rows are the file `wrong` answers with a lie."""
    app = ClientApp()

    @app.train("step")
    def step(message: Message, context: Context) -> Message:
        reply = honest_app(message, context)
        if context.node_config["data"] != wrong:
            return reply
        (update,) = reply.content.array_records["gradient"].to_numpy_ndarrays()
        metrics = {"weight": reply.content.metric_records["reply"]["weight"], "void": 0}
        gradient = ArrayRecord([np.asarray(lie(update), np.float32)])
        return Message(RecordDict({"gradient": gradient, "reply": MetricRecord(metrics)}), reply_to=message)

    return app


def five_devices(split: Split) -> list[Path]:
    """The training files of a split, the largest cut in two."""
    largest = split.train[LARGEST]
    with largest.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    halves = [write_rows(largest.with_name(f"{LARGEST}-{part}.csv"), rows[part::2]) for part in range(2)]
    return [*halves, *(path for name, path in split.train.items() if name != LARGEST)]


def auc_of(split: Split, *, rule: str, epsilon: float | None, attack: str, seed: str = "") -> float:
    """Train by the rule with the first device wrong; AUC on all held-out rows. A `seed` makes the noise repeatable."""
    files = five_devices(split)
    config = RunConfig(
        combine=rule,
        wrong_devices=0 if rule == "mean" else 1,
        min_devices=len(files),
        epsilon=epsilon or RunConfig.epsilon,
        unsafe_no_privacy=epsilon is None,
    )
    nodes: list[dict[str, bool | float | int | str]] = [{"data": str(path), "public-data": True} for path in files]
    for index, node in enumerate(nodes):
        if seed:
            node["insecure-seeded-noise"] = f"{seed}/{index}"
    app = wrong_app(LIES[attack], str(files[0]))
    context = run_in_process(server_app, app, nodes=nodes, run_config=config.to_flat())
    (weights,) = context.state.array_records["weights"].to_numpy_ndarrays()
    net = build(config.spec)
    net.load_state_dict(unflatten(weights, net.state_dict()))
    features = np.concatenate([table.features for table in split.test.values()])
    labels = np.concatenate([table.labels for table in split.test.values()])
    with torch.inference_mode():
        auc = unsafe_auc(labels, net(torch.from_numpy(features))[:, 0].numpy())
    assert auc is not None
    return auc


def table(seeds: Sequence[int], quarters: int, attacks: Sequence[str]) -> list[Row]:
    """Every rule under each attack, without privacy and at ε = 2; differences are to the mean unattacked."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="fedinfer-robust-") as folder:
        every = [split for number, split in enumerate(splits(seeds, Path(folder))) if number % 4 < quarters]
        for epsilon in (None, 2.0):
            plain = np.zeros(0)
            for attack in attacks:
                for rule in COMBINERS:
                    aucs = np.array([auc_of(split, rule=rule, epsilon=epsilon, attack=attack) for split in every])
                    if not len(plain):
                        plain = aucs
                    difference = aucs - plain
                    rows.append(
                        Row(
                            epsilon=epsilon,
                            attack=attack,
                            rule=rule,
                            unsafe_auc_mean=float(aucs.mean()),
                            unsafe_auc_std=float(aucs.std(ddof=1)),
                            difference=float(difference.mean()),
                            standard_error=float(difference.std(ddof=1) / math.sqrt(len(every))),
                        )
                    )
    return rows


def seconds(devices: int, size: int) -> dict[str, float]:
    """Processor seconds of each rule for that many updates, a twentieth of the devices wrong."""
    rng = np.random.default_rng(0)
    updates = list(rng.normal(size=(devices, size)).astype(np.float32))
    times = {}
    for name in COMBINERS:
        rule = combiner_named(name, wrong_devices=0 if name == "mean" else max(1, devices // 20))
        started = time.process_time()
        rule.combine(updates, [1.0] * devices)
        times[name] = time.process_time() - started
    return times


def main(argv: Sequence[str] | None = None) -> None:
    """Print the AUC of each rule under each attack, and the processor time of each rule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two splits of twelve, one attack, fewer updates to time")
    parser.add_argument("--json", type=Path, help="write the table here")
    options = parser.parse_args(argv)
    # Steps of a millisecond are slower on two threads than on one.
    torch.set_num_threads(1)
    attacks = list(LIES)[: 2 if options.quick else None]
    rows = table(range(1 if options.quick else 3), 2 if options.quick else 4, attacks)
    devices, size = (100, 10_000) if options.quick else (1000, 100_000)
    times = seconds(devices, size)
    for epsilon in (None, 2.0):
        print("no privacy" if epsilon is None else f"ε = {epsilon:g}, each device its own noise")
        print(f"  {'one of five devices is wrong':30}" + "".join(f"{rule:>18}" for rule in COMBINERS))
        for attack in attacks:
            cells = [row for row in rows if (row.epsilon, row.attack) == (epsilon, attack)]
            print(f"  {attack:30}" + "".join(f"{_cell(row):>18}" for row in cells))
    print("AUC; in brackets its difference to the mean that nobody attacks, ± its paired standard error over splits")
    print(f"processor seconds for {devices:,} updates of {size:,} numbers")
    print(f"  {'':30}" + "".join(f"{value:18.2f}" for value in times.values()))
    if options.json:
        result = {"rows": [asdict(row) for row in rows], "devices": devices, "size": size, "seconds": times}
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _cell(row: Row) -> str:
    text = f"{row.unsafe_auc_mean:.3f} ({row.difference:+.3f}±{row.standard_error:.3f})"
    return text.replace("0.", ".")


if __name__ == "__main__":
    main()
