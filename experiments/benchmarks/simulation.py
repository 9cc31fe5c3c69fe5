"""Client updates a second: cohorts as one program beside Flower's own simulation and a plain loop over clients.

The work of a client: an MLP 64-64-10, 16 rows, 2 steps of gradient descent, as one ordinary Flower ClientApp writes it
and as a `LocalTask` says it. Steady state: the first round of each is left out, and with it Flower's start of about
ten seconds. "stock FedAvg" is Flower's own strategy on its own records; "sum" is `grid.sum_of_updates`, which hands the
server the cohort's sum instead of its replies, and is not a stock strategy. Floor: the arithmetic is 0.65 MFLOP an
update (forward, and backward without the gradient at the rows), which the last column compares with the machine's
largest rate for matrix products. On a machine that does other things too, the processor time of an update is steadier
than its rate; of Flower's workers it is not known here.

Then FLUTE's logistic regression and pfl-research's CNN beside a plain loop (`simulation_published.py`), and rounds of a
population of 1,000,000 clients: the plot shows their seconds by the size of the cohort that takes part.

    python -m experiments.benchmarks.simulation [--quick] [--json FILE] [--plot FILE]
"""

import argparse
import json
import logging
import os
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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

from experiments.benchmarks import simulation_published
from fedinfer.privacy import Poisson, PrivacyPlan
from fedinfer.simulation import SimulatedGrid, simulate
from fedinfer.training import LocalTask, Sgd

INPUTS, HIDDEN, CLASSES, ROWS, STEPS, RATE = 64, 64, 10, 16, 2, 0.1
CLIENTS, FLOWER_CLIENTS, POPULATION = 1000, 100, 1_000_000
LOOP, FLOWER, FLOWER_DP = "plain loop, one thread", "Flower, Ray", "Flower, Ray, Opacus, DP"
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
        warnings.simplefilter("ignore")
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


@dataclass
class Clock:
    """Wall and processor seconds of each round but the first."""

    clients: int
    walls: list[float] = field(default_factory=list)
    processors: list[float] = field(default_factory=list)
    rounds: int = 0

    @contextmanager
    def round(self) -> Iterator[None]:
        """Measure one round."""
        wall, processor = time.perf_counter(), time.process_time()
        yield
        self.rounds += 1
        if self.rounds > 1:
            self.walls.append(time.perf_counter() - wall)
            self.processors.append(time.process_time() - processor)


def fedavg_server(nodes: int, rounds: int, clock: Clock) -> ServerApp:
    """Flower's stock strategy, all nodes in each round; the seconds of each round but the first."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        arrays = ArrayRecord(network().state_dict())
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
        for _ in range(rounds + 1):
            with clock.round():
                result = strategy.start(grid, arrays, num_rounds=1)
            assert result.train_metrics_clientapp, "clients answered"
            arrays = result.arrays

    return app


def summing_server(nodes: int, rounds: int, clock: Clock) -> ServerApp:
    """The same mean from the cohort's sum."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        assert isinstance(grid, SimulatedGrid), "a grid that sums"
        everybody = range(min(grid.get_node_ids()), max(grid.get_node_ids()) + 1)
        arrays = ArrayRecord(network().state_dict())
        for number in range(rounds + 1):
            # A cohort of its own each round, as large as was asked for, out of all nodes.
            start = number * nodes % len(everybody)
            with clock.round():
                total = grid.sum_of_updates(RecordDict({"arrays": arrays}), everybody[start : start + nodes])
                means = {name: update / total.weight for name, update in total.update.items()}
                moved = {name: (array.numpy() + means[name]).astype("float32") for name, array in arrays.items()}
                arrays = ArrayRecord({name: Array(values) for name, values in moved.items()})
            assert total.replies == nodes, "clients answered"

    return app


def ours(
    make: Callable[[int, int, Clock], ServerApp],
    plan: PrivacyPlan | None,
    rounds: int,
    *,
    cohort: int = CLIENTS,
    population: int = CLIENTS,
) -> Clock:
    """The rounds of a cohort on the vectorised grid."""
    clock = Clock(clients=cohort)
    simulate(make(cohort, rounds, clock), task(plan).client_app(load), num_clients=population)
    return clock


def flowers(train: Callable[[nn.Module, Tensor, Tensor], float], rounds: int) -> Clock:
    """The same on Flower's simulation: Ray, one CPU a client, which is its best setting on two cores."""
    clock = Clock(clients=FLOWER_CLIENTS)
    resources: dict[str, Any] = {
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        "init_args": {"log_to_driver": False},
    }
    flwr.simulation.run_simulation(
        fedavg_server(FLOWER_CLIENTS, rounds, clock),
        ordinary_app(train),
        num_supernodes=FLOWER_CLIENTS,
        backend_config=resources,
    )
    # The work was done in other processes.
    clock.processors.clear()
    return clock


def loop(rounds: int) -> Clock:
    """A plain loop over clients in one thread: no messages, no records, the mean of the states."""
    torch.set_num_threads(1)
    clock = Clock(clients=FLOWER_CLIENTS)
    start, net = network().state_dict(), network()
    rows = [load(partition, FLOWER_CLIENTS) for partition in range(FLOWER_CLIENTS)]
    for _ in range(rounds + 1):
        with clock.round():
            sums = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
            for x, y in rows:
                net.load_state_dict(start)
                train_plainly(net, x, y)
                for name, tensor in net.state_dict().items():
                    sums[name] += tensor
            start = {name: total / FLOWER_CLIENTS for name, total in sums.items()}
    return clock


def gemm_rate() -> float:
    """FLOP a second of single-precision matrix products on all cores: large ones or many small ones, whichever more."""
    torch.set_num_threads(os.cpu_count() or 1)
    found = []
    for shape in ((1, 1024, 1024, 1024), (512, ROWS, INPUTS, HIDDEN)):
        count, rows, inner, columns = shape
        one, other = torch.randn(count, rows, inner), torch.randn(count, inner, columns)
        rates = []
        for _ in range(15):
            started = time.perf_counter()
            torch.bmm(one, other)
            rates.append(2 * count * rows * inner * columns / (time.perf_counter() - started))
        found.append(statistics.median(rates))
    torch.set_num_threads(1)
    return max(found)


def main(argv: Sequence[str] | None = None) -> None:
    """Print updates a second of each contender, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="at most a minute")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw a round's seconds by the size of its cohort here, as PNG")
    options = parser.parse_args(argv)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    few, many = (2, 6) if options.quick else (10, 40)
    clocks: dict[str, list[Clock]] = {}
    rates = []
    # Ours before, between and after the peers: whatever else the machine does, it does to all.
    for part in range(3):
        rates.append(gemm_rate())
        clocks.setdefault(LOOP, []).append(loop(few))
        clocks.setdefault("fedinfer, stock FedAvg", []).append(ours(fedavg_server, None, few))
        clocks.setdefault("fedinfer, sum", []).append(ours(summing_server, None, many))
        clocks.setdefault("fedinfer, sum, example DP", []).append(ours(summing_server, example_plan(), few))
        if part == 0:
            clocks[FLOWER] = [flowers(train_plainly, few)]
        if part == 1:
            clocks[FLOWER_DP] = [flowers(train_with_opacus, few)]
    figures = {name: rate_of(each) for name, each in clocks.items()}
    report(figures, {name: processor_of(each) for name, each in clocks.items()}, statistics.median(rates))
    published = simulation_published.compare(quick=options.quick)
    cohorts = population()
    if options.plot:
        draw(cohorts, options.plot)
    if options.json:
        payload = {
            "updates_per_s": figures,
            "gemm_flop_per_s": statistics.median(rates),
            "flop_per_update": FLOP,
            "published": published,
            "cohort_seconds": cohorts,
            "peak_memory_gb": peak_memory_gb(),
            "round_seconds": {name: [wall for one in each for wall in one.walls] for name, each in clocks.items()},
        }
        options.json.write_text(json.dumps(payload, indent=2) + "\n", encoding="utf-8")


def rate_of(clocks: Sequence[Clock]) -> float:
    """Updates a second, by the median round."""
    return clocks[0].clients / statistics.median(wall for clock in clocks for wall in clock.walls)


def processor_of(clocks: Sequence[Clock]) -> float | None:
    """Processor seconds of an update, by the median round; None if they were spent elsewhere."""
    seconds = [each for clock in clocks for each in clock.processors]
    return statistics.median(seconds) / clocks[0].clients if seconds else None


def report(figures: dict[str, float], processors: dict[str, float | None], rate: float) -> None:
    """The table."""
    print(f"{'':28}{'updates/s':>11}{'of Flower':>11}{'of the loop':>13}{'processor':>12}{'of GEMM':>9}")
    for name, figure in figures.items():
        peer = figures[FLOWER_DP if "DP" in name else FLOWER]
        share, spent = figure * FLOP / rate, processors[name]
        time_us = "-" if spent is None else f"{spent * 1e6:.0f} µs"
        print(f"{name:28}{figure:11,.0f}{figure / peer:10.0f}×{figure / figures[LOOP]:12.1f}×{time_us:>12}{share:9.1%}")
    print(f"{FLOP / 1e6:.2f} MFLOP an update; matrix products reach {rate / 1e9:.0f} GFLOP/s on {os.cpu_count()} cores")
    print("with DP the peer is Flower with Opacus, and without it Flower")


def population() -> dict[int, float]:
    """Print and return the seconds of a round by the size of its cohort, out of 1,000,000 clients."""
    found = {}
    for cohort in (1000, 2000, 5000, 10_000):
        clock = ours(summing_server, None, 2, cohort=cohort, population=POPULATION)
        found[cohort] = statistics.median(clock.walls)
        print(
            f"{cohort:6,} of {POPULATION:,} clients: {found[cohort]:.2f} s a round, rows made included; "
            f"{found[cohort] / cohort * 1e6:.0f} µs a client; peak memory {peak_memory_gb():.2f} GB"
        )
    return found


def peak_memory_gb() -> float:
    """The most that this process has held, torch and Ray included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def draw(cohorts: dict[int, float], path: Path) -> None:
    """Seconds of a round against the size of its cohort, and the line through the origin that fits them best."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    slope = sum(size * seconds for size, seconds in cohorts.items()) / sum(size**2 for size in cohorts)
    figure, axis = pyplot.subplots(figsize=(5, 3.6), layout="constrained")
    axis.plot(list(cohorts), list(cohorts.values()), "o", label="measured")
    ends = (0, max(cohorts))
    axis.plot(ends, [slope * size for size in ends], "--", color="grey", label=f"{slope * 1e6:.0f} µs a client")
    axis.set(
        xlabel=f"clients in a round, of {POPULATION:,}",
        ylabel="seconds of a round",
        title=f"peak memory {peak_memory_gb():.2f} GB",
    )
    axis.legend(frameon=False)
    axis.grid(alpha=0.25)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
