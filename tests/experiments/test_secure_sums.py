"""The experiments on secure sums run, on plans of equal ε or of equal noise, and print what they measured."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import joint_training, secure_sums
from fedinfer.privacy import DistributedPlan, os_noise
from fedinfer.settings import RunConfig


def test_joint_training_compares_ways_of_one_epsilon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    joint_training.main(["--quick", "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")])
    rows = {row["method"]: row for row in json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))}
    assert list(rows) == ["pooled", "joint", "joint, 1 of 4 colluding", "each its own"]
    assert all(0.8 < auc < 1.0 for row in rows.values() for auc in row["aucs"])
    noise = {name: row["noise_multiplier"] for name, row in rows.items()}
    assert noise["pooled"] == noise["each its own"]
    assert noise["pooled"] < noise["joint"] < 1.01 * noise["pooled"]
    assert (tmp_path / "a.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "| heart disease | 2 |" in printed
    assert printed.count("±") == 3


def test_the_ways_have_one_epsilon_and_noise_as_they_say() -> None:
    table, stream, error = joint_training.heart(), os_noise(), {}
    rows = np.column_stack([table.x, table.y])
    held = [rows[table.sites == site] for site in range(joint_training.HOSPITALS)]
    for method in joint_training.methods(table, 2.0):
        assert 1.9998 < method.plan.epsilon() <= 2.0
        # With gradients of nothing what is left is the noise.
        means = [method.mean(step, held, lambda part, clip: np.zeros(36), stream) for step in range(100)]
        error[method.name] = float(np.std(means)) / method.plan.noise_multiplier
    whole = 1.0 / (RunConfig.sampling_rate * 4 * RunConfig.examples_per_client)
    factors = {"pooled": 1.0, "joint": 1.0, joint_training.COLLUDING: (4 / 3) ** 0.5, "each its own": 2.0}
    for name, factor in factors.items():
        assert error[name] == pytest.approx(factor * whole, rel=6.2 / (2 * 3600) ** 0.5)


def test_splits_hold_each_row_once_and_every_hospital_in_quarters() -> None:
    table = joint_training.breast()
    seen = np.zeros(len(table.y), int)
    for inside, outside in joint_training.splits(table, [0]):
        assert not set(inside) & set(outside)
        assert len(inside) + len(outside) == len(table.y)
        seen[outside] += 1
        assert np.bincount(table.sites[outside], minlength=4) == pytest.approx(len(table.y) / 16, abs=2)
    assert (seen == 1).all()


def test_secure_sums_compare_bits_with_central_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secure_sums.main(["--quick", "--json", str(tmp_path / "a.json")])
    central, sums = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert (central["bits"], sums["bits"]) == (None, 16)
    assert 0.8 < central["accuracies"][0] < 1.0
    assert abs(central["accuracies"][0] - sums["accuracies"][0]) < 0.04
    assert central["epsilon"] <= 3.0 < sums["epsilon"] < 3.2
    assert 0.0 < sums["more_noise"] < 0.05
    assert "minus central" in capsys.readouterr().out


def test_a_client_round_of_secure_sums_has_the_central_noise() -> None:
    central = secure_sums.central_plan("digits", "client")
    plan = secure_sums.distributed_plan(central, bits=18, dimension=650, clients=50)
    assert isinstance(plan, DistributedPlan)
    stream, parts = os_noise(), [np.zeros(650)] * 50
    for one in (central, plan):
        drawn = [secure_sums.released(one, parts, step, stream) for step in range(8)]
        expected = central.noise_multiplier * central.clip_norm / central.divisor
        assert np.std(drawn) == pytest.approx(expected, rel=6.2 / (2 * 5200) ** 0.5)
