"""The heterogeneity experiment runs, and what it prints is what is claimed."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import heterogeneity


def test_algorithms_are_compared_on_the_same_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heterogeneity.main(["--quick", "--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "rows.png")])
    rows = {row["contender"]: row for row in json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))}
    assert set(rows) == set(heterogeneity.CONTENDERS)
    # Ditto's shared model is FedAvg's; its personal ones know more of their own clients' rows.
    assert rows["Ditto"]["shared"] == rows["FedAvg"]["shared"]
    assert rows["Ditto"]["own"] > rows["FedAvg"]["own"] + 0.05
    # Who shares all uses what it shares.
    assert all(rows[name]["own"] == rows[name]["shared"][-1] for name in ("FedAvg", "FedProx", "SCAFFOLD", "FedAdam"))
    assert rows["SCAFFOLD"]["shared"][-1] > rows["FedAvg"]["shared"][-1]
    assert (tmp_path / "rows.png").stat().st_size > 5000
    assert "Dirichlet 0.1" in capsys.readouterr().out


def test_every_row_has_one_client() -> None:
    clients = heterogeneity.divided(0.1, 0)
    rows = [x for pair in clients for x, _ in pair]
    assert sum(map(len, rows)) == 1797
    labels = [np.unique(np.concatenate([own.numpy(), held.numpy()])) for (_, own), (_, held) in clients]
    assert np.mean([len(each) for each in labels]) < 4.5, "few classes a client"
