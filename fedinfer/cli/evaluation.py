"""The demo's table: an evaluation on public data, through the same server and device code as a deployment.

Five seeds cut each hospital into four stratified quarters; each quarter is the test once: twenty splits. `methods.py`
says what is trained on them. Raw metrics are under `unsafe_` names.

Intervals of a mean over splits that share training rows use the corrected resampled variance (Nadeau and Bengio 2003,
doi:10.1023/A:1024068626366): the plain standard error over twenty splits would be too small.
"""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import t as student_t

from fedinfer.arrays import unflatten
from fedinfer.cli.methods import NAMES, PRIVATE, Method, Sums, Trained, splits, train
from fedinfer.cli.workers import without_interrupts, workers
from fedinfer.data import Table, heart_rows
from fedinfer.inference import unsafe_accuracy, unsafe_auc
from fedinfer.models import build
from fedinfer.settings import RunConfig

Floats = NDArray[np.float64]
ALL = "All"
NOTE = (
    "An evaluation on public data: scratch ledgers, raw metrics on held-out rows. A deployment may not see these "
    "numbers without paying for them. One machine played the server and every hospital."
)
# Against whom the ε of a way holds, for each patient.
APART_AGAINST = "the server and all other hospitals together: what each hospital sends has noise enough of its own"
POOLED_AGAINST = "whoever sees what the one party releases; that party holds all rows and is trusted with them"
# AUC over all hospitals of the published recipe (each hospital adds all its own noise) on the twenty splits of these
# seeds, with the step size that suits it best: `python -m experiments.heart_baselines` measures it.
RECIPE_SEEDS = [0, 1, 2, 3, 4]
RECIPE_AUC = {8.0: 0.904, 4.0: 0.901, 2.0: 0.896, 1.0: 0.883}
TEST_SHARE = 1.0 / 4.0
CURVE_POINTS = 20


class Evaluation:
    """Scores of every method on every split, and the table made from them."""

    def __init__(self, *, seeds: Sequence[int], methods: Sequence[Method], rounds: int) -> None:
        self._seeds = list(seeds)
        self._rounds = rounds
        self.methods = list(methods)
        self.sites = [*heart_rows(), ALL]
        self._splits = 4 * len(self._seeds)
        self._auc = {(m.key, site): np.full(self._splits, np.nan) for m in self.methods for site in self.sites}
        self._accuracy = {place: scores.copy() for place, scores in self._auc.items()}
        self._curve_rounds = sorted({round(r) for r in np.linspace(0, rounds, min(CURVE_POINTS, rounds) + 1)})
        shape = (self._splits, len(self._curve_rounds))
        self._curves = {m.key: np.full(shape, np.nan) for m in self.methods if m.way != "alone"}
        self._sums: Sums | None = None
        self._net = build(RunConfig().spec)
        self.steps = self._splits * len(self.methods)

    def run(self, advance: Callable[[], None]) -> None:
        """Train and score every method on every split, on all cores; `advance` is called after each."""
        with tempfile.TemporaryDirectory(prefix="fedinfer-evaluation-") as folder, workers() as pool:
            cuts = list(splits(self._seeds, Path(folder)))
            with without_interrupts():
                jobs = {
                    pool.submit(train, method, method.federations(cut), self._rounds): (method, number)
                    for number, cut in enumerate(cuts)
                    for method in self.methods
                }
            for job in as_completed(jobs):
                method, number = jobs[job]
                self.score(method, number, cuts[number].test, job.result())
                advance()

    def score(self, method: Method, number: int, test: Mapping[str, Table], trained: Sequence[Trained]) -> None:
        """Note how what `method` trained on split `number` does on its test rows: one model a hospital, or one."""
        sites = list(test)
        models = [one.trajectory[-1] for one in trained] * (len(sites) // len(trained))
        scores = {
            name: self._probabilities(weights, test[name].features) for name, weights in zip(sites, models, strict=True)
        }
        labels = {name: test[name].labels for name in sites}
        scores[ALL] = np.concatenate([scores[name] for name in sites])
        labels[ALL] = np.concatenate([labels[name] for name in sites])
        for name in self.sites:
            auc = unsafe_auc(labels[name], scores[name])
            self._auc[method.key, name][number] = math.nan if auc is None else auc
            self._accuracy[method.key, name][number] = unsafe_accuracy(labels[name], scores[name], threshold=0.5)
        if method.key in self._curves:
            self._curves[method.key][number] = self._curve(trained[0].trajectory, test)
        for one in trained:
            self._count(one.sums)

    def _count(self, sums: Sums | None) -> None:
        if sums is not None and self._sums is not None:
            overshoot = max(sums.overshoot, self._sums.overshoot)
            sums = replace(sums, overshoot=overshoot, count=sums.count + self._sums.count)
        self._sums = sums or self._sums

    def _probabilities(self, weights: NDArray[np.float32], features: NDArray[np.float32]) -> Floats:
        self._net.load_state_dict(unflatten(weights, self._net.state_dict()))
        with torch.inference_mode():
            return np.asarray(expit(self._net(torch.from_numpy(features))[:, 0].numpy()), np.float64)

    def _curve(self, trajectory: NDArray[np.float32], test: Mapping[str, Table]) -> list[float]:
        labels = np.concatenate([table.labels for table in test.values()])
        features = np.concatenate([table.features for table in test.values()])
        points = [unsafe_auc(labels, self._probabilities(trajectory[r], features)) for r in self._curve_rounds]
        return [math.nan if point is None else point for point in points]

    def aucs(self, method: str, site: str) -> list[float]:
        """The AUC of each split, NaN where a split's test rows are of one class."""
        return self._auc[method, site].tolist()

    def to_json(self) -> dict[str, Any]:
        """The table, the paired differences and the curves, as the report takes them."""
        return {
            "note": NOTE,
            "splits": self._splits,
            "seeds": len(self._seeds),
            "sites": self.sites,
            "secure_sums": None if self._sums is None else asdict(self._sums),
            "against": self._against(),
            "methods": [{"key": m.key, "label": m.label, "way": m.way, "epsilon": m.epsilon} for m in self.methods],
            "cells": [self._cell(method.key, site) for method in self.methods for site in self.sites],
            "paired": [self._paired(*pair, site) for pair in self._pairs() for site in self.sites],
            "curves": [self._curve_json(m) for m in self.methods if m.key in self._curves],
            "baselines": [
                {"label": f"another recipe with noise from each hospital, ε = {e:g}", "epsilon": e, "unsafe_auc": auc}
                for e, auc in RECIPE_AUC.items()
                # On other rows than ours it would compare nothing.
                if self._seeds == RECIPE_SEEDS
            ],
        }

    def _against(self) -> list[dict[str, str]]:
        """Against whom an ε holds, for each way to it in the table."""
        texts = {"apart": APART_AGAINST, "pooled": POOLED_AGAINST}
        if self._sums is not None:
            sums = self._sums
            texts["together"] = (
                f"the server, which sees every sum, with {sums.colluders} of the {sums.members} hospitals: the noise "
                f"of {sums.min_honest} is counted on, and a sum had at most {sums.overshoot:.2f} times its variance"
            )
        ways = {method.way for method in self.methods if method.epsilon is not None}
        return [
            {"way": way, "label": NAMES[way], "text": texts[way]} for way in PRIVATE if way in ways and way in texts
        ]

    def _pairs(self) -> list[tuple[str, str]]:
        """What is compared split by split: all with alone, and together with the other ways at the same ε."""
        keys = {method.key for method in self.methods}
        alone = [(m.key, "alone") for m in self.methods if m.way != "alone" and "alone" in keys]
        private = [m for m in self.methods if m.way == "together" and m.epsilon is not None]
        others = [replace(m, way=way) for way in PRIVATE[1:] for m in private]
        same = [(replace(other, way="together").key, other.key) for other in others if other.key in keys]
        return alone + same

    def _cell(self, method: str, site: str) -> dict[str, Any]:
        auc, accuracy = self._auc[method, site], self._accuracy[method, site]
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
        difference = self._auc[method, site] - self._auc[against, site]
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
        curves = self._curves[method.key]
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
