"""Clipped gradients equal a plain loop over examples, and no example counts for more than its clip."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from torch import Tensor, nn

from fedinfer.errors import BadUsage
from fedinfer.models import ModelSpec, build
from fedinfer.privacy import clipped_gradient
from fedinfer.privacy.bookkeeping import MARGIN
from fedinfer.training import logistic_loss


def loop(model: nn.Module, x: Tensor, y: Tensor, clip: float) -> dict[str, Tensor]:
    """The definition: one example after another."""
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    for one_x, one_y in zip(x, y, strict=True):
        model.zero_grad()
        logistic_loss(model(one_x[None]), one_y[None]).sum().backward()
        grads = {name: model.get_parameter(name).grad.clone() for name in sums}
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
        if math.isfinite(norm):
            for name, g in grads.items():
                sums[name] += g * min(1.0, MARGIN * clip / max(norm, 1e-300))
    return sums


def data(rows: int, inputs: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator, dtype=dtype) * 2
    return x, (torch.rand(rows, generator=generator) > 0.5).to(dtype)


def models(dtype: torch.dtype) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    frozen = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))
    frozen[0].weight.requires_grad_(False)
    named = {
        "logistic": nn.Sequential(nn.Linear(6, 1)),
        "mlp": build(ModelSpec(family="mlp", inputs=6), seed=1),
        "no bias": nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 1)),
        "frozen weight": frozen,
        "layer used twice": nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(6, 1)),
        "layer norm": nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 1)),
    }
    return {name: model.to(dtype) for name, model in named.items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", models(torch.float32))
@pytest.mark.parametrize("rows", [0, 1, 17])
def test_equals_a_loop_over_examples(name: str, rows: int, dtype: torch.dtype, tolerance: float) -> None:
    model = models(dtype)[name]
    x, y = data(rows, 6, dtype)
    for clip in (0.1, 1.0, 1e6):
        got, expected = clipped_gradient(model, logistic_loss, x, y, clip_norm=clip), loop(model, x, y, clip)
        assert set(got) == set(expected)
        for key, tensor in expected.items():
            # A sum of `rows` clipped terms may cancel: its rounding goes with the terms, not with what is left.
            scale = float(tensor.norm()) + rows * min(clip, 1.0)
            assert float((got[key] - tensor).norm()) <= tolerance * scale


def test_equals_opacus() -> None:
    model = models(torch.float64)["mlp"]
    x, y = data(31, 6)
    ours = clipped_gradient(model, logistic_loss, x, y, clip_norm=0.5)
    theirs = GradSampleModule(models(torch.float64)["mlp"])
    logistic_loss(theirs(x.clone().requires_grad_()), y).mean().backward()
    samples = {name.removeprefix("_module."): p.grad_sample for name, p in theirs.named_parameters()}
    norms = torch.stack([g.reshape(31, -1).norm(dim=1) for g in samples.values()]).norm(dim=0)
    factors = (MARGIN * 0.5 / norms).clamp(max=1.0)
    for name, g in samples.items():
        expected = torch.tensordot(factors, g, dims=1)
        assert float((ours[name] - expected).norm() / expected.norm()) < 1e-12
    assert ours.below_clip == int((factors >= 1).sum())


@settings(max_examples=60)
@given(st.integers(1, 12), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.sampled_from(["logistic", "mlp"]))
def test_one_example_changes_the_result_by_at_most_clip_norm(rows: int, clip: float, size: float, name: str) -> None:
    model = models(torch.float32)[name]
    x, y = data(rows, 6, torch.float32, seed=rows)
    x[-1] *= size
    whole = clipped_gradient(model, logistic_loss, x, y, clip_norm=clip)
    without = clipped_gradient(model, logistic_loss, x[:-1], y[:-1], clip_norm=clip)
    moved = math.sqrt(sum(float((whole[key] - without[key]).double().square().sum()) for key in whole))
    # What float32 rounding of a sum of `rows` terms may add has nothing to do with the example.
    assert moved <= clip * (1 + 1e-6 * rows)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("name", ["mlp", "layer norm"])
def test_an_example_that_is_not_finite_contributes_zero(value: float, name: str) -> None:
    model = models(torch.float32)[name]
    x, y = data(5, 6, torch.float32)
    poisoned = x.clone()
    poisoned[2] = value
    got = clipped_gradient(model, logistic_loss, poisoned, y, clip_norm=1.0)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in got.values())
    if got.nonfinite:
        keep = [0, 1, 3, 4]
        expected = clipped_gradient(model, logistic_loss, x[keep], y[keep], clip_norm=1.0)
        assert all(torch.allclose(got[key], expected[key], atol=1e-6) for key in got)
    assert got.nonfinite == 1 or value == 1e30


def test_layers_that_mix_examples_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    with pytest.raises(BadUsage, match="layer '1': got BatchNorm1d, which mixes examples; use GroupNorm or LayerNorm"):
        clipped_gradient(model, logistic_loss, *data(4, 6, torch.float32), clip_norm=1.0)


def test_counts_are_not_shown() -> None:
    got = clipped_gradient(models(torch.float32)["mlp"], logistic_loss, *data(4, 6, torch.float32), clip_norm=1.0)
    assert repr(got) == "ClippedGradient()"
    assert np.isfinite(got.below_clip)
