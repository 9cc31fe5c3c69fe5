"""Compiled networks answer as torch does, on the clear scheme and under CKKS, and say so when they cannot."""

import dataclasses
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
    noise,
)
from fedinfer.encrypted.circuit import execute
from fedinfer.encrypted.clear import InsecureClear
from fedinfer.encrypted.params import MAX_BITS_128, Parameters
from fedinfer.encrypted.ring import held_for
from fedinfer.encrypted.scheme import Scheme, TenSeal
from fedinfer.errors import BadUsage, CompileError, EncryptedError, NonFinite, ShapeMismatch
from tests.encrypted.networks import Square, networks


class Kept(nn.Module):
    """A map that mixes features whose mean it keeps."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x + 0.5 * x.flip(-1)


class Tenth(nn.Module):
    """A map that keeps values near one through any number of squares."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.1 * x.flip(-1) + 0.9


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
        (nn.Sequential(*[part for _ in range(24) for part in (Tenth(), Square())]), (4,), "bits more than"),
        (nn.Sequential(*[Square() for _ in range(16)], nn.Linear(4, 1)), (4,), "values above 1e308|bits more than"),
    ],
)
def test_what_has_no_encrypted_form_is_refused_by_name(net: nn.Module, shape: tuple[int, ...], message: str) -> None:
    (rows,) = rows_of([shape], 8)
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


@pytest.mark.parametrize("squares", [1, 3, 5])
def test_nothing_wraps_within_the_range_of_the_inputs(squares: int) -> None:
    """Powers of features a quarter larger are up to a thousand times larger: the primes must have room for them."""
    last = nn.Linear(8, 1)
    nn.init.constant_(last.weight, 0.125)
    nn.init.zeros_(last.bias)
    net = nn.Sequential(*[part for _ in range(squares) for part in (Kept(), Square())], last).eval()
    rows = 1.0 - 0.1 * torch.rand(32, 8, generator=torch.Generator().manual_seed(1))
    one = compile_model(net, rows[:1], calibration=rows)
    features = (np.full((1, 8), one.public.inputs[0].bound),)
    assert 1.2 < one.public.inputs[0].bound < 1.6
    expected = plain(net, (features[0].astype(np.float32),))
    np.testing.assert_allclose(asked(one, features, None), expected, rtol=0.02)


def test_keys_need_a_special_prime_and_released_noise_a_floor() -> None:
    with pytest.raises(EncryptedError, match="without one for key switching"):
        Parameters(degree=2048, prime_bits=(32, 20), special=False, scale_bits=20.0)
    with pytest.raises(EncryptedError, match="do not fit"):
        dataclasses.replace(compiled("logistic 30").public, error=0.0)
    weak = dataclasses.replace(compiled("logistic 30").public, error=1e-300)
    client = EncryptedClient.generate(weak)
    one = dataclasses.replace(compiled("logistic 30"), public=weak)
    answer = EncryptedEngine(one).open(client.evaluation_keys()).run(client.encrypt(np.zeros((1, 30))))
    released = np.array([client.release(answer, releases=1000, bits=8)[0, 0] for _ in range(50)])
    assert released.std() > 50 * 5 * noise.answered(weak.parameters.degree, 1) / weak.scale
    with pytest.raises(BadUsage, match="got 50 releases and 8 bits, expected 51"):
        client.release(answer, releases=50, bits=8)


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


@pytest.mark.parametrize("name", ["logistic 30", "mlp 30-64-2", "three layers", "odd 37-53-11", "signal", "gated"])
def test_a_flood_is_as_many_times_the_real_noise_as_it_says(name: str) -> None:
    """Under CKKS, every number of an answer before re-randomisation and flooding, against exact arithmetic."""
    bits = 12
    net, shapes = NETWORKS[name]
    rows = rows_of(shapes)
    one = compile_model(
        net.eval(), tuple(row[:1] for row in rows), calibration=rows, precision=0.1,
        circuit_privacy=StatisticalFlooding(bits=bits),
    )  # fmt: skip
    public, scheme = one.public, TenSeal()
    secret = scheme.secret_side(public.parameters, public.keys)
    side = scheme.server_side(public.parameters, public.keys, secret.public_keys())
    side._rerandomised = lambda parts: parts  # type: ignore[attr-defined]
    few = [row[:6].double().reshape(6, -1).numpy() for row in rows]
    exact = one.simulate(few, noise=None)
    encoded, largest = one.encode(scheme), 0.0
    for number in range(6):
        parts = [side.read(secret.encrypt(slots)) for slots in public.pack([row[number : number + 1] for row in few])]
        (answer,) = execute(one.private, encoded, side, public.split(parts))
        got = secret.decrypt(side.write(answer, outputs=public.classes, flood=0.0), outputs=public.classes, scale=1.0)
        wanted = np.zeros(public.classes)
        wanted[: public.outputs] = exact[number] * public.scale
        largest = max(largest, float(np.abs(held_for(got - wanted)).max()))
    assert largest * 2**bits <= one.private.flood


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
