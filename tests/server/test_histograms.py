"""Histograms of every feature by a secure sum, through the real apps."""

import json
from pathlib import Path

import numpy as np
import pytest

from clients.app import app as client_app
from fedinfer.data import heart_schema, read_table
from fedinfer.errors import BadUsage
from fedinfer.settings import RunConfig
from fedinfer.simulation import run_in_process
from server.app import app as server_app
from tests.server.federation import charged, hospitals


def test_the_counts_of_all_devices_come_back_as_one_sum(tmp_path: Path) -> None:
    config, nodes = hospitals(tmp_path, RunConfig(min_devices=4, histograms=2, epsilon=8.0, delta=1e-5))
    context = run_in_process(server_app, client_app, nodes=nodes, run_config=config.to_flat())
    found = json.loads(str(context.state.config_records["histograms"]["json"]))
    exact = np.zeros((heart_schema().width, 2))
    for node in nodes:
        features = read_table(Path(str(node["data"])), heart_schema()).features
        exact += np.stack([(features < 0.0).sum(0), (features >= 0.0).sum(0)], axis=1)
    assert np.abs(np.array(found["counts"]) - exact).max() < 7 * found["standard_error"]
    assert found["standard_error"] < 10 < exact.max()
    assert (found["devices"], found["void"]) == (4, True)
    assert found["epsilon"] == pytest.approx(8.0, abs=1e-3)
    assert [charged(node) for node in nodes] == [(1, 1)] * 4


def test_without_a_pki_file_there_are_none(tmp_path: Path) -> None:
    nodes = [{"partition-id": index} for index in range(4)]
    with pytest.raises(BadUsage, match="histograms: got no PKI file"):
        run_in_process(server_app, client_app, nodes=nodes, run_config=RunConfig(min_devices=4, histograms=4).to_flat())
