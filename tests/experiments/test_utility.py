"""The utility experiments: features made row by row, steps through plans alone, and FLamby's division."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import flamby_heart, utility
from experiments.private_training import Recipe, linear, train
from experiments.scattering import scatter
from experiments.utility_tasks import BREAST_RANGES, breast_cancer, in_ranges, quarter, synthetic_patients, wavelets
from fedinfer.errors import BadUsage


def test_a_wave_answers_to_the_wavelet_of_its_direction() -> None:
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    angles = math.pi * torch.arange(8.0)[:, None, None] / 8
    waves = torch.sin(3 * math.pi / 4 * (angles.cos() * x + angles.sin() * y))
    first = scatter(waves, scales=2)[:, 1:17].mean((2, 3))
    assert first.argmax(1).tolist() == list(range(8))


def test_scattering_of_a_constant_is_its_blur_alone() -> None:
    found = scatter(torch.full((2, 16, 24), 0.7), scales=2)
    assert found.shape == (2, 81, 4, 6)
    torch.testing.assert_close(found[:, 0], torch.full((2, 4, 6), 0.7), rtol=1e-5, atol=1e-5)
    assert float(found[:, 1:].abs().max()) < 1e-6
    with pytest.raises(BadUsage, match="divisible by 4"):
        scatter(torch.zeros(1, 30, 28), scales=2)


def test_features_of_a_row_depend_on_that_row_alone() -> None:
    images = torch.rand(6, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = wavelets(images, scales=1, groups=9)
    torch.testing.assert_close(whole[2:3], wavelets(images[2:3], scales=1, groups=9), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(6))
    low, high = in_ranges(np.array([[low for low, _, _ in BREAST_RANGES], [1e6] * 30]), BREAST_RANGES)
    assert (low == -1.0).all()
    assert (high == 1.0).all()


def test_rows_reach_the_net_through_the_plan_alone() -> None:
    task = synthetic_patients(0)
    rows, _ = quarter(task, 0)
    net = linear(task.made.shape[1], 2)
    part = (task.made[rows], task.labels[rows])
    plan = train(net, [part, part], Recipe(clip_norm=0.1, learning_rate=10.0, steps=8), examples=600, epsilon=1.0)
    assert plan.steps == 8
    assert plan.divisor == 300
    assert 0.999 < plan.epsilon() <= 1.0
    # With next to no signal, what is left is the noise: the mean of two releases a step, added up over the steps.
    none = (torch.zeros(0, task.made.shape[1]), torch.zeros(0))
    empty = linear(task.made.shape[1], 2)
    recipe = Recipe(clip_norm=0.1, learning_rate=10.0, steps=8, average=False)
    train(empty, [none, none], recipe, examples=600, epsilon=1.0)
    expected = 10.0 * math.sqrt(8 / 2) * plan.noise_multiplier * 0.1 / 300
    # The standard deviation of 46 normal numbers is off by a factor of two about once in 1e10.
    assert 0.4 < float(empty.weight.detach().std()) / expected < 2.0


def test_utility_prints_pairs_and_draws_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "rows.png")]
    utility.main(["--quick", "--tasks", "breast_cancer", *files])
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))["rows"]
    assert {(row["method"], row["epsilon"]) for row in rows} >= {("fedinfer", 1.0), ("reference", None)}
    assert all(0.5 < row["mean"] <= 1.0 and len(row["by_division"]) == 2 for row in rows)
    for row in rows:
        assert (row["minus_reference"] is None) == (row["method"] == "reference")
    assert (tmp_path / "rows.png").stat().st_size > 10_000
    assert "minus reference" in capsys.readouterr().out
    with pytest.raises(BadUsage, match="got cancer, expected some of digits"):
        utility.main(["--tasks", "cancer"])


def test_divisions_hold_each_row_once() -> None:
    task = breast_cancer()
    inside, outside = quarter(task, 0)
    assert sorted([*inside.tolist(), *outside.tolist()]) == list(range(569))
    assert len(outside) == 143


def test_flambys_division_is_flambys() -> None:
    # Records per center as its README has them.
    clinics = flamby_heart.hospitals()
    assert [(len(one), len(one.labels[1])) for one in clinics] == [(199, 104), (172, 89), (30, 16), (85, 45)]
    assert [one.private_x[0].shape[1] for one in clinics] == [13] * 4
    assert all(float(one.public_x[0].abs().max()) <= 1.0 for one in clinics)


def test_flambys_epsilon_is_larger_than_it_says() -> None:
    counted = flamby_heart.counted_again(30, 1e-4)
    assert 0.97 < counted["epsilon_counted"] < 1.01
    assert 4.1 < counted["epsilon_if_poisson"] < 4.2
    assert counted["epsilon_as_shuffled"] > 14
