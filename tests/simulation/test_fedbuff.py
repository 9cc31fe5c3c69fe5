"""Buffered asynchronous rounds: staleness, cohorts, privacy, and what they are for: virtual time."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from fedinfer.data.partitions import LabelDirichlet
from fedinfer.errors import BadInput, BadUsage, RoundFailed
from fedinfer.local_app import SEED_KEY, LocalApp
from fedinfer.privacy import Cyclic, Poisson, PrivacyPlan, insecure_seeded_noise
from fedinfer.privacy.samplers import Sampler
from fedinfer.rules import FedSgd
from fedinfer.simulation import (
    BufferedStep,
    FedBuff,
    LogNormalSeconds,
    OnOff,
    PopulatedGrid,
    Population,
    RecordedTrace,
    simulate,
)
from fedinfer.simulation.engines import CohortSum, OneByOne, Task
from fedinfer.simulation.grid import run_on
from fedinfer.simulation.vectorised import Vectorised
from fedinfer.training import LocalTask, Sgd
from tests.simulation.test_clock import Given
from tests.simulation.test_simulate import losses

SPREAD = Population(seconds=LogNormalSeconds(median_s=10.0, sigma=1.0), dropout=0.1, seed=2)


def adding(update: Callable[[int], np.ndarray], *, loss: bool = True) -> ClientApp:
    """A client that adds `update(client)` to what it was sent."""
    client = ClientApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        own = update(int(context.node_config["partition-id"]))
        after = message.content["arrays"]["w"].numpy() + own
        metrics = MetricRecord({"num-examples": 7, "loss": 2.0} if loss else {"num-examples": 7})
        content = RecordDict({"arrays": ArrayRecord({"w": Array(after.astype(np.float32))}), "metrics": metrics})
        return Message(content, reply_to=message)

    return client


def run(
    fedbuff: FedBuff, client_app: ClientApp, population: Population, *, clients: int, steps: int, size: int = 1
) -> list[BufferedStep]:
    app = ServerApp()
    found: list[BufferedStep] = []

    @app.main()
    def main(grid: PopulatedGrid, context: Context) -> None:
        start = ArrayRecord({"w": Array(np.zeros(size, np.float32))})
        found.extend(fedbuff.run(grid, start, steps=steps, stream=insecure_seeded_noise("fedbuff")))

    simulate(app, client_app, num_clients=clients, seed=0, population=population)
    return found


def weights(steps: list[BufferedStep]) -> np.ndarray:
    """The weights (steps, d) after each step."""
    return np.array([step.arrays["w"].numpy() for step in steps])


def test_an_old_answer_weighs_one_over_the_root_of_one_plus_its_age() -> None:
    """Client 0 answers each second and adds 1; client 1 after three seconds and a half, and adds 10."""
    population = Population(seconds=Given(seconds=(1.0, 3.5)))
    steps = run(
        FedBuff(buffer=1, concurrency=2),
        adding(lambda client: np.array([1.0 + 9.0 * client])),
        population,
        clients=2,
        steps=9,
    )
    assert [step.at_s for step in steps] == [1.0, 2.0, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 7.0]
    stale = [0, 0, 0, 3, 1, 0, 0]
    assert [step.staleness for step in steps][:7] == [(s,) for s in stale]
    added = [1.0, 1.0, 1.0, 10.0 / np.sqrt(4.0), 1.0 / np.sqrt(2.0), 1.0, 1.0]
    assert weights(steps)[:7, 0] == pytest.approx(np.cumsum(added), rel=1e-6)
    assert [step.loss for step in steps] == [2.0] * 9


def test_with_everybody_in_each_buffer_it_is_federated_averaging() -> None:
    update = np.random.default_rng(0).normal(size=(6, 4))
    steps = run(
        FedBuff(buffer=6, concurrency=6, rule=FedSgd(learning_rate=0.5, momentum=0.9)),
        adding(update.__getitem__, loss=False),
        Population(),
        clients=6,
        steps=3,
        size=4,
    )
    mean = 0.5 * update.mean(0)
    expected = np.cumsum([mean, 1.9 * mean, (1.0 + 0.9 * 1.9) * mean], axis=0)
    assert np.allclose(weights(steps), expected, atol=1e-6)
    assert [(step.number, step.at_s, step.staleness, step.loss) for step in steps] == [
        (number, float(number), (0,) * 6, None) for number in (1, 2, 3)
    ]


def test_errors_do_not_fill_a_buffer_and_are_counted() -> None:
    population = Population(dropout=0.5, seed=1)
    steps = run(FedBuff(buffer=3, concurrency=5), adding(lambda _: np.ones(1)), population, clients=20, steps=30)
    assert all(len(step.staleness) == 3 for step in steps)
    lost = sum(step.lost for step in steps)
    assert 0.3 < lost / (lost + 90) < 0.7


def task_on(rows: Callable[[int], int]) -> LocalApp:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))

    def load(partition: int, partitions: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(partition)
        x = torch.randn(rows(partition), 5, generator=generator)
        return x, torch.randint(0, 3, (len(x),), generator=generator)

    return LocalTask(model=net, loss=losses, optimiser=Sgd(lr=0.3), steps=2, batch_size=4).client_app(load)


class Watched:
    """An engine that remembers how many clients it was given at a time."""

    def __init__(self, engine: Vectorised) -> None:
        self._engine = engine
        self.cohorts: list[int] = []

    def replies(self, tasks: list[Task]):
        self.cohorts.append(len(tasks))
        return self._engine.replies(tasks)

    def total(self, tasks: list[Task]) -> CohortSum:
        return self._engine.total(tasks)

    def close(self) -> None:
        self._engine.close()


def test_cohorts_as_one_program_give_what_the_devices_own_code_gives() -> None:
    client_app = task_on(lambda partition: 3 + partition % 5)
    watched = Watched(Vectorised(client_app, memory_bytes=1 << 20, workers=1))
    found: list[list[BufferedStep]] = []
    for engine in (OneByOne(client_app), watched):
        app = ServerApp()

        @app.main()
        def main(grid: PopulatedGrid, context: Context) -> None:
            arrays = ArrayRecord(client_app.task.model.state_dict())
            run = FedBuff(buffer=5, concurrency=20).run(grid, arrays, steps=12, stream=insecure_seeded_noise("x"))
            found.append(list(run))

        grid = PopulatedGrid(
            engine,
            population=SPREAD,
            plan=None,
            nodes=40,
            configure=lambda index: {"partition-id": index, "num-partitions": 40, SEED_KEY: 3},
            run_config={},
        )
        run_on(app, grid, {})
        engine.close()
    for one, other in zip(*found, strict=True):
        assert (one.at_s, one.staleness, one.lost) == (other.at_s, other.staleness, other.lost)
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        for name, array in one.arrays.items():
            assert np.allclose(array.numpy(), other.arrays[name].numpy(), rtol=1e-4, atol=1e-5)
    assert max(max(step.staleness) for step in found[0]) >= 4
    # Sixty answers; the first twenty clients run together, and later ones in groups.
    assert watched.cohorts[0] >= 15
    assert len(watched.cohorts) < 25


def test_a_seed_repeats_a_run_to_the_bit() -> None:
    client_app = task_on(lambda _: 6)
    arrays = client_app.task.model.state_dict()
    found = []
    app = ServerApp()

    @app.main()
    def main(grid: PopulatedGrid, context: Context) -> None:
        stream = insecure_seeded_noise(f"run {grid.population.seed}")
        found.append(list(FedBuff(buffer=4, concurrency=9).run(grid, ArrayRecord(arrays), steps=5, stream=stream)))

    for seed in (0, 0, 1):
        simulate(app, client_app, num_clients=30, seed=seed, population=replace(SPREAD, seed=seed))
    first, second, other = ([(step.at_s, step.staleness) for step in steps] for steps in found)
    assert first == second
    assert first != other
    for one, two in zip(found[0], found[1], strict=True):
        assert all(np.array_equal(array.numpy(), two.arrays[name].numpy()) for name, array in one.arrays.items())


CLIENTS, STEPS, PERIOD, BUFFER = 24, 20, 4, 3


def plan_of(sampler: Sampler, **fields: object) -> PrivacyPlan:
    values = {
        "clip_norm": 0.5,
        "noise_multiplier": 0.7,
        "delta": 1e-5,
        "steps": STEPS,
        "divisor": 3.0,
        "unit": "client",
    }
    return PrivacyPlan(**{**values, "sampler": sampler, **fields})


PLAN = plan_of(Cyclic(period=PERIOD))


def moves(update: Callable[[int], np.ndarray], plan: PrivacyPlan | None) -> np.ndarray:
    """What each step adds to the weights (steps, d)."""
    fedbuff = FedBuff(buffer=BUFFER, concurrency=6, plan=plan)
    steps = run(fedbuff, adding(update), SPREAD, clients=CLIENTS, steps=STEPS, size=CLIENTS)
    assert plan is None or all(step.loss is None for step in steps)
    return np.diff(weights(steps), axis=0, prepend=0.0)


def taken_part(plan: PrivacyPlan | None) -> np.ndarray:
    """Who is in which step (steps, clients): noise and schedule repeat, so that what differs from zeros is theirs."""
    return np.abs(moves(lambda client: np.eye(CLIENTS)[client], plan) - moves(lambda _: np.zeros(CLIENTS), plan)) > 1e-3


def test_of_any_period_in_a_row_a_client_is_in_one_step_at_most() -> None:
    def closest(taken: np.ndarray) -> int:
        gaps = [after - before for own in taken.T for before, after in pairwise(np.flatnonzero(own))]
        return min(gaps, default=STEPS)

    private, free = taken_part(PLAN), taken_part(None)
    assert (private.sum(1) == BUFFER).all()
    assert closest(private) >= PERIOD
    assert private.sum(0).max() <= PLAN.sampler.participations(STEPS)
    assert closest(free) < PERIOD, "without the plan somebody is, so that this test can fail"


def test_one_client_moves_a_step_by_its_clip_at_most_and_the_rest_not_at_all() -> None:
    """The attack: a client of huge updates, and a client of NaN, against the same run with zeros in their place."""
    direction = np.random.default_rng(0).normal(size=CLIENTS)
    for shout in (1e6 * direction, 1e-2 * direction, np.full(CLIENTS, np.nan)):
        for target in (0, 5):
            with_client = moves(lambda client: shout if client == target else np.zeros(CLIENTS), PLAN)  # noqa: B023
            without = moves(lambda _: np.zeros(CLIENTS), PLAN)
            differences = np.linalg.norm(with_client - without, axis=1)
            assert differences.max() <= PLAN.clip_norm / PLAN.divisor + 1e-5
            assert (differences > 1e-4).sum() <= PLAN.sampler.participations(STEPS)
    naive = moves(lambda client: 1e6 * direction if client == 0 else np.zeros(CLIENTS), None)
    assert np.linalg.norm(naive, axis=1).max() > 1e5


def test_a_private_step_has_the_plans_noise() -> None:
    noise = moves(lambda _: np.zeros(CLIENTS), PLAN)
    assert noise.std() == pytest.approx(PLAN.clip_norm * PLAN.noise_multiplier / PLAN.divisor, rel=0.12)
    assert moves(lambda _: np.zeros(CLIENTS), None).std() == 0.0


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"buffer": 0}, "buffer: got 0"),
        ({"concurrency": 0}, "concurrency: got 0"),
        ({"plan": plan_of(Poisson(rate=0.1))}, "no sampling can be claimed"),
        ({"plan": plan_of(Poisson(rate=0.1), adversary="outsider")}, "no sampling can be claimed"),
        ({"plan": plan_of(Cyclic(period=2), unit="example")}, "no sampling can be claimed"),
        ({"plan": plan_of(Cyclic(period=2), divisor=1.0)}, "expected the buffer's 3"),
    ],
)
def test_a_buffer_that_cannot_be_is_refused(fields: Mapping[str, object], expected: str) -> None:
    with pytest.raises(BadUsage, match=expected):
        FedBuff(**{"buffer": 3, "concurrency": 3, **fields})


def test_a_plan_is_kept_or_the_run_does_not_begin() -> None:
    private = FedBuff(buffer=BUFFER, concurrency=6, plan=PLAN)
    ones = adding(lambda _: np.ones(1))
    with pytest.raises(BadUsage, match="at most the plan's 20"):
        run(private, ones, SPREAD, clients=CLIENTS, steps=STEPS + 1)
    with pytest.raises(BadUsage, match="expected at least 12"):
        run(private, ones, SPREAD, clients=11, steps=1)
    task = replace(task_on(lambda _: 5).task, plan=PLAN)
    for other in (None, replace(PLAN, noise_multiplier=0.8)):
        with pytest.raises(BadUsage, match="expected the same plan"):
            run(replace(private, plan=other), task.client_app(lambda *_: None), SPREAD, clients=CLIENTS, steps=1)


def test_a_period_just_long_enough_never_blocks() -> None:
    private = FedBuff(buffer=BUFFER, concurrency=50, plan=PLAN)
    assert len(run(private, adding(lambda _: np.ones(1)), SPREAD, clients=BUFFER * PERIOD, steps=STEPS)) == STEPS


def test_a_server_waits_for_clients_that_come_and_gives_up_on_a_trace_that_has_ended() -> None:
    ones = adding(lambda _: np.ones(1))
    late = RecordedTrace(client=np.arange(3), start_s=np.full(3, 1e4), end_s=np.full(3, 1.01e4))
    (step,) = run(FedBuff(buffer=2, concurrency=2), ones, Population(availability=late), clients=3, steps=1)
    assert 1e4 < step.at_s < 1e4 + 100.0
    with pytest.raises(RoundFailed, match="nobody to ask for a week"):
        run(FedBuff(buffer=2, concurrency=2), ones, Population(availability=late), clients=3, steps=200)
    coming = Population(availability=OnOff(mean_on_s=50.0, mean_off_s=500.0), seconds=Given(seconds=(20.0,) * 30))
    assert len(run(FedBuff(buffer=4, concurrency=8), ones, coming, clients=30, steps=10)) == 10


def test_a_reply_without_the_weights_is_told() -> None:
    client = ClientApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    with pytest.raises(BadInput, match="expected the new weights"):
        run(FedBuff(buffer=1, concurrency=1), client, Population(), clients=2, steps=1)


def test_it_reaches_an_accuracy_on_digits_long_before_rounds_that_wait_for_stragglers() -> None:
    digits = load_digits()
    x, y = torch.from_numpy(digits.data / 16.0).float(), torch.from_numpy(digits.target)
    held_out = torch.arange(len(x)) % 4 == 0
    division = LabelDirichlet(alpha=0.5).divide(y[~held_out].numpy(), 60)
    net = nn.Linear(64, 10)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    task = LocalTask(model=net, loss=losses, optimiser=Sgd(lr=0.5), epochs=1, batch_size=8)
    client_app = task.client_app(division.load(x[~held_out], y[~held_out]))
    population = Population(seconds=LogNormalSeconds(median_s=10.0, sigma=1.2))
    reached: dict[str, float] = {}

    def accuracy(arrays: Mapping[str, np.ndarray]) -> float:
        output = functional.linear(x[held_out], *(torch.from_numpy(arrays[name]) for name in ("weight", "bias")))
        return float((output.argmax(1) == y[held_out]).float().mean())

    app = ServerApp()

    @app.main()
    def main(grid: PopulatedGrid, context: Context) -> None:
        stream = insecure_seeded_noise("digits")
        state = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
        if context.run_config["kind"] == "buffered":
            for step in FedBuff(buffer=5, concurrency=15).run(
                grid, ArrayRecord(net.state_dict()), steps=300, stream=stream
            ):
                if accuracy({name: array.numpy() for name, array in step.arrays.items()}) > 0.9:
                    break
        for _ in range(100):
            if context.run_config["kind"] == "buffered" or accuracy(state) > 0.9:
                break
            chosen = np.argsort(stream.uniform(60))[:15]
            content = RecordDict({"arrays": ArrayRecord({name: Array(array) for name, array in state.items()})})
            total = grid.sum_of_updates(content, [grid.nodes[client] for client in chosen])
            state = {
                name: (array + total.update[name] / total.weight).astype(np.float32) for name, array in state.items()
            }
        else:
            pytest.fail("0.9 was not reached")
        reached[str(context.run_config["kind"])] = grid.clock.now_s

    for kind in ("buffered", "synchronous"):
        simulate(app, client_app, num_clients=60, seed=0, population=population, run_config={"kind": kind})
    assert reached["buffered"] < 0.5 * reached["synchronous"]
