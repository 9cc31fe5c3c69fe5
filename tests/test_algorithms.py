"""Federated algorithms on a device: what they compute, and that nothing leaves but what a plan released."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedinfer.errors import BadUsage
from fedinfer.local_task import trained
from fedinfer.privacy import NoiseStream, Poisson, PrivacyPlan, clipped_gradient, insecure_seeded_noise
from fedinfer.training import Adam, Ditto, FedAvg, FedProx, LocalParameters, LocalTask, Scaffold, Sgd

INPUTS, CLASSES, ROWS = 4, 3, 9
PLAN = PrivacyPlan(clip_norm=0.1, noise_multiplier=1.0, sampler=Poisson(rate=1.0), delta=1e-5, steps=99, divisor=4.0)
ALGORITHMS = {
    "fedavg": FedAvg(),
    "fedprox": FedProx(mu=0.5),
    "scaffold": Scaffold(),
    "local": LocalParameters(names=("head.*",)),
    "ditto": Ditto(mu=0.5),
}


class BodyAndHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(INPUTS, 5)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def halves(output: Tensor, y: Tensor) -> Tensor:
    return (output - y).square().sum(1) / 2.0


def cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(output, y, reduction="none")


def net_of(seed: int = 0) -> BodyAndHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BodyAndHead().double()


def rows_of(seed: int, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, INPUTS, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, CLASSES, (rows,), generator=generator)


def near_optimum(x: Tensor, y: Tensor, mu: float, sent: Tensor) -> Tensor:
    """What minimises the mean of |w x - y|²/2 plus mu/2 |w - sent|²."""
    size = x.shape[1]
    return torch.linalg.solve(x.T @ x / len(x) + mu * torch.eye(size, dtype=x.dtype), x.T @ y / len(x) + mu * sent)


@pytest.mark.parametrize("mu", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("which", [FedProx, Ditto])
def test_a_pull_leads_to_the_optimum_of_the_pulled_loss(mu: float, which: type[FedProx] | type[Ditto]) -> None:
    x = rows_of(1)[0]
    y = x @ torch.tensor([[1.0], [2.0], [-1.0], [0.5]], dtype=torch.float64)
    net = nn.Linear(INPUTS, 1, bias=False).double()
    task = LocalTask(model=net, loss=halves, optimiser=Sgd(lr=0.3), steps=600, batch_size=ROWS, algorithm=which(mu=mu))
    update = task.train(net.state_dict(), x, y, insecure_seeded_noise("s"))
    expected = near_optimum(x, y, mu, net.weight.detach().T).T
    found = update.state if which is FedProx else update.memory
    assert torch.allclose(found["weight"], expected, atol=1e-9)
    if which is Ditto:
        assert torch.allclose(update.state["weight"], torch.linalg.lstsq(x, y).solution.T, atol=1e-6)


def test_a_device_drifts_less_the_more_it_is_pulled() -> None:
    x, y = rows_of(2)
    net = net_of()

    def drift(algorithm: FedAvg | FedProx) -> float:
        task = LocalTask(
            model=net, loss=cross_entropy, optimiser=Sgd(lr=0.1), steps=50, batch_size=ROWS, algorithm=algorithm
        )
        state = task.train(net.state_dict(), x, y, insecure_seeded_noise("s")).state
        return math.sqrt(sum(float((state[name] - old).square().sum()) for name, old in net.state_dict().items()))

    drifts = [drift(FedAvg()), *(drift(FedProx(mu=mu)) for mu in (0.01, 0.1, 1.0))]
    assert drifts == sorted(drifts, reverse=True)
    assert drifts[-1] < 0.5 * drifts[0]


def test_a_control_variate_becomes_the_mean_of_the_gradients_of_the_steps() -> None:
    x, y = rows_of(3)
    net = net_of()
    gradients: list[dict[str, Tensor]] = []

    def seen(output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(output, target)

    task = LocalTask(model=net, loss=seen, optimiser=Sgd(lr=0.2), steps=4, batch_size=ROWS, algorithm=Scaffold())
    control = {name: torch.full_like(value, 0.01) for name, value in trained(net)}
    own = {name: torch.full_like(value, -0.02) for name, value in trained(net)}
    update = task.train(net.state_dict(), x, y, insecure_seeded_noise("s"), memory=own, control=control)
    walker = net_of()
    for _ in range(4):
        walker.zero_grad()
        cross_entropy(walker(x), y).mean().backward()
        gradients.append({name: p.grad.clone() for name, p in walker.named_parameters()})
        with torch.no_grad():
            for parameter in walker.parameters():
                parameter -= 0.2 * (parameter.grad + 0.03)
    for name, value in walker.named_parameters():
        mean = torch.stack([each[name] for each in gradients]).mean(0)
        assert torch.allclose(update.state[name], value)
        assert torch.allclose(update.memory[name], mean)
        assert torch.allclose(update.auxiliary[name], mean - own[name])


def test_a_device_without_rows_keeps_its_control_variate() -> None:
    net = net_of()
    task = LocalTask(model=net, loss=cross_entropy, optimiser=Sgd(lr=0.2), epochs=1, batch_size=2, algorithm=Scaffold())
    own = {name: torch.ones_like(value) for name, value in trained(net)}
    update = task.train(net.state_dict(), *rows_of(0, rows=0), insecure_seeded_noise("s"), memory=own, control=own)
    for name, value in own.items():
        assert torch.equal(update.memory[name], value)
        assert not update.auxiliary[name].any()
        assert torch.equal(update.state[name], net.state_dict()[name])


@pytest.mark.parametrize("plan", [None, PLAN])
def test_local_parameters_never_leave(plan: PrivacyPlan | None) -> None:
    net = net_of()
    task = LocalTask(
        model=net,
        loss=cross_entropy,
        optimiser=Sgd(lr=0.2),
        steps=2,
        batch_size=4,
        plan=plan,
        algorithm=ALGORITHMS["local"],
    )
    stream = insecure_seeded_noise("s")
    first = task.train(net.state_dict(), *rows_of(4), stream)
    second = task.train(net_of(1).state_dict(), *rows_of(4), stream, memory=first.memory)
    for name, kept in first.memory.items():
        assert name.startswith("head.")
        assert torch.equal(first.state[name], net.state_dict()[name])
        assert not torch.equal(kept, net.state_dict()[name])
        # The second round starts from what was kept, and not from what was sent.
        assert torch.equal(second.state[name], net_of(1).state_dict()[name])
        assert (second.memory[name] - kept).norm() < (second.memory[name] - net_of(1).state_dict()[name]).norm()
    assert not torch.equal(first.state["body.weight"], net.state_dict()["body.weight"])


def test_a_parameter_in_two_places_stays_if_one_of_them_matches() -> None:
    net = nn.ModuleDict({"one": nn.Linear(2, 2), "two": nn.Linear(2, 2)})
    net["two"].weight = net["one"].weight
    assert LocalParameters(names=("two.*",)).of(net) == ("one.weight", "two.bias")


def test_ditto_leaves_the_shared_model_alone() -> None:
    net, (x, y) = net_of(), rows_of(5)
    for plan in (None, PLAN):
        states = []
        for algorithm in (FedAvg(), Ditto(mu=0.3)):
            task = LocalTask(
                model=net, loss=cross_entropy, optimiser=Adam(lr=0.1), steps=3, batch_size=4, plan=plan,
                algorithm=algorithm,
            )  # fmt: skip
            states.append(task.train(net.state_dict(), x, y, insecure_seeded_noise("s")).state)
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("algorithm", ["local", "ditto"])
def test_evaluation_is_of_what_the_device_kept(algorithm: str) -> None:
    net, (x, y) = net_of(), rows_of(6)
    task = LocalTask(
        model=net, loss=cross_entropy, optimiser=Sgd(lr=0.1), steps=1, batch_size=4, algorithm=ALGORITHMS[algorithm]
    )
    other = {name: value for name, value in trained(net_of(9)) if algorithm == "ditto" or name.startswith("head.")}
    mixed = net_of()
    mixed.load_state_dict({**net.state_dict(), **other})
    loss, _ = task.evaluate(net.state_dict(), x, y, memory=other)
    assert loss == pytest.approx(cross_entropy(mixed(x), y).mean().item())
    assert loss != task.evaluate(net.state_dict(), x, y)[0]


def scripted(monkeypatch: pytest.MonkeyPatch) -> list[NDArray[np.float64]]:
    """Every release is one that was written down before, whatever the rows; what would have got noise is returned."""
    sums: list[NDArray[np.float64]] = []

    def release(plan: PrivacyPlan, total: NDArray[np.float64], stream: NoiseStream) -> NDArray[np.float32]:
        sums.append(total.copy())
        return np.random.default_rng(len(total)).normal(size=total.shape).astype(np.float32)

    monkeypatch.setattr(PrivacyPlan, "release", release)
    return sums


def two_rounds(algorithm: str, x: Tensor, y: Tensor) -> list[dict[str, Tensor]]:
    """All that leaves a device under the plan in two rounds."""
    net = net_of()
    task = LocalTask(
        model=net, loss=cross_entropy, optimiser=Sgd(lr=0.5), steps=2, plan=PLAN, algorithm=ALGORITHMS[algorithm]
    )
    control = {name: torch.full_like(value, 0.1) for name, value in trained(net)}
    left, memory = [], None
    state = net.state_dict()
    for done in (0, 2):
        stream = insecure_seeded_noise("s")
        update = task.train(state, x, y, stream, done=done, memory=memory, control=control)
        left += [dict(update.state), dict(update.auxiliary)]
        assert (update.loss, update.examples) == (None, 1)
        memory, state = update.memory, dict(update.state)
    return left


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_under_an_example_plan_what_leaves_is_a_function_of_the_releases(
    algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same releases and quite other rows: the same answers to the last bit. So ε is that of the releases."""
    scripted(monkeypatch)
    left = [two_rounds(algorithm, *rows) for rows in (rows_of(7), rows_of(8, rows=3), rows_of(0, rows=0))]
    for other in left[1:]:
        for one, another in zip(left[0], other, strict=True):
            assert set(one) == set(another)
            assert all(torch.equal(one[name], another[name]) for name in one)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_row_moves_each_sum_by_the_clip_alone_given_the_releases_before(
    algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = scripted(monkeypatch)
    x, y = rows_of(7)
    x[-1] *= 100.0
    two_rounds(algorithm, x, y)
    whole = sums.copy()
    sums.clear()
    two_rounds(algorithm, x[:-1], y[:-1])
    assert len(sums) == len(whole) == 4
    shifts = [float(np.linalg.norm(one - other)) for one, other in zip(whole, sums, strict=True)]
    assert 0.09 < max(shifts) <= 0.1 * (1.0 + 1e-6)


def test_a_head_trained_without_noise_would_tell_far_more_than_the_clip() -> None:
    """What the class does not do: one row turns the head, and the head turns the gradients of all others."""
    x = rows_of(7, rows=40)[0]
    y = torch.arange(40) % CLASSES
    x[-1] *= 100.0

    def body_sum(count: int) -> Tensor:
        net = net_of()
        for _ in range(20):
            gradients = torch.autograd.grad(cross_entropy(net(x[:count]), y[:count]).mean(), net.head.parameters())
            with torch.no_grad():
                for parameter, gradient in zip(net.head.parameters(), gradients, strict=True):
                    parameter -= 5.0 * gradient
        net.head.requires_grad_(False)
        sums = clipped_gradient(net, cross_entropy, x[:count], y[:count], clip_norm=0.1)
        return torch.cat([each.flatten() for each in sums.values()])

    assert float((body_sum(40) - body_sum(39)).norm()) > 0.15


def test_a_broken_personal_model_shows_in_no_answer() -> None:
    def strict(output: Tensor, target: Tensor) -> Tensor:
        # As binary_cross_entropy does.
        if output.isnan().any():
            raise RuntimeError("NaN")
        return cross_entropy(output, target)

    net, (x, y) = net_of(), rows_of(5)
    task = LocalTask(model=net, loss=strict, optimiser=Sgd(lr=0.5), steps=2, plan=PLAN, algorithm=ALGORITHMS["ditto"])
    broken = {name: torch.full_like(value, math.nan) for name, value in trained(net)}
    updates = [
        task.train(net.state_dict(), x, y, insecure_seeded_noise("s"), memory=memory) for memory in (None, broken)
    ]
    assert all(torch.equal(value, updates[1].state[name]) for name, value in updates[0].state.items())
    assert all(value.isnan().all() for value in updates[1].memory.values())


def test_with_a_client_plan_local_parameters_take_nothing_of_the_clip() -> None:
    net, (x, y) = net_of(), rows_of(5)
    plan = PrivacyPlan(
        unit="client", clip_norm=0.1, noise_multiplier=1.0, sampler=Poisson(rate=0.5), delta=1e-5, steps=9
    )
    task = LocalTask(
        model=net,
        loss=cross_entropy,
        optimiser=Sgd(lr=2.0),
        steps=5,
        batch_size=4,
        plan=plan,
        algorithm=ALGORITHMS["local"],
    )
    update = task.train(net.state_dict(), x, y, insecure_seeded_noise("s"))
    moved = {name: update.state[name] - old for name, old in net.state_dict().items()}
    assert 0.0999 < math.sqrt(sum(float(each.square().sum()) for each in moved.values())) <= 0.1
    assert not moved["head.weight"].any()


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"algorithm": Scaffold(), "optimiser": Adam()}, "Sgd without momentum"),
        ({"algorithm": Scaffold(), "optimiser": Sgd(lr=0.1, momentum=0.5)}, "Sgd without momentum"),
        (
            {
                "algorithm": Scaffold(),
                "plan": PrivacyPlan(
                    unit="client", clip_norm=1.0, noise_multiplier=1.0, sampler=Poisson(rate=0.5), delta=1e-5, steps=9
                ),
            },
            "unit 'client'",
        ),
        ({"algorithm": LocalParameters(names=("tail.*",))}, "tail"),
        ({"algorithm": LocalParameters(names=("*",))}, "all of the model's"),
    ],
)
def test_an_algorithm_that_does_not_fit_is_refused(fields: dict[str, object], word: str) -> None:
    with pytest.raises(BadUsage, match=word):
        LocalTask(**{
            "model": net_of(), "loss": cross_entropy, "optimiser": Sgd(lr=0.1), "steps": 1, "batch_size": 2, **fields
        })  # fmt: skip


@pytest.mark.parametrize(
    "make", [lambda: FedProx(mu=0.0), lambda: Ditto(mu=math.inf), lambda: LocalParameters(names=())]
)
def test_an_algorithm_that_cannot_be_is_refused(make: object) -> None:
    with pytest.raises(BadUsage, match="expected"):
        make()


@pytest.mark.parametrize("value", [math.nan, 1e12])
def test_control_variates_that_would_overflow_are_refused_under_a_plan(value: float) -> None:
    net = net_of()
    task = LocalTask(model=net, loss=cross_entropy, optimiser=Sgd(lr=0.5), steps=2, plan=PLAN, algorithm=Scaffold())
    control = {name: torch.full_like(tensor, value) for name, tensor in trained(net)}
    with pytest.raises(BadUsage, match="weights"):
        task.train(net.state_dict(), *rows_of(5), insecure_seeded_noise("s"), control=control)


def test_scaffold_without_control_variates_says_which_server_sends_them() -> None:
    net = net_of()
    task = LocalTask(model=net, loss=cross_entropy, optimiser=Sgd(lr=0.5), steps=2, batch_size=2, algorithm=Scaffold())
    with pytest.raises(BadUsage, match="ScaffoldStrategy"):
        task.train(net.state_dict(), *rows_of(5), insecure_seeded_noise("s"))
