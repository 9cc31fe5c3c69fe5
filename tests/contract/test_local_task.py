"""The contract of a local task: a cohort as one program gives each client what the device's own code gives it."""

import logging
import math
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from torch import Tensor, nn
from torch.nn import functional

from fedinfer.algorithms import Algorithm
from fedinfer.errors import BadUsage
from fedinfer.local_app import MEMORY_KEY, SEED_KEY, LocalApp
from fedinfer.local_task import trained
from fedinfer.optimisers import Optimiser
from fedinfer.privacy import Cyclic, Poisson, PrivacyPlan, insecure_seeded_noise
from fedinfer.simulation import stacked
from fedinfer.simulation.engines import Engine, OneByOne
from fedinfer.simulation.grid import SimulatedGrid, run_on
from fedinfer.simulation.stacked import LinearStack, Stack, VmapStack, choose
from fedinfer.simulation.turns import Turns
from fedinfer.simulation.vectorised import Vectorised
from fedinfer.training import Adam, Ditto, FedAvg, FedProx, LocalParameters, LocalTask, Scaffold, Sgd

SIZES = (7, 0, 1, 12, 5, 12, 30)
INPUTS, CLASSES = 6, 3
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


class OwnForward(nn.Module):
    """Linear layers of which one is frozen and one has no bias, and code of its own between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(INPUTS, 5, bias=False)
        self.frozen = nn.Linear(5, 4)
        self.last = nn.Linear(4, CLASSES)
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.tensor([0.5]))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x.flatten(1))) * self.scale
        return functional.log_softmax(self.last(functional.relu(self.frozen(hidden))), dim=1)


class Tied(nn.Module):
    """One weight that stands in two places, and is used in a third."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(INPUTS, INPUTS)
        self.two = nn.Linear(INPUTS, INPUTS)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.two(torch.tanh(self.one(x))), self.one.weight)[:, :CLASSES]


class Mixing(nn.Module):
    """Its examples are not independent: each is measured against the mean of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(INPUTS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        output = self.layer(x)
        return output - 0.5 * output.mean(0)


MODELS = {
    "logistic": lambda: nn.Linear(INPUTS, CLASSES),
    "mlp": lambda: nn.Sequential(nn.Linear(INPUTS, 8), nn.ReLU(inplace=True), nn.Linear(8, CLASSES)),
    "own forward": OwnForward,
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, INPUTS)), nn.Conv1d(1, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    ),
    "cnn": lambda: nn.Sequential(
        nn.Linear(INPUTS, 49, bias=False),
        nn.Unflatten(1, (1, 7, 7)),
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 3, 2, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(27, CLASSES),
    ),
    "tied": Tied,
}
KINDS = [(model, plan) for model in MODELS for plan in ("none", "example", "client")]
OPTIMISERS = {"sgd": Sgd(lr=0.2), "momentum": Sgd(lr=0.1, momentum=0.7), "adam": Adam(lr=0.02)}
LAST = {"mlp": "2.*", "own forward": "last.*", "convolution": "5.*", "tied": "two.*"}
ALGORITHMS = {
    "fedprox": dict.fromkeys(LAST, FedProx(mu=0.3)),
    "scaffold": dict.fromkeys(LAST, Scaffold()),
    "local": {model: LocalParameters(names=(pattern,)) for model, pattern in LAST.items()},
    "ditto": dict.fromkeys(LAST, Ditto(mu=0.3)),
}
ALGORITHM_CASES = [
    (model, algorithm, plan, "sgd" if algorithm == "scaffold" else "adam", torch.float64)
    for model in LAST
    for algorithm in ALGORITHMS
    for plan in ("none", "example", "client")
    if (algorithm, plan) != ("scaffold", "client")
] + [
    ("mlp", algorithm, plan, "sgd" if algorithm == "scaffold" else "momentum", torch.float32)
    for algorithm in ALGORITHMS
    for plan in ("none", "example")
]


def plan_of(kind: str) -> PrivacyPlan | None:
    if kind == "none":
        return None
    unit = "client" if kind == "client" else "example"
    sampler = Cyclic(period=4) if kind == "cyclic" else Poisson(rate=0.4)
    return PrivacyPlan(
        unit=unit, clip_norm=0.1, noise_multiplier=1.1, sampler=sampler, delta=1e-5, steps=100, divisor=4.0
    )


def cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(output, y, reduction="none")


def loader(dtype: torch.dtype):
    def load(partition: int, partitions: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(partition)
        rows = SIZES[partition]
        x = torch.randn(rows, INPUTS, generator=generator, dtype=dtype)
        return x, torch.randint(0, CLASSES, (rows,), generator=generator)

    return load


def task_of(
    model: str,
    optimiser: Optimiser,
    plan: str,
    dtype: torch.dtype,
    *,
    epochs: bool = False,
    algorithm: Algorithm = FedAvg(),  # noqa: B008 (frozen)
) -> LocalTask:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = MODELS[model]().to(dtype)
    times = {"epochs": 2} if epochs else {"steps": 3}
    return LocalTask(
        model=net,
        loss=cross_entropy,
        optimiser=optimiser,
        batch_size=5,
        plan=plan_of(plan),
        algorithm=algorithm,
        **times,
    )


def answers(engine: Engine, task: LocalTask, rounds: int = 2) -> Iterator[Mapping[int, RecordDict]]:
    """What each node answers in each round; in the second each is sent what it answered in the first.

    Besides it is sent control variates, where the task wants them, and after the last round asked to evaluate. What a
    node remembers stands beside its answer, as "memory".
    """
    grid = SimulatedGrid(
        engine,
        nodes=len(SIZES),
        configure=lambda index: {"partition-id": index, "num-partitions": len(SIZES), SEED_KEY: 3},
        run_config={},
    )
    found: list[Mapping[int, RecordDict]] = []
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        start = ArrayRecord(task.model.state_dict())
        sent = {node: RecordDict({"arrays": start}) for node in grid.get_node_ids()}
        for number in range(rounds):
            if isinstance(task.algorithm, Scaffold):
                control = {n: torch.full_like(v, 0.1 * (number + 1)) for n, v in trained(task.model)}
                record = ArrayRecord(control)
                for content in sent.values():
                    content["control"] = record
            found.append(asked(grid, "train", sent))
            sent = {node: RecordDict({"arrays": own["arrays"]}) for node, own in found[-1].items()}
            for node, own in found[-1].items():
                kept = grid._contexts[node].state.get(MEMORY_KEY)
                if kept is not None:
                    own["memory"] = ArrayRecord(kept.to_torch_state_dict())
        if task.plan is None:
            found.append(asked(grid, "evaluate", sent))

    run_on(app, grid, {})
    engine.close()
    yield from found


def asked(grid: Grid, kind: str, sent: Mapping[int, RecordDict]) -> dict[int, RecordDict]:
    replies = list(grid.send_and_receive([Message(own, node, kind) for node, own in sent.items()]))
    assert not any(reply.has_error() for reply in replies), [r.error for r in replies if r.has_error()]
    return {reply.metadata.src_node_id: reply.content for reply in replies}


def check_same(task: LocalTask, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    app = LocalApp(task, loader(dtype))
    tolerance = TOLERANCE[dtype]
    keeps = isinstance(task.algorithm, Scaffold | LocalParameters | Ditto)
    with caplog.at_level(logging.DEBUG, "fedinfer.simulation"):
        pairs = zip(answers(OneByOne(app), task), answers(Vectorised(app, memory_bytes=1 << 20), task), strict=True)
        for expected, got in pairs:
            assert set(expected) == set(got)
            for node, own in expected.items():
                assert set(own) == set(got[node])
                assert ("memory" in own) == (keeps and "arrays" in own)
                for record, arrays in own.array_records.items():
                    assert set(arrays) == set(got[node][record])
                    for name, array in arrays.items():
                        want, have = array.numpy(), got[node][record][name].numpy()
                        assert have.dtype == want.dtype
                        assert np.abs(have - want).max() <= tolerance * np.abs(want).max()
                assert set(own["metrics"]) == set(got[node]["metrics"])
                assert own["metrics"]["num-examples"] == got[node]["metrics"]["num-examples"]
                if "loss" in own["metrics"]:
                    assert got[node]["metrics"]["loss"] == pytest.approx(own["metrics"]["loss"], rel=tolerance)
    assert caplog.records == [], "it ran as one program"


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize(("model", "plan"), KINDS)
def test_a_cohort_gives_what_each_device_gives(
    model: str, optimiser: str, plan: str, caplog: pytest.LogCaptureFixture
) -> None:
    check_same(task_of(model, OPTIMISERS[optimiser], plan, torch.float64), torch.float64, caplog)


@pytest.mark.parametrize("plan", ["none", "example", "client"])
@pytest.mark.parametrize("model", ["mlp", "own forward", "convolution"])
def test_the_same_in_single_precision(model: str, plan: str, caplog: pytest.LogCaptureFixture) -> None:
    optimiser = OPTIMISERS["momentum" if model == "mlp" else "adam"]
    check_same(task_of(model, optimiser, plan, torch.float32), torch.float32, caplog)


@pytest.mark.parametrize("plan", ["none", "example", "client"])
@pytest.mark.parametrize("model", ["own forward", "cnn", "tied"])
def test_clients_of_large_models_take_turns_and_give_the_same(
    model: str, plan: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacked, "makers", lambda task: (Turns,))
    for dtype in (torch.float32, torch.float64):
        check_same(task_of(model, OPTIMISERS["momentum"], plan, dtype, epochs=plan == "none"), dtype, caplog)


def test_examples_that_mix_do_so_within_their_batch(caplog: pytest.LogCaptureFixture) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = Mixing().double()
    task = LocalTask(model=net, loss=cross_entropy, optimiser=Sgd(lr=0.1), epochs=2, batch_size=5)
    check_same(task, torch.float64, caplog)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_epochs_of_clients_with_unlike_numbers_of_batches(optimiser: str, caplog: pytest.LogCaptureFixture) -> None:
    task = task_of("mlp", OPTIMISERS[optimiser], "none", torch.float64, epochs=True)
    check_same(task, torch.float64, caplog)


@pytest.mark.parametrize(("model", "algorithm", "plan", "optimiser", "dtype"), ALGORITHM_CASES)
def test_an_algorithm_is_the_same_for_a_cohort(
    model: str, algorithm: str, plan: str, optimiser: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    task = task_of(
        model,
        OPTIMISERS[optimiser],
        plan,
        dtype,
        epochs=plan == "none" and dtype == torch.float64,
        algorithm=ALGORITHMS[algorithm][model],
    )
    check_same(task, dtype, caplog)


@pytest.mark.parametrize("epochs", [False, True])
def test_a_schedule_goes_on_from_round_to_round(epochs: bool, caplog: pytest.LogCaptureFixture) -> None:
    task = task_of("mlp", Sgd(lr=0.1), "cyclic", torch.float64, epochs=epochs)
    assert task.releases == (8 if epochs else 3)
    check_same(task, torch.float64, caplog)


def test_which_stack_is_chosen() -> None:
    rows = [loader(torch.float64)(partition, 0) for partition in range(4)]
    for model, stack in (("mlp", LinearStack), ("own forward", LinearStack), ("cnn", VmapStack)):
        for plan in ("none", "example"):
            task = task_of(model, Sgd(lr=0.1), plan, torch.float64)
            assert type(choose(task, task.model.state_dict(), rows)()) is stack
    images = nn.Sequential(nn.Linear(INPUTS, 64), nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3), nn.Flatten())
    large = nn.Sequential(*images, nn.Linear(288, 1000), nn.Tanh(), nn.Linear(1000, CLASSES)).double()
    for model, stack in ((large, Turns), (Mixing().double(), Turns)):
        task = LocalTask(model=model, loss=cross_entropy, optimiser=Sgd(lr=0.1), steps=1, batch_size=5)
        assert type(choose(task, model.state_dict(), rows)()) is stack


@pytest.mark.parametrize("stack", [LinearStack, VmapStack, Turns])
def test_what_is_not_trained_is_what_was_sent(stack: type[Stack], monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack that kept its own frozen layer, or its own buffer, would not be chosen."""
    monkeypatch.setattr(stacked, "makers", lambda task: (stack,))
    task = task_of("own forward", Sgd(lr=0.1), "none", torch.float64)
    sent = {name: tensor + 0.1 for name, tensor in task.model.state_dict().items()}
    rows = [loader(torch.float64)(partition, 0) for partition in range(4)]
    assert type(choose(task, sent, rows)()) is stack


def test_a_seed_decides_rows_and_noise_and_without_one_they_differ() -> None:
    for plan in ("none", "example"):
        task = task_of("mlp", Sgd(lr=0.1), plan, torch.float64)
        x, y = loader(torch.float64)(6, 0)
        runs = [
            task.train(task.model.state_dict(), x, y, insecure_seeded_noise(seed)).state["2.bias"]
            for seed in ("a", "a", "b")
        ]
        assert torch.equal(runs[0], runs[1])
        assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_a_device_steps_as_torch_does(optimiser: str) -> None:
    task = task_of("mlp", OPTIMISERS[optimiser], "none", torch.float64, epochs=True)
    x, y = loader(torch.float64)(6, 0)
    got = task.train(task.model.state_dict(), x, y, insecure_seeded_noise("s"))
    net = MODELS["mlp"]().double()
    net.load_state_dict(task.model.state_dict())
    ours = OPTIMISERS[optimiser]
    peer: torch.optim.Optimizer = (
        torch.optim.Adam(net.parameters(), lr=ours.lr)
        if isinstance(ours, Adam)
        else torch.optim.SGD(net.parameters(), lr=ours.lr, momentum=ours.momentum)
    )
    losses = []
    for batch in task.batches(len(x), lambda: insecure_seeded_noise("s")):
        peer.zero_grad()
        loss = cross_entropy(net(x[batch]), y[batch]).mean()
        loss.backward()
        peer.step()
        losses.append(loss.item())
    for name, tensor in net.state_dict().items():
        assert torch.allclose(got.state[name], tensor, rtol=1e-10, atol=1e-12)
    assert got.loss == pytest.approx(np.mean(losses))
    assert got.examples == len(x)


def test_batches_are_shuffled_passes_cut_into_pieces() -> None:
    task = task_of("mlp", Sgd(lr=0.1), "none", torch.float64, epochs=True)
    batches = task.batches(12, lambda: insecure_seeded_noise("s"))
    assert [len(batch) for batch in batches] == [5, 5, 2] * 2
    for one in (batches[:3], batches[3:]):
        assert sorted(np.concatenate(one).tolist()) == list(range(12))
    assert np.concatenate(batches[:3]).tolist() != np.concatenate(batches[3:]).tolist()
    whole = task.batches(4, lambda: pytest.fail("nothing is to be drawn"))
    assert [batch.tolist() for batch in whole] == [[0, 1, 2, 3]] * 2
    assert task.batches(0, lambda: pytest.fail("nothing is to be drawn")) == []


def test_a_client_plan_bounds_the_whole_update() -> None:
    task = task_of("own forward", Sgd(lr=5.0), "client", torch.float64)
    x, y = loader(torch.float64)(6, 0)
    before = task.model.state_dict()
    update = task.train(before, x, y, insecure_seeded_noise("s"))
    norm = math.sqrt(sum(float((update.state[name] - before[name]).square().sum()) for name in before))
    assert 0.0999 < norm <= 0.1
    assert (update.loss, update.examples) == (None, 1)
    broken = task.train(before, x * math.nan, y, insecure_seeded_noise("s"))
    assert all(torch.equal(broken.state[name], before[name]) for name in before)


def test_one_row_moves_an_example_plan_by_its_clip_alone() -> None:
    """With one step, the noise taken away, the update differs by at most lr * clip / divisor if a row comes in."""
    plan = PrivacyPlan(clip_norm=0.1, noise_multiplier=1.0, sampler=Poisson(rate=1.0), delta=1e-5, steps=9, divisor=4.0)
    net = task_of("mlp", Sgd(lr=1.0), "none", torch.float64).model
    task = LocalTask(model=net, loss=cross_entropy, optimiser=Sgd(lr=1.0), steps=1, plan=plan)
    x, y = loader(torch.float64)(6, 0)
    # The last row is far out and wrong: its gradient is as large as the clip lets it be.
    x[-1] *= 1e3
    y[-1] = int(net(x[-1:]).argmin())
    released = []
    for count in (len(x), len(x) - 1):
        stream = insecure_seeded_noise("s")
        # Both draw as many numbers for their rows, so that both add the same noise.
        stream.uniform(len(x) - count)
        released.append(task.train(net.state_dict(), x[:count], y[:count], stream).state)
    moved = math.sqrt(sum(float((released[0][name] - released[1][name]).square().sum()) for name in released[0]))
    assert 0.1 / 4.0 * 0.99 < moved <= 0.1 / 4.0 * (1.0 + 1e-6)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"steps": 1, "epochs": 1, "batch_size": 2}, "one of them"),
        ({"batch_size": 2}, "one of them"),
        ({"steps": 0, "batch_size": 2}, "at least 1"),
        ({"steps": 1}, "batch_size"),
        ({"steps": 1, "plan": plan_of("client")}, "batch_size"),
    ],
)
def test_a_task_that_cannot_be_is_refused(fields: dict[str, object], word: str) -> None:
    with pytest.raises(BadUsage, match=word):
        LocalTask(model=nn.Linear(1, 1), loss=cross_entropy, optimiser=Sgd(lr=0.1), **fields)


@pytest.mark.parametrize("make", [lambda: Sgd(lr=0.0), lambda: Sgd(lr=1.0, momentum=1.0), lambda: Adam(lr=math.nan)])
def test_an_optimiser_that_cannot_be_is_refused(make: object) -> None:
    with pytest.raises(BadUsage, match="expected"):
        make()


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e12])
def test_weights_that_would_overflow_are_refused_under_a_plan(value: float) -> None:
    task = task_of("mlp", Sgd(lr=0.1), "example", torch.float64)
    x, y = loader(torch.float64)(6, 0)
    state = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    state["2.bias"][0] = value
    with pytest.raises(BadUsage, match=r"weights '2\.bias'"):
        task.train(state, x, y, insecure_seeded_noise("s"))


def test_under_a_plan_a_row_does_not_change_how_others_are_rounded() -> None:
    plan = PrivacyPlan(clip_norm=0.1, noise_multiplier=1.0, sampler=Poisson(rate=1.0), delta=1e-5, steps=9)
    net = nn.Linear(97, CLASSES).double()
    y = loader(torch.float64)(6, 0)[1]
    x = torch.randn(len(y), 97, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outputs: list[Tensor] = []

    def seen(output: Tensor, target: Tensor) -> Tensor:
        outputs.append(output.detach())
        return cross_entropy(output, target)

    task = LocalTask(model=net, loss=seen, optimiser=Sgd(lr=1.0), steps=1, plan=plan)
    found = []
    for count in range(len(x), 0, -1):
        outputs.clear()
        task.train(net.state_dict(), x[:count], y[:count], insecure_seeded_noise("s"))
        found.append(next(output for output in outputs if output.shape[0] == count))
        assert torch.equal(found[-1], found[0][:count])
