"""What privacy costs in accuracy: four public tables, five divisions each, beside an untuned recipe on the same rows.

Reference: plain features, 100 full-batch steps of DP gradient descent, clip 1, step size 2; figures that this library
set out to beat were made by such a recipe. fedinfer: the features of `utility_tasks.py`, 60 full-batch steps with a
small clip, the mean of the last half of the iterates. Clip and step size were fixed on stand-ins (`--choose`), never
on rows of the table itself; the rest by argument. MNIST has two more rows: fedinfer's steps on pixels alone, and the
convolutional network of the literature trained end to end. Heart disease has a federation of its four hospitals.

Everything that learns goes through `PrivacyPlan`. Unit: one example. Relation: add or remove one. Adversary: whoever
sees every release and all other rows. Trusted: whoever holds the rows; in the federation each hospital for its own,
and the server with nothing. δ = 1e-5. Accuracies are measured on public rows; elsewhere they would cost budget too.

    python -m experiments.utility [--quick] [--tasks NAME,...] [--seeds N ...] [--json FILE] [--plot FILE] [--choose]
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.private_training import (
    Part,
    Recipe,
    convolutional,
    linear,
    scored,
    train,
    unsafe_epochs,
    unsafe_fit,
)
from experiments.utility_tasks import STAND_INS, TASKS, Task, centred, quarter, views
from fedinfer.cli.console import note, show_table
from fedinfer.errors import BadUsage

EPSILONS = (0.5, 1.0, 3.0, 8.0)
REFERENCE = Recipe(clip_norm=1.0, learning_rate=2.0, steps=100, average=False)
# By task: clip, and step size times clip, for each of `EPSILONS`: the clip that is best over all ε on the stand-ins,
# and the best step size with it (`--choose` prints the grid; for MNIST it was run at clip 0.3 alone, on one division).
CHOSEN: Mapping[str, tuple[tuple[float, float], ...]] = {
    "digits": ((0.3, 8.0), (0.3, 8.0), (0.3, 32.0), (0.3, 64.0)),
    "breast_cancer": ((0.1, 2.0), (0.1, 4.0), (0.1, 8.0), (0.1, 16.0)),
    "heart": ((0.1, 4.0), (0.1, 8.0), (0.1, 16.0), (0.1, 16.0)),
    "mnist": ((0.3, 16.0), (0.3, 16.0), (0.3, 32.0), (0.3, 128.0)),
}
CONVOLUTIONAL = Recipe(clip_norm=0.1, learning_rate=2.0, sampling_rate=0.2, momentum=0.9)
EPOCHS = 15
# The grid: clips, and step sizes times clip for rows in ranges and for rows of unit norm.
CLIPS = (0.1, 0.3, 1.0)
REACHES, UNIT_REACHES = (1.0, 2.0, 4.0, 8.0, 16.0), (8.0, 16.0, 32.0, 64.0, 128.0)
# Draws of the noise that count as one value; MNIST has one.
DRAWS = 3
STYLES = {
    "reference": ("tab:gray", "o"),
    "reference, by hospital": ("tab:brown", "v"),
    "fedinfer": ("tab:blue", "s"),
    "fedinfer, by hospital": ("tab:green", "^"),
    "fedinfer, pixels": ("tab:purple", "D"),
    "CNN end to end": ("tab:orange", "x"),
}
# What such a reference gave before, over five divisions, for each of `EPSILONS` and without privacy.
EARLIER = {
    "digits": (0.795, 0.874, 0.923, 0.931, 0.969),
    "breast_cancer": (0.928, 0.949, 0.967, 0.968, 0.977),
}


# %% Methods and their scores
@dataclass(kw_only=True)
class Scores:
    """One row of a table: a value for each division at each ε (None: without privacy)."""

    task: str
    method: str
    metric: str
    values: dict[float | None, list[float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A linear model on `features` (n, d): its recipe, and who holds which rows."""

    name: str
    features: Tensor = field(repr=False)
    holders: Sequence[Tensor] = field(repr=False)
    recipe: Recipe

    def parts(self, labels: Tensor) -> list[Part]:
        return [(self.features[rows], labels[rows]) for rows in self.holders]


def chosen(name: str, epsilon: float, holders: int = 1) -> Recipe:
    """fedinfer's recipe for a task, by the setting of the nearest of `EPSILONS`.

    With `holders` that each add all their noise, the noise on the mean is as of one holder at ε over their root.
    """
    noisy = epsilon / math.sqrt(holders)
    place = min(range(len(EPSILONS)), key=lambda index: abs(math.log(EPSILONS[index] / noisy)))
    clip, reach = CHOSEN[name][place]
    return Recipe(clip_norm=clip, learning_rate=reach / clip)


def methods(name: str, task: Task, rows: Tensor, epsilon: float) -> Iterator[Method]:
    """The linear models of a task that train on `rows`."""
    ours = chosen(name, epsilon)
    yield Method(name="reference", features=task.plain, holders=[rows], recipe=REFERENCE)
    yield Method(name="fedinfer", features=task.made, holders=[rows], recipe=ours)
    if task.images is not None:
        yield Method(name="fedinfer, pixels", features=views(centred(task.images)), holders=[rows], recipe=ours)
    if task.sites is not None:
        held = [rows[task.sites[rows] == site] for site in torch.unique(task.sites)]
        yield Method(name="reference, by hospital", features=task.plain, holders=held, recipe=REFERENCE)
        ours = chosen(name, epsilon, len(held))
        yield Method(name="fedinfer, by hospital", features=task.made, holders=held, recipe=ours)


def evaluate(name: str, task: Task, seeds: Sequence[int], epsilons: Sequence[float], draws: int) -> list[Scores]:
    """Every method on every division; the mean over `draws` of the noise counts as one value."""
    found: dict[tuple[str, str], Scores] = {}

    def add(method: str, epsilon: float | None, results: Sequence[Mapping[str, float]]) -> None:
        for metric in results[0]:
            scores = found.setdefault((method, metric), Scores(task=name, method=method, metric=metric))
            value = float(np.mean([result[metric] for result in results]))
            scores.values.setdefault(epsilon, []).append(value)

    for seed in seeds:
        rows, held_out = quarter(task, seed)
        labels, wanted = task.labels, task.labels[held_out]
        for method, x, weight in (("reference", task.plain, 0.5), ("fedinfer", task.made, task.penalty)):
            net = linear(x.shape[1], task.classes)
            unsafe_fit(net, x[rows], labels[rows], penalty=weight / len(rows))
            add(method, None, [scored(net, x[held_out], wanted)])
        for epsilon in epsilons:
            for one in methods(name, task, rows, epsilon):
                results = []
                for _ in range(draws):
                    net = linear(one.features.shape[1], task.classes)
                    train(net, one.parts(labels), one.recipe, examples=task.examples, epsilon=epsilon)
                    results.append(scored(net, one.features[held_out], wanted))
                add(one.name, epsilon, results)
        if task.images is not None:
            part = (task.images[rows], labels[rows])
            net = convolutional(seed)
            unsafe_epochs(net, *part, epochs=EPOCHS, seed=seed)
            add("CNN end to end", None, [scored(net, task.images[held_out], wanted)])
            for epsilon in epsilons:
                net = convolutional(seed)
                train(net, [part], CONVOLUTIONAL, examples=task.examples, epsilon=epsilon)
                add("CNN end to end", epsilon, [scored(net, task.images[held_out], wanted)])
        note(f"{task.title}, division {seed}: done")
    return list(found.values())


def differences(mine: Scores, theirs: Scores) -> dict[float | None, tuple[float, float]]:
    """`mine` minus `theirs` on the same divisions, by ε: the mean and its paired standard error."""
    found = {}
    for epsilon in [e for e in mine.values if e in theirs.values]:
        gap = np.array(mine.values[epsilon]) - np.array(theirs.values[epsilon])
        error = float(gap.std(ddof=1) / math.sqrt(len(gap))) if len(gap) > 1 else math.nan
        found[epsilon] = (float(gap.mean()), error)
    return found


# %% Fixing the settings
def choose(name: str, epsilons: Sequence[float], divisions: int) -> list[dict[str, Any]]:
    """Accuracy on the stand-ins of a task for each clip and step size, the best first at each ε."""
    stand_ins, rows = [make() for make in STAND_INS[name]], []
    reaches = REACHES if stand_ins[0].classes == 2 else UNIT_REACHES
    for epsilon, clip, reach in product(epsilons, CLIPS, reaches):
        recipe, values = Recipe(clip_norm=clip, learning_rate=reach / clip), []
        for task, seed in product(stand_ins, range(divisions)):
            inside, outside = quarter(task, seed)
            net = linear(task.made.shape[1], task.classes)
            train(net, [(task.made[inside], task.labels[inside])], recipe, examples=task.examples, epsilon=epsilon)
            values.append(scored(net, task.made[outside], task.labels[outside])["accuracy"])
        rows.append({"epsilon": epsilon, "clip": clip, "reach": reach, "accuracy": float(np.mean(values))})
    return sorted(rows, key=lambda row: (row["epsilon"], -row["accuracy"]))


# %% What is printed and drawn
def reference_of(method: str) -> str | None:
    """The method that another is compared with on the same rows."""
    if method.startswith("reference"):
        return None
    return "reference, by hospital" if method.endswith("by hospital") else "reference"


def decimals(value: float, form: str) -> str:
    return format(value, form).replace("0.", ".")


def show(task: Task, scores: Sequence[Scores]) -> None:
    """Print the tables of a task."""
    columns = sorted({e for row in scores for e in row.values}, key=lambda e: e or math.inf)
    for metric in dict.fromkeys(row.metric for row in scores):
        rows, table = {row.method: row for row in scores if row.metric == metric}, []
        for method, row in rows.items():
            cells = [
                f"{decimals(float(np.mean(row.values[e])), '.3f')} ± {decimals(float(np.std(row.values[e])), '.3f')}"
                if e in row.values
                else ""
                for e in columns
            ]
            table.append([method, *cells])
            other = reference_of(method)
            if other in rows:
                gaps = differences(row, rows[other])
                cells = [
                    f"{decimals(gaps[e][0], '+.3f')} ± {decimals(gaps[e][1], '.3f')}" if e in gaps else ""
                    for e in columns
                ]
                table.append([f"  minus {other}", *cells])
        name = scores[0].task
        if metric == "accuracy" and name in EARLIER:
            earlier = dict(zip((*EPSILONS, None), EARLIER[name], strict=True))
            table.append(["earlier figures", *(decimals(earlier[e], ".3f") if e in earlier else "" for e in columns)])
        titles = ["no privacy" if e is None else f"ε = {e:g}" for e in columns]
        show_table(f"{task.title}: {metric}, mean ± standard deviation over divisions", ["", *titles], table)


def to_json(scores: Sequence[Scores]) -> list[dict[str, Any]]:
    """The rows with every division's value, and the paired differences."""
    by_name = {(row.task, row.method, row.metric): row for row in scores}
    found = []
    for row in scores:
        other = by_name.get((row.task, reference_of(row.method) or "", row.metric))
        gaps = {} if other is None else differences(row, other)
        for epsilon, values in row.values.items():
            gap = gaps.get(epsilon)
            found.append(
                {
                    "task": row.task,
                    "method": row.method,
                    "metric": row.metric,
                    "epsilon": epsilon,
                    "by_division": values,
                    "mean": float(np.mean(values)),
                    "minus_reference": None if gap is None else gap[0],
                    "standard_error": None if gap is None or math.isnan(gap[1]) else gap[1],
                }
            )
    return found


def draw(scores: Sequence[Scores], titles: Mapping[str, str], path: Path) -> None:
    """One picture a task: accuracy against ε, with dashed lines where nothing is private."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(titles), figsize=(3.4 * len(titles), 3.6), layout="constrained", squeeze=False)
    for axis, (name, title) in zip(axes[0], titles.items(), strict=True):
        rows = [row for row in scores if row.task == name and row.metric == "accuracy"]
        for row in rows:
            epsilons = sorted(e for e in row.values if e is not None)
            means = [float(np.mean(row.values[e])) for e in epsilons]
            spread = [float(np.std(row.values[e])) for e in epsilons]
            colour, marker = STYLES[row.method]
            axis.errorbar(epsilons, means, spread, color=colour, marker=marker, capsize=2.5, lw=1.4, label=row.method)
            if None in row.values:
                axis.axhline(float(np.mean(row.values[None])), color=colour, ls="--", lw=0.9)
        axis.set(title=title, xscale="log", xlabel="ε (δ = 1e-5)")
        axis.set_xticks(epsilons, [f"{e:g}" for e in epsilons])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7.5, loc="lower right", frameon=False)
    axes[0][0].set_ylabel("accuracy on held-out rows; dashed: no privacy")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table for each task, or the grid that its settings come from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two divisions, ε = 1 and 8, no MNIST unless it is named")
    parser.add_argument("--tasks", help=f"comma-separated, of {','.join(TASKS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="divisions of the rows")
    parser.add_argument("--json", type=Path, help="write the tables here")
    parser.add_argument("--plot", type=Path, help="draw them here, as PNG")
    parser.add_argument("--choose", action="store_true", help="the grid on the stand-ins instead of the tables")
    options = parser.parse_args(argv)
    # Steps of a millisecond are slower on two threads than on one.
    torch.set_num_threads(1)
    names = options.tasks.split(",") if options.tasks else [n for n in TASKS if not options.quick or n != "mnist"]
    if unknown := sorted(set(names) - set(TASKS)):
        raise BadUsage(f"tasks: got {', '.join(unknown)}, expected some of {', '.join(TASKS)}")
    epsilons, seeds = ((1.0, 8.0), options.seeds[:2]) if options.quick else (EPSILONS, options.seeds)
    command = " ".join(["python -m experiments.utility", *(sys.argv[1:] if argv is None else argv)])
    result: dict[str, Any] = {"command": command}
    if options.choose:
        result["grid"] = {}
        for name in names:
            grid = result["grid"][name] = choose(name, epsilons, 1 if options.quick or name == "mnist" else 4)
            table = [[f"{value:.4g}" for value in row.values()] for row in grid]
            show_table(f"{name}: on its stand-ins, the best first at each ε", list(grid[0]), table)
    else:
        titles, scores = {}, []
        for name in names:
            task = TASKS[name]()
            titles[name] = task.title
            found = evaluate(name, task, seeds, epsilons, 1 if options.quick or name == "mnist" else DRAWS)
            show(task, found)
            scores += found
        result["rows"] = to_json(scores)
        if options.plot:
            draw(scores, titles, options.plot)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
