"""Whatever the model does, no example counts for more than its clip, and none for another."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

from fedinfer.errors import BadUsage, ShapeMismatch
from fedinfer.privacy import clipped_gradient
from fedinfer.privacy.bookkeeping import MARGIN
from fedinfer.privacy.products import Products, Terms

STEPS = 5


def loss(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output, target, reduction="none")


def batch(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, STEPS, 4, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 3, (count,), generator=generator)


def loop(model: nn.Module, loss_fn: Callable[..., Tensor], x: Tensor, y: Tensor, clip: float) -> dict[str, Tensor]:
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


class Net(nn.Module):
    """Two linear layers and what `between` does to the (B, T, 6) of the first."""

    def __init__(self, between: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Linear(4, 6), nn.Linear(6, 3), between

    def forward(self, x: Tensor) -> Tensor:
        return self.between(self, self.first(x))


def total(net: Net, hidden: Tensor) -> Tensor:
    return net.second(hidden.tanh()).sum(1)


def rows_of_all(net: Net, hidden: Tensor) -> Tensor:
    return net.second(hidden.tanh().reshape(-1, 6)).view(len(hidden), -1, 3).sum(1)


def time_first(net: Net, hidden: Tensor) -> Tensor:
    return net.second(hidden.tanh().transpose(0, 1)).sum(0)


def backwards(net: Net, hidden: Tensor) -> Tensor:
    return net.second(hidden.tanh().flip(0)).flip(0).sum(1)


def functional_use(net: Net, hidden: Tensor) -> Tensor:
    return total(net, hidden) + functional.linear(hidden.mean(1), net.second.weight)


def called_past_the_module(net: Net, hidden: Tensor) -> Tensor:
    return nn.Linear.forward(net.second, hidden.tanh()).sum(1)


def overwritten(net: Net, hidden: Tensor) -> Tensor:
    hidden = hidden * 1
    output = net.second(hidden)
    hidden.zero_()
    return output.sum(1)


def centred(net: Net, hidden: Tensor) -> Tensor:
    return total(net, hidden - hidden.mean(0, keepdim=True))


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def subclassed() -> nn.Module:
    net = Net(total)
    net.second = Doubled(6, 3)
    return net


def patched() -> nn.Module:
    net = Net(total)
    own = net.second.forward
    net.second.forward = lambda x: 3 * own(x)
    return net


def parametrized() -> nn.Module:
    net = Net(total)
    parametrizations.weight_norm(net.second)
    return net


def pruned() -> nn.Module:
    net = Net(total)
    prune.l1_unstructured(net.second, "weight", amount=0.5)
    return net


def bias_pruned() -> nn.Module:
    net = Net(total)
    prune.random_unstructured(net.second, "bias", amount=0.5)
    return net


def with_attention() -> nn.Module:
    net = Net(lambda net, hidden: total(net, net.attention(hidden, hidden, hidden)[0]))
    net.attention = nn.MultiheadAttention(6, 2, batch_first=True)
    return net


def with_gru_and_own_parameter() -> nn.Module:
    net = Net(lambda net, hidden: total(net, net.gru(hidden)[0] * net.scale))
    net.gru, net.scale = nn.GRU(6, 6, batch_first=True), nn.Parameter(torch.rand(6))
    return net


def looking_at_values() -> nn.Module:
    net = Net(lambda net, hidden: total(net, hidden * net.scale if float(hidden.detach().sum()) > 0 else hidden))
    net.scale = nn.Parameter(torch.rand(6))
    return net


ODD = {
    "rows of all examples": lambda: Net(rows_of_all),
    "time first": lambda: Net(time_first),
    "examples in another order": lambda: Net(backwards),
    "weight used outside its layer": lambda: Net(functional_use),
    "layer run past its call": lambda: Net(called_past_the_module),
    "inputs overwritten": lambda: Net(overwritten),
    "examples centred": lambda: Net(centred),
    "subclass": subclassed,
    "own forward": patched,
    "weight norm": parametrized,
    "pruned": pruned,
    "bias pruned": bias_pruned,
    "attention": with_attention,
    "GRU beside an own parameter": with_gru_and_own_parameter,
    "control flow by values": looking_at_values,
}


@pytest.mark.parametrize("name", ODD)
# With as many examples as steps, shapes tell nothing.
@pytest.mark.parametrize("count", [STEPS, 7])
def test_models_that_two_passes_would_get_wrong(name: str, count: int) -> None:
    torch.manual_seed(0)
    model = ODD[name]().double()
    x, y = batch(count)
    if name == "inputs overwritten":
        # torch refuses such a model in an ordinary backward pass too.
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            clipped_gradient(model, loss, x, y, clip_norm=0.5)
        return
    expected = loop(model, loss, x, y, 0.5)
    for _ in range(2):
        got = clipped_gradient(model, loss, x, y, clip_norm=0.5)
        for key, tensor in expected.items():
            assert float((got[key] - tensor).norm()) <= 1e-12 * float(tensor.norm())


class Overwriting(nn.Module):
    """Empties what it gave to its layer, which the layer's gradient needs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        output = self.layer(x)
        x.zero_()
        return self.head((output[0] if isinstance(output, tuple) else output).mean(1))


@pytest.mark.parametrize(
    ("layer", "x"),
    [(nn.Embedding(4, 5), torch.arange(12).reshape(4, 3) % 4), (nn.GRU(4, 5, batch_first=True), torch.ones(4, 3, 4))],
)
def test_inputs_that_were_overwritten_are_not_taken_for_what_they_were(layer: nn.Module, x: Tensor) -> None:
    model, y = Overwriting(layer), torch.zeros(4, dtype=torch.long)
    # torch refuses such a model in an ordinary backward pass too.
    for _ in range(2):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            clipped_gradient(model, loss, x.clone(), y, clip_norm=0.5)


def test_losses_that_share_something_are_taken_apart() -> None:
    def normalised(output: Tensor, target: Tensor) -> Tensor:
        losses = loss(output, target)
        return losses / losses.sum()

    torch.manual_seed(0)
    model = Net(total).double()
    x, y = batch(6)
    # That the model was fine with another loss says nothing.
    clipped_gradient(model, loss, x, y, clip_norm=1e-3)
    got, expected = clipped_gradient(model, normalised, x, y, clip_norm=1e-3), loop(model, normalised, x, y, 1e-3)
    # Alone, an example's share of the loss is all of it, whatever the model does.
    assert all(float((got[key] - expected[key]).norm()) <= 1e-15 for key in expected)


def test_a_loss_that_holds_parameters_of_the_model_counts_them() -> None:
    torch.manual_seed(0)
    model = Net(total).double()

    def penalised(output: Tensor, target: Tensor) -> Tensor:
        return loss(output, target) + model.second.weight.square().sum()

    x, y = batch(6)
    got, expected = clipped_gradient(model, penalised, x, y, clip_norm=0.5), loop(model, penalised, x, y, 0.5)
    assert all(float((got[key] - expected[key]).norm()) <= 1e-12 * float(expected[key].norm()) for key in expected)


def test_a_model_is_looked_at_again_when_it_changes() -> None:
    """In training mode it centres its examples, in evaluation it does not."""
    model = Net(lambda net, hidden: centred(net, hidden) if net.training else total(net, hidden)).double()
    x, y = batch(6)
    for training in (False, True):
        model.train(training)
        got, expected = clipped_gradient(model, loss, x, y, clip_norm=0.5), loop(model, loss, x, y, 0.5)
        assert all(float((got[key] - expected[key]).norm()) <= 1e-12 * float(expected[key].norm()) for key in expected)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(4 * STEPS, 8), nn.ReLU(), nn.Linear(8, 3)),
    "steps, kept": lambda: nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 2), nn.Flatten(), nn.Linear(10, 3)),
    "steps, parts": lambda: nn.Sequential(nn.Linear(4, 12), nn.Linear(12, 12), nn.Flatten(), nn.Linear(60, 3)),
    "steps, Gram": lambda: nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 64), nn.Flatten(), nn.Linear(320, 3)),
    "convolution": lambda: nn.Sequential(nn.Conv1d(STEPS, 6, 3), nn.GroupNorm(2, 6), nn.Flatten(), nn.Linear(12, 3)),
    "layer norm": lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Flatten(), nn.Linear(25, 3)),
    "recurrent": lambda: nn.Sequential(nn.GRU(4, 6, batch_first=True), First(), nn.Flatten(), nn.Linear(30, 3)),
    "own parameter": looking_at_values,
}


class First(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0]


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(sorted(MODELS)),
    st.integers(1, 9),
    st.floats(1e-3, 1e3),
    st.floats(1e-3, 1e4),
    st.integers(0, 2**32 - 1),
)
def test_one_example_changes_the_result_by_at_most_clip_norm(
    name: str, count: int, clip: float, size: float, seed: int
) -> None:
    torch.manual_seed(seed)
    model = MODELS[name]()
    x, y = batch(count, seed, torch.float32)
    x[-1] *= size
    whole = clipped_gradient(model, loss, x, y, clip_norm=clip)
    without = clipped_gradient(model, loss, x[:-1], y[:-1], clip_norm=clip)
    moved = math.sqrt(sum(float((whole[key].double() - without[key]).square().sum()) for key in whole))
    # What float32 rounding of a sum of `count` terms may add has nothing to do with the example.
    assert moved <= clip * (1 + 1e-6 * count)
    alone = clipped_gradient(model, loss, x[-1:], y[-1:], clip_norm=clip)
    assert math.sqrt(sum(float(alone[key].double().square().sum()) for key in alone)) <= clip


@pytest.mark.parametrize(("steps", "size"), [(8, 64), (60, 40), (400, 8)])
def test_terms_that_cancel_do_not_pass_the_clip(steps: int, size: int) -> None:
    """An example whose terms are huge and whose gradient is a few times the clip: Gram matrices in float32 lose it."""
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(1, steps, size, generator=generator) * 1e3
    b = torch.randn(1, steps, size, generator=generator) * 1e3
    a[:, 1::2], b[:, 1::2] = a[:, ::2], -b[:, ::2]
    b[:, 0, 0] += 1e-2
    true = float(torch.einsum("btp,btd->bpd", b.double(), a.double()).norm())
    naive = (torch.bmm(a, a.mT) * torch.bmm(b, b.mT)).sum((1, 2)).clamp_min(0).sqrt()
    clip = true / 8
    assert true * float(clip / naive.clamp_min(clip)) > 1.5 * clip
    squared, clippable = Products(Terms(a, b)).measured(clip)
    factors = torch.from_numpy(MARGIN * clip / np.maximum(np.sqrt(squared), clip)).float()
    assert float(clippable.weighted_sum(factors).double().norm()) <= clip


def test_terms_that_cancel_a_little_are_measured_well_enough() -> None:
    """So little that nothing is laid out: a Gram matrix in float32 would be off by more than the margin."""
    generator = torch.Generator().manual_seed(2)
    excess, naive_excess = [], []
    for _ in range(40):
        a = (torch.randn(1, 1, 64, generator=generator) * 3).repeat(1, 6, 1)
        b = torch.randn(1, 6, 64, generator=generator)
        b -= b.mean(1, keepdim=True) * (1 - 1 / 20)
        true = float((b.double().sum(1)).norm() * a[0, 0].double().norm())
        clip = true / 2
        squared, clippable = Products(Terms(a, b)).measured(clip)
        assert isinstance(clippable, Terms)
        excess.append(true / math.sqrt(squared[0]) - 1)
        naive = (torch.bmm(a, a.mT) * torch.bmm(b, b.mT)).sum((1, 2)).sqrt()
        naive_excess.append(true / float(naive) - 1)
    assert max(excess) < 4e-7 < 4e-6 < max(naive_excess)


def test_a_large_row_does_not_hide_behind_a_small_gradient() -> None:
    """b is too small for its square, a large enough to make up for it."""
    model = nn.Linear(2, 1, bias=False)
    x = torch.tensor([[1e15, -1e15]])
    got = clipped_gradient(
        model, lambda output, y: 1e-23 * (output - output.detach())[:, 0], x, torch.zeros(1), clip_norm=1e-9
    )
    assert 0 < float(got["weight"].norm()) <= 1e-9


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38])
@pytest.mark.parametrize("name", MODELS)
def test_an_example_that_is_not_finite_contributes_zero(name: str, value: float) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    x, y = batch(6, dtype=torch.float32)
    kept = [0, 1, 3, 4]
    expected = clipped_gradient(model, loss, x[kept], y[kept], clip_norm=0.5)
    x[2], x[5, 1, 1] = value, value
    got = clipped_gradient(model, loss, x, y, clip_norm=0.5)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in got.values())
    if got.nonfinite == 2:
        assert all(float((got[key] - expected[key]).norm()) <= 1e-6 * float(expected[key].norm()) for key in expected)
        assert got.below_clip == expected.below_clip
    # A large number may still have a finite gradient, behind a layer that squashes it.
    assert got.nonfinite == 2 or value == 1e38 or name == "recurrent"


def test_no_finite_example_gives_zeros() -> None:
    x, y = batch(3)
    got = clipped_gradient(MODELS["mlp"]().double(), loss, x * math.nan, y, clip_norm=1.0)
    assert (got.below_clip, got.nonfinite) == (0, 3)
    assert not any(tensor.any() for tensor in got.values())


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.BatchNorm1d(STEPS), "BatchNorm1d, which mixes examples; use GroupNorm or LayerNorm"),
        (nn.BatchNorm1d(STEPS, affine=False).eval(), "BatchNorm1d, which mixes examples; use GroupNorm or LayerNorm"),
        (nn.SyncBatchNorm(STEPS), "SyncBatchNorm, which mixes examples"),
        (nn.InstanceNorm1d(STEPS, track_running_stats=True), "keeps statistics of examples; use track_running_stats=F"),
        (nn.Embedding(3, 4, max_norm=1.0), "changes the rows that examples look up, without noise; use max_norm=None"),
        (nn.EmbeddingBag(3, 4, scale_grad_by_freq=True), "mixes examples; use scale_grad_by_freq=False"),
    ],
)
def test_layers_that_mix_examples_or_keep_them_are_refused_by_name(layer: nn.Module, message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), layer)
    with pytest.raises(BadUsage, match=f"layer '1': got .*{message}"):
        clipped_gradient(model, loss, *batch(4, dtype=torch.float32), clip_norm=1.0)


def test_layers_that_keep_nothing_are_not_refused() -> None:
    model = nn.Sequential(nn.InstanceNorm1d(STEPS), nn.Flatten(), nn.Linear(20, 3)).double()
    x, y = batch(4)
    got, expected = clipped_gradient(model, loss, x, y, clip_norm=0.5), loop(model, loss, x, y, 0.5)
    assert all(float((got[key] - expected[key]).norm()) <= 1e-12 for key in expected)


def test_arguments_that_cannot_be_right() -> None:
    model = MODELS["mlp"]().double()
    x, y = batch(4)
    for clip in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(BadUsage, match="clip_norm: got"):
            clipped_gradient(model, loss, x, y, clip_norm=clip)
    with pytest.raises(ShapeMismatch, match=r"x: got shape \(3, 5, 4\)"):
        clipped_gradient(model, loss, x[:3], y, clip_norm=1.0)
    with pytest.raises(ShapeMismatch, match=r"losses: got shape \(\), expected \(4,\)"):
        clipped_gradient(model, lambda output, y: loss(output, y).mean(), x, y, clip_norm=1.0)
    with pytest.raises(BadUsage, match=r"parameter '1.weight': got torch.bfloat16"):
        clipped_gradient(copy.deepcopy(model).bfloat16(), loss, x, y, clip_norm=1.0)
    model[1].weight.register_hook(lambda gradient: gradient * 2)
    with pytest.raises(BadUsage, match=r"parameter '1.weight': got a hook on its gradient"):
        clipped_gradient(model, loss, x, y, clip_norm=1.0)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_stays_as_it_is(name: str) -> None:
    def fails(output: Tensor, target: Tensor) -> Tensor:
        raise ZeroDivisionError

    torch.manual_seed(0)
    model = MODELS[name]().double()
    model[1].eval() if isinstance(model, nn.Sequential) else model.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    attributes = [set(module.__dict__) for module in model.modules()]
    x, y = batch(4)
    x.requires_grad_()
    with torch.no_grad():
        clipped_gradient(model, loss, x, y, clip_norm=1.0)
    with pytest.raises(ZeroDivisionError):
        clipped_gradient(model, fails, x, y, clip_norm=1.0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert x.grad is None
    assert [module.training for module in model.modules()] == modes
    assert [set(module.__dict__) for module in model.modules()] == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("rnn", [None, nn.GRU, nn.LSTM])
def test_dropout_draws_what_an_ordinary_pass_draws(rnn: type[nn.GRU | nn.LSTM] | None) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6)] if rnn is None else [rnn(4, 6, num_layers=2, dropout=0.5, batch_first=True), First()]
    model = nn.Sequential(*layers, nn.Dropout(0.5), nn.Flatten(), nn.Linear(30, 3)).double()
    x, y = batch(4)
    for _ in range(2):
        torch.manual_seed(1)
        got = clipped_gradient(model, loss, x, y, clip_norm=1e6)
        after = torch.get_rng_state()
        torch.manual_seed(1)
        expected = torch.autograd.grad(loss(model(x), y).sum(), list(model.parameters()))
        if rnn is None:
            assert torch.equal(after, torch.get_rng_state())
            assert all(torch.allclose(got[key], g) for key, g in zip(got, expected, strict=True))
        # Between the layers of an LSTM torch may draw its masks in another order.
        assert all(bool(tensor.any()) for tensor in got.values())


def test_examples_draw_dropout_of_their_own_in_the_slower_way() -> None:
    torch.manual_seed(0)
    net = Net(lambda net, hidden: net.second(functional.dropout(hidden[:, 0] * net.scale, 0.5)))
    net.scale = nn.Parameter(torch.ones(6))
    x, y = batch(1, dtype=torch.float32)
    many = clipped_gradient(net, loss, x.repeat(64, 1, 1), y.repeat(64), clip_norm=1e6)
    # With one mask for all, what it drops would be dropped in all.
    assert bool(many["scale"].all())


def test_the_slower_way_takes_some_examples_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedinfer.privacy import instances

    torch.manual_seed(0)
    model = with_attention().double()
    x, y = batch(7)
    whole = clipped_gradient(model, loss, x, y, clip_norm=0.5)
    monkeypatch.setattr(instances, "CHUNK", 3 * sum(p.numel() for p in model.parameters()))
    parts = clipped_gradient(model, loss, x, y, clip_norm=0.5)
    assert all(torch.allclose(whole[key], parts[key], rtol=1e-12, atol=1e-14) for key in whole)
    assert whole.below_clip == parts.below_clip


def test_counts_are_not_shown() -> None:
    got = clipped_gradient(MODELS["mlp"]().double(), loss, *batch(4), clip_norm=1.0)
    assert repr(got) == "ClippedGradient()"
    assert isinstance(got.below_clip, int)
