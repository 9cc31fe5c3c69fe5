"""FLamby's Fed-Heart-Disease at ε that is true: its protocol re-run, its ε counted again, and fedinfer beside it.

FLamby (du Terrail et al. 2022, arXiv:2210.04620) trains a logistic regression on four hospitals: complete rows of ten
columns, one fixed division (486 patients to train on, 254 to test on), the score the mean of the four accuracies. Its
private runs ask Opacus for the noise of 15 epochs, but do 15 rounds of 100 batches of 4, which is more by a factor of
2 to 12.5; they draw shuffled batches where the account is of Poisson samples; and they normalise each hospital by the
mean and deviation of its private rows, which nobody accounts for.

Here ε is counted for the steps that are done, as if the batches were Poisson samples (by PLD), and as they are, passes
over shuffled rows, with no amplification claimed: an upper bound that holds. fedinfer takes public ranges, one plan for
each hospital, all rows in each step, and the setting that `utility.py` has for heart disease, fixed on other tables.

Unit: one patient. Relation: add or remove one. Adversary of fedinfer's figures: whoever sees every release, the
server too, and knows all other patients. Trusted: each hospital with its own rows ("pooled": whoever holds them all).

    python -m experiments.flamby_heart [--quick] [--seeds N ...] [--json FILE] [--plot FILE]
"""

import argparse
import json
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.accountants.utils import get_noise_multiplier
from scipy.special import expit
from sklearn.model_selection import train_test_split
from torch import Tensor

from experiments.private_training import linear, train, unsafe_fit
from experiments.utility import EPSILONS, chosen
from experiments.utility_tasks import with_constant
from fedinfer.cli.console import note, show_table
from fedinfer.data import Row, encode, heart_rows, heart_schema
from fedinfer.inference import unsafe_auc
from fedinfer.privacy import PrivacyPlan
from fedinfer.privacy.samplers import Cyclic, Poisson

Floats = NDArray[np.float64]
HOSPITALS = ("Cleveland", "Hungary", "Switzerland", "VA Long Beach")
NUMBERS = ("age", "trestbps", "chol", "thalch", "oldpeak")
# FLamby's indicator columns; the first category of each is left out, as there.
INDICATORS = (
    ("sex", "Male"), ("fbs", "TRUE"), ("exang", "TRUE"), ("cp", "atypical angina"), ("cp", "non-anginal"),
    ("cp", "asymptomatic"), ("restecg", "st-t abnormality"), ("restecg", "lv hypertrophy"),
)  # fmt: skip
COLUMNS = tuple(dict.fromkeys((*NUMBERS, *(column for column, _ in INDICATORS))))
TRAIN_SHARE, SPLIT_SEED = 0.66, 43
EXAMPLES = 486
BATCH, ROUNDS, UPDATES, STEP, CLIP = 4, 15, 100, 1e-3, 1.1
DELTAS = (1e-3, 1e-4, 1e-5)
# As published: mean over hospitals and five seeds, from the tables in FLamby's repository (results/, dp_example/).
PUBLISHED = {"pooled": 0.735, "FedYogi": 0.731, "FedAvg": 0.685, "FedAvg of the private example": 0.712}
PUBLISHED_PRIVATE = {1e-3: 0.702, 1e-4: 0.685}


@dataclass(frozen=True, kw_only=True)
class Hospital:
    """Rows of one hospital, to train and to test on: 13 columns by its private statistics, and by public ranges."""

    name: str
    private_x: tuple[Floats, Floats] = field(repr=False)
    public_x: tuple[Tensor, Tensor] = field(repr=False)
    labels: tuple[Tensor, Tensor] = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels[0])


def complete_rows() -> dict[str, list[Row]]:
    """FLamby's rows. Patient 304 is in Hungary's file at UCI, and in Cleveland's part of the bundled copy."""
    rows = {name: list(found) for name, found in heart_rows().items()}
    rows["Hungary"].insert(0, rows["Cleveland"].pop())
    return {name: [row for row in rows[name] if all(row[column] for column in COLUMNS)] for name in HOSPITALS}


def hospitals() -> list[Hospital]:
    """The four hospitals, divided as FLamby divides them."""
    schema = heart_schema()
    schema = replace(schema, columns=tuple(column for column in schema.columns if column.column in COLUMNS))
    found = []
    for name, rows in complete_rows().items():
        labels = np.array([row["num"] != "0" for row in rows])
        rare = min(labels.sum(), (~labels).sum()) <= 2
        train_rows, test_rows = train_test_split(
            np.arange(len(rows)),
            train_size=TRAIN_SHARE,
            test_size=1.0 - TRAIN_SHARE,
            random_state=SPLIT_SEED,
            stratify=None if rare else labels,
        )
        values = np.array(
            [[float(row[c]) for c in NUMBERS] + [float(row[c] == value) for c, value in INDICATORS] for row in rows]
        )
        mean, deviation = values[train_rows].mean(0), values[train_rows].std(0, ddof=1) + 1e-9
        features = with_constant(torch.from_numpy(encode(rows, schema, with_target=False).features), 1.0)
        y = torch.from_numpy(labels.astype(np.float32))
        inside, outside = np.sort(train_rows), np.sort(test_rows)
        found.append(
            Hospital(
                name=name,
                private_x=((values[inside] - mean) / deviation, (values[outside] - mean) / deviation),
                public_x=(features[inside], features[outside]),
                labels=(y[inside], y[outside]),
            )
        )
    return found


# %% FLamby's ε, counted again
@lru_cache
def opacus_noise(rows: int, delta: float) -> float:
    """The noise multiplier that FLamby's run gets from Opacus for ε = 1 and 15 epochs."""
    with warnings.catch_warnings():
        # Opacus remarks on the Rényi orders that bound its own search.
        warnings.simplefilter("ignore", UserWarning)
        noise = get_noise_multiplier(
            target_epsilon=1.0,
            target_delta=delta,
            sample_rate=1.0 / math.ceil(rows / BATCH),
            epochs=ROUNDS,
            accountant="prv",
        )
    return float(noise)


def counted_again(rows: int, delta: float) -> dict[str, float]:
    """ε of what FLamby does at "ε = 1" in a hospital of that many training rows (Opacus 1.6 makes the noise)."""
    batches, steps = math.ceil(rows / BATCH), ROUNDS * UPDATES
    noise = opacus_noise(rows, delta)

    def epsilon(sampler: Poisson | Cyclic, steps: int) -> float:
        plan = PrivacyPlan(clip_norm=CLIP, noise_multiplier=noise, sampler=sampler, delta=delta, steps=steps)
        return plan.epsilon()

    poisson = Poisson(rate=1.0 / batches)
    return {
        "rows": rows,
        "delta": delta,
        "noise_multiplier": noise,
        "steps_counted": ROUNDS * batches,
        "steps_done": steps,
        "epsilon_counted": epsilon(poisson, ROUNDS * batches),
        "epsilon_if_poisson": epsilon(poisson, steps),
        "epsilon_as_shuffled": epsilon(Cyclic(period=batches), steps),
    }


def flamby(clinics: Sequence[Hospital], seed: int, delta: float | None) -> Floats:
    """Weights (14,) of FLamby's FedAvg, without privacy or at its "ε = 1", as it runs: shuffled batches of 4."""
    rng = np.random.default_rng(seed)
    weights = rng.uniform(-1, 1, 14) / math.sqrt(13)
    noises = [0.0 if delta is None else opacus_noise(len(one), delta) for one in clinics]
    rows = [np.c_[one.private_x[0], np.ones(len(one))] for one in clinics]
    queues: list[list[NDArray[np.int64]]] = [[] for _ in clinics]
    for _ in range(ROUNDS):
        changes = []
        for x, one, noise, queue in zip(rows, clinics, noises, queues, strict=True):
            local, y = weights.copy(), one.labels[0].numpy()
            for _ in range(UPDATES):
                if not queue:
                    order = rng.permutation(len(x))
                    queue += [order[start : start + BATCH] for start in range(0, len(x), BATCH)]
                batch = queue.pop(0)
                gradients = (expit(x[batch] @ local) - y[batch])[:, None] * x[batch]
                if delta is None:
                    local -= STEP * gradients.mean(0)
                else:
                    norms = np.linalg.norm(gradients, axis=1, keepdims=True)
                    total = (gradients * np.minimum(1.0, CLIP / np.maximum(norms, 1e-12))).sum(0)
                    expected = len(x) // math.ceil(len(x) / BATCH)
                    local -= STEP * (total + noise * CLIP * rng.normal(size=14)) / expected
            changes.append((local - weights) * len(x))
        weights = weights + np.sum(changes, axis=0) / sum(map(len, clinics))
    return weights


# %% Scores
def score(outputs: Sequence[Floats], clinics: Sequence[Hospital]) -> dict[str, float]:
    """Accuracy by hospital, FLamby's score (their plain mean), and the AUC over all patients."""
    wanted = [one.labels[1].numpy() for one in clinics]
    found = {
        one.name: float(((output > 0) == (labels > 0.5)).mean())
        for one, output, labels in zip(clinics, outputs, wanted, strict=True)
    }
    auc = unsafe_auc(np.concatenate(wanted), np.concatenate(outputs))
    return {"mean": float(np.mean(list(found.values()))), **found, "AUC of all": math.nan if auc is None else auc}


def fedinfer(clinics: Sequence[Hospital], epsilon: float | None, *, pooled: bool) -> dict[str, float]:
    """One model on public ranges: each hospital with a plan of its own, or all rows under one."""
    parts = [(one.public_x[0], one.labels[0]) for one in clinics]
    together = (torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))
    net = linear(together[0].shape[1], 2)
    if epsilon is None:
        unsafe_fit(net, *together, penalty=0.5 / len(together[1]))
    else:
        held = [together] if pooled else parts
        train(net, held, chosen("heart", epsilon, len(held)), examples=EXAMPLES, epsilon=epsilon)
    with torch.no_grad():
        return score([net(one.public_x[1])[:, 0].double().numpy() for one in clinics], clinics)


def evaluate(
    clinics: Sequence[Hospital], seeds: Sequence[int], epsilons: Sequence[float]
) -> dict[str, list[dict[str, float]]]:
    """Scores by method, one for each seed. The division is FLamby's: seeds are starts, batches and noise."""
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:
        for delta in (None, *PUBLISHED_PRIVATE):
            weights = flamby(clinics, seed, delta)
            outputs = [np.c_[one.private_x[1], np.ones(len(one.private_x[1]))] @ weights for one in clinics]
            name = "no privacy" if delta is None else f'"ε = 1", δ = {delta:g}'
            rows.setdefault(f"FLamby re-run, {name}", []).append(score(outputs, clinics))
        for epsilon, pooled in [(None, True), *((e, pooled) for pooled in (True, False) for e in epsilons)]:
            place = "pooled" if pooled else "federated"
            name = "no privacy" if epsilon is None else f"ε = {epsilon:g}"
            found = fedinfer(clinics, epsilon, pooled=pooled)
            rows.setdefault(f"fedinfer {place}, {name}", []).append(found)
        note(f"seed {seed}: done")
    return rows


# %% What is printed and drawn
def show_counts(counts: Sequence[Mapping[str, float]], clinics: Sequence[Hospital]) -> None:
    """Print FLamby's ε, counted again."""
    names = {len(one): one.name for one in clinics}
    table = [
        [
            names[int(one["rows"])],
            f"{one['delta']:g}",
            f"{one['noise_multiplier']:.3f}",
            f"{one['steps_counted']:.0f} → {one['steps_done']:.0f}",
            f"{one['epsilon_counted']:.2f}",
            f"{one['epsilon_if_poisson']:.2f}",
            f"{one['epsilon_as_shuffled']:.1f}",
        ]
        for one in counts
    ]
    titles = ["", "δ", "noise", "steps counted → done", "ε for the counted", "for the done, if Poisson", "as shuffled"]
    show_table('FLamby\'s "ε = 1", counted again', titles, table)


def show_scores(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Print accuracies and AUC, with what FLamby published."""
    columns = list(next(iter(rows.values()))[0])
    table = [[f"published: {name}", f"{value:.3f}", *[""] * (len(columns) - 1)] for name, value in PUBLISHED.items()]
    table += [
        [f'published: "ε = 1", δ = {delta:g}', f"{value:.3f}", *[""] * (len(columns) - 1)]
        for delta, value in PUBLISHED_PRIVATE.items()
    ]
    for name, results in rows.items():
        values = {column: [result[column] for result in results] for column in columns}
        table.append([name, *(f"{np.mean(values[c]):.3f} ± {np.std(values[c]):.3f}" for c in columns)])
    show_table("Accuracy on FLamby's division, mean ± standard deviation over seeds", ["", *columns], table)


def draw(
    rows: Mapping[str, Sequence[Mapping[str, float]]], epsilons: Sequence[float], worst: float, path: Path
) -> None:
    """FLamby's score against the ε that is true; FLamby's own at the ε of its worst hospital."""
    import matplotlib.pyplot as plt

    means = {
        name: [float(np.mean([r["mean"] for r in results])), float(np.std([r["mean"] for r in results]))]
        for name, results in rows.items()
    }
    figure, axis = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    for place, colour, marker in (("pooled", "tab:blue", "s"), ("federated", "tab:green", "^")):
        found = [means[f"fedinfer {place}, ε = {e:g}"] for e in epsilons]
        axis.errorbar(
            epsilons,
            [m for m, _ in found],
            [s for _, s in found],
            color=colour,
            marker=marker,
            capsize=2.5,
            label=f"fedinfer, {place}",
        )
    mean, spread = means['FLamby re-run, "ε = 1", δ = 0.0001']
    axis.errorbar(
        [worst],
        [mean],
        [spread],
        color="tab:red",
        marker="o",
        capsize=2.5,
        ls="",
        label='FLamby re-run, "ε = 1" (δ = 1e-4)',
    )
    axis.axhline(
        means["fedinfer pooled, no privacy"][0], color="tab:blue", ls="--", lw=0.9, label="fedinfer, no privacy"
    )
    axis.axhline(PUBLISHED["pooled"], color="tab:red", ls="--", lw=0.9, label="FLamby pooled, no privacy (published)")
    axis.set(xscale="log", xlabel="ε that is true (fedinfer: δ = 1e-5)", ylabel="accuracy, mean over hospitals")
    axis.set_xticks(epsilons, [f"{e:g}" for e in epsilons])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7.5, frameon=False, loc="center right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Print FLamby's ε counted again, and its scores beside fedinfer's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, ε = 1 and 8, δ = 1e-4")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44, 45, 46], help="starts and batches")
    parser.add_argument("--json", type=Path, help="write the tables here")
    parser.add_argument("--plot", type=Path, help="draw them here, as PNG")
    options = parser.parse_args(argv)
    # Steps of a millisecond are slower on two threads than on one.
    torch.set_num_threads(1)
    epsilons = (1.0, 8.0) if options.quick else EPSILONS
    clinics = hospitals()
    counts = [counted_again(len(one), delta) for delta in (DELTAS[1:2] if options.quick else DELTAS) for one in clinics]
    show_counts(counts, clinics)
    rows = evaluate(clinics, options.seeds[:1] if options.quick else options.seeds, epsilons)
    show_scores(rows)
    if options.plot:
        worst = max(one["epsilon_if_poisson"] for one in counts if one["delta"] == DELTAS[1])
        draw(rows, epsilons, worst, options.plot)
    if options.json:
        command = " ".join(["python -m experiments.flamby_heart", *(sys.argv[1:] if argv is None else argv)])
        result: dict[str, Any] = {"command": command, "counted_again": counts, "scores": rows, "published": PUBLISHED}
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
