"""Our own server loop: the mean of a stock strategy, a plan at the server, and runs that are interrupted and go on."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from fedinfer.arrays import Vector
from fedinfer.errors import BadUsage, BudgetExceeded, CheckpointError, RoundFailed
from fedinfer.optimisers import Adam, Sgd
from fedinfer.privacy import Cyclic, FixedSize, Poisson, PrivacyPlan
from fedinfer.rules import FedAdaptive, FedSgd, RuleState
from fedinfer.simulation import (
    Checkpoint,
    Population,
    RoundLog,
    ScaffoldStrategy,
    SimulationResult,
    federation,
    simulate,
)
from fedinfer.training import LocalTask, Scaffold

CLIENTS, INPUTS, CLASSES = 12, 5, 3
PLAN = PrivacyPlan(clip_norm=1.0, noise_multiplier=2.0, sampler=Poisson(rate=0.5), delta=1e-5, steps=40)


def losses(output: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(output, y, reduction="none")


def load(partition: int, partitions: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(partition)
    rows = 2 + partition
    return torch.randn(rows, INPUTS, generator=generator), torch.randint(0, CLASSES, (rows,), generator=generator)


def no_rows(partition: int, partitions: int) -> tuple[Tensor, Tensor]:
    raise FileNotFoundError("rows.csv")


def network(*between: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(INPUTS, 4), nn.Tanh(), *between, nn.Linear(4, CLASSES))


def task_of(plan: PrivacyPlan | None = None, *between: nn.Module) -> LocalTask:
    return LocalTask(
        model=network(*between), loss=losses, optimiser=Adam(lr=0.05), steps=3, batch_size=4, plan=plan
    )  # fmt: skip


def whole(result: SimulationResult) -> dict[str, np.ndarray]:
    record = result.context.state["arrays"]
    assert isinstance(record, ArrayRecord)
    return {name: array.numpy() for name, array in record.items()}


def same(one: SimulationResult, other: SimulationResult) -> bool:
    first, second = whole(one), whole(other)
    return list(first) == list(second) and all(np.array_equal(first[name], second[name]) for name in first)


class Seen:
    """A callback that keeps what it is told, and interrupts after a round if it should."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.records: list[RoundLog] = []
        self.begun: list[int] = []
        self.ended = 0
        self._stop_after = stop_after

    def begin(self, done: int) -> None:
        self.begun.append(done)

    def round(self, record: RoundLog) -> None:
        self.records.append(record)
        if record.round == self._stop_after:
            raise KeyboardInterrupt

    def end(self) -> None:
        self.ended += 1


class Failing:
    """A rule that is interrupted in its nth step, after the release it is about to use."""

    def __init__(self, step: int) -> None:
        self._left = step

    def __repr__(self) -> str:
        return repr(FedSgd(learning_rate=1.0))

    def init(self, weights: Vector) -> RuleState:
        return FedSgd(learning_rate=1.0).init(weights)

    def step(self, weights: Vector, mean: Vector, state: RuleState) -> tuple[Vector, RuleState]:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt
        return FedSgd(learning_rate=1.0).step(weights, mean, state)


def test_without_a_plan_it_is_federated_averaging() -> None:
    task, app = task_of(), ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=CLIENTS)
        context.state["arrays"] = strategy.start(grid, ArrayRecord(task.model.state_dict()), num_rounds=3).arrays

    stock = simulate(app, task.client_app(load), num_clients=CLIENTS, seed=0)
    ours = simulate(federation(task, rounds=3), task.client_app(load), num_clients=CLIENTS, seed=0)
    assert ours.updates == stock.updates == 3 * CLIENTS
    for name, weights in whole(stock).items():
        assert np.allclose(whole(ours)[name], weights, rtol=1e-5, atol=1e-6)


def test_running_statistics_take_their_mean_and_counts_stay(caplog: pytest.LogCaptureFixture) -> None:
    task, app = task_of(None, nn.BatchNorm1d(4)), ServerApp()
    app = federation(task, rounds=2, rule=FedAdaptive(learning_rate=0.1))
    result = whole(simulate(app, task.client_app(load), num_clients=CLIENTS, seed=0))
    assert result["2.num_batches_tracked"] == 0
    assert 0.0 < abs(result["2.running_mean"]).max() < 1.0
    assert np.isfinite(result["2.running_var"]).all()


@pytest.mark.parametrize(
    "plan", [None, PLAN, replace(PLAN, unit="client", divisor=6.0)], ids=["no", "example", "client"]
)
@pytest.mark.parametrize("every", [1, 3])
def test_a_resumed_run_gives_the_weights_of_an_uninterrupted_one(
    plan: PrivacyPlan | None, every: int, tmp_path: Path
) -> None:
    rule = FedAdaptive(learning_rate=0.1, yogi=True)
    cohort = FixedSize(size=5, population=CLIENTS) if plan is None or plan.unit == "example" else None

    def run(*callbacks: Seen, resume: bool = False, kept: bool = True) -> SimulationResult:
        task = task_of(plan, nn.Dropout(0.3)) if plan is None else task_of(plan)
        checkpoint = Checkpoint(path=tmp_path / "loop", every=every, resume=resume) if kept else None
        app = federation(task, rounds=6, cohort=cohort, rule=rule, callbacks=callbacks, checkpoint=checkpoint)
        return simulate(app, task.client_app(load), num_clients=CLIENTS, seed=4)

    expected = run(kept=False)
    for stop, resume in ((2, False), (5, True)):
        with pytest.raises(KeyboardInterrupt):
            run(Seen(stop), resume=resume)
    seen = Seen()
    assert same(run(seen, resume=True), expected)
    assert seen.begun == [5], "a callback that stops the run does not undo its round"
    assert [record.round for record in seen.records] == [6]
    assert same(run(resume=True), expected), "a finished run gives its weights"


def test_scaffold_is_that_of_the_stock_strategy_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    task = replace(task_of(), optimiser=Sgd(lr=0.1), algorithm=Scaffold())
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = ScaffoldStrategy(FedAvg(fraction_evaluate=0.0, min_available_nodes=CLIENTS), task)
        context.state["arrays"] = strategy.start(grid, ArrayRecord(task.model.state_dict()), num_rounds=4).arrays

    def run(*callbacks: Seen, resume: bool = False) -> SimulationResult:
        ours = federation(
            task, rounds=4, callbacks=callbacks, checkpoint=Checkpoint(path=tmp_path / "loop", resume=resume)
        )
        return simulate(ours, task.client_app(load), num_clients=CLIENTS, seed=0)

    stock = whole(simulate(app, task.client_app(load), num_clients=CLIENTS, seed=0))
    expected = run()
    assert all(np.allclose(weights, stock[name], rtol=1e-4, atol=1e-5) for name, weights in whole(expected).items())
    with pytest.raises(KeyboardInterrupt):
        run(Seen(2))
    assert same(run(resume=True), expected)


def test_a_population_is_sampled_whole_and_who_is_not_there_is_an_error(tmp_path: Path) -> None:
    task, seen = task_of(replace(PLAN, unit="client", sampler=Poisson(rate=1.0))), Seen()
    population = Population(dropout=0.5, seed=1)
    simulate(
        federation(task, rounds=6, callbacks=[seen]),
        task.client_app(load),
        num_clients=CLIENTS,
        seed=0,
        population=population,
    )
    assert {record.clients for record in seen.records} == {CLIENTS}
    assert all(record.replies + record.errors == CLIENTS for record in seen.records)
    assert 0 < sum(record.replies for record in seen.records) < 6 * CLIENTS
    app = federation(task, rounds=1, checkpoint=Checkpoint(path=tmp_path / "loop"))
    with pytest.raises(BadUsage, match="whose clock is not kept"):
        simulate(app, task.client_app(load), num_clients=CLIENTS, population=population)


def test_rounds_can_be_added_to_a_finished_run(tmp_path: Path) -> None:
    task = task_of()

    def run(rounds: int, *, resume: bool) -> SimulationResult:
        app = federation(task, rounds=rounds, checkpoint=Checkpoint(path=tmp_path / "loop", resume=resume))
        return simulate(app, task.client_app(load), num_clients=CLIENTS, seed=4)

    run(2, resume=False)
    longer = run(4, resume=True)
    assert same(longer, run(4, resume=False))


def interrupted(task: LocalTask, path: Path, *, step: int, rounds: int) -> None:
    app = federation(task, rounds=rounds, rule=Failing(step), checkpoint=Checkpoint(path=path))
    with pytest.raises(KeyboardInterrupt):
        simulate(app, task.client_app(load), num_clients=CLIENTS)


def resumed(task: LocalTask, path: Path, *, rounds: int) -> SimulationResult:
    app = federation(task, rounds=rounds, checkpoint=Checkpoint(path=path, resume=True))
    return simulate(app, task.client_app(load), num_clients=CLIENTS)


def test_a_release_that_may_have_been_made_is_charged_and_another_is_drawn(tmp_path: Path) -> None:
    plan = replace(PLAN, unit="client", steps=5)
    path = tmp_path / "loop"
    task = task_of(plan)
    interrupted(task, path, step=3, rounds=4)
    result = resumed(task, path, rounds=4)
    assert dict(result.context.state["loop"]) == {"round": 4, "releases": 5}
    assert not result.void
    # A plan for four releases has nothing left for the round that was lost.
    task = task_of(replace(plan, steps=4))
    interrupted(task, path, step=3, rounds=4)
    with pytest.raises(BudgetExceeded, match="got 3 releases made and 2 rounds to go, expected at most 4 in all"):
        resumed(task, path, rounds=4)


def test_a_lost_release_keeps_its_turn_in_a_cyclic_schedule(tmp_path: Path) -> None:
    asked: list[int] = []

    def noted(partition: int, partitions: int) -> tuple[Tensor, Tensor]:
        asked.append(partition)
        return load(partition, partitions)

    plan = replace(PLAN, unit="client", steps=5, sampler=Cyclic(period=CLIENTS))
    task, path = task_of(plan), tmp_path / "loop"
    for rule, resume in ((Failing(2), False), (FedSgd(learning_rate=1.0), True)):
        app = federation(task, rounds=3, rule=rule, checkpoint=Checkpoint(path=path, resume=resume))
        try:
            simulate(app, task.client_app(noted), num_clients=CLIENTS)
        except KeyboardInterrupt:
            assert not resume
    assert asked == [0, 1, 2, 3], "client 1 paid in the lost round, and is not asked again"


def test_a_device_pays_for_the_round_that_was_lost(tmp_path: Path) -> None:
    # Three steps a round: the plan has room for three rounds.
    task, path = task_of(replace(PLAN, steps=9)), tmp_path / "loop"
    interrupted(task, path, step=2, rounds=3)
    seen = Seen()
    app = federation(task, rounds=3, callbacks=[seen], checkpoint=Checkpoint(path=path, resume=True))
    simulate(app, task.client_app(load), num_clients=CLIENTS)
    assert [(record.round, record.replies, record.errors) for record in seen.records] == [
        (2, CLIENTS, 0),
        (3, 0, CLIENTS),
    ]


def test_with_a_seed_a_repeated_release_is_the_same_one(tmp_path: Path) -> None:
    task = task_of(replace(PLAN, unit="client", steps=4))

    def run(step: int, *, resume: bool = False) -> SimulationResult:
        app = federation(
            task, rounds=4, rule=Failing(step), checkpoint=Checkpoint(path=tmp_path / "loop", resume=resume)
        )
        return simulate(app, task.client_app(load), num_clients=CLIENTS, seed=1)

    expected = run(0)
    with pytest.raises(KeyboardInterrupt):
        run(3)
    assert same(run(0, resume=True), expected)


def frozen(partition: int, partitions: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(0, INPUTS), torch.zeros(0, dtype=torch.int64)


def test_the_plans_noise_is_in_the_weights_and_a_client_moves_them_by_the_clip() -> None:
    net = nn.Linear(INPUTS, 2000)
    plan = PrivacyPlan(
        unit="client", clip_norm=0.25, noise_multiplier=3.0, sampler=Poisson(rate=1.0), delta=1e-5, steps=1, divisor=8.0
    )
    task = LocalTask(model=net, loss=losses, optimiser=Sgd(lr=50.0), steps=1, batch_size=4, plan=plan)

    def moves(rows) -> tuple[np.ndarray, float | None]:
        seen = Seen()
        result = simulate(federation(task, rounds=1, callbacks=[seen]), task.client_app(rows), num_clients=1, seed=3)
        start = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
        return np.concatenate([(after - start[n]).ravel() for n, after in whole(result).items()]), seen.records[0].loss

    still, _ = moves(frozen)
    # 12,000 numbers: the deviation of their deviation is 0.65 %, and seven of them are past 1e-9.
    assert np.std(still) == pytest.approx(3.0 * 0.25 / 8.0, rel=0.05)
    moved, loss = moves(load)
    assert loss is None
    assert np.linalg.norm(moved - still) == pytest.approx(0.25 / 8.0, rel=1e-3), "the same noise, and the clip"


def test_each_round_has_a_cohort_and_noise_of_its_own() -> None:
    cohorts: list[set[int]] = []

    def noted(partition: int, partitions: int) -> tuple[Tensor, Tensor]:
        cohorts[-1].add(partition)
        return load(partition, partitions)

    class Marks(Seen):
        def begin(self, done: int) -> None:
            cohorts.append(set())

        def round(self, record: RoundLog) -> None:
            cohorts.append(set())

    task = task_of()
    cohort = FixedSize(size=4, population=CLIENTS)
    # Too little memory to keep rows: each client of a cohort loads its own again.
    simulate(
        federation(task, rounds=4, cohort=cohort, callbacks=[Marks()]),
        task.client_app(noted),
        num_clients=CLIENTS,
        seed=2,
        memory_bytes=1,
    )
    assert [len(own) for own in cohorts] == [4, 4, 4, 4, 0]
    assert len({frozenset(own) for own in cohorts[:4]}) > 1
    plan = replace(PLAN, unit="client", sampler=Poisson(rate=1.0))
    one, two = (
        np.concatenate([array.ravel() for array in whole(noise_alone(plan, rounds)).values()]) for rounds in (1, 2)
    )
    start = np.concatenate([tensor.numpy().ravel() for tensor in task.model.state_dict().values()])
    assert not np.allclose(two - one, one - start), "the same noise twice would cancel in a difference"


def noise_alone(plan: PrivacyPlan, rounds: int) -> SimulationResult:
    """Of clients without rows, from the starting weights of `task_of`."""
    task = task_of(plan)
    return simulate(federation(task, rounds=rounds), task.client_app(frozen), num_clients=CLIENTS, seed=2)


def test_a_client_that_fails_counts_as_zero_under_a_plan_and_ends_a_run_without() -> None:
    plan = replace(PLAN, unit="client", divisor=6.0)
    task = task_of(plan)
    seen = Seen()
    simulate(federation(task, rounds=2, callbacks=[seen]), task.client_app(no_rows), num_clients=CLIENTS)
    assert [record.replies for record in seen.records] == [0, 0]
    assert all(record.errors == record.clients for record in seen.records)
    assert seen.ended == 1
    task, seen = task_of(), Seen()
    with pytest.raises(RoundFailed, match=r"round 1: got no answer of 12 clients, expected at least one; .*rows\.csv"):
        simulate(federation(task, rounds=2, callbacks=[seen]), task.client_app(no_rows), num_clients=CLIENTS)
    assert seen.ended == 1


def test_rounds_are_told_as_they_were() -> None:
    task, seen = task_of(), Seen()
    asked: list[dict[str, Tensor]] = []

    def evaluate(state: Mapping[str, Tensor]) -> Mapping[str, float]:
        asked.append(dict(state))
        return {"norm": float(sum(tensor.square().sum() for tensor in state.values()))}

    app = federation(
        task, rounds=5, cohort=Cyclic(period=4), evaluate=evaluate, evaluate_every=2, callbacks=[seen]
    )  # fmt: skip
    simulate(app, task.client_app(load), num_clients=CLIENTS)
    assert [record.round for record in seen.records] == list(range(6))
    assert [bool(record.metrics) for record in seen.records] == [True, False, True, False, True, True]
    assert [record.clients for record in seen.records] == [0, 3, 3, 3, 3, 3]
    assert all(record.replies == record.clients and record.errors == 0 for record in seen.records)
    assert seen.records[0].loss is None
    assert all(
        record.loss is not None and record.seconds > 0 and record.updates_per_s > 0 for record in seen.records[1:]
    )
    assert all(torch.equal(asked[0][name], tensor) for name, tensor in task.model.state_dict().items())


@pytest.mark.parametrize("seed", [None, 7])
def test_an_empty_cohort_is_a_round_without_a_move(seed: int | None) -> None:
    task = task_of()
    app = federation(task, rounds=3, cohort=Poisson(rate=1e-9))
    result = whole(simulate(app, task.client_app(load), num_clients=CLIENTS, seed=seed))
    assert all(np.array_equal(result[name], tensor.numpy()) for name, tensor in task.model.state_dict().items())


def test_a_checkpoint_is_for_its_own_run_and_for_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "loop"

    def run(task: LocalTask | None = None, *, resume: bool = True, seed: int = 0, **fields: object) -> None:
        used = task_of() if task is None else task
        app = federation(used, rounds=2, checkpoint=Checkpoint(path=path, resume=resume), **fields)
        simulate(app, used.client_app(load), num_clients=CLIENTS, seed=seed)

    with pytest.raises(CheckpointError, match="got no such file"):
        run()
    run(resume=False)
    run()
    for other in (
        {"seed": 1},
        {"rule": FedSgd(learning_rate=0.5)},
        {"cohort": Poisson(rate=0.5)},
        {"task": replace(task_of(), steps=4)},
        {"task": replace(task_of(), plan=PLAN)},
    ):
        with pytest.raises(CheckpointError, match="other settings"):
            run(**other)
    data = path.read_bytes()
    for torn in (data[: len(data) // 2], b"", b"torn"):
        path.write_bytes(torn)
        with pytest.raises(CheckpointError, match="got a file that is not a checkpoint"):
            run()
    assert [item.name for item in tmp_path.iterdir()] == ["loop"]


def test_the_checkpoint_holds_no_row_and_says_where_it_stands(tmp_path: Path) -> None:
    path, task = tmp_path / "loop", task_of()
    app = federation(task, rounds=2, checkpoint=Checkpoint(path=path))
    simulate(app, task.client_app(load), num_clients=CLIENTS, seed=0)
    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["fedinfer-simulation"])
        names = set(file.keys())
    assert (header["round"], header["releases"], header["begun"]) == (2, 0, False)
    assert names == {f"weights.{name}" for name in task.model.state_dict()} | {
        "rule.velocity", "begun", "nodes", "node_ids", "node_bytes"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rounds": 0}, "rounds: got 0"),
        ({"rounds": 1, "evaluate_every": 0}, "evaluate_every: got 0"),
        ({"rounds": 1, "cohort": Poisson(rate=0.1)}, "cohort: got .* expected that of the plan"),
    ],
)
def test_a_federation_that_cannot_be_is_refused(fields: dict[str, object], expected: str) -> None:
    with pytest.raises(BadUsage, match=expected):
        federation(task_of(replace(PLAN, unit="client")), **fields)


def test_another_grid_is_refused() -> None:
    class Other(Grid):
        def nothing(self, *args: object) -> Iterator[None]:
            raise AssertionError

        set_run = create_message = get_node_ids = get_nodes = push_messages = pull_messages = send_and_receive = nothing
        run = property(nothing)

    app = federation(task_of(), rounds=1)
    context = Context(run_id=1, node_id=0, node_config={}, state=None, run_config={})
    with pytest.raises(BadUsage, match="got a Other, expected a grid of"):
        app(Other(), context)


def test_a_checkpoint_every_no_round_is_refused() -> None:
    with pytest.raises(BadUsage, match="every=0"):
        Checkpoint(path=Path("loop"), every=0)


def test_a_stranger_on_the_grid_says_what_is_missing() -> None:
    with pytest.raises(RoundFailed, match="got no answer"):
        simulate(federation(task_of(), rounds=1), ClientApp(), num_clients=2)
