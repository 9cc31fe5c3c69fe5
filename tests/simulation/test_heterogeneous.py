"""Federated algorithms in simulation: what they are for, on problems where plain averaging fails."""

import pickle
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAdam, FedAvg, FedYogi, Strategy
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from fedinfer.arrays import flatten, unflatten
from fedinfer.errors import BadUsage
from fedinfer.local_app import LocalApp, memory_in
from fedinfer.local_task import trained
from fedinfer.rules import FedAdaptive
from fedinfer.simulation import CohortSum, ScaffoldStrategy, ServerControl, SimulatedGrid, simulate
from fedinfer.simulation.engines import OneByOne, Summing, Task
from fedinfer.simulation.grid import run_on
from fedinfer.simulation.ray_engine import Worker
from fedinfer.simulation.vectorised import Vectorised
from fedinfer.training import (
    Ditto,
    FedProx,
    LocalParameters,
    LocalTask,
    Scaffold,
    Sgd,
)

CLIENTS, SIZE = 6, 4
ALGORITHMS = {
    "fedprox": FedProx(mu=0.3),
    "scaffold": Scaffold(),
    "local": LocalParameters(names=("1.*",)),
    "ditto": Ditto(mu=0.3),
}


def halves(output: Tensor, y: Tensor) -> Tensor:
    return (output - y).square().sum(1) / 2.0


def cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(output, y, reduction="none")


def squares(partition: int, partitions: int) -> tuple[Tensor, Tensor]:
    """Least squares, each client with another truth, other directions and another number of rows."""
    generator = torch.Generator().manual_seed(partition)
    rows = 8 + 4 * partition
    x = torch.randn(rows, SIZE, generator=generator, dtype=torch.float64)
    x *= torch.tensor([1.0, 0.3, 1.0, 0.3] if partition % 2 else [0.3, 1.0, 0.3, 1.0], dtype=torch.float64)
    return x, x @ torch.randn(SIZE, 1, generator=generator, dtype=torch.float64)


def optimum(*, by_rows: bool = False) -> Tensor:
    """Where the mean of the clients' mean losses is least, or the mean over all rows."""
    parts = [squares(partition, CLIENTS) for partition in range(CLIENTS)]
    scales = [1.0 if by_rows else len(x) ** -0.5 for x, _ in parts]
    x = torch.cat([scale * x for (x, _), scale in zip(parts, scales, strict=True)])
    y = torch.cat([scale * y for (_, y), scale in zip(parts, scales, strict=True)])
    return torch.linalg.lstsq(x, y).solution.T


def server_of(strategy: Strategy, net: nn.Module, rounds: int) -> ServerApp:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        context.state["arrays"] = strategy.start(grid, ArrayRecord(net.state_dict()), num_rounds=rounds).arrays

    return app


def line_task(algorithm: object = None) -> LocalTask:
    net = nn.Linear(SIZE, 1, bias=False).double()
    nn.init.zeros_(net.weight)
    extra = {} if algorithm is None else {"algorithm": algorithm}
    return LocalTask(model=net, loss=halves, optimiser=Sgd(lr=0.2), steps=10, batch_size=100, **extra)


def end(strategy: Callable[[LocalTask], Strategy], task: LocalTask, rounds: int) -> Tensor:
    """The server's last weights."""
    server = server_of(strategy(task), task.model, rounds)
    result = simulate(server, task.client_app(squares), num_clients=CLIENTS, seed=0)
    record = result.context.state["arrays"]
    assert isinstance(record, ArrayRecord)
    return record.to_torch_state_dict()["weight"]


@pytest.mark.parametrize(("share", "rounds", "near"), [(1.0, 25, 1e-5), (0.5, 60, 1e-4)])
def test_scaffold_reaches_the_optimum_that_averaging_does_not(share: float, rounds: int, near: float) -> None:
    def averaging(task: LocalTask) -> Strategy:
        return FedAvg(fraction_train=share, fraction_evaluate=0.0)

    plain = end(averaging, line_task(), rounds)
    assert min(float((plain - optimum(by_rows=by_rows)).norm()) for by_rows in (False, True)) > 0.05
    controlled = end(lambda task: ScaffoldStrategy(averaging(task), task), line_task(Scaffold()), rounds)
    assert float((controlled - optimum()).norm()) < near


def test_the_servers_control_is_the_mean_of_all_devices_whoever_was_asked() -> None:
    task = line_task(Scaffold())
    strategy = ScaffoldStrategy(FedAvg(fraction_train=0.5, fraction_evaluate=0.0), task)
    grid = grid_of(task, "vectorised", squares, CLIENTS)
    run_on(server_of(strategy, task.model, 2), grid, {})
    remembered = [memory_in(context) for context in grid._contexts.values()]
    assert 3 <= len(remembered) <= CLIENTS
    mean = sum(memory["weight"] for memory in remembered) / CLIENTS
    assert np.allclose(strategy.control.record["weight"].numpy(), mean.numpy(), rtol=1e-9)
    assert float(mean.abs().max()) > 0.01


def summing(grid: SimulatedGrid, task: LocalTask, rounds: int, found: list[Tensor]) -> None:
    """SCAFFOLD by sums alone: no answer of a client is seen."""
    control, state = ServerControl(task), dict(task.model.state_dict())
    for _ in range(rounds):
        content = RecordDict({"arrays": ArrayRecord(state), "control": control.record})
        total = grid.sum_of_updates(content, grid.get_node_ids())
        control.move(total.auxiliary, devices=CLIENTS)
        state = {name: state[name] + torch.from_numpy(part / total.weight) for name, part in total.update.items()}
    found.append(state["weight"])


@pytest.mark.parametrize("engine", ["vectorised", "one by one"])
def test_scaffold_reaches_it_by_sums_alone(engine: str) -> None:
    task = line_task(Scaffold())
    found: list[Tensor] = []
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        assert isinstance(grid, SimulatedGrid)
        summing(grid, task, 25, found)

    run_on(app, grid_of(task, engine, squares, CLIENTS), {})
    assert float((found[0] - optimum()).norm()) < 1e-5


def grid_of(
    task: LocalTask, engine: str, load: Callable[[int, int], tuple[Tensor, Tensor]], nodes: int
) -> SimulatedGrid:
    app = LocalApp(task, load)
    return SimulatedGrid(
        Vectorised(app, memory_bytes=1 << 20) if engine == "vectorised" else OneByOne(app),
        nodes=nodes,
        configure=lambda index: {"partition-id": index, "num-partitions": nodes, "insecure-simulation-seed": 5},
        run_config={},
    )


def two_layers() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(SIZE, 3), nn.Linear(3, 1)).double()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_sum_is_that_of_the_replies(algorithm: str) -> None:
    """Two rounds on either engine, by sums and by replies; the second depends on what nodes remember of the first."""
    task = LocalTask(
        model=two_layers(), loss=halves, optimiser=Sgd(lr=0.1), steps=3, batch_size=5, algorithm=ALGORITHMS[algorithm]
    )
    content = RecordDict({"arrays": ArrayRecord(task.model.state_dict())})
    if algorithm == "scaffold":
        content["control"] = ArrayRecord({name: torch.full_like(value, 0.1) for name, value in trained(task.model)})
    sums: list[Mapping[str, np.ndarray]] = []
    for engine in ("vectorised", "one by one"):
        app = ServerApp()

        @app.main()
        def main(grid: Grid, context: Context) -> None:
            assert isinstance(grid, SimulatedGrid)
            for _ in range(2):
                total = grid.sum_of_updates(content, grid.get_node_ids())
                assert total.replies == CLIENTS
                assert set(total.auxiliary) == (set(content["arrays"]) if algorithm == "scaffold" else set())
                beside = {f"beside {name}": part for name, part in total.auxiliary.items()}
                sums.append({**total.update, **beside})

        run_on(app, grid_of(task, engine, squares, CLIENTS), {})
    app = ServerApp()
    replied: list[Mapping[str, np.ndarray]] = []

    @app.main()
    def by_replies(grid: Grid, context: Context) -> None:
        for _ in range(2):
            replies = list(grid.send_and_receive([Message(content, node, "train") for node in grid.get_node_ids()]))
            weights = [reply.content["metrics"]["num-examples"] for reply in replies]
            found: dict[str, np.ndarray] = {}
            for name, old in content["arrays"].items():
                pairs = zip(replies, weights, strict=True)
                found[name] = sum(w * (reply.content["arrays"][name].numpy() - old.numpy()) for reply, w in pairs)
                if algorithm == "scaffold":
                    found[f"beside {name}"] = sum(reply.content["control"][name].numpy() for reply in replies)
            replied.append(found)

    run_on(app, grid_of(task, "vectorised", squares, CLIENTS), {})
    for number in range(2):
        for other in (sums[2 + number], replied[number]):
            assert set(other) == set(sums[number])
            for name, part in sums[number].items():
                assert np.allclose(part, other[name], rtol=1e-9, atol=1e-10)
    if algorithm in ("scaffold", "local"):
        assert any(not np.allclose(part, sums[1][name]) for name, part in sums[0].items()), "nodes remember"


def test_a_node_that_is_asked_twice_remembers_the_first_time() -> None:
    task = LocalTask(
        model=two_layers(), loss=halves, optimiser=Sgd(lr=0.1), steps=3, batch_size=5, algorithm=ALGORITHMS["local"]
    )
    kept = []
    for engine in ("vectorised", "one by one"):
        grid = grid_of(task, engine, squares, 2)
        app = ServerApp()

        @app.main()
        def main(grid: Grid, context: Context) -> None:
            content = RecordDict({"arrays": ArrayRecord(task.model.state_dict())})
            nodes = list(grid.get_node_ids())
            list(grid.send_and_receive([Message(content, node, "train") for node in [*nodes, *nodes]]))

        run_on(app, grid, {})
        kept.append([memory_in(context) for context in grid._contexts.values()])
    for one, other in zip(*kept, strict=True):
        assert all(torch.allclose(one[name], other[name], rtol=1e-10) for name in one)


def test_nodes_that_were_never_asked_keep_nothing() -> None:
    task = LocalTask(
        model=two_layers(), loss=halves, optimiser=Sgd(lr=0.1), steps=1, batch_size=5, algorithm=ALGORITHMS["ditto"]
    )
    grid = grid_of(task, "vectorised", squares, 1_000_000)
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        assert isinstance(grid, SimulatedGrid)
        nodes = list(grid.get_node_ids())[7:9]
        assert grid.sum_of_updates(RecordDict({"arrays": ArrayRecord(task.model.state_dict())}), nodes).replies == 2

    run_on(app, grid, {})
    assert len(grid._contexts) == 2
    assert all(memory_in(context) for context in grid._contexts.values())


DIGITS, TASTES, PER_CLIENT = load_digits(), 6, 120


def tastes(partition: int, partitions: int) -> tuple[Tensor, Tensor]:
    """Digits whose names each client has in an order of its own: no one model can please all."""
    rows = slice(partition * PER_CLIENT, (partition + 1) * PER_CLIENT)
    x = torch.tensor(DIGITS.data[rows] / 16.0, dtype=torch.float32)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(partition))
    return x, order[torch.tensor(DIGITS.target[rows])]


@pytest.mark.parametrize(("algorithm", "bound"), [(Ditto(mu=0.05), 0.5), (LocalParameters(names=("2.*",)), 0.7)])
def test_personal_weights_please_whom_one_model_cannot(algorithm: object, bound: float) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    losses = []
    for own in ({}, {"algorithm": algorithm}):
        task = LocalTask(model=net, loss=cross_entropy, optimiser=Sgd(lr=0.3), epochs=2, batch_size=20, **own)
        app = ServerApp()

        @app.main()
        def main(grid: Grid, context: Context) -> None:
            result = FedAvg().start(grid, ArrayRecord(net.state_dict()), num_rounds=6)
            losses.append(result.evaluate_metrics_clientapp[6]["loss"])

        simulate(app, task.client_app(tastes), num_clients=TASTES, seed=0)
    shared, personal = losses
    assert shared > 1.2
    assert personal < bound


@pytest.mark.parametrize("strategy", [FedAdam, FedYogi])
def test_flowers_adaptive_strategies_see_the_same_from_cohorts_as_from_devices(strategy: type[FedAdam]) -> None:
    task = line_task(FedProx(mu=0.1))
    ends = []
    for engine in ("vectorised", "one by one"):
        server = server_of(strategy(fraction_evaluate=0.0, eta=0.1), task.model, 8)
        record = run_on(server, grid_of(task, engine, squares, CLIENTS), {}).state["arrays"]
        ends.append(record.to_torch_state_dict()["weight"])
    assert torch.allclose(ends[0], ends[1], rtol=1e-9)
    assert 0.1 < float((ends[0] - optimum()).norm()) < float(optimum().norm())


@pytest.mark.parametrize("yogi", [False, True])
def test_an_adaptive_rule_moves_the_weights_by_sums_alone(yogi: bool) -> None:
    """Reddi et al. 2021, algorithm 2, by hand, beside the rule on a cohort's sums."""
    task, rule = line_task(), FedAdaptive(learning_rate=0.1, yogi=yogi)
    app = ServerApp()
    ends: list[tuple[np.ndarray, np.ndarray]] = []

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        assert isinstance(grid, SimulatedGrid)
        like = task.model.state_dict()
        weights = flatten(like)
        state = rule.init(weights)
        first, second, by_hand = np.zeros(SIZE), np.full(SIZE, 1e-6), weights.astype(np.float64)
        for _ in range(10):
            sent = ArrayRecord(unflatten(weights, like))
            total = grid.sum_of_updates(RecordDict({"arrays": sent}), grid.get_node_ids())
            move = total.update["weight"].ravel() / total.weight
            weights, state = rule.step(weights, -move.astype(np.float32), state)
            first = 0.9 * first + 0.1 * move
            gain = 0.01 * move**2
            second = second - gain * np.sign(second - move**2) if yogi else 0.99 * second + gain
            by_hand = by_hand + 0.1 * first / (np.sqrt(second) + 1e-3)
        ends.append((weights, by_hand))

    run_on(app, grid_of(task, "vectorised", squares, CLIENTS), {})
    assert np.allclose(*ends[0], rtol=1e-4)
    assert np.linalg.norm(ends[0][0] - optimum().numpy()) < float(optimum().norm())


def test_a_ray_worker_sends_back_what_nodes_remember() -> None:
    task = LocalTask(
        model=two_layers(), loss=halves, optimiser=Sgd(lr=0.1), steps=1, batch_size=5, algorithm=ALGORITHMS["ditto"]
    )
    context = Context(
        run_id=1, node_id=7, node_config={"partition-id": 0, "num-partitions": 1}, state=RecordDict(), run_config={}
    )
    content = RecordDict({"arrays": ArrayRecord(task.model.state_dict())})
    worker = Worker(LocalApp(task, squares), 1 << 20)
    total, states = pickle.loads(pickle.dumps(worker.total([Task(content, "train", context)])))
    assert total.replies == 1
    context.state = states[0]
    memory = memory_in(context)
    assert memory is not None
    assert set(memory) == set(task.model.state_dict())


def test_sums_of_workers_are_joined_with_what_goes_beside() -> None:
    task = line_task(Scaffold())
    content = RecordDict({"arrays": ArrayRecord(task.model.state_dict()), "control": ServerControl(task).record})
    summed: list[CohortSum] = []
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        assert isinstance(grid, SimulatedGrid)
        nodes = list(grid.get_node_ids())
        summed.extend(grid.sum_of_updates(content, part) for part in (nodes, nodes[:2], nodes[2:]))

    run_on(app, grid_of(task, "vectorised", squares, CLIENTS), {})
    joined = Summing()
    for part in summed[1:]:
        joined.join(part)
    total = joined.result()
    assert total.replies == CLIENTS
    expected = summed[1].auxiliary["weight"] + summed[2].auxiliary["weight"]
    assert np.array_equal(total.auxiliary["weight"], expected)
    assert np.abs(expected).max() > 0.01


def test_answers_without_control_variates_are_refused() -> None:
    task = line_task(Scaffold())
    server = server_of(ScaffoldStrategy(FedAvg(fraction_evaluate=0.0), task), task.model, 1)
    with pytest.raises(BadUsage, match="Scaffold"):
        simulate(server, line_task().client_app(squares), num_clients=CLIENTS)


def test_a_control_does_not_move_where_nobody_answered() -> None:
    control = ServerControl(line_task(Scaffold()))
    before = control.record
    control.move({}, devices=4)
    assert np.array_equal(control.record["weight"].numpy(), before["weight"].numpy())
    control.move({"weight": np.full((1, SIZE), 4.0)}, devices=4)
    assert isinstance(control.record["weight"], Array)
    assert np.array_equal(control.record["weight"].numpy(), np.ones((1, SIZE)))
