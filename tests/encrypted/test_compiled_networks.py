"""Compiled networks answer as torch does, on the clear scheme and under CKKS, and say so when they cannot."""

import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fedinfer.encrypted import (
    Compiled,
    EncryptedClient,
    EncryptedEngine,
    PublicCircuit,
    StatisticalFlooding,
    compile_model,
)
from fedinfer.encrypted.clear import InsecureClear
from fedinfer.encrypted.params import MAX_BITS_128
from fedinfer.encrypted.scheme import Scheme
from fedinfer.errors import BadUsage, CompileError, EncryptedError, NonFinite, ShapeMismatch
from tests.encrypted.networks import Square, networks

NETWORKS = networks()
# Under real CKKS a few that between them use every operation; all of them run in the clear.
REAL = ("logistic 30", "mlp 30-64-2", "odd 37-53-11", "residual", "gated", "signal", "cubic")


def rows_of(shapes: list[tuple[int, ...]], count: int = 48, seed: int = 1) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, *shape, generator=generator) * 0.5 for shape in shapes)


@functools.cache
def compiled(name: str) -> Compiled:
    net, shapes = NETWORKS[name]
    rows = rows_of(shapes)
    return compile_model(net.eval(), tuple(row[:1] for row in rows), calibration=rows)


def asked(one: Compiled, features: tuple[np.ndarray, ...], scheme: Scheme | None) -> np.ndarray:
    """Every byte crosses: circuit, keys, query and answer."""
    engine = EncryptedEngine(one, scheme)
    client = EncryptedClient.generate(PublicCircuit.from_bytes(one.public.to_bytes()), scheme)
    session = engine.open(client.evaluation_keys())
    return client.decrypt(session.run(client.encrypt(features if len(features) > 1 else features[0])))


def plain(net: nn.Module, features: tuple[np.ndarray, ...]) -> np.ndarray:
    with torch.no_grad():
        return net.eval()(*(torch.from_numpy(part) for part in features)).numpy()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_circuit_is_the_network(name: str) -> None:
    net, shapes = NETWORKS[name]
    features = tuple(row[:4].numpy() for row in rows_of(shapes))
    np.testing.assert_allclose(asked(compiled(name), features, InsecureClear()), plain(net, features), atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_noise_of_the_size_of_ckks_stays_within_the_stated_error(name: str) -> None:
    net, shapes = NETWORKS[name]
    features = tuple(row[:8].numpy() for row in rows_of(shapes))
    error = np.abs(asked(compiled(name), features, InsecureClear(noise=1)) - plain(net, features)).max()
    assert error <= 4 * compiled(name).public.error


@pytest.mark.parametrize("name", REAL)
def test_ckks_answers_are_as_exact_as_promised(name: str) -> None:
    net, shapes = NETWORKS[name]
    features = tuple(row[:2].numpy() for row in rows_of(shapes))
    error = np.abs(asked(compiled(name), features, None) - plain(net, features)).max()
    assert error <= 4 * compiled(name).public.error


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_have_128_bits(name: str) -> None:
    parameters = compiled(name).public.parameters
    assert sum(prime.bit_length() for prime in parameters.primes) <= MAX_BITS_128[parameters.degree]
    assert all(prime % (2 * parameters.degree) == 1 for prime in parameters.primes)


@st.composite
def small_nets(draw: st.DrawFn) -> tuple[nn.Module, list[tuple[int, ...]]]:
    """Dense or convolutional, of any size, with any of the activations between."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    activation = draw(st.sampled_from([Square, nn.Identity]))
    if draw(st.booleans()):
        sizes = draw(st.lists(st.integers(1, 40), min_size=2, max_size=4))
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after), activation()]
        return nn.Sequential(*layers[:-1]), [(sizes[0],)]
    channels, side = draw(st.integers(1, 3)), draw(st.integers(5, 10))
    kernel, stride, padding = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(0, 1))
    out = draw(st.integers(1, 4)) * channels
    conv = nn.Conv2d(channels, out, kernel, stride=stride, padding=padding, groups=draw(st.sampled_from([1, channels])))
    size = (side + 2 * padding - kernel) // stride + 1
    return nn.Sequential(conv, activation(), nn.Flatten(), nn.Linear(out * size * size, 3)), [(channels, side, side)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(small_nets())
def test_random_networks_compile_to_themselves(drawn: tuple[nn.Module, list[tuple[int, ...]]]) -> None:
    net, shapes = drawn
    rows = rows_of(shapes, 16)
    one = compile_model(net.eval(), tuple(row[:1] for row in rows), calibration=rows)
    features = tuple(row[:2].numpy() for row in rows)
    np.testing.assert_allclose(asked(one, features, InsecureClear()), plain(net, features), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("net", "shape", "message"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2)), (1, 8, 8), "layer 1: max_pool2d .* AvgPool2d"),
        (nn.Sequential(nn.Linear(4, 4), nn.Softmax(dim=1)), (4,), "layer 1: softmax .* logits"),
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), (4,), "layer 1: layer_norm .* BatchNorm"),
        (nn.Sequential(*[part for _ in range(24) for part in (nn.Linear(4, 4), Square())]), (4,), "bits more than"),
    ],
)
def test_what_has_no_encrypted_form_is_refused_by_name(net: nn.Module, shape: tuple[int, ...], message: str) -> None:
    rows = torch.randn(8, *shape)
    with pytest.raises(CompileError, match=message):
        compile_model(net.eval(), rows[:1], calibration=rows)


def test_arguments_that_cannot_be_right_are_refused() -> None:
    net, rows = nn.Linear(4, 1), torch.randn(8, 4)
    with pytest.raises(BadUsage, match="expected a batch axis of one"):
        compile_model(net, rows, calibration=rows)
    with pytest.raises(BadUsage, match=r"calibration: got shape"):
        compile_model(net, rows[:1], calibration=rows[:, :3])
    with pytest.raises(BadUsage, match="NaN"):
        compile_model(net, rows[:1], calibration=rows * torch.nan)
    with pytest.raises(BadUsage, match="expected 1 to 30"):
        StatisticalFlooding(bits=0)


def test_features_that_do_not_fit_are_refused() -> None:
    client = EncryptedClient.generate(compiled("logistic 30").public, InsecureClear())
    with pytest.raises(ShapeMismatch):
        client.encrypt(np.zeros((1, 31)))
    with pytest.raises(NonFinite):
        client.encrypt(np.full((1, 30), np.nan))
    with pytest.raises(EncryptedError, match="got 0 rows"):
        client.encrypt(np.zeros((0, 30)))
    with pytest.raises(EncryptedError, match="outside the circuit's range"):
        client.encrypt(np.full((1, 30), 1e6))
    with pytest.raises(EncryptedError, match="got 2 arrays, expected 1"):
        client.encrypt((np.zeros((1, 30)), np.zeros((1, 30))))


@pytest.mark.parametrize("name", ["mlp 30-64-2", "signal", "joined"])
def test_throughput_gives_every_row_a_slot(name: str) -> None:
    net, shapes = NETWORKS[name]
    rows = rows_of(shapes, 300)
    one = compile_model(net.eval(), tuple(row[:1] for row in rows), calibration=rows, objective="throughput")
    features = tuple(row.numpy() for row in rows)
    np.testing.assert_allclose(asked(one, features, InsecureClear()), plain(net, features), atol=1e-4)
    assert one.public.max_rows == one.public.parameters.slots
    if name == "mlp 30-64-2":
        error = np.abs(asked(one, features, None) - plain(net, features)).max()
        assert error <= 4 * one.public.error


def test_flooding_costs_scale_and_keeps_the_precision() -> None:
    net, shapes = NETWORKS["mlp 30-64-2"]
    rows = rows_of(shapes)
    flooded = compile_model(
        net.eval(), rows[0][:1], calibration=rows[0], precision=1e-2, circuit_privacy=StatisticalFlooding(bits=8)
    )
    features = (rows[0][:2].numpy(),)
    error = np.abs(asked(flooded, features, None) - plain(net, features)).max()
    assert error <= 4 * flooded.public.error
    assert flooded.private.flood >= 2.0**8
