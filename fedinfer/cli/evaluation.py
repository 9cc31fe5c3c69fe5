"""The demo's table: an evaluation on public data, through the same server and device code as a deployment.

Five seeds cut each hospital into four stratified quarters; each quarter is the test once: twenty splits. Scratch
ledgers, `public-data` devices, raw metrics under `unsafe_` names. The noise is real and not seeded.

Intervals of a mean over splits that share training rows use the corrected resampled variance (Nadeau and Bengio 2003,
doi:10.1023/A:1024068626366): the plain standard error over twenty splits would be too small.
"""

import csv
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import t as student_t

from fedinfer.arrays import unflatten
from fedinfer.cli.federation import Node
from fedinfer.cli.parts import part
from fedinfer.data import Row, Table, encode, heart_rows, heart_schema, stratified_quarters
from fedinfer.inference import unsafe_accuracy, unsafe_auc
from fedinfer.models import build
from fedinfer.settings import RunConfig
from fedinfer.simulation import run_in_process

Floats = NDArray[np.float64]
ALL = "All"
NOTE = (
    "An evaluation on public data: scratch ledgers, raw metrics on held-out rows. A deployment may not see these "
    "numbers without paying for them."
)
# AUC over all hospitals of the published recipe (each hospital adds all its own noise) on the twenty splits of these
# seeds, with the step size that suits it best: `python -m experiments.heart_baselines` measures it.
RECIPE_SEEDS = [0, 1, 2, 3, 4]
RECIPE_AUC = {8.0: 0.904, 4.0: 0.901, 2.0: 0.896, 1.0: 0.883}
TEST_SHARE = 1.0 / 4.0
CURVE_POINTS = 20


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table: `alone` and `pooled` are federations of one device."""

    key: str
    label: str
    epsilon: float | None = None


@dataclass(frozen=True, kw_only=True)
class Split:
    """One division of every hospital: training files on disk, test rows in memory."""

    seed: int
    train: Mapping[str, Path]
    pooled: Path
    test: Mapping[str, Table] = field(repr=False)


def methods(epsilons: Sequence[float]) -> list[Method]:
    """The rows of the table, in order."""
    private = [Method(key=f"dp{e:g}", label=f"federated, ε = {e:g}", epsilon=e) for e in epsilons]
    return [
        Method(key="alone", label="alone, no privacy"),
        Method(key="federated", label="federated, no privacy"),
        *private,
        Method(key="pooled", label="pooled, no privacy"),
    ]


def splits(seeds: Sequence[int], folder: Path) -> Iterator[Split]:
    """Write the training rows of each split below `folder` and encode its test rows."""
    schema = heart_schema()
    hospitals = heart_rows()
    for seed in seeds:
        quarters = {
            name: list(stratified_quarters([int(row["num"] != "0") for row in rows], seed=seed))
            for name, rows in hospitals.items()
        }
        for quarter in range(4):
            place = folder / f"{seed}-{quarter}"
            train, test, pooled = {}, {}, []
            for name, rows in hospitals.items():
                inside, outside = quarters[name][quarter]
                train[name] = write_rows(place / f"{name}.csv", [rows[i] for i in inside])
                test[name] = encode([rows[i] for i in outside], schema, with_target=True)
                pooled += [rows[i] for i in inside]
            yield Split(seed=seed, train=train, pooled=write_rows(place / "pooled.csv", pooled), test=test)


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    """Write rows as CSV with a header; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


class Evaluation:
    """Scores of every method on every split, and the table made from them."""

    def __init__(self, *, seeds: Sequence[int], epsilons: Sequence[float], rounds: int) -> None:
        self._seeds = list(seeds)
        self._rounds = rounds
        self.methods = methods(epsilons)
        self.sites = [*heart_rows(), ALL]
        self._auc: dict[tuple[str, str], list[float | None]] = {}
        self._accuracy: dict[tuple[str, str], list[float]] = {}
        self._curves: dict[str, list[list[float]]] = {}
        self.steps = len(self._seeds) * 4 * len(self.methods)
        self._curve_rounds = sorted({round(r) for r in np.linspace(0, rounds, min(CURVE_POINTS, rounds) + 1)})
        self._net = build(RunConfig().spec)

    def run(self, advance: Callable[[], None]) -> None:
        """Train and score every method on every split; `advance` is called after each."""
        with tempfile.TemporaryDirectory(prefix="fedinfer-evaluation-") as folder:
            for split in splits(self._seeds, Path(folder)):
                for method in self.methods:
                    self._score(method, split)
                    advance()

    def _score(self, method: Method, split: Split) -> None:
        sites = list(split.test)
        if method.key == "alone":
            models = {name: self._train(method, [split.train[name]])[-1] for name in sites}
        else:
            files = [split.pooled] if method.key == "pooled" else list(split.train.values())
            trajectory = self._train(method, files)
            models = dict.fromkeys(sites, trajectory[-1])
            self._curves.setdefault(method.key, []).append(self._curve(trajectory, split))
        scores = {name: self._probabilities(models[name], split.test[name].features) for name in sites}
        labels = {name: split.test[name].labels for name in sites}
        scores[ALL] = np.concatenate([scores[name] for name in sites])
        labels[ALL] = np.concatenate([labels[name] for name in sites])
        for name in self.sites:
            place = (method.key, name)
            self._auc.setdefault(place, []).append(unsafe_auc(labels[name], scores[name]))
            accuracy = unsafe_accuracy(labels[name], scores[name], threshold=0.5)
            self._accuracy.setdefault(place, []).append(accuracy)

    def _train(self, method: Method, files: Sequence[Path]) -> NDArray[np.float32]:
        config = self._config(method, devices=len(files))
        nodes: list[Node] = [{"data": str(path), "schema": config.schema, "public-data": True} for path in files]
        context = run_in_process(
            part("server.app").app, part("clients.app").app, nodes=nodes, run_config=config.to_flat()
        )
        (trajectory,) = context.state.array_records["trajectory"].to_numpy_ndarrays()
        return np.asarray(trajectory, np.float32)

    def _config(self, method: Method, *, devices: int) -> RunConfig:
        config = RunConfig(rounds=self._rounds, min_devices=devices, keep_trajectory=True)
        if method.epsilon is None:
            return replace(config, unsafe_no_privacy=True)
        return replace(config, epsilon=method.epsilon)

    def _probabilities(self, weights: NDArray[np.float32], features: NDArray[np.float32]) -> Floats:
        self._net.load_state_dict(unflatten(weights, self._net.state_dict()))
        with torch.inference_mode():
            return np.asarray(expit(self._net(torch.from_numpy(features))[:, 0].numpy()), np.float64)

    def _curve(self, trajectory: NDArray[np.float32], split: Split) -> list[float]:
        labels = np.concatenate([table.labels for table in split.test.values()])
        features = np.concatenate([table.features for table in split.test.values()])
        points = [unsafe_auc(labels, self._probabilities(trajectory[r], features)) for r in self._curve_rounds]
        return [math.nan if point is None else point for point in points]

    def aucs(self, method: str, site: str) -> list[float]:
        """The AUC of each split, NaN where a split's test rows are of one class."""
        return [math.nan if auc is None else auc for auc in self._auc[method, site]]

    def to_json(self) -> dict[str, Any]:
        """The table, the paired differences and the curves, as the report takes them."""
        return {
            "note": NOTE,
            "splits": len(self._seeds) * 4,
            "seeds": len(self._seeds),
            "sites": self.sites,
            "methods": [{"key": m.key, "label": m.label, "epsilon": m.epsilon} for m in self.methods],
            "cells": [self._cell(method.key, site) for method in self.methods for site in self.sites],
            "paired": [
                self._paired(method.key, "alone", site)
                for method in self.methods
                for site in self.sites
                if method.key != "alone"
            ],
            "curves": [self._curve_json(m) for m in self.methods if m.key in self._curves],
            "baselines": [
                {"label": f"another recipe with noise from each hospital, ε = {e:g}", "epsilon": e, "unsafe_auc": auc}
                for e, auc in RECIPE_AUC.items()
                # On other rows than ours it would compare nothing.
                if self._seeds == RECIPE_SEEDS
            ],
        }

    def _cell(self, method: str, site: str) -> dict[str, Any]:
        auc = np.array(self.aucs(method, site))
        accuracy = np.array(self._accuracy[method, site])
        mean, half = float(auc.mean()), half_width(auc)
        by_seed = auc.reshape(len(self._seeds), 4).mean(1)
        return {
            "method": method,
            "site": site,
            "unsafe_auc_mean": mean,
            "unsafe_auc_std": float(auc.std(ddof=1)),
            "unsafe_auc_seed_std": float(by_seed.std(ddof=1)) if len(by_seed) > 1 else 0.0,
            "unsafe_auc_low": max(0.0, mean - half),
            "unsafe_auc_high": min(1.0, mean + half),
            "unsafe_accuracy_mean": float(accuracy.mean()),
            "unsafe_accuracy_std": float(accuracy.std(ddof=1)),
        }

    def _paired(self, method: str, against: str, site: str) -> dict[str, Any]:
        difference = np.array(self.aucs(method, site)) - np.array(self.aucs(against, site))
        mean, half = float(difference.mean()), half_width(difference)
        return {
            "site": site,
            "method": method,
            "against": against,
            "difference": mean,
            "standard_error": float(difference.std(ddof=1) / math.sqrt(len(difference))),
            "low": mean - half,
            "high": mean + half,
        }

    def _curve_json(self, method: Method) -> dict[str, Any]:
        curves = np.array(self._curves[method.key])
        return {
            "method": method.key,
            "label": method.label,
            "rounds": self._curve_rounds,
            "unsafe_auc_mean": curves.mean(0).tolist(),
            "unsafe_auc_std": curves.std(0, ddof=1).tolist(),
        }


def half_width(values: Floats) -> float:
    """Half of the corrected resampled 95 % interval of the mean of `values`, one for each split."""
    count = len(values)
    variance = float(values.var(ddof=1)) * (1.0 / count + TEST_SHARE / (1.0 - TEST_SHARE))
    return float(student_t.ppf(0.975, count - 1)) * math.sqrt(variance)
