"""Client updates a second: cohorts as one program beside Flower's own simulation and a plain loop over clients.

The work of a client: an MLP 64-64-10, 16 rows, 2 steps of gradient descent, as one ordinary Flower ClientApp writes it
and as a `LocalTask` says it. Steady state: the first round of each is left out, and with it Flower's start of about
ten seconds. "stock FedAvg" is Flower's own strategy on its own records; "sum" is `grid.sum_of_updates`, which hands the
server the cohort's sum instead of its replies, and is not a stock strategy. Floor: the arithmetic is 0.65 MFLOP an
update (forward, and backward without the gradient at the rows), which the last column compares with the machine's
largest rate for matrix products.

    python -m experiments.benchmarks.simulation [--quick] [--json FILE]
"""

import argparse
import json
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import flwr.simulation
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn
from torch.nn import functional

from fedinfer.privacy import Poisson, PrivacyPlan
from fedinfer.simulation import SimulatedGrid, simulate
from fedinfer.training import LocalTask, Sgd

INPUTS, HIDDEN, CLASSES, ROWS, STEPS, RATE = 64, 64, 10, 16, 2, 0.1
CLIENTS, FLOWER_CLIENTS = 1000, 100
FLOP = STEPS * ROWS * (4 * (INPUTS * HIDDEN + HIDDEN * CLASSES) + 2 * HIDDEN * CLASSES)
CLIP, NOISE, SHARE = 1.0, 1.0, 0.5


def network() -> nn.Module:
    """The model of every contender."""
    return nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


def load(partition: int, partitions: int) -> tuple[Tensor, Tensor]:
    """A client's rows."""
    generator = torch.Generator().manual_seed(partition)
    return torch.randn(ROWS, INPUTS, generator=generator), torch.randint(CLASSES, (ROWS,), generator=generator)


def losses(output: Tensor, y: Tensor) -> Tensor:
    """Per-example losses (B,)."""
    return functional.cross_entropy(output, y, reduction="none")


def train_plainly(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Two steps, as anybody writes them."""
    optimiser = torch.optim.SGD(net.parameters(), lr=RATE)
    for _ in range(STEPS):
        optimiser.zero_grad()
        loss = functional.cross_entropy(net(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return loss.item()


def train_with_opacus(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Two steps of DP-SGD, as Flower's example with Opacus writes them."""
    from opacus import PrivacyEngine

    optimiser = torch.optim.SGD(net.parameters(), lr=RATE)
    rows = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(rows, batch_size=int(ROWS * SHARE))
    net, optimiser, loader = PrivacyEngine().make_private(
        module=net, optimizer=optimiser, data_loader=loader, noise_multiplier=NOISE, max_grad_norm=CLIP
    )
    # At a rate of one half there are two batches in a pass.
    for batch_x, batch_y in loader:
        optimiser.zero_grad()
        functional.cross_entropy(net(batch_x), batch_y, reduction="mean").backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return 0.0


def ordinary_app(train: Callable[[nn.Module, Tensor, Tensor], float]) -> ClientApp:
    """An ordinary Flower ClientApp, written against its public API."""
    app = ClientApp()

    @app.train()
    def fit(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        net = network()
        net.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        loss = train(net, *load(int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])))
        state = {name.removeprefix("_module."): tensor for name, tensor in net.state_dict().items()}
        metrics = MetricRecord({"loss": loss, "num-examples": ROWS})
        return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=message)

    return app


def task(plan: PrivacyPlan | None = None) -> LocalTask:
    """The same work, said as data."""
    return LocalTask(model=network(), loss=losses, optimiser=Sgd(lr=RATE), steps=STEPS, batch_size=ROWS, plan=plan)


def example_plan() -> PrivacyPlan:
    """What the run with Opacus does, with as many steps as this benchmark makes."""
    return PrivacyPlan(
        clip_norm=CLIP,
        noise_multiplier=NOISE,
        sampler=Poisson(rate=SHARE),
        delta=1e-5,
        steps=1000,
        divisor=ROWS * SHARE,
    )


def fedavg_server(nodes: int, rounds: int, seconds: list[float]) -> ServerApp:
    """Flower's stock strategy, all nodes in each round; the seconds of each round but the first."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        arrays = ArrayRecord(network().state_dict())
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
        for number in range(rounds + 1):
            started = time.perf_counter()
            result = strategy.start(grid, arrays, num_rounds=1)
            assert result.train_metrics_clientapp, "clients answered"
            arrays = result.arrays
            if number:
                seconds.append(time.perf_counter() - started)

    return app


def summing_server(nodes: int, rounds: int, seconds: list[float]) -> ServerApp:
    """The same mean from the cohort's sum."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        assert isinstance(grid, SimulatedGrid), "a grid that sums"
        arrays = ArrayRecord(network().state_dict())
        for number in range(rounds + 1):
            started = time.perf_counter()
            total = grid.sum_of_updates(RecordDict({"arrays": arrays}), grid.get_node_ids())
            assert total.replies == nodes, "clients answered"
            means = {name: update / total.weight for name, update in total.update.items()}
            moved = {name: (array.numpy() + means[name]).astype("float32") for name, array in arrays.items()}
            arrays = ArrayRecord({name: Array(values) for name, values in moved.items()})
            if number:
                seconds.append(time.perf_counter() - started)

    return app


def ours(make: Callable[[int, int, list[float]], ServerApp], plan: PrivacyPlan | None, rounds: int) -> list[float]:
    """Updates a second of each round on the vectorised grid."""
    seconds: list[float] = []
    simulate(make(CLIENTS, rounds, seconds), task(plan).client_app(load), num_clients=CLIENTS)
    return [CLIENTS / each for each in seconds]


def flowers(train: Callable[[nn.Module, Tensor, Tensor], float], rounds: int) -> list[float]:
    """The same on Flower's simulation: Ray, one CPU a client, which is its best setting on two cores."""
    seconds: list[float] = []
    resources: dict[str, Any] = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    flwr.simulation.run_simulation(
        fedavg_server(FLOWER_CLIENTS, rounds, seconds),
        ordinary_app(train),
        num_supernodes=FLOWER_CLIENTS,
        backend_config=resources,
    )
    return [FLOWER_CLIENTS / each for each in seconds]


def loop(rounds: int) -> list[float]:
    """A plain loop over clients in one thread: no messages, no records, the mean of the states."""
    torch.set_num_threads(1)
    start, net, found = network().state_dict(), network(), []
    rows = [load(partition, FLOWER_CLIENTS) for partition in range(FLOWER_CLIENTS)]
    for _ in range(rounds + 1):
        started = time.perf_counter()
        sums = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
        for x, y in rows:
            net.load_state_dict(start)
            train_plainly(net, x, y)
            for name, tensor in net.state_dict().items():
                sums[name] += tensor
        start = {name: total / FLOWER_CLIENTS for name, total in sums.items()}
        found.append(FLOWER_CLIENTS / (time.perf_counter() - started))
    return found[1:]


def gemm_rate() -> float:
    """FLOP a second of large single-precision matrix products on all cores."""
    torch.set_num_threads(os.cpu_count() or 1)
    one, other = torch.randn(1024, 1024), torch.randn(1024, 1024)
    found = []
    for _ in range(9):
        started = time.perf_counter()
        for _ in range(4):
            one @ other
        found.append(4 * 2 * 1024**3 / (time.perf_counter() - started))
    torch.set_num_threads(1)
    return statistics.median(found)


def main(argv: Sequence[str] | None = None) -> None:
    """Print updates a second of each contender, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="at most a minute")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(argv)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    few, many = (2, 6) if options.quick else (10, 40)
    samples: dict[str, list[float]] = {}

    def measure(name: str, run: Callable[[], list[float]]) -> None:
        samples.setdefault(name, []).extend(run())

    names = ("plain loop, one thread", "fedinfer, stock FedAvg", "fedinfer, sum", "fedinfer, sum, example DP")
    rates = []
    # Ours before, between and after the peers: whatever else the machine does, it does to all.
    for part in range(3):
        rates.append(gemm_rate())
        measure(names[0], lambda: loop(few))
        measure(names[1], lambda: ours(fedavg_server, None, few))
        measure(names[2], lambda: ours(summing_server, None, many))
        measure(names[3], lambda: ours(summing_server, example_plan(), few))
        if part == 0:
            measure("Flower, Ray", lambda: flowers(train_plainly, few))
        if part == 1:
            measure("Flower, Ray, Opacus", lambda: flowers(train_with_opacus, few))
    figures = {name: statistics.median(each) for name, each in samples.items()}
    rate = statistics.median(rates)
    report(figures, rate)
    if options.json:
        payload = {"updates_per_s": figures, "gemm_flop_per_s": rate, "flop_per_update": FLOP, "samples": samples}
        options.json.write_text(json.dumps(payload, indent=2) + "\n", encoding="utf-8")


def report(figures: dict[str, float], rate: float) -> None:
    """The table."""
    flower, private = figures["Flower, Ray"], figures["Flower, Ray, Opacus"]
    plain = figures["plain loop, one thread"]
    print(f"{'':28}{'updates/s':>11}{'of Flower':>11}{'of the loop':>13}{'of GEMM':>9}")
    for name, figure in figures.items():
        peer = private if "DP" in name or "Opacus" in name else flower
        share = figure * FLOP / rate
        print(f"{name:28}{figure:11,.0f}{figure / peer:10.0f}×{figure / plain:12.1f}×{share:9.1%}")
    print(f"{FLOP / 1e6:.2f} MFLOP an update; matrix products reach {rate / 1e9:.0f} GFLOP/s on {os.cpu_count()} cores")
    print("example DP is compared with Flower and Opacus, the others with Flower")


if __name__ == "__main__":
    main()
