"""What stragglers cost: rounds that wait, rounds that ask for more than they take, and a buffer, on a virtual clock.

Digits, divided over clients by Dirichlet labels; each client has a speed of its own (log-normal), and one in twenty
tasks fails. A client trains for one epoch. All three ask as many clients at a time; what differs is for whom the server
waits. Accuracy is on rows held out, time is virtual: it does not depend on the machine.

    python -m experiments.stragglers [--quick] [--json FILE] [--plot FILE]
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, RecordDict
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedinfer.data.partitions import LabelDirichlet
from fedinfer.privacy import NoiseStream, insecure_seeded_noise
from fedinfer.simulation import FedBuff, LogNormalSeconds, PopulatedGrid, Population, Wait, simulate
from fedinfer.training import LocalTask, Sgd

CLIENTS, ASKED = 100, 30
MEDIAN_S, SIGMA, DROPOUT = 60.0, 1.0, 0.05
TARGETS = (0.85, 0.9, 0.93)
# For whom a server waits; a buffer of 5 takes a step every 5 answers.
WAITS: Mapping[str, Wait | FedBuff] = {
    "all of 30": Wait(),
    "the first 23 of 30": Wait(first=23),
    "FedBuff, 5 of 30": FedBuff(buffer=5, concurrency=30),
}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Accuracy after each step of the server, the virtual hours by then, and the answers that were used."""

    name: str
    seed: int
    hours: tuple[float, ...]
    accuracies: tuple[float, ...]
    answers: tuple[int, ...]

    def reached(self, target: float) -> tuple[float, int] | None:
        """The hours and the answers until the accuracy was reached for the first time."""
        points = zip(self.hours, self.answers, self.accuracies, strict=True)
        return next(((hour, used) for hour, used, accuracy in points if accuracy >= target), None)


def losses(output: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(output, y, reduction="none")


def rounds(grid: PopulatedGrid, arrays: ArrayRecord, stream: NoiseStream) -> Iterator[tuple[ArrayRecord, int]]:
    """Synchronous rounds without end: the weights after each, and how many answers were used."""
    while True:
        nodes = np.array(list(grid.get_node_ids()))
        chosen = nodes[np.argsort(stream.uniform(len(nodes)))[:ASKED]].tolist()
        total = grid.sum_of_updates(RecordDict({"arrays": arrays}), chosen)
        moved: dict[str, NDArray[Any]] = {}
        for name, array in arrays.items():
            moved[name] = (array.numpy() + total.update[name] / total.weight).astype(np.float32)
        arrays = ArrayRecord({name: Array(array) for name, array in moved.items()})
        yield arrays, total.replies


def curve(name: str, seed: int, hours: float) -> Curve:
    """Train until the virtual time is up."""
    data = load_digits()
    x, test_x, y, test_y = train_test_split(
        torch.from_numpy(data.data / 16.0).float(), torch.from_numpy(data.target), test_size=0.25, random_state=seed
    )
    net = nn.Linear(64, 10)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    task = LocalTask(model=net, loss=losses, optimiser=Sgd(lr=0.3), epochs=1, batch_size=8)
    division = LabelDirichlet(alpha=0.5, seed=seed).divide(y.numpy(), CLIENTS)
    seconds = LogNormalSeconds(median_s=MEDIAN_S, sigma=SIGMA)
    population = Population(seconds=seconds, dropout=DROPOUT, seed=seed)
    points: list[tuple[float, float, int]] = []
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        assert isinstance(grid, PopulatedGrid)
        start, stream = ArrayRecord(net.state_dict()), insecure_seeded_noise(f"stragglers {seed}")
        server = WAITS[name]
        if isinstance(server, FedBuff):
            steps = server.run(grid, start, steps=1_000_000, stream=stream)
            each: Iterator[tuple[ArrayRecord, int]] = ((step.arrays, server.buffer) for step in steps)
        else:
            grid.wait = server
            each = rounds(grid, start, stream)
        answers = 0
        for arrays, used in each:
            if grid.clock.now_s > 3600.0 * hours:
                return
            answers += used
            weight, bias = (torch.from_numpy(arrays[part].numpy()) for part in ("weight", "bias"))
            right = (test_x @ weight.T + bias).argmax(1) == test_y
            points.append((grid.clock.now_s / 3600.0, float(right.float().mean()), answers))

    simulate(app, task.client_app(division.load(x, y)), num_clients=CLIENTS, seed=seed, population=population)
    at, accuracies, used = zip(*points, strict=True)
    return Curve(name=name, seed=seed, hours=at, accuracies=accuracies, answers=used)


def print_table(curves: Sequence[Curve], hours: float) -> None:
    """Hours, and answers used, until each accuracy; mean over seeds."""
    print(f"{'the server waits for':22}" + "".join(f"{f'hours, answers to {target:.2f}':>26}" for target in TARGETS))
    for name in WAITS:
        mine = [own for own in curves if own.name == name]
        line = f"{name:22}"
        for target in TARGETS:
            reached = [point for own in mine if (point := own.reached(target)) is not None]
            if len(reached) < len(mine):
                line += f"{f'> {hours:g}':>26}"
            else:
                line += f"{np.mean([hour for hour, _ in reached]):>18.2f}{np.mean([used for _, used in reached]):>8.0f}"
        print(line)
    print(f"virtual hours; mean of {len({own.seed for own in curves})} seeds")


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Accuracy over virtual time, one line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for number, name in enumerate(WAITS):
        for own in (own for own in curves if own.name == name):
            label = name if own.seed == curves[0].seed else None
            axes.plot(own.hours, own.accuracies, color=f"C{number}", label=label, linewidth=1)
    axes.set(xlabel="virtual hours", ylabel="accuracy on rows held out", ylim=(0.6, 1.0))
    axes.legend(title="the server waits for")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Train in three ways and print when each was how good."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, half an hour of virtual time")
    parser.add_argument("--json", type=Path, help="write the curves here")
    parser.add_argument("--plot", type=Path, help="draw accuracy over virtual time here")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    seeds, hours = ([0], 0.5) if options.quick else (range(3), 8.0)
    curves = [curve(name, seed, hours) for name in WAITS for seed in seeds]
    print_table(curves, hours)
    if options.json:
        options.json.write_text(json.dumps([asdict(own) for own in curves], indent=2) + "\n", encoding="utf-8")
    if options.plot:
        draw(curves, options.plot)


if __name__ == "__main__":
    main()
