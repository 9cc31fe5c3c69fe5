"""The same seed gives the same bits; and nothing assumes that a tensor is on the CPU."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp, strategy
from torch import Tensor, nn

from fedinfer.algorithms import Algorithm, FedAvg, FedProx, Scaffold, control_of, shared_pull
from fedinfer.errors import BadUsage
from fedinfer.local_app import Visit
from fedinfer.optimisers import Adam, Optimiser, Sgd
from fedinfer.privacy import Poisson, PrivacyPlan
from fedinfer.simulation import SimulatedGrid, cohort, federation, simulate, vectorised
from fedinfer.simulation.stacked import LinearStack, Stack, VmapStack
from fedinfer.training import LocalTask
from tests.simulation.test_federation import losses, whole

CLIENTS, INPUTS, CLASSES = 60, 5, 3
PLAN = PrivacyPlan(clip_norm=1.0, noise_multiplier=2.0, sampler=Poisson(rate=0.5), delta=1e-5, steps=40)
PLANS = {"no": None, "example": PLAN, "client": replace(PLAN, unit="client", divisor=6.0)}


def load(partition: int, partitions: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(partition)
    rows = 1 + partition % 13
    return torch.randn(rows, INPUTS, generator=generator), torch.randint(0, CLASSES, (rows,), generator=generator)


def unsteady(output: Tensor, y: Tensor) -> Tensor:
    """Takes its time with few examples, so that chunks are not done in their order."""
    time.sleep(0.03 / len(output))
    return losses(output, y)


def task_of(plan: PrivacyPlan | None) -> LocalTask:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(INPUTS, 4), nn.Tanh(), nn.Linear(4, CLASSES))
    return LocalTask(model=net, loss=losses, optimiser=Adam(lr=0.05), steps=3, batch_size=4, plan=plan)


def stock(task: LocalTask) -> ServerApp:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        half = strategy.FedAvg(fraction_train=0.5, fraction_evaluate=0.0, min_available_nodes=CLIENTS)
        context.state["arrays"] = half.start(grid, ArrayRecord(task.model.state_dict()), num_rounds=2).arrays

    return app


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("ours", [True, False])
def test_threads_and_memory_do_not_change_a_bit(name: str, ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Chunks of a few clients and blocks of a few chunks, as a large cohort has.
    monkeypatch.setattr(vectorised, "CHUNK_BYTES", 1 << 13)
    monkeypatch.setattr(vectorised, "BLOCK_BYTES", 1 << 13)
    task = replace(task_of(PLANS[name]), loss=unsteady)

    def run(workers: int, memory_bytes: int) -> Mapping[str, np.ndarray]:
        app = federation(task, rounds=2) if ours else stock(task)
        result = simulate(
            app, task.client_app(load), num_clients=CLIENTS, seed=3, workers=workers, memory_bytes=memory_bytes
        )  # fmt: skip
        return whole(result)

    expected = run(1, 1 << 30)
    for workers, memory_bytes in ((1, 1 << 30), (2, 1 << 30), (5, 1 << 14)):
        got = run(workers, memory_bytes)
        assert all(np.array_equal(expected[key], got[key]) for key in expected)


def test_workers_get_chunks_of_like_clients_that_are_as_large_as_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    # Room for 25 clients: filled one after another, the third chunk would have ten.
    monkeypatch.setattr(vectorised, "CHUNK_BYTES", 1 << 15)
    sizes: list[int] = []
    train = vectorised.train_chunk

    def counted(task: LocalTask, stack: Stack, members: Sequence[vectorised.Ready]) -> cohort.Trained:
        sizes.append(len(members))
        return train(task, stack, members)

    monkeypatch.setattr(vectorised, "train_chunk", counted)

    def alike(partition: int, partitions: int) -> tuple[Tensor, Tensor]:
        return torch.ones(6, INPUTS), torch.zeros(6, dtype=torch.long)

    task = task_of(None)
    simulate(federation(task, rounds=1), task.client_app(alike), num_clients=CLIENTS, seed=3)
    assert sizes == [20, 20, 20]


@pytest.mark.long
@pytest.mark.parametrize("ours", [True, False])
def test_processes_do_not_change_a_bit_by_who_is_first(ours: bool) -> None:
    task = task_of(None)
    first, *others = (
        whole(
            simulate(
                federation(task, rounds=2) if ours else stock(task),
                task.client_app(load),
                num_clients=CLIENTS,
                seed=3,
                backend="process",
                workers=workers,
            )
        )
        for workers in (1, 2, 2)
    )
    assert all(np.array_equal(first[key], other[key]) for other in others for key in first)


def test_answers_come_in_the_order_of_the_messages() -> None:
    app, task = ServerApp(), task_of(None)

    @app.main()
    def main(grid: SimulatedGrid, context: Context) -> None:
        content = RecordDict({"arrays": ArrayRecord(task.model.state_dict())})
        nodes = [grid.get_node_ids()[index] for index in (7, 3, 50, 0, 12)]
        messages = [grid.create_message(content, "train", node, "1") for node in nodes]
        assert [reply.metadata.src_node_id for reply in grid.send_and_receive(messages)] == nodes

    simulate(app, task.client_app(load), num_clients=CLIENTS)


@dataclass(frozen=True, kw_only=True)
class Member:
    """A client of a chunk that computes on a GPU which is not there."""

    state: Mapping[str, Tensor]
    control: Mapping[str, Tensor]
    x: Tensor
    y: Tensor
    turn: Visit


MODELS = {
    "linear": lambda: nn.Sequential(nn.Linear(INPUTS, 4), nn.Tanh(), nn.Linear(4, CLASSES)),
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (1, INPUTS)), nn.Conv1d(1, CLASSES, INPUTS), nn.Flatten()),
}


@pytest.mark.parametrize(
    ("optimiser", "algorithm"),
    [(Sgd(lr=0.1, momentum=0.5), FedAvg()), (Adam(), FedProx(mu=0.1)), (Sgd(lr=0.1), Scaffold())],
)
@pytest.mark.parametrize(
    ("stack_of", "model"), [(LinearStack, "linear"), (VmapStack, "linear"), (VmapStack, "convolution")]
)
def test_no_step_of_a_cohort_mixes_devices(
    stack_of: type[LinearStack] | type[VmapStack], model: str, optimiser: Optimiser, algorithm: Algorithm
) -> None:
    # A device of shapes without numbers stands for a GPU: an operation on two devices raises.
    other = torch.device("meta")
    net = MODELS[model]().to(other)
    task = LocalTask(model=net, loss=losses, optimiser=optimiser, steps=2, batch_size=4, algorithm=algorithm)
    state = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    kept = {name: torch.ones(tensor.shape) for name, tensor in state.items()} if algorithm == Scaffold() else {}
    members = [
        Member(
            state=state,
            control=control_of(algorithm, state, kept),
            x=torch.zeros(rows, INPUTS, device=other),
            y=torch.zeros(rows, dtype=torch.int64, device=other),
            turn=Visit(partition=rows, partitions=9, done=0, seed=str(rows), memory=kept or None),
        )
        for rows in (7, 3)
    ]
    stack: Stack = stack_of(task)
    stack.use(state)
    sent = cohort._start(task, members)
    control = cohort._stacked([member.control for member in members], sent if kept else {})
    memory = cohort._remembered(task, members, sent)
    pull = shared_pull(algorithm, sent, memory, control)
    weights = {name: weight.clone() for name, weight in sent.items()}
    batches = [task.batches(len(member.x), member.turn.stream) for member in members]
    assert cohort._plain(task, stack, members, batches, list(weights.values()), pull).device == other
    steps = torch.tensor([len(own) for own in batches], device=other)
    for left in task.leaving(sent, weights, memory, control, steps):
        assert all(tensor.device == other for tensor in left.values())
    if stack_of is VmapStack:
        x, y, starts = cohort._joined(members)
        index, present = cohort._gathered([np.arange(2), np.arange(3)], starts, x.device)
        sums = stack.clipped(list(weights.values()), x[index], y[index], present, 1.0)
        assert all(total.device == other for total in sums)
    with pytest.raises(RuntimeError, match="on the expected device"):
        next(iter(weights.values())) + torch.zeros(next(iter(weights.values())).shape)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"device": "tpu"}, "device: got 'tpu', expected 'cpu' or 'cuda'"),
        ({"device": "cuda", "backend": "process"}, "expected 'cpu'; a ClientApp of its own code says itself"),
        ({"device": "cuda"}, "torch finds no GPU on this machine"),
    ],
)
def test_a_device_that_cannot_be_is_refused(
    fields: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadUsage, match=expected):
        simulate(ServerApp(), task_of(None).client_app(load), num_clients=2, **fields)


def test_a_strangers_app_says_itself_where_it_computes() -> None:
    with pytest.raises(BadUsage, match="what is not a LocalTask"):
        simulate(ServerApp(), ClientApp(), num_clients=2, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", PLANS)
def test_a_gpu_gives_the_weights_of_the_cpu(name: str) -> None:
    task = task_of(PLANS[name])
    cpu, gpu = (
        whole(simulate(federation(task, rounds=2), task.client_app(load), num_clients=CLIENTS, seed=3, device=device))
        for device in ("cpu", "cuda")
    )
    assert all(np.allclose(cpu[key], gpu[key], rtol=1e-4, atol=1e-5) for key in cpu)
