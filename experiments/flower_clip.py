"""Adaptive clipping by Flower and by fedinfer, on the same updates: whose clip finds the median norm?

Flower's own strategy runs through its ServerApp and ClientApps. Update norms are lognormal with median 1, so that a
clip that follows the median ends near 1 from wherever it starts (Andrew et al. 2021, arXiv:1905.03871).

    python -m experiments.flower_clip [--quick] [--json FILE]
"""

import argparse
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import DifferentialPrivacyServerSideAdaptiveClipping, FedAvg

from fedinfer.arrays import Vector
from fedinfer.privacy import PrivacyPlan, os_noise
from fedinfer.privacy.clipping import AdaptiveClip
from fedinfer.privacy.samplers import Cyclic
from fedinfer.simulation import run_in_process

SIZE, NOISE, FIRST_CLIPS = 6, 1.0, (5.0, 0.1)


def lognormal_update(rng: np.random.Generator) -> Vector:
    direction = rng.normal(size=SIZE)
    return (direction / np.linalg.norm(direction) * rng.lognormal(0.0, 0.5)).astype(np.float32)


def flower_clips(first: float, rounds: int, clients: int) -> list[float]:
    """The clips of Flower's adaptive clipping, from before the first round to after the last."""
    rng, clips = np.random.default_rng(0), []
    device, server = ClientApp(), ServerApp()

    @device.train()
    def train(message: Message, context: Context) -> Message:
        (weights,) = message.content.array_records["arrays"].to_numpy_ndarrays()
        content = {"arrays": ArrayRecord([weights + lognormal_update(rng)])}
        return Message(RecordDict({**content, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        average = FedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
        strategy = DifferentialPrivacyServerSideAdaptiveClipping(average, NOISE, clients, initial_clipping_norm=first)

        def look(number: int, arrays: ArrayRecord) -> None:
            clips.append(strategy.clipping_norm)

        strategy.start(grid, ArrayRecord([np.zeros(SIZE, np.float32)]), num_rounds=rounds, evaluate_fn=look)

    run_in_process(server, device, nodes=[{} for _ in range(clients)], run_config={})
    return clips


def our_clips(first: float, rounds: int, clients: int) -> list[float]:
    """The clips of `AdaptiveClip` under the same parameters, on the same updates."""
    plan = PrivacyPlan(
        unit="client",
        clip_norm=1.0,
        noise_multiplier=NOISE,
        sampler=Cyclic(period=1),
        delta=1e-5,
        steps=rounds,
        divisor=float(clients),
    )
    rule = AdaptiveClip(plan=plan, count_noise=clients / 20.0)
    rng, stream, clips = np.random.default_rng(0), os_noise(), [first]
    for _ in range(rounds):
        total = np.sum([rule.contribution(lognormal_update(rng), clip=clips[-1]) for _ in range(clients)], axis=0)
        clips.append(rule.release(total, clip=clips[-1], stream=stream)[1])
    return clips


def main(argv: Sequence[str] | None = None) -> None:
    """Print the clips of both, every few rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 rounds of 20 clients instead of 30 of 100")
    parser.add_argument("--json", type=Path, help="write the clips here")
    options = parser.parse_args(argv)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    rounds, clients = (10, 20) if options.quick else (30, 100)
    figures = {
        f"{name} from {first:g}": clips(first, rounds, clients)
        for first in FIRST_CLIPS
        for name, clips in (("flower", flower_clips), ("fedinfer", our_clips))
    }
    shown = range(0, rounds + 1, rounds // 5)
    print(f"{'clip after round':20}" + "".join(f"{number:>10}" for number in shown))
    for name, clips in figures.items():
        print(f"{name:20}" + "".join(f"{clips[number]:10.4f}" for number in shown))
    print("the median norm is 1; a clip that follows it ends near 1")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
