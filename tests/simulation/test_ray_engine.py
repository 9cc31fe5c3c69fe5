"""Shares of a cohort on Ray workers: the answer of one process, and nothing lost with a worker that dies."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, RecordDict
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from fedinfer.errors import BadUsage, RemoteError
from fedinfer.simulation import CohortSum, SimulatedGrid, simulate
from fedinfer.training import LocalParameters, LocalTask
from tests.simulation.test_simulate import CLIENTS, load, task_of
from tests.simulation.third_party import numpy_app

pytestmark = [
    pytest.mark.long,
    # Ray warns of its own future, and leaves log files to the garbage collector.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[None]:
    """A local cluster of two workers for all tests here."""
    import ray

    path = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=path)
    yield
    ray.shutdown()


def sums(task: LocalTask, backend: str, rows=load) -> list[CohortSum]:
    """Two rounds of sums from the same weights."""
    app = ServerApp()
    found: list[CohortSum] = []

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        assert isinstance(grid, SimulatedGrid)
        content = RecordDict({"arrays": ArrayRecord(task.model.state_dict())})
        found.extend(grid.sum_of_updates(content, grid.get_node_ids()) for _ in range(2))

    result = simulate(app, task.client_app(rows), num_clients=CLIENTS, backend=backend, seed=0, workers=2)
    assert result.updates == sum(total.replies for total in found)
    return found


def same(one: CohortSum, other: CohortSum) -> bool:
    assert (one.replies, one.weight, len(one.errors)) == (other.replies, other.weight, len(other.errors))
    return all(np.allclose(one.update[name], other.update[name], atol=1e-5) for name in one.update)


@pytest.mark.parametrize("private", [False, True])
def test_two_workers_give_the_sum_of_one_process(private: bool) -> None:
    task = task_of(private=private)
    for one, other in zip(sums(task, "vectorised"), sums(task, "ray"), strict=True):
        assert same(one, other)
        assert one.loss == other.loss or one.loss == pytest.approx(other.loss)


def test_what_nodes_remember_goes_to_the_workers_and_back() -> None:
    task = replace(task_of(), algorithm=LocalParameters(names=("2.*",)))
    ours, rays = sums(task, "vectorised"), sums(task, "ray")
    assert all(same(one, other) for one, other in zip(ours, rays, strict=True))
    assert not same(*rays), "the second round begins where the first ended"


def test_a_worker_that_dies_in_a_round_costs_no_client_its_answer(tmp_path: Path) -> None:
    mark = tmp_path / "died"

    def deadly(partition: int, partitions: int) -> tuple[Tensor, Tensor]:
        if partition == 6 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return load(partition, partitions)

    task = task_of(private=True)
    got = sums(task, "ray", deadly)
    assert mark.exists()
    for one, other in zip(sums(task, "vectorised"), got, strict=True):
        assert same(one, other)


def test_work_that_kills_every_worker_ends_the_run() -> None:
    def deadly(partition: int, partitions: int) -> tuple[Tensor, Tensor]:
        os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(0), torch.zeros(0)

    with pytest.raises(RemoteError, match="3 dead workers"):
        sums(task_of(), "ray", deadly)


def test_a_strangers_app_is_told_where_to_go() -> None:
    with pytest.raises(BadUsage, match="use 'flower'"):
        simulate(*numpy_app(), num_clients=2, backend="ray")


def test_a_cluster_that_ray_address_names_goes_on_when_it_loses_a_node(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulation.ray_cluster", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=270,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=Path(__file__).parents[2],
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["nodes"], found["lost"]) == (2, True)
    expected = [[total.weight, total.replies, len(total.errors)] for total in sums(task_of(), "vectorised")]
    assert found["sums"] == expected * 2
