"""Attacks on the promise of training: each succeeds on a naive version and fails on ours."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import beta

from clients.sdk import Device
from fedinfer.arrays import flatten
from fedinfer.data import Table, heart_schema
from fedinfer.errors import BudgetExceeded, LedgerError
from fedinfer.models import ModelSpec, build
from fedinfer.privacy import Poisson, PrivacyLedger, PrivacyPlan, insecure_seeded_noise
from fedinfer.training import StepTask, logistic_loss, private_step

INPUTS = 5
SPEC = ModelSpec(family="logistic", inputs=INPUTS)
PLAN = PrivacyPlan.calibrate(epsilon=1.0, delta=1e-5, steps=1, sampler=Poisson(rate=1.0), clip_norm=1.0, divisor=1.0)
TRIALS = 4000
NET = build(SPEC)
Release = Callable[[Table, np.ndarray, int], np.ndarray]


def tables() -> tuple[Table, Table]:
    """Neighbours: nine ordinary rows, with and without one whose gradient is far too long."""
    rng = np.random.default_rng(0)
    features = rng.uniform(-1, 1, (9, INPUTS)).astype(np.float32)
    labels = np.tile([0.0, 1.0], 5)[:9].astype(np.float32)
    outlier = np.full((1, INPUTS), 30.0, np.float32)
    return (
        Table(features=features, labels=labels),
        Table(features=np.concatenate([features, outlier]), labels=np.append(labels, np.float32(1.0))),
    )


def ours(table: Table, weights: np.ndarray, trial: int) -> np.ndarray:
    task = StepTask(run="game", round=1, spec=SPEC, schema_digest="", weights=weights, plan=PLAN)
    return private_step(task, NET, table, insecure_seeded_noise(f"{len(table)}/{trial}")).gradient


def plain_sum(table: Table) -> np.ndarray:
    net = build(SPEC)
    losses = logistic_loss(net(torch.from_numpy(table.features)), torch.from_numpy(table.labels))
    gradients = torch.autograd.grad(losses.sum(), list(net.parameters()))
    return flatten(dict(enumerate(gradients)))  # type: ignore[arg-type]


def quarter_of_the_noise(table: Table, weights: np.ndarray, trial: int) -> np.ndarray:
    mutant = replace(PLAN, noise_multiplier=PLAN.noise_multiplier / 4)
    task = StepTask(run="game", round=1, spec=SPEC, schema_digest="", weights=weights, plan=mutant)
    return private_step(task, NET, table, insecure_seeded_noise(f"{len(table)}/{trial}")).gradient


def no_clip(table: Table, weights: np.ndarray, trial: int) -> np.ndarray:
    return PLAN.release(plain_sum(table), insecure_seeded_noise(f"{len(table)}/{trial}"))


def no_noise(table: Table, weights: np.ndarray, trial: int) -> np.ndarray:
    return plain_sum(table)


def proven_epsilon(release: Release, trials: int) -> float:
    """A lower bound on ε, right with 99.9 % probability, from a distinguishing game with 2 x `trials` releases.

    The adversary projects on the known direction of the outlier's gradient. Half of the releases choose the
    threshold, the other half are counted (Clopper-Pearson).
    """
    without, with_outlier = tables()
    weights = np.zeros(INPUTS + 1, np.float32)
    direction = -np.ones(INPUTS + 1) / math.sqrt(INPUTS + 1)
    scores = [
        np.array([release(table, weights, trial) @ direction for trial in range(trials)])
        for table in (without, with_outlier)
    ]
    train, test = [s[::2] for s in scores], [s[1::2] for s in scores]
    thresholds = np.quantile(np.concatenate(train), np.linspace(0.02, 0.98, 97))

    def bound(parts: list[np.ndarray], threshold: float) -> float:
        count = len(parts[0])
        hits, alarms = int((parts[1] > threshold).sum()), int((parts[0] > threshold).sum())
        power = float(beta.ppf(5e-4, hits, count - hits + 1)) if hits else 0.0
        alarm = float(beta.ppf(1 - 5e-4, alarms + 1, count - alarms)) if alarms < count else 1.0
        return math.log(max((power - PLAN.delta) / alarm, 1e-9))

    chosen = max(thresholds, key=lambda threshold: bound(train, threshold))
    return bound(test, chosen)


def test_a_distinguishing_game_does_not_beat_the_claimed_epsilon() -> None:
    assert proven_epsilon(ours, TRIALS) <= PLAN.epsilon()


@pytest.mark.parametrize(("naive", "trials"), [(quarter_of_the_noise, TRIALS), (no_clip, 1000), (no_noise, 1000)])
def test_the_game_catches_each_mutant(naive: Release, trials: int) -> None:
    assert proven_epsilon(naive, trials) > PLAN.epsilon()


def device(path: Path, table: Table) -> Device:
    ledger = PrivacyLedger.create(path, epsilon=2.5, delta=1e-3)
    return Device(table=table, schema=heart_schema(), ledger=ledger)


def test_a_server_that_repeats_renames_or_replans_gets_no_more_than_the_budget(tmp_path: Path) -> None:
    schema = heart_schema()
    spec = ModelSpec(family="logistic", inputs=schema.width)
    table = Table(features=np.zeros((9, schema.width), np.float32), labels=np.zeros(9, np.float32))
    target = device(tmp_path / "ledger", table)
    plan = PrivacyPlan.calibrate(
        epsilon=1.0, delta=1e-5, steps=3, sampler=Poisson(rate=0.5), clip_norm=1.0, divisor=1.0
    )
    weights = np.zeros(schema.width + 1, np.float32)
    task = StepTask(run="a", round=1, spec=spec, schema_digest=schema.digest(), weights=weights, plan=plan)
    got = 0
    for run in ("a", "b", "c", "d", "e"):
        for _ in range(10):
            try:
                target.step(replace(task, run=run))
                got += 1
            except BudgetExceeded:
                break
    # A fresh accountant a run, or a round, would have given fifty.
    assert got == 2 * plan.steps
    louder = replace(plan, noise_multiplier=plan.noise_multiplier / 2)
    with pytest.raises((LedgerError, BudgetExceeded)):
        target.step(replace(task, plan=louder))
    with PrivacyLedger.open(tmp_path / "ledger") as ledger:
        assert ledger.summary().spent_epsilon <= 2.5


def test_a_poisoned_row_does_not_poison_the_sum() -> None:
    without, _ = tables()
    poisoned = Table(
        features=np.concatenate([without.features, np.full((1, INPUTS), np.nan, np.float32)]),
        labels=np.append(without.labels, np.float32(1.0)),
    )
    assert not np.isfinite(plain_sum(poisoned)).all()
    assert np.isfinite(ours(poisoned, np.zeros(INPUTS + 1, np.float32), 0)).all()


def test_noise_and_divisor_do_not_depend_on_the_number_of_rows() -> None:
    small, large = tables()
    empty = Table(features=small.features[:0], labels=small.labels[:0])
    spreads = []
    for table in (empty, small, large):
        releases = np.stack([ours(table, np.zeros(INPUTS + 1, np.float32), trial) for trial in range(500)])
        spreads.append(releases.std(0).mean())
    assert max(spreads) / min(spreads) < 1.1
