"""The published tasks are what their sources say, run on the grid, and print and draw what they took."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import simulation_tasks
from experiments.benchmarks import simulation_published


def test_tasks_run_and_learn_and_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(2)
    files = ["--json", str(tmp_path / "tasks.json"), "--plot", str(tmp_path / "tasks.png")]
    simulation_tasks.main(["--quick", *files])
    assert torch.get_num_threads() == 1
    tasks = json.loads((tmp_path / "tasks.json").read_text(encoding="utf-8"))["tasks"]
    assert list(tasks) == ["mnist", "digits", "heart", "cifar"]
    for name, found in tasks.items():
        assert len(found["round_s"]) == found["rounds"]
        assert all(seconds > 0.0 for seconds in found["round_s"])
        assert (found["scores"] == {}) == (name == "cifar")
    # Rows, clients and cohorts come from seeds. Guessing gives 0.1.
    assert list(tasks["mnist"]["scores"].values())[-1] > 0.3
    assert list(tasks["digits"]["scores"].values())[-1] > 0.4
    assert (tmp_path / "tasks.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "FLUTE 200 s" in printed
    assert "(projected)" in printed


def test_flutes_clients_hold_rows_of_two_digits_as_unevenly_as_there() -> None:
    task = simulation_tasks.mnist()
    sizes = []
    for partition in range(task.clients):
        x, y = task.load(partition, task.clients)
        assert x.shape == (len(y), 784)
        assert len(y.unique()) <= 2
        sizes.append(len(y))
    # 69 (106) in the source, of which at most the 800 rows of two digits can be held.
    assert 60 < np.mean(sizes) < 75
    assert 80 < np.std(sizes) < 115


def test_digits_are_dealt_once() -> None:
    task = simulation_tasks.digits()
    rows = torch.cat([task.load(partition, task.clients)[0] for partition in range(task.clients)])
    assert len(rows) == 1200
    assert len(torch.unique(rows, dim=0)) == 1200


def test_pfls_cnn_costs_what_its_layers_say() -> None:
    net = simulation_tasks.cifar_cnn()
    shapes = []
    for module in net:
        module.register_forward_hook(lambda layer, given, output: shapes.append((layer, given[0].shape, output.shape)))
    net(torch.zeros(1, 3, 32, 32))
    flop = 0
    for index, (layer, _, output) in enumerate(shapes):
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            places = output[2] * output[3] if len(output) == 4 else 1
            flop += (2 if index == 0 else 3) * 2 * layer.weight.numel() * places
    assert flop == simulation_tasks.cifar_flop_per_image()


def test_the_loop_of_the_benchmark_moves_weights_as_the_grid_does() -> None:
    """With batches as large as the clients' rows nothing is shuffled, so that both come to the same model."""
    task = simulation_tasks.digits()
    task = replace(task, task=replace(task.task, epochs=1, batch_size=99))
    chosen = simulation_tasks.cohorts(task, 3, 5, seed=0)
    held = {client: task.load(client, task.clients) for clients in chosen for client in clients}
    round_s, expected = simulation_published.loop(task, chosen, held)
    got = simulation_tasks.run(task, cohort=5, rounds=3, seed=0)
    assert len(round_s) == len(got.round_s) == 3
    for name, tensor in expected.items():
        assert not torch.equal(tensor, task.task.model.state_dict()[name])
        torch.testing.assert_close(got.state[name], tensor, rtol=1e-4, atol=1e-5)
