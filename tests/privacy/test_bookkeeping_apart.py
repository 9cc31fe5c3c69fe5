"""Models that mix their examples are found out, however little the first batch shows of it."""

import functools
import gc
import math
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedinfer.errors import BadUsage
from fedinfer.privacy import clipped_gradient, passes
from fedinfer.privacy.bookkeeping import MARGIN
from fedinfer.privacy.uses import PART, squares

Loss = Callable[[Tensor, Tensor], Tensor]
EXAMPLES = 8


def loss(output: Tensor, target: Tensor) -> Tensor:
    return (output[:, 0] - target).square()


def batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(EXAMPLES, 4, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randn(EXAMPLES, generator=generator, dtype=torch.float64).to(dtype)


def loop(model: nn.Module, loss_fn: Loss, x: Tensor, y: Tensor, clip: float) -> dict[str, Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p) for name, p in trained.items()}
    for one_x, one_y in zip(x.split(1), y.split(1), strict=True):
        grads = torch.autograd.grad(
            loss_fn(model(one_x), one_y).sum(), list(trained.values()), allow_unused=True, materialize_grads=True
        )
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
        for name, g in zip(trained, grads, strict=True):
            sums[name] += g * min(1.0, MARGIN * clip / max(norm, 1e-300))
    return sums


def check(model: nn.Module, loss_fn: Loss, x: Tensor, y: Tensor, clip: float = 0.5) -> None:
    got, expected = clipped_gradient(model, loss_fn, x, y, clip_norm=clip), loop(model, loss_fn, x, y, clip)
    assert all(float((got[key] - expected[key]).norm()) <= 1e-11 for key in expected)


def is_apart(model: nn.Module) -> bool:
    return model in passes._APART


class Net(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head, self.between = nn.Linear(4, 6), nn.Linear(6, 1), between
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.between(self.first(x)))
        return output


def centred(hidden: Tensor) -> Tensor:
    return hidden - hidden.mean(0)


def divided(hidden: Tensor) -> Tensor:
    return hidden / hidden.detach().square().mean(0)


def test_a_head_of_zeros_hides_nothing() -> None:
    model, (x, y) = Net(centred), batch()
    nn.init.zeros_(model.head.weight)
    check(model, loss, x, y)
    nn.init.normal_(model.head.weight)
    check(model, loss, x, y)


def test_a_branch_of_zeros_beside_another_way_hides_nothing() -> None:
    """Gradients at the inputs are there all the same, but not those through the branch."""
    model, (x, y) = Net(), batch()
    model.branch = nn.Linear(6, 6, dtype=torch.float64)
    nn.init.zeros_(model.branch.weight)
    model.between = lambda hidden: hidden + model.branch(centred(hidden))
    check(model, loss, x, y)
    nn.init.normal_(model.branch.weight)
    check(model, loss, x, y)


def test_gradients_of_zero_are_looked_at_again_even_where_examples_cannot_be_run_alone() -> None:
    model, (x, y) = Net(lambda hidden: centred(hidden) + 0 * torch.rand(1)), batch()
    nn.init.zeros_(model.head.weight)
    clipped_gradient(model, loss, x, y, clip_norm=0.5)
    assert not is_apart(model)
    nn.init.normal_(model.head.weight)
    check(model, loss, x, y)


@pytest.mark.parametrize("row", [0, 3])
@pytest.mark.parametrize("draws", [False, True])
def test_a_row_that_is_not_finite_hides_nothing(row: int, draws: bool) -> None:
    """It makes the gradients of all examples so."""
    model, (x, y) = Net(lambda hidden: centred(hidden) + 0 * torch.rand(1) if draws else centred(hidden)), batch()
    spoiled = x.clone()
    spoiled[row] = math.nan
    got = clipped_gradient(model, loss, spoiled, y, clip_norm=0.5)
    assert got.nonfinite == 1
    check(model, loss, x, y)


@pytest.mark.parametrize("between", [divided, lambda hidden: hidden - hidden.detach().mean(0)])
def test_what_no_gradient_shows_is_seen_where_examples_run_alone(between: Callable[[Tensor], Tensor]) -> None:
    check(Net(between), loss, *batch())


def test_losses_that_share_what_no_gradient_shows_are_taken_apart() -> None:
    def normalised(output: Tensor, target: Tensor) -> Tensor:
        return loss(output, target) / loss(output, target).detach().mean()

    check(Net(), normalised, *batch(), clip=1e6)


def test_tokens_behind_a_frozen_layer_are_mixed() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(10, 6), nn.Linear(6, 1)
            self.words.weight.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.head(divided(self.words(x) + 0.1))
            return output

    torch.manual_seed(0)
    model, (_, y) = Words().double(), batch()
    check(model, loss, torch.arange(EXAMPLES) % 3, y)


def shared(weight: float, output: Tensor, target: Tensor) -> Tensor:
    return loss(output, target) + weight * centred(output).square().mean()


def with_closure(weight: float) -> Loss:
    return lambda output, target: shared(weight, output, target)


def with_default(weight: float) -> Loss:
    def own(output: Tensor, target: Tensor, weight: float = weight) -> Tensor:
        return shared(weight, output, target)

    return own


def with_keyword(weight: float) -> Loss:
    def own(output: Tensor, target: Tensor, *, weight: float = weight) -> Tensor:
        return shared(weight, output, target)

    return own


def with_partial(weight: float) -> Loss:
    return functools.partial(shared, weight)


class Weighted:
    def __init__(self, weight: float) -> None:
        self.weight = weight

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return shared(self.weight, output, target)

    def method(self, output: Tensor, target: Tensor) -> Tensor:
        return shared(self.weight, output, target)


LOSSES: dict[str, Callable[[float], Loss]] = {
    "closure": with_closure,
    "default": with_default,
    "keyword": with_keyword,
    "partial": with_partial,
    "object": Weighted,
    "method": lambda weight: Weighted(weight).method,
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_known_by_what_it_holds(name: str) -> None:
    """The first loss is gone when the second is made, perhaps in its place."""
    model, (x, y) = Net(), batch()
    for weight in (0.0, 1e3, 0.0, 1e3):
        check(model, LOSSES[name](weight), x, y)


@pytest.mark.parametrize("name", ["closure", "default", "keyword"])
def test_a_function_made_anew_with_the_same_numbers_is_the_same_loss(name: str) -> None:
    model, (x, y) = Net(), batch()
    for _ in range(3):
        clipped_gradient(model, LOSSES[name](0.0), x, y, clip_norm=0.5)
    assert len(passes._APART[model]) == 1


def test_a_bound_method_is_the_same_loss_each_time() -> None:
    model, (x, y), own = Net(), batch(), Weighted(0.0)
    for _ in range(3):
        clipped_gradient(model, own.method, x, y, clip_norm=0.5)
    assert len(passes._APART[model]) == 1


def test_a_model_that_its_loss_holds_is_let_go() -> None:
    def fitted() -> "weakref.ref[nn.Module]":
        model, (x, y) = Net(), batch()
        clipped_gradient(model, lambda output, y: loss(output, y) + 0 * len(list(model.modules())), x, y, clip_norm=0.5)
        assert is_apart(model)
        return weakref.ref(model)

    model = fitted()
    gc.collect()
    assert model() is None


def test_an_object_that_is_gone_is_like_no_other() -> None:
    one, other = passes._Held(Weighted(0.0)), passes._Held(Weighted(0.0))
    gc.collect()
    assert one != other
    kept = Weighted(0.0)
    assert passes._Held(kept) == passes._Held(kept)


def test_inputs_of_another_kind_are_looked_at_again() -> None:
    """Rows run as they are, sequences with time in front: with as many steps as examples, shapes tell nothing."""

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 1, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.linear(x) if x.dim() == 2 else self.linear(x.transpose(0, 1)).mean(0)
            return output

    torch.manual_seed(0)
    model, (x, y) = Steps(), batch()
    check(model, loss, x, y)
    assert is_apart(model)
    check(model, loss, torch.randn(EXAMPLES, EXAMPLES, 4, dtype=torch.float64), y)


def test_parameters_that_are_trained_later_are_looked_at_again() -> None:
    model, (x, y) = Net(), batch()
    model.between = lambda hidden: centred(hidden) if model.first.weight.requires_grad else hidden
    model.first.requires_grad_(False)
    check(model, loss, x, y)
    assert is_apart(model)
    model.first.requires_grad_(True)
    check(model, loss, x, y)


def test_a_sound_model_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = Net(), batch()
    clipped_gradient(model, loss, x, y, clip_norm=0.5)
    monkeypatch.setattr(passes, "_is_scaled", None)
    clipped_gradient(model, loss, x[:5], y[:5], clip_norm=0.5)


def test_a_model_with_random_numbers_takes_no_more_of_them_than_an_ordinary_pass() -> None:
    model, (x, y) = Net(lambda hidden: functional.dropout(hidden, 0.1)), batch()
    torch.manual_seed(1)
    got = clipped_gradient(model, loss, x, y, clip_norm=1e6)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    expected = torch.autograd.grad(loss(model(x), y).sum(), list(model.parameters()))
    assert torch.equal(after, torch.get_rng_state())
    assert all(torch.allclose(got[key], each) for key, each in zip(got, expected, strict=True))
    assert is_apart(model)


def test_random_numbers_that_only_single_examples_draw_are_given_back() -> None:
    model, (x, y) = Net(lambda hidden: hidden + 0 * torch.rand(1) if len(hidden) == 1 else hidden), batch()
    before = torch.get_rng_state()
    clipped_gradient(model, loss, x, y, clip_norm=0.5)
    assert torch.equal(before, torch.get_rng_state())


class Remembering(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(4, 1, dtype=torch.float64), kind
        self.register_buffer("mean", torch.full((4,), math.nan if kind == "NaN" else 0.0, dtype=torch.float64))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "in place":
            self.mean.lerp_(x.detach().mean(0), 0.1)
        elif self.kind == "another":
            self.mean = x.detach().mean(0)
        elif self.kind == "past autograd":
            self.mean.data += 1.0
        elif self.kind == "with its graph":
            self.mean += self.linear(x).mean()
        elif self.kind == "number":
            self.calls += 1
        output: Tensor = self.linear(x)
        return output


@pytest.mark.parametrize("kind", ["in place", "another", "past autograd", "with its graph", "number"])
@pytest.mark.parametrize("count", [1, EXAMPLES])
def test_a_model_that_changes_a_buffer_is_refused_and_stays_as_it_is(kind: str, count: int) -> None:
    model, (x, y) = Remembering(kind), batch()
    name, mean = "calls" if kind == "number" else "mean", model.mean
    for _ in range(2):
        with pytest.raises(BadUsage, match=f"buffer '{name}': got a model that changes it when it runs"):
            clipped_gradient(model, loss, x[:count], y[:count], clip_norm=0.5)
        assert model.mean is mean
        assert not model.mean.any()
        assert model.calls == 0
        assert model.mean.grad_fn is None


def test_a_loss_that_fails_leaves_buffers_as_they_were() -> None:
    def fails(output: Tensor, target: Tensor) -> Tensor:
        raise ZeroDivisionError

    model = Remembering("in place")
    with pytest.raises(ZeroDivisionError):
        clipped_gradient(model, fails, *batch(), clip_norm=0.5)
    assert not model.mean.any()


@pytest.mark.parametrize("kind", ["nothing", "NaN"])
def test_buffers_that_stay_as_they_are_are_fine(kind: str) -> None:
    check(Remembering(kind), loss, *batch())


@pytest.mark.parametrize("size", [5 * PART // 2, 10**5, 10**6, 3 * 10**6 + 1])
@pytest.mark.parametrize("value", [1.1, 1.3, 1.9])
def test_a_long_row_does_not_pass_the_clip(size: int, value: float) -> None:
    """Equal numbers, whose sum of squares is rounded the same way each time."""
    model = nn.Linear(size, 1, bias=False)
    got = clipped_gradient(
        model, lambda output, y: 100 * output[:, 0], torch.full((1, size), value), torch.zeros(1), clip_norm=1.0
    )
    assert 1 - 1e-5 < float(got["weight"].double().norm()) <= 1.0


def test_a_long_row_laid_out_does_not_pass_the_clip() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1000, 1000))

        def forward(self, x: Tensor) -> Tensor:
            return 100 * x * self.weight.sum((0, 1))

    for value in (1.1, 1.3, 1.9):
        got = clipped_gradient(
            Own(), lambda output, y: output[:, 0], torch.full((2, 1), value), torch.zeros(2), clip_norm=1.0
        )
        assert 1 - 1e-5 < float(got["weight"].double().norm()) / 2 <= 1.0


def test_squares_are_within_what_the_margin_leaves() -> None:
    """A row's norm may be the product of two such, and rounding of what is summed comes on top."""
    for size in (784, PART, 2 * PART - 1, 2 * PART, 10 * PART + 7):
        for value in torch.linspace(1, 2, 40):
            row = value.repeat(3, size)
            assert abs(math.sqrt(squares(row)[0]) / float(row[0].double().norm()) - 1) <= (1 - MARGIN) * 0.3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_is_refused(dtype: torch.dtype) -> None:
    model, (x, y) = Net().float(), batch(dtype=torch.float32)
    with (
        torch.autocast("cpu", dtype=dtype),
        pytest.raises(BadUsage, match="autocast: got it enabled for cpu, expected none"),
    ):
        clipped_gradient(model, loss, x, y, clip_norm=0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_inside_a_model_is_refused(dtype: torch.dtype) -> None:
    class Cast(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=dtype):
                return super().forward(x).float()

    model, (x, y) = Cast().float(), batch(dtype=torch.float32)
    for count in (1, EXAMPLES):
        with pytest.raises(BadUsage, match=f"gradients at a layer's outputs: got {dtype}, expected torch.float32"):
            clipped_gradient(model, loss, x[:count], y[:count], clip_norm=0.5)


@pytest.mark.parametrize("clip", [1e-2, 1e6])
def test_a_parameter_that_is_one_number_counts(clip: float) -> None:
    model, (x, y) = Net(), batch()
    model.temperature = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
    model.between = lambda hidden: hidden.tanh() * model.temperature
    check(model, loss, x, y, clip)
    got = clipped_gradient(model, loss, x, y, clip_norm=clip)
    assert got["temperature"].shape == ()
    # One after another, where `vmap` has no way.
    model.between = lambda hidden: hidden.tanh() * model.temperature * (1.0 if float(hidden.detach().sum()) else 2.0)
    check(model, loss, x, y, clip)
