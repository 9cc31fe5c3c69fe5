"""The client-level experiments run, and what they print is what is claimed."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import client_level, flower_clip


def test_client_level_compares_mechanisms_at_one_epsilon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(2)
    client_level.main(["--quick", "--json", str(tmp_path / "table.json"), "--plot", str(tmp_path / "table.png")])
    assert torch.get_num_threads() == 1
    free, *private = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    assert (free["mechanism"], free["outsider"]) == ("no privacy", None)
    assert len(private) == 4
    assert all(8.0 - 1e-3 <= row["outsider"] <= 8.0 for row in private)
    # What sampling amplifies is nothing against a server that knows the cohort.
    servers = {row["mechanism"]: row["server"] for row in private}
    assert servers["Poisson, fixed clip"] > 2 * 8.0
    assert servers["cyclic, independent noise"] == pytest.approx(8.0, abs=1e-3)
    assert servers["cyclic, banded matrix"] is None
    # Guessing gives 0.1. The noise is fresh in each run, so that no closer bound holds for certain.
    assert all(0.3 < row["accuracies"][0] < 1.0 for row in private)
    assert (tmp_path / "table.png").stat().st_size > 5000
    printed = capsys.readouterr().out
    assert "banded minus independent" in printed
    assert "secure sum" in printed


def test_clients_are_disjoint_and_of_one_size() -> None:
    clients = client_level.clients_of("digits", 0)
    assert clients.x.shape == (673, 2, 65)
    # One row is left over, and no other is missing or in two places.
    held = np.concatenate([clients.x.reshape(-1, 65).numpy(), clients.test_x.numpy()])
    x, _ = client_level.rows_of("digits")
    assert len(held) == len(x) - 1
    assert set(map(bytes, held)) <= set(map(bytes, x))
    assert len(set(map(bytes, held))) == len(held)


def test_a_cohorts_updates_are_those_of_its_clients_alone() -> None:
    clients = client_level.clients_of("digits", 0)
    weights = torch.zeros(650)
    together = client_level.local_updates(weights, clients.x[:5], clients.y[:5])
    alone = [client_level.local_update(weights, clients.x[i], clients.y[i]) for i in range(5)]
    assert torch.allclose(together, torch.stack(alone), atol=1e-6)
    assert float(together.norm(dim=1).min()) > 0


def test_flowers_clip_runs_away_and_ours_comes_home(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flower_clip.main(["--quick", "--json", str(tmp_path / "clips.json")])
    clips = json.loads((tmp_path / "clips.json").read_text(encoding="utf-8"))
    for first in (5.0, 0.1):
        flower, ours = clips[f"flower from {first:g}"], clips[f"fedinfer from {first:g}"]
        assert len(flower) == len(ours) == 11
        assert flower[0] == ours[0] == first
        assert abs(math.log(flower[-1])) > abs(math.log(first)) + 0.3
        assert abs(math.log(ours[-1])) < abs(math.log(first)) - 0.3
    assert "clip after round" in capsys.readouterr().out
