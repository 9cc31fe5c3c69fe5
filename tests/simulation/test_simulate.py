"""One call for a whole simulation: strangers' apps, every backend, seeds, errors, sums."""

import logging
import os
import pickle
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn
from torch.nn import functional

import tests.simulation.third_party as third_party
from fedinfer.errors import BadUsage
from fedinfer.privacy import FixedSize, Poisson, PrivacyPlan
from fedinfer.simulation import CohortSum, Population, SimulatedGrid, simulate
from fedinfer.simulation.records import LazyArray
from fedinfer.training import LocalTask, Sgd

CLIENTS = 9
APPS = {"torch": third_party.torch_app, "sklearn": third_party.sklearn_app, "numpy": third_party.numpy_app}


@pytest.mark.parametrize("backend", ["vectorised", pytest.param("process", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", APPS)
def test_a_strangers_app_runs_as_it_is(name: str, backend: str) -> None:
    server, client = APPS[name]()
    result = simulate(server, client, num_clients=5, backend=backend, run_config={"lr": 0.5}, workers=2)
    metrics = result.context.state["accuracy"]
    assert metrics["accuracy"] > 0.9
    assert result.updates == 5 * {"torch": 5, "sklearn": 2, "numpy": 3}[name]
    assert result.updates_per_s == pytest.approx(result.updates / result.seconds)
    if name == "numpy":
        assert metrics["turns"] == pytest.approx(3), "a node's state lives from round to round"


def losses(output: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(output, y, reduction="none")


def load(partition: int, partitions: int) -> tuple[Tensor, Tensor]:
    assert partitions == CLIENTS
    if partition == 4:
        raise FileNotFoundError("the rows of patient 1234")
    generator = torch.Generator().manual_seed(partition)
    rows = 3 + 2 * partition
    return torch.randn(rows, 5, generator=generator), torch.randint(0, 3, (rows,), generator=generator)


def task_of(*, private: bool = False) -> LocalTask:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    plan = None
    if private:
        plan = PrivacyPlan(clip_norm=1.0, noise_multiplier=2.0, sampler=Poisson(rate=0.5), delta=1e-5, steps=4)
    return LocalTask(model=net, loss=losses, optimiser=Sgd(lr=0.1), steps=2, batch_size=4, plan=plan)


def fedavg(task: LocalTask, rounds: int, *, share: float) -> ServerApp:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(
            fraction_train=share,
            fraction_evaluate=0.0,
            min_train_nodes=round(share * CLIENTS),
            min_available_nodes=CLIENTS,
        )
        result = strategy.start(grid, ArrayRecord(task.model.state_dict()), num_rounds=rounds)
        context.state["arrays"] = result.arrays

    return app


def weights_after(
    task: LocalTask, *, backend: str, seed: int | None, rounds: int = 2, share: float = 0.6
) -> list[np.ndarray]:
    # A seed counts from wherever the global generators are.
    random.random()
    # Nodes of Flower's simulation have ids of their own, so that a share of them would be another share.
    result = simulate(
        fedavg(task, rounds, share=share),
        task.client_app(load),
        num_clients=CLIENTS,
        backend=backend,
        seed=seed,
        workers=2,
    )
    assert result.void == (seed is not None)
    return result.context.state["arrays"].to_numpy_ndarrays()


@pytest.mark.parametrize("private", [False, True])
def test_a_seed_repeats_a_run_to_the_bit(private: bool) -> None:
    task = task_of(private=private)
    first, second, other = (weights_after(task, backend="vectorised", seed=seed) for seed in (5, 5, 6))
    assert all(np.array_equal(one, two) for one, two in zip(first, second, strict=True))
    assert not any(np.array_equal(one, two) for one, two in zip(first, other, strict=True))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::Warning")
@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("backend", ["process", "flower"])
def test_each_backend_gives_the_same(backend: str, private: bool) -> None:
    task = task_of(private=private)
    first, other = (weights_after(task, backend=kind, seed=5, share=1.0) for kind in ("vectorised", backend))
    assert all(np.allclose(one, two, rtol=1e-5, atol=1e-6) for one, two in zip(first, other, strict=True))


def test_without_a_seed_noise_comes_from_the_operating_system() -> None:
    task = task_of(private=True)
    first, second = (weights_after(task, backend="vectorised", seed=None, share=1.0) for _ in range(2))
    assert not any(np.array_equal(one, two) for one, two in zip(first, second, strict=True))


def test_a_simulation_leaves_the_global_generators_as_they_were() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    weights_after(task_of(), backend="vectorised", seed=5, rounds=1)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def asked(task: LocalTask, *, message_type: str = "train", rounds: int = 1) -> list[list[Message]]:
    """The replies of all nodes in each round."""
    found: list[list[Message]] = []
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        content = RecordDict({"arrays": ArrayRecord(task.model.state_dict())})
        for _ in range(rounds):
            messages = [Message(content, node, message_type, group_id="7") for node in grid.get_node_ids()]
            found.append(list(grid.send_and_receive(messages)))

    simulate(app, task.client_app(load), num_clients=CLIENTS, seed=0)
    return found


@pytest.mark.parametrize("private", [False, True])
def test_a_client_that_fails_gives_an_error_reply_and_the_others_theirs(private: bool) -> None:
    (replies,) = asked(task_of(private=private))
    assert len(replies) == CLIENTS
    (failed,) = [reply for reply in replies if reply.has_error()]
    assert failed.metadata.src_node_id == 2 + 4
    assert failed.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert ("patient 1234" in failed.error.reason) is not private, "with a plan an error tells its kind only"
    assert {reply.metadata.group_id for reply in replies} == {"7"}
    for reply in replies:
        if reply.has_content():
            rows = 3 + 2 * (reply.metadata.src_node_id - 2)
            assert reply.content["metrics"]["num-examples"] == (1 if private else rows)
            assert ("loss" in reply.content["metrics"]) is not private


def test_a_plan_makes_no_more_releases_than_it_has() -> None:
    *within, beyond = asked(task_of(private=True), rounds=3)
    assert [sum(reply.has_content() for reply in replies) for replies in within] == [CLIENTS - 1] * 2
    assert all("BudgetExceeded" in reply.error.reason for reply in beyond)


@pytest.mark.parametrize("mixing", [False, True])
def test_evaluation_is_answered_without_a_plan_and_refused_with_one(mixing: bool) -> None:
    task = replace(task_of(), model=Mixing()) if mixing else task_of()
    (replies,) = asked(task, message_type="evaluate")
    assert sum(reply.has_content() for reply in replies) == CLIENTS - 1
    for reply in replies:
        if reply.has_content():
            x, y = load(reply.metadata.src_node_id - 2, CLIENTS)
            expected = losses(task.model(x), y).mean().item()
            assert reply.content["metrics"]["loss"] == pytest.approx(expected)
            assert reply.content["metrics"]["num-examples"] == len(x)
    (refused,) = asked(task_of(private=True), message_type="evaluate")
    assert all("UnprotectedRefused" in reply.error.reason for reply in refused), "before any row is loaded"


@pytest.mark.parametrize("backend", ["vectorised", pytest.param("process", marks=pytest.mark.long)])
def test_the_sum_is_the_sum_of_the_replies(backend: str) -> None:
    task = task_of()
    app = ServerApp()
    found = []

    @app.main()
    def main(grid: SimulatedGrid, context: Context) -> None:
        content = RecordDict({"arrays": ArrayRecord(task.model.state_dict())})
        found.append(grid.sum_of_updates(content, grid.get_node_ids()))

    simulate(app, task.client_app(load), num_clients=CLIENTS, backend=backend, seed=0, workers=2)
    (total,) = found
    (replies,) = asked(task)
    answers = [reply.content for reply in replies if reply.has_content()]
    start = {name: tensor.numpy() for name, tensor in task.model.state_dict().items()}
    assert (total.replies, len(total.errors)) == (CLIENTS - 1, 1)
    assert total.weight == sum(own["metrics"]["num-examples"] for own in answers)
    mean = sum(own["metrics"]["num-examples"] * own["metrics"]["loss"] for own in answers) / total.weight
    assert total.loss == pytest.approx(mean)
    for name, update in total.update.items():
        expected = sum(
            own["metrics"]["num-examples"] * (own["arrays"][name].numpy().astype(np.float64) - start[name])
            for own in answers
        )
        assert np.allclose(update, expected, rtol=1e-4, atol=1e-5)


class Mixing(nn.Module):
    """Its examples are not independent: each is measured against the mean of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        output = self.layer(x)
        return output - 0.5 * output.mean(0)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)),
        nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, 3)),
    ],
)
def test_what_cannot_be_stacked_runs_one_after_another_and_one_line_says_why(
    model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    task = LocalTask(model=model, loss=losses, optimiser=Sgd(lr=0.1), steps=2, batch_size=99)
    with caplog.at_level(logging.WARNING, "fedinfer.simulation"):
        replies = asked(task, rounds=2)
    assert [sum(reply.has_content() for reply in each) for each in replies] == [CLIENTS - 1] * 2
    (line,) = [record.getMessage() for record in caplog.records if record.name == "fedinfer.simulation"]
    assert line.startswith("clients run one after another: ")


def test_a_process_that_dies_is_an_error_reply_and_the_next_wave_is_whole(tmp_path: Path) -> None:
    mark = tmp_path / "died"
    client = ClientApp()

    @client.query()
    def query(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 0 and not mark.exists():
            mark.touch()
            os._exit(1)
        return Message(RecordDict(), reply_to=message)

    app = ServerApp()
    outcomes: list[list[bool]] = []

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        for _ in range(2):
            messages = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
            replies = list(grid.send_and_receive(messages))
            outcomes.append([reply.has_error() for reply in replies])
            codes = {reply.error.code for reply in replies if reply.has_error()}
            assert codes <= {ErrorCode.CLIENT_APP_CRASHED}

    simulate(app, client, num_clients=6, backend="process", workers=1)
    assert len(outcomes[0]) == 6
    assert any(outcomes[0])
    assert outcomes[1] == [False] * 6


def test_a_million_nodes_cost_nothing_until_they_are_asked() -> None:
    client = ClientApp()

    @client.query()
    def query(message: Message, context: Context) -> Message:
        assert context.node_config == {"partition-id": context.node_id - 2, "num-partitions": 1_000_000}
        return Message(RecordDict(), reply_to=message)

    app = ServerApp()

    @app.main()
    def main(grid: SimulatedGrid, context: Context) -> None:
        nodes = grid.get_node_ids()
        assert len(nodes) == 1_000_000
        replies = list(grid.send_and_receive([Message(RecordDict(), nodes[i], "query") for i in (0, 999_999)]))
        assert not any(reply.has_error() for reply in replies)
        assert len(grid._contexts) == 2

    simulate(app, client, num_clients=1_000_000)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_clients": 0},
        {"num_clients": 2, "backend": "clever"},
        {"num_clients": 2, "population": Population(dropout=0.5), "backend": "flower"},
    ],
)
def test_a_simulation_that_cannot_be_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(BadUsage, match="expected"):
        simulate(ServerApp(), ClientApp(), **fields)


def test_rows_that_do_not_fit_spoil_nobody_elses_answer() -> None:
    def crooked(partition: int, partitions: int) -> tuple[Tensor, Tensor]:
        x, y = load(partition, partitions)
        return (x[:, :4], y) if partition == 2 else (x, y)

    task, app = task_of(), ServerApp()
    replies: list[Message] = []
    sums: list[CohortSum] = []

    @app.main()
    def main(grid: SimulatedGrid, context: Context) -> None:
        content = RecordDict({"arrays": ArrayRecord(task.model.state_dict())})
        if context.run_config["sum"]:
            sums.append(grid.sum_of_updates(content, grid.get_node_ids()))
        else:
            replies.extend(grid.send_and_receive([Message(content, node, "train") for node in grid.get_node_ids()]))

    for summed in (False, True):
        simulate(app, task.client_app(crooked), num_clients=CLIENTS, seed=0, run_config={"sum": summed})
    (total,) = sums
    assert {error.metadata.src_node_id - 2 for error in total.errors} == {2, 4}
    answers = [reply.content for reply in replies if reply.has_content()]
    assert total.weight == sum(own["metrics"]["num-examples"] for own in answers)
    for name, tensor in task.model.state_dict().items():
        moved = sum(own["metrics"]["num-examples"] * (own["arrays"][name].numpy() - tensor.numpy()) for own in answers)
        assert np.allclose(total.update[name], moved, rtol=1e-4, atol=1e-5)
    assert {reply.metadata.src_node_id - 2 for reply in replies if reply.has_error()} == {2, 4}
    (expected,) = asked(task)
    for reply in replies:
        (other,) = [own for own in expected if own.metadata.src_node_id == reply.metadata.src_node_id]
        if reply.has_content():
            for name, array in reply.content["arrays"].items():
                assert np.allclose(array.numpy(), other.content["arrays"][name].numpy(), rtol=1e-5, atol=1e-6)


def test_little_memory_means_more_pieces_and_the_same_answer() -> None:
    task = task_of()
    sums = []
    for memory_bytes in (1, 1 << 30):
        app = ServerApp()

        @app.main()
        def main(grid: SimulatedGrid, context: Context) -> None:
            content = RecordDict({"arrays": ArrayRecord(task.model.state_dict())})
            sums.append(grid.sum_of_updates(content, grid.get_node_ids()))

        simulate(app, task.client_app(load), num_clients=CLIENTS, seed=0, memory_bytes=memory_bytes)
    assert sums[0].replies == sums[1].replies == CLIENTS - 1
    assert all(np.allclose(sums[0].update[name], sums[1].update[name], atol=1e-5) for name in sums[0].update)


def test_lazy_arrays_are_flower_arrays() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    lazy, plain = LazyArray(values, "float32"), Array(values)
    assert (lazy.dtype, lazy.shape, lazy.stype, lazy.data) == (plain.dtype, plain.shape, plain.stype, plain.data)
    copied = lazy.numpy()
    copied[:] = 0.0
    assert np.array_equal(lazy.numpy(), plain.numpy()), (
        "what a strategy does with the numbers does not reach the cohort"
    )
    record = ArrayRecord()
    record["w"] = lazy
    assert record.object_id == ArrayRecord({"w": plain}).object_id
    assert type(pickle.loads(pickle.dumps(lazy))) is Array
    lazy.data = Array(plain.numpy() + 1.0).data
    assert np.array_equal(lazy.numpy(), plain.numpy() + 1.0)


def test_dropped_clients_are_errors_and_their_state_does_not_move() -> None:
    task, app = task_of(private=True), ServerApp()
    seen: list[dict[int, bool]] = []

    @app.main()
    def main(grid: SimulatedGrid, context: Context) -> None:
        content = RecordDict({"arrays": ArrayRecord(task.model.state_dict())})
        for _ in range(40):
            replies = list(grid.send_and_receive([Message(content, node, "train") for node in grid.get_node_ids()]))
            codes = {reply.error.code for reply in replies if reply.has_error()}
            assert codes <= {ErrorCode.NODE_UNAVAILABLE, ErrorCode.CLIENT_APP_RAISED_EXCEPTION}
            seen.append({reply.metadata.src_node_id: reply.has_content() for reply in replies})
        total = grid.sum_of_updates(content, grid.get_node_ids())
        assert total.replies + len(total.errors) == CLIENTS

    simulate(app, task.client_app(load), num_clients=CLIENTS, seed=1, population=Population(dropout=0.7))
    assert all(len(replies) == CLIENTS for replies in seen)
    # A plan of four releases pays for two rounds that reached the client, however many did not.
    per_node = [sum(replies[node] for replies in seen) for node in seen[0]]
    assert sorted(per_node) == [0, *[2] * (CLIENTS - 1)]


@pytest.mark.parametrize("backend", ["vectorised", pytest.param("process", marks=pytest.mark.long)])
def test_no_error_under_a_plan_counts_rows(backend: str) -> None:
    plan = PrivacyPlan(
        clip_norm=1.0,
        noise_multiplier=2.0,
        sampler=FixedSize(size=2, population=1000),
        delta=1e-5,
        steps=4,
    )
    task, app = replace(task_of(), plan=plan), ServerApp()
    errors: list[str] = []

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        content = RecordDict({"arrays": ArrayRecord(task.model.state_dict())})
        messages = [Message(content, node, "train") for node in grid.get_node_ids()]
        errors.extend(str(reply.error.reason) for reply in grid.send_and_receive(messages))

    def uneven(partition: int, partitions: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(7 + partition, 5), torch.zeros(7 + 2 * partition, dtype=torch.int64)

    simulate(app, task.client_app(uneven), num_clients=CLIENTS, backend=backend, workers=1)
    assert len(errors) == CLIENTS
    assert not any(character.isdigit() for error in errors for character in error)
