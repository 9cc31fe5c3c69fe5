"""The published recipe for the heart-disease table, re-run on the very splits of the demo's evaluation.

Recipe: public ranges, one-hot, rows of unit norm, logistic regression, 60 full-batch DP-GD steps with exact Gaussian
accounting (Dong et al. 2022, arXiv:1905.02383), δ = 1e-5; alone, pooled, one shared noise ("central"), and each
hospital adding all its own noise ("local"). Its step size is not published: the best of a few on these test rows is
taken, which favours the recipe.

    python -m experiments.heart_baselines [--quick] [--json FILE]
"""

import argparse
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import norm

from fedinfer.cli.evaluation import ALL, Evaluation, half_width
from fedinfer.cli.methods import Method, splits
from fedinfer.data import Table, heart_schema, read_table
from fedinfer.inference import unsafe_auc
from fedinfer.settings import RunConfig

Floats = NDArray[np.float64]
DELTA, STEPS, CLIP = 1e-5, 60, 1.0
LEARNING_RATES = (1.0, 2.0, 4.0, 8.0)
EPSILONS = (8.0, 4.0, 2.0, 1.0)
Tables = Mapping[str, Table]


def gaussian_noise(epsilon: float) -> float:
    """The noise multiplier of 60 full-batch steps: μ-GDP with μ = sqrt(60) / z, exactly (ε, δ)."""

    def excess(mu: float) -> float:
        return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)) - DELTA

    return math.sqrt(STEPS) / float(brentq(excess, 1e-3, 50.0))


def prepared(table: Table) -> Floats:
    """Rows of unit norm and a constant."""
    x = table.features.astype(np.float64)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    return np.concatenate([unit, np.ones((len(x), 1))], axis=1)


def descend(tables: Sequence[Table], rate: float, noise: float, rng: np.random.Generator) -> Floats:
    """60 steps of gradient descent on the rows of all tables, with noise of that deviation on the sum."""
    x = np.concatenate([prepared(table) for table in tables])
    y = np.concatenate([table.labels for table in tables])
    norms = np.linalg.norm(x, axis=1)
    weights = np.zeros(x.shape[1])
    for _ in range(STEPS):
        error = expit(x @ weights) - y
        if noise:
            error *= np.minimum(1.0, CLIP / np.maximum(np.abs(error) * norms, 1e-12))
        weights -= rate * (error @ x + noise * rng.normal(size=len(weights))) / len(y)
    return weights


def recipe_aucs(
    seeds: Sequence[int], repeats: int, rate: float, epsilons: Sequence[float]
) -> dict[str, dict[str, list[float]]]:
    """AUC by method and site, one value a split (the mean over noise seeds)."""
    schema = heart_schema()
    results: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="fedinfer-baselines-") as folder:
        for number, split in enumerate(splits(seeds, Path(folder))):
            train = {name: read_table(path, schema) for name, path in split.train.items()}
            everyone = list(train.values())
            runs: dict[str, list[dict[str, Floats]]] = {
                "alone": [{name: descend([t], rate, 0.0, np.random.default_rng()) for name, t in train.items()}],
                "pooled": [dict.fromkeys(train, descend(everyone, rate, 0.0, np.random.default_rng()))],
            }
            for epsilon in epsilons:
                sigma = gaussian_noise(epsilon) * CLIP
                for kind, scale in (("central", 1.0), ("local", math.sqrt(len(train)))):
                    generators = [np.random.default_rng([number, repeat]) for repeat in range(repeats)]
                    runs[f"{kind} ε = {epsilon:g}"] = [
                        dict.fromkeys(train, descend(everyone, rate, sigma * scale, rng)) for rng in generators
                    ]
            for method, models in runs.items():
                for site, auc in mean_aucs(models, split.test).items():
                    results.setdefault(method, {}).setdefault(site, []).append(auc)
    return results


def mean_aucs(models: Sequence[Mapping[str, Floats]], test: Tables) -> dict[str, float]:
    """AUC by site, the mean over models; the last site is all rows together."""
    sums = dict.fromkeys([*test, ALL], 0.0)
    for model in models:
        scores = {name: prepared(table) @ model[name] for name, table in test.items()}
        labels = {name: table.labels for name, table in test.items()}
        scores[ALL], labels[ALL] = np.concatenate(list(scores.values())), np.concatenate(list(labels.values()))
        for site in sums:
            auc = unsafe_auc(labels[site], scores[site])
            sums[site] += math.nan if auc is None else auc
    return {site: total / len(models) for site, total in sums.items()}


def best_recipe(seeds: Sequence[int], repeats: int, epsilons: Sequence[float]) -> dict[str, dict[str, list[float]]]:
    """For each method the step size with the best AUC over all hospitals."""
    tried = [recipe_aucs(seeds, repeats, rate, epsilons) for rate in LEARNING_RATES]
    return {
        method: max((results[method] for results in tried), key=lambda sites: float(np.mean(sites[ALL])))
        for method in tried[0]
    }


def compare(method: str, key: str, site: str, mine: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """fedinfer's method `key` minus the recipe's `method`, split by split."""
    difference = np.array(mine) - np.array(theirs)
    mean, half = float(difference.mean()), half_width(difference)
    return {
        "recipe": method,
        "fedinfer": key,
        "site": site,
        "recipe_auc": float(np.mean(theirs)),
        "fedinfer_auc": float(np.mean(mine)),
        "difference": mean,
        "standard_error": float(difference.std(ddof=1) / math.sqrt(len(difference))),
        "low": mean - half,
        "high": mean + half,
    }


def _cell(row: Mapping[str, Any]) -> str:
    return f"{row['fedinfer_auc']:.3f} ({row['difference']:+.3f}±{row['standard_error']:.3f})"


def _interval(row: Mapping[str, Any]) -> str:
    return f"{row['difference']:+.3f} ({row['low']:+.3f}, {row['high']:+.3f})".replace("0.", ".")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the recipe and fedinfer side by side, with paired differences on the same splits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, one noise draw, ε = 2 only")
    parser.add_argument("--json", type=Path, help="write the table here")
    options = parser.parse_args(argv)
    # Steps of a millisecond are slower on two threads than on one.
    torch.set_num_threads(1)
    seeds = range(1 if options.quick else 5)
    epsilons = (2.0,) if options.quick else EPSILONS
    recipe = best_recipe(seeds, 1 if options.quick else 5, epsilons)
    methods = [Method(way="alone"), Method(way="together"), *(Method(way="apart", epsilon=e) for e in epsilons)]
    ours = Evaluation(seeds=seeds, methods=methods, rounds=RunConfig.rounds)
    ours.run(lambda: None)
    pairs = [("alone", "alone"), ("alone", "together"), ("pooled", "together")]
    pairs += [(f"local ε = {e:g}", f"apart{e:g}") for e in epsilons]
    sites = ours.sites
    print(f"{'AUC':24}" + "".join(f"{site:>22}" for site in sites))
    rows: list[dict[str, Any]] = []
    for method, values in recipe.items():
        print(f"{'recipe: ' + method:24}" + "".join(f"{np.mean(values[site]):22.3f}" for site in sites))
        for key in (key for name, key in pairs if name == method):
            compared = [compare(method, key, site, ours.aucs(key, site), values[site]) for site in sites]
            rows += compared
            print(f"{'fedinfer: ' + key:24}" + "".join(f"{_cell(row):>22}" for row in compared))
    gains = [
        ("fedinfer", [ours.aucs("alone", site) for site in sites]),
        ("the recipe", [recipe["alone"][s] for s in sites]),
    ]
    print("training together, no privacy: fedinfer minus a hospital alone, with the 95 % interval of the difference")
    for name, alone in gains:
        compared = [
            compare("alone", "together", site, ours.aucs("together", site), values)
            for site, values in zip(sites, alone, strict=True)
        ]
        print(f"{'alone by ' + name:24}" + "".join(f"{_interval(row):>22}" for row in compared))
    print("in brackets: fedinfer minus recipe on the same splits, ± the paired standard error over splits")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
