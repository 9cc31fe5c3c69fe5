"""Clipped gradients equal a plain loop over examples and Opacus, whatever layers the model is made of."""

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from opacus import GradSampleModule
from opacus.layers import DPGRU, DPLSTM
from torch import Tensor, nn
from torch.nn import functional

from fedinfer.privacy import bookkeeping, clipped_gradient
from fedinfer.privacy.bookkeeping import MARGIN

Inputs = Tensor | tuple[Tensor, ...]
EXAMPLES = 11


def loss(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output, target, reduction="none")


def taken(x: Inputs, rows: slice) -> tuple[Tensor, ...]:
    return tuple(each[rows] for each in (x if isinstance(x, tuple) else (x,)))


def loop(model: nn.Module, x: Inputs, y: Tensor, clip: float) -> dict[str, Tensor]:
    """The definition: one example after another."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p) for name, p in trained.items()}
    for index in range(len(y)):
        one = slice(index, index + 1)
        grads = torch.autograd.grad(
            loss(model(*taken(x, one)), y[one]).sum(), list(trained.values()), allow_unused=True, materialize_grads=True
        )
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
        if math.isfinite(norm):
            for name, g in zip(trained, grads, strict=True):
                sums[name] += g * min(1.0, MARGIN * clip / max(norm, 1e-300))
    return sums


class Recurrent(nn.Module):
    """Takes what a GRU or LSTM made of (B, T, 4): its last output, its last state, or all its outputs."""

    def __init__(self, rnn: nn.GRU | nn.LSTM, take: str) -> None:
        super().__init__()
        self.rnn, self.take = rnn, take
        self.head = nn.Linear(rnn.hidden_size * (1 + rnn.bidirectional), 3)

    def forward(self, x: Tensor) -> Tensor:
        output, state = self.rnn(x if self.rnn.batch_first else x.transpose(0, 1))
        if not self.rnn.batch_first:
            output = output.transpose(0, 1)
        if self.take == "outputs":
            return self.head(output.tanh()).mean(1)
        if self.take == "last":
            return self.head(output[:, -1])
        last = state if isinstance(state, Tensor) else state[0] * state[1]
        return self.head(torch.cat(list(last[-1 - self.rnn.bidirectional :]), -1))


class FirstStates(nn.Module):
    """A GRU and an LSTM whose first states come from a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gru, self.lstm = nn.Linear(4, 5), nn.GRU(4, 5), nn.LSTM(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x.mean(1))[None]
        output, last = self.gru(x.transpose(0, 1), hx=first)
        return self.head(self.lstm(output, (first.tanh(), last))[0][-1])


class Words(nn.Module):
    def __init__(self, padding: int | None = None, *, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5, padding_idx=padding)
        self.head = nn.Linear(5, 7, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x).tanh().mean(1))


class Cell(nn.Module):
    """A recurrent network by hand: two linear layers that are called in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.states, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 6)
        for step in range(x.shape[1]):
            state = torch.tanh(self.inputs(x[:, step]) + self.states(input=state))
        return self.head(state)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 5), nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head((self.a(a).mean(1) + self.b(b)).tanh())


class Unused(nn.Module):
    """A parameter that the loss does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.spare(x)
        return self.used(x)


def rows(count: int) -> Tensor:
    return torch.randn(count, 4) * 2


def sequences(count: int) -> Tensor:
    return torch.randn(count, 8, 4)


def signals(count: int) -> Tensor:
    return torch.randn(count, 4, 11)


def images(count: int) -> Tensor:
    return torch.randn(count, 4, 9, 8)


def words(count: int) -> Tensor:
    return torch.randint(0, 7, (count, 9))


def pairs(count: int) -> tuple[Tensor, ...]:
    return sequences(count), torch.randn(count, 3)


def frozen(model: nn.Sequential, *names: str) -> nn.Sequential:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def shared() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 3))


def after(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))


PLAIN: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Inputs]]] = {
    "linear": (lambda: nn.Linear(4, 3), rows),
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3, bias=False)), rows),
    "frozen": (
        lambda: frozen(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), "0.weight", "2.bias"),
        rows,
    ),
    "used twice": (shared, rows),
    "not used": (Unused, rows),
    "linear over steps, gradients kept": (lambda: after(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)), sequences),
    "linear over steps, gradients in parts": (lambda: after(nn.Linear(4, 20), nn.Tanh(), nn.Linear(20, 20)), sequences),
    "linear over steps, Gram": (
        lambda: nn.Sequential(nn.Linear(4, 90), nn.Tanh(), nn.Linear(90, 90), nn.Flatten(), nn.Linear(720, 3)),
        sequences,
    ),
    "two inputs": (TwoInputs, pairs),
    "called in every step": (Cell, sequences),
    "embedding": (Words, words),
    "embedding with padding": (lambda: Words(2), words),
    "embedding tied to a linear layer": (lambda: Words(tied=True), words),
    "group norm": (lambda: after(nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6)), images),
    "group norm, not affine": (lambda: after(nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6, affine=False)), images),
    "group norm of rows": (lambda: after(nn.GroupNorm(2, 4)), rows),
    "layer norm": (
        lambda: after(nn.Linear(4, 6), nn.LayerNorm(6), nn.Flatten(), nn.LayerNorm(48, bias=False)),
        sequences,
    ),
    "layer norm of two axes": (lambda: after(nn.LayerNorm((8, 4))), sequences),
    "layer norm, not affine": (lambda: after(nn.Linear(4, 6), nn.LayerNorm(6, elementwise_affine=False)), sequences),
    "first states": (FirstStates, sequences),
}
CONVOLUTIONS: dict[str, dict[str, object]] = {
    "plain": {"kernel_size": 3},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilated": {"kernel_size": 2, "dilation": 2, "padding": 2},
    "grouped": {"kernel_size": 3, "groups": 2, "stride": 2},
    "depthwise": {"kernel_size": 3, "groups": 4},
    "same, odd": {"kernel_size": 3, "padding": "same", "dilation": 2},
    "same, even": {"kernel_size": 4, "padding": "same"},
    "valid": {"kernel_size": 2, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": 2, "padding_mode": "circular", "bias": False},
    "replicate": {"kernel_size": 4, "padding": "same", "padding_mode": "replicate"},
    "whole": {"kernel_size": 8},
}
for _name, _options in CONVOLUTIONS.items():
    PLAIN[f"conv1d, {_name}"] = (lambda options=_options: after(nn.Conv1d(4, 8, **options)), signals)
    PLAIN[f"conv2d, {_name}"] = (lambda options=_options: after(nn.Conv2d(4, 8, **options)), images)
PLAIN["conv2d, uneven"] = (
    lambda: after(nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1))),
    images,
)
PLAIN["conv2d, many outputs"] = (lambda: after(nn.Conv2d(4, 60, 4, stride=3)), images)
for _kind in (nn.GRU, nn.LSTM):
    for _take in ("last", "state", "outputs"):
        for _title, _made in {
            "batch first": {"batch_first": True},
            "time first, no bias": {"bias": False},
            "two layers, both ways": {"num_layers": 2, "bidirectional": True, "batch_first": True},
        }.items():
            PLAIN[f"{_kind.__name__}, {_title}, {_take}"] = (
                lambda kind=_kind, take=_take, made=_made: Recurrent(kind(4, 5, **made), take),
                sequences,
            )


def prepared(name: str, dtype: torch.dtype, count: int) -> tuple[nn.Module, Inputs, Tensor]:
    torch.manual_seed(0)
    build, draw = PLAIN[name]
    model, x, y = build(), draw(EXAMPLES), torch.randint(0, 3, (EXAMPLES,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(*taken(x, slice(None)))
    cast = tuple(each.to(dtype) if each.is_floating_point() else each for each in taken(x, slice(count)))
    return model.to(dtype), cast if isinstance(x, tuple) else cast[0], y[:count]


@pytest.fixture
def only_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower ways are right for any model: here they would hide what is tested."""

    def refuse(*_: object) -> None:
        raise AssertionError("expected one forward and one backward pass")

    monkeypatch.setattr(bookkeeping, "per_example_gradients", refuse)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.usefixtures("only_two_passes")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", PLAIN)
def test_equals_a_loop_over_examples(name: str, dtype: torch.dtype, tolerance: float) -> None:
    for count in (EXAMPLES, 1):
        model, x, y = prepared(name, dtype, count)
        for clip in (0.1, 1e6):
            expected = loop(model, x, y, clip)
            # The first call looks whether examples mix, the second knows.
            for _ in range(2):
                got = clipped_gradient(model, loss, x, y, clip_norm=clip)
                assert list(got) == list(expected)
                for key, tensor in expected.items():
                    assert got[key].shape == tensor.shape
                    assert got[key].dtype is dtype
                    assert float((got[key] - tensor).norm()) <= tolerance * float(tensor.norm())


@pytest.mark.parametrize("name", PLAIN)
def test_no_examples_give_zeros(name: str) -> None:
    model, x, y = prepared(name, torch.float32, 0)
    got = clipped_gradient(model, loss, x, y, clip_norm=1.0)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert {key: tensor.shape for key, tensor in got.items()} == {key: p.shape for key, p in trained.items()}
    assert not any(tensor.any() for tensor in got.values())
    assert (got.below_clip, got.nonfinite) == (0, 0)


def opacus_sums(model: nn.Module, x: Inputs, y: Tensor, clip: float) -> tuple[dict[str, Tensor], int]:
    """What Opacus' hooks make of each example, clipped as here, and how many were below the clip."""
    whole = GradSampleModule(model)
    inputs = [each.clone().requires_grad_() if each.is_floating_point() else each for each in taken(x, slice(None))]
    loss(whole(*inputs), y).mean().backward()
    samples = {key.removeprefix("_module."): p.grad_sample for key, p in whole.named_parameters() if p.requires_grad}
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in samples.values()]).norm(dim=0)
    factors = (MARGIN * clip / norms).clamp(max=1.0)
    return {key: torch.tensordot(factors, g, dims=1) for key, g in samples.items()}, int((factors >= 1).sum())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("only_two_passes")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize(
    "name",
    [
        "linear",
        "used twice",
        "linear over steps, Gram",
        "two inputs",
        "embedding",
        "group norm",
        "layer norm of two axes",
        "conv1d, dilated",
        "conv2d, grouped",
        "conv2d, strided",
        "conv2d, uneven",
        "GRU, two layers, both ways, outputs",
        "LSTM, two layers, both ways, last",
    ],
)
def test_equals_opacus(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model, x, y = prepared(name, dtype, EXAMPLES)
    got = clipped_gradient(model, loss, x, y, clip_norm=0.5)
    # Theirs is of the same numbers in float64: what float32 costs them is not the question.
    model, x, y = prepared(name, torch.float64, EXAMPLES)
    if isinstance(model, Recurrent):
        kind = DPGRU if isinstance(model.rnn, nn.GRU) else DPLSTM
        theirs = kind(4, 5, num_layers=2, bidirectional=True, batch_first=True).double()
        theirs.load_state_dict(model.rnn.state_dict())
        model.rnn = theirs
    expected, below = opacus_sums(model, x, y, 0.5)
    assert set(got) == set(expected)
    for key, tensor in got.items():
        assert float((tensor - expected[key]).norm()) <= tolerance * float(expected[key].norm())
    assert got.below_clip == below
