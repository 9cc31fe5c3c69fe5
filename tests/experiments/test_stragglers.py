"""The comparison of stragglers runs, prints its table and draws it."""

import json
from pathlib import Path

import pytest

from experiments import stragglers


def test_stragglers_compares_three_ways_to_wait(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stragglers.main(["--quick", "--json", str(tmp_path / "curves.json"), "--plot", str(tmp_path / "curves.png")])
    curves = json.loads((tmp_path / "curves.json").read_text(encoding="utf-8"))
    assert [curve["name"] for curve in curves] == list(stragglers.WAITS)
    for curve in curves:
        assert curve["hours"] == sorted(curve["hours"])
        assert curve["hours"][-1] <= 0.5
        assert all(0.0 < accuracy < 1.0 for accuracy in curve["accuracies"])
    waiting, first, buffered = (curve["accuracies"][-1] for curve in curves)
    assert buffered > max(waiting, first)
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert "hours, answers to 0.85" in capsys.readouterr().out


def test_a_curve_says_when_it_was_good_enough() -> None:
    curve = stragglers.Curve(name="x", seed=0, hours=(1.0, 2.0), accuracies=(0.5, 0.9), answers=(10, 20))
    assert curve.reached(0.8) == (2.0, 20)
    assert curve.reached(0.95) is None
