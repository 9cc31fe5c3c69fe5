"""How the defaults of `RunConfig` were fixed: on stand-ins for the demo's data, never on the heart-disease table.

Stand-ins: synthetic tables of four clients of the same shape (six numbers, seven categories, missing values, label
shift, class-conditional Gaussian copulas) and scikit-learn's breast-cancer table cut in four. Their overall
difficulty was set once from published AUCs. The settings were first picked by hand from finer grids of this kind; the
grid below reproduces the pick.

    python -m experiments.choose_settings [--quick] [--json FILE]
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import norm

from fedinfer.inference import unsafe_auc
from fedinfer.privacy import Poisson, PrivacyPlan
from fedinfer.settings import RunConfig

Floats = NDArray[np.float64]
Rows = tuple[Floats, Floats]
EPSILONS = (8.0, 4.0, 2.0, 1.0)
TRAIN_ROWS = (230, 220, 90, 150)
POSITIVE = (0.46, 0.36, 0.94, 0.75)
LEVELS = (2, 4, 2, 3, 2, 3, 3)
MISSING = np.array(
    [
        [0, 0, 0, 0, 0, 0.02, 0, 0, 0, 0, 0, 0, 0.01],
        [0, 0, 0.08, 0, 0, 0.98, 0, 0, 0.03, 0, 0, 0.65, 0.9],
        [0, 0.02, 1.0, 0, 0.05, 0.96, 0, 0, 0.6, 0, 0, 0.14, 0.42],
        [0, 0.28, 0.28, 0.26, 0.28, 0.99, 0, 0, 0.03, 0, 0.26, 0.51, 0.83],
    ]
)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One setting of the private run."""

    learning_rate: float
    momentum: float
    clip_norm: float
    sampling_rate: float = 0.5
    rounds: int = 40


def synthetic(seed: int) -> tuple[list[Rows], list[Rows]]:
    """Train and test rows of four clients of one random task."""
    rng = np.random.default_rng(seed)
    strength = rng.choice([-1, 1], 13) * rng.gamma(2.0, 0.26, 13)
    loadings = rng.normal(size=(13, 3)) * 0.35
    cuts = [np.sort(norm.ppf(rng.dirichlet(np.full(k, 4)).cumsum()[:-1])) for k in LEVELS]
    parts: tuple[list[Rows], list[Rows]] = ([], [])
    for client, (rows, positive) in enumerate(zip(TRAIN_ROWS, POSITIVE, strict=True)):
        local = strength * (1, 1, 0.6, 0.6)[client] + rng.normal(size=13) * 0.1
        shift = rng.normal(size=13) * 0.25
        for part, count in zip(parts, (rows, 4 * rows), strict=True):
            labels = (rng.random(count) < positive).astype(np.float64)
            latent = rng.normal(size=(count, 3)) @ loadings.T + rng.normal(size=(count, 13)) * 0.8
            latent += (labels[:, None] - 0.5) * local + shift
            gone = rng.random((count, 13)) < MISSING[client]
            columns = [np.where(gone[:, j], 0.0, np.clip(latent[:, j] / 3, -1, 1)) for j in range(6)]
            for j, (levels, cut) in enumerate(zip(LEVELS, cuts, strict=True), 6):
                value = np.searchsorted(cut, latent[:, j])
                columns += [(~gone[:, j] & (value == level)).astype(np.float64) for level in range(levels)]
            columns += [gone[:, j].astype(np.float64) for j in range(1, 13)]
            part.append((np.stack(columns, axis=1), labels))
    return parts


def breast_cancer(seed: int) -> tuple[list[Rows], list[Rows]]:
    """The table cut in four clients, a quarter of the rows held out."""
    from sklearn.datasets import load_breast_cancer

    table = load_breast_cancer()
    low, high = table.data.min(0), table.data.max(0)
    features, labels = (2 * table.data - low - high) / (high - low), 1.0 - table.target
    order = np.random.default_rng(seed).permutation(len(labels))
    test, train = order[:142], order[142:]
    return [(features[i], labels[i]) for i in np.array_split(train, 4)], [(features[test], labels[test])]


def train(clients: Sequence[Rows], candidate: Candidate, epsilon: float, seed: int) -> Floats:
    """Weights (d + 1,) of one private run; each client adds all its own noise."""
    rng = np.random.default_rng(seed)
    divisor = candidate.sampling_rate * RunConfig.examples_per_client
    plan = PrivacyPlan.calibrate(
        epsilon=epsilon,
        delta=1e-5,
        steps=candidate.rounds,
        sampler=Poisson(rate=candidate.sampling_rate),
        clip_norm=candidate.clip_norm,
        divisor=divisor,
    )
    x = np.concatenate([np.c_[features, np.ones(len(features))] for features, _ in clients])
    y = np.concatenate([labels for _, labels in clients])
    norms = np.linalg.norm(x, axis=1)
    weights, velocity = np.zeros((2, x.shape[1]))
    noise = plan.noise_multiplier * plan.clip_norm * np.sqrt(len(clients))
    for _ in range(candidate.rounds):
        error = expit(x @ weights) - y
        error *= np.minimum(1.0, plan.clip_norm / np.maximum(np.abs(error) * norms, 1e-12))
        error *= rng.random(len(y)) < plan.sampling_rate
        gradient = (error @ x + rng.normal(size=len(weights)) * noise) / (len(clients) * divisor)
        velocity = candidate.momentum * velocity + gradient
        weights = weights - candidate.learning_rate * velocity
    return np.asarray(weights, np.float64)


def score(tasks: Sequence[tuple[list[Rows], list[Rows]]], candidate: Candidate) -> float:
    """Mean over tasks and ε of half the pooled AUC and half the clients' mean AUC."""
    values = []
    for number, (clients, tests) in enumerate(tasks):
        for epsilon in EPSILONS:
            weights = train(clients, candidate, epsilon, seed=number)
            pooled = tuple(np.concatenate(part) for part in zip(*tests, strict=True))
            aucs = [unsafe_auc(labels, features @ weights[:-1]) for features, labels in [pooled, *tests]]
            known = [auc for auc in aucs if auc is not None]
            values.append((known[0] + float(np.mean(known[1:]))) / 2)
    return float(np.mean(values))


def main(argv: Sequence[str] | None = None) -> None:
    """Print the grid, best first, and where the defaults stand in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four tasks and nine candidates")
    parser.add_argument("--json", type=Path, help="write the grid here")
    options = parser.parse_args(argv)
    tasks = [synthetic(seed) for seed in range(3 if options.quick else 16)]
    tasks += [breast_cancer(seed) for seed in range(1 if options.quick else 4)]
    defaults = RunConfig()
    default = Candidate(
        learning_rate=defaults.learning_rate,
        momentum=defaults.momentum,
        clip_norm=defaults.clip_norm,
        sampling_rate=defaults.sampling_rate,
        rounds=defaults.rounds,
    )
    grid = [
        Candidate(learning_rate=rate, momentum=momentum, clip_norm=clip)
        for momentum, rates in ((0.0, (1.0, 2.5, 5.0)), (0.8, (0.2, 0.5, 1.0)), (0.9, (0.1, 0.25, 0.5)))
        for rate in rates
        for clip in ((1.0,) if options.quick else (0.5, 1.0, 2.0))
    ]
    if not options.quick:
        grid += [replace(default, sampling_rate=rate) for rate in (0.25, 1.0)]
        grid += [replace(default, rounds=rounds) for rounds in (30, 60)]
    results = sorted(((score(tasks, candidate), candidate) for candidate in grid), key=lambda pair: -pair[0])
    print(f"{'score':>6}  {'lr':>5} {'momentum':>8} {'clip':>5} {'q':>5} {'rounds':>6}")
    for value, c in results:
        mark = "  <- the defaults" if c == default else ""
        shape = f"{c.learning_rate:5g} {c.momentum:8g} {c.clip_norm:5g} {c.sampling_rate:5g} {c.rounds:6d}"
        print(f"{value:6.4f}  {shape}{mark}")
    if options.json:
        rows: list[dict[str, Any]] = [{"score": value, **vars(c), "default": c == default} for value, c in results]
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
