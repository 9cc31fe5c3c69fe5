"""Networks with polynomials in place of activations: as near as a fit can be, trainable, and exact when compiled."""

import copy
import functools

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from fedinfer.encrypted import EncryptedClient, EncryptedEngine, compile_model
from fedinfer.encrypted.capture import Approximation, capture
from fedinfer.encrypted.clear import InsecureClear
from fedinfer.encrypted.finetune import ELEMENTWISE, Polynomial, finetune, polynomial_activations
from fedinfer.encrypted.graph import Product, Value, sources_of
from fedinfer.encrypted.polynomials import minimax
from fedinfer.errors import BadUsage, CompileError, NonFinite
from fedinfer.privacy import clipped_gradient


def rows(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(activation: nn.Module, outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), activation, nn.Linear(8, outputs))


def polynomials_of(net: nn.Module) -> list[Polynomial]:
    return [layer for layer in net.modules() if isinstance(layer, Polynomial)]


def same(one: nn.Module, two: nn.Module) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", ELEMENTWISE)
@pytest.mark.parametrize("degree", [2, 5, 8])
def test_a_polynomial_is_the_nearest_one_on_the_values_that_it_replaces(kind: type[nn.Module], degree: int) -> None:
    net, x = small(kind()), rows(300, 6)
    (polynomial,) = polynomials_of(polynomial_activations(net, calibration=x, degree=degree))
    with torch.no_grad():
        values = net[0](x)
        got, wanted = polynomial(values).double().numpy().ravel(), kind()(values.clone()).double().numpy().ravel()
    at = values.double().numpy().ravel()
    best = np.polynomial.Chebyshev.fit(at, wanted, degree)(at)
    np.testing.assert_allclose(got, best, atol=1e-4)
    inside = (at - float(polynomial.centre)) / float(polynomial.radius)
    assert np.abs(inside).max() < 1.0


def test_an_activation_that_is_a_polynomial_is_replaced_exactly() -> None:
    class Cubic(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0.25 * x**3 + 0.5 * x

    net, x = small(Cubic()), rows(200, 6)
    replaced = polynomial_activations(net, calibration=x, degree=3, kinds=(Cubic,))
    torch.testing.assert_close(replaced(x), net(x), atol=1e-5, rtol=1e-5)


def depth(value: Value) -> int:
    return max((depth(source) for source in sources_of(value)), default=0) + isinstance(value, Product)


@pytest.mark.parametrize(("degree", "levels"), [(2, 1), (3, 2), (4, 2), (8, 3)])
def test_the_compiler_sees_one_polynomial_of_least_depth(degree: int, levels: int) -> None:
    x = rows(64, 6)
    net = polynomial_activations(small(nn.ReLU()), calibration=x, degree=degree)
    captured = capture(net, (x[:1],), (x,), Approximation(degree=1, fit=minimax))
    assert depth(captured.output) == levels
    np.testing.assert_allclose(captured.output.rows, net(x).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("degree", [2, 4])
def test_a_fine_tuned_network_compiles_to_itself(degree: int) -> None:
    x, y = rows(200, 6), torch.arange(200) % 3
    net = polynomial_activations(small(nn.GELU()), calibration=x, degree=degree)
    tuned = finetune(net, public_x=x, public_y=y, epochs=2, learning_rate=1e-2, seed=0)
    compiled = compile_model(tuned, x[:1], calibration=x)
    client = EncryptedClient.generate(compiled.public, InsecureClear())
    session = EncryptedEngine(compiled, InsecureClear()).open(client.evaluation_keys())
    got = client.decrypt(session.run(client.encrypt(x[:16].numpy())))
    np.testing.assert_allclose(got, tuned(x[:16]).detach().numpy(), atol=1e-4)
    assert compiled.public.approximation < 1e-9


@functools.cache
def trained_digits() -> tuple[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A ReLU network on scikit-learn's digits: 1,297 rows to train on, 500 to test."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    x, y = torch.tensor(data.data[order] / 16, dtype=torch.float32), torch.tensor(data.target[order])
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(15):
        for chosen in torch.randperm(1297).split(64):
            loss = nn.functional.cross_entropy(net(x[chosen]), y[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return net.eval(), x[:1297], y[:1297], x[1297:], y[1297:]


def accuracy(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    with torch.no_grad():
        return float((net(x).argmax(1) == y).double().mean())


def test_fine_tuning_closes_the_gap_to_relu() -> None:
    net, x, y, test_x, test_y = trained_digits()
    start = polynomial_activations(net, calibration=x, degree=2)
    tuned = finetune(start, public_x=x, public_y=y, epochs=10, learning_rate=3e-3, seed=0, distill_from=net)
    relu, before, after = (accuracy(one, test_x, test_y) for one in (net, start, tuned))
    assert relu > 0.94
    assert before < relu
    assert after >= relu - 0.01
    assert after > before


def test_values_stay_in_the_range_of_the_polynomials() -> None:
    net, x, y, test_x, _ = trained_digits()
    start = polynomial_activations(net, calibration=x, degree=4)
    tuned = finetune(start, public_x=x, public_y=y, epochs=5, learning_rate=1e-2, seed=0)
    outside: list[float] = []
    for layer in polynomials_of(tuned):
        layer.register_forward_hook(
            lambda layer, args, _: outside.append(
                float((((args[0] - layer.centre) / layer.radius).abs() > 1.05).double().mean())
            )
        )
    tuned(test_x)
    assert len(outside) == 2
    assert max(outside) < 1e-3


def test_the_same_seed_gives_the_same_weights_and_changes_nothing_else() -> None:
    x, y = rows(120, 6), torch.arange(120) % 3
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3)).eval()
    before = copy.deepcopy(net)
    start = polynomial_activations(net, calibration=x)
    assert same(net, before)
    kept, generator = copy.deepcopy(start), torch.get_rng_state()

    def tuned(seed: int) -> nn.Module:
        return finetune(start, public_x=x, public_y=y, epochs=2, learning_rate=1e-2, seed=seed, distill_from=net)

    assert same(tuned(0), tuned(0))
    assert not same(tuned(0), tuned(1))
    assert same(start, kept)
    assert same(net, before)
    assert torch.equal(generator, torch.get_rng_state())
    assert not any(layer.training for layer in tuned(0).modules())


def test_one_output_learns_from_zeros_and_ones() -> None:
    x = rows(400, 6)
    y = (x[:, 0].abs() > 0.7).float()
    start = polynomial_activations(small(nn.ReLU(), outputs=1), calibration=x)
    tuned = finetune(start, public_x=x, public_y=y, epochs=30, learning_rate=2e-2, seed=0)
    assert float(((tuned(x)[:, 0] > 0) == (y > 0.5)).double().mean()) > 0.9


def test_every_place_has_coefficients_of_its_own() -> None:
    shared, x = nn.ReLU(inplace=True), rows(200, 6)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), shared, nn.Linear(8, 8), shared, nn.Linear(8, 3))
    first, second = polynomials_of(polynomial_activations(net, calibration=x))
    assert first is not second
    assert not torch.equal(first.coefficients, second.coefficients)


def test_a_module_that_is_called_twice_is_fitted_to_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.activation = nn.ReLU()

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.activation(x) + self.activation(10.0 * y)

    x, y = rows(100, 4), rows(100, 4, seed=2)
    (polynomial,) = polynomials_of(polynomial_activations(Twice(), calibration=(x, y)))
    assert float(polynomial.centre - polynomial.radius) < 10 * float(y.min())
    assert float(polynomial.centre + polynomial.radius) > 10 * float(y.max())


def test_constant_values_are_fitted() -> None:
    x = torch.full((10, 1), 1e6)
    replaced = polynomial_activations(nn.Sequential(nn.Identity(), nn.ReLU()), calibration=x)
    torch.testing.assert_close(replaced(x), x)


def test_maximum_pooling_becomes_average_pooling_if_asked() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.AdaptiveMaxPool2d(2), nn.Flatten())
    x = rows(16, 1, 9, 9)
    replaced = polynomial_activations(net, calibration=x, replace_max_pool=True)
    assert replaced(x).shape == net(x).shape
    pool = replaced[2]
    assert isinstance(pool, nn.AvgPool2d)
    assert (pool.kernel_size, pool.stride, pool.padding, pool.count_include_pad) == (3, 2, 1, False)
    assert isinstance(replaced[3], nn.AdaptiveAvgPool2d)
    with pytest.raises(CompileError, match="AvgPool2d"):
        compile_model(polynomial_activations(net, calibration=x), x[:1], calibration=x)
    with pytest.raises(BadUsage, match="layer 0: got a dilation of 2"):
        polynomial_activations(
            nn.Sequential(nn.MaxPool2d(2, dilation=2), nn.ReLU()), calibration=x, replace_max_pool=True
        )


def test_private_rows_have_clipped_gradients_of_the_coefficients_too() -> None:
    x, y = rows(5, 6), torch.ones(5)
    net = polynomial_activations(small(nn.ReLU(), outputs=1), calibration=rows(100, 6, seed=3))

    def loss(outputs: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], wanted, reduction="none")

    sums = clipped_gradient(net, loss, x, y, clip_norm=0.01)
    assert set(sums) == {name for name, _ in net.named_parameters()}
    assert "1.coefficients" in sums
    assert float(torch.cat([part.ravel() for part in sums.values()]).norm()) <= 5 * 0.01


def test_an_activation_that_nothing_reaches_is_refused_by_name() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.ReLU(), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    with pytest.raises(BadUsage, match="layer spare: got no value"):
        polynomial_activations(Spare(), calibration=rows(8, 4))


def test_arguments_that_cannot_be_right_are_refused() -> None:
    net, x, y = small(nn.ReLU()), rows(20, 6), torch.arange(20) % 3
    start = polynomial_activations(net, calibration=x)
    with pytest.raises(BadUsage, match="polynomial degree: got 9, expected 2 to 8"):
        polynomial_activations(net, calibration=x, degree=9)
    with pytest.raises(BadUsage, match="calibration: got NaN"):
        polynomial_activations(net, calibration=x * torch.nan)
    with pytest.raises(BadUsage, match=r"calibration: got \[0\] rows, expected 1"):
        polynomial_activations(net, calibration=x[:0])
    with pytest.raises(BadUsage, match="got no activation module, expected one of ReLU"):
        polynomial_activations(nn.Linear(6, 3), calibration=x)
    with pytest.raises(BadUsage, match="got no Polynomial layer, expected what polynomial_activations returns"):
        finetune(small(nn.ReLU()), public_x=x, public_y=y, epochs=1, learning_rate=0.1, seed=0)
    with pytest.raises(BadUsage, match=r"public_x: got \[20\] rows, expected 19"):
        finetune(start, public_x=x, public_y=y[:19], epochs=1, learning_rate=0.1, seed=0)
    with pytest.raises(BadUsage, match=r"public_y: got shape \(20, 1\), expected \(n,\)"):
        finetune(start, public_x=x, public_y=y[:, None], epochs=1, learning_rate=0.1, seed=0)
    with pytest.raises(BadUsage, match="got 0 epochs"):
        finetune(start, public_x=x, public_y=y, epochs=0, learning_rate=0.1, seed=0)
    with pytest.raises(NonFinite, match="use less than 1e"):
        finetune(start, public_x=x, public_y=y, epochs=9, learning_rate=1e30, seed=0)
