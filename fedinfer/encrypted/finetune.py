"""Networks that are retrained with the polynomials they are encrypted with.

A polynomial in the place of a trained ReLU changes what every later layer sees. Here it starts as a fit to the values
that the network really has at that place, and is then trained together with the weights, held in the range of those
values: outside of it a polynomial runs away.

Reference: Gilad-Bachrach et al. 2016, proceedings.mlr.press/v48 (CryptoNets: networks trained with polynomials);
Ba and Caruana 2014, arXiv:1312.6184 (a network taught the outputs of another).
"""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedinfer.encrypted.polynomials import MARGIN
from fedinfer.errors import BadUsage, NonFinite

ELEMENTWISE: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.LogSigmoid,
    nn.Tanh, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Softplus, nn.Softsign,
)  # fmt: skip
POOLS: Mapping[type[nn.Module], type[nn.Module]] = {
    nn.MaxPool1d: nn.AvgPool1d,
    nn.MaxPool2d: nn.AvgPool2d,
    nn.AdaptiveMaxPool1d: nn.AdaptiveAvgPool1d,
    nn.AdaptiveMaxPool2d: nn.AdaptiveAvgPool2d,
}
# Up to this degree the compiler takes products of polynomials of one value for a polynomial.
MAX_DEGREE = 8
# Values of the calibration data that a polynomial is fitted to.
FITTED = 100_000
# The weight of leaving the range in the loss, and the norm that gradients are clipped to.
RANGE_PENALTY = 1.0
GRADIENT_NORM = 1.0


class Polynomial(nn.Module):
    """c0 + c1 T1(t) + c2 T2(t) + ... of each element x, with t = (x - centre) / radius and learnable c (degree + 1,).

    T are Chebyshev polynomials: none exceeds one inside the range, so that one step size suits every coefficient. The
    compiler sees one polynomial of x: one level for the square of degree 2, two for degree 4.
    """

    centre: Tensor
    radius: Tensor

    def __init__(self, *, low: float, high: float, degree: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.tensor((low + high) / 2, dtype=torch.float64))
        self.register_buffer("radius", torch.tensor(max((high - low) / 2, 1e-3), dtype=torch.float64))
        self.coefficients = nn.Parameter(torch.zeros(degree + 1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        t = (x - self.centre) / self.radius
        total = self.coefficients[1] * t + self.coefficients[0]
        before: Tensor | float = 1.0
        now = t
        for c in self.coefficients[2:]:
            before, now = now, 2.0 * t * now - before
            total = total + c * now
        return total

    def excess(self, x: Tensor) -> Tensor:
        """How far elements of x (B, ...) lie outside the range, in radii: squared, summed, the mean over rows."""
        t = (x - self.centre) / self.radius
        return functional.relu(t.abs() - 1.0).square().sum() / len(x)


class _Fitting(nn.Module):
    """Stands in for an activation while the calibration data pass: fits to all it saw, answers as the polynomial."""

    def __init__(self, activation: nn.Module, degree: int) -> None:
        super().__init__()
        self.activation, self.degree = activation, degree
        self.seen: list[Tensor] = []
        self.polynomial: Polynomial | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.flatten())
        self.polynomial = _fitted(self.activation, torch.cat(self.seen), self.degree).to(x.dtype)
        return self.polynomial(x)  # type: ignore[no-any-return]


def _fitted(activation: nn.Module, values: Tensor, degree: int) -> Polynomial:
    low, high = float(values.min()), float(values.max())
    margin = (high - low) * MARGIN
    polynomial = Polynomial(low=low - margin, high=high + margin, degree=degree)
    points = values[:: math.ceil(len(values) / FITTED)].double()
    t = (points - polynomial.centre) / polynomial.radius
    basis = torch.cos(torch.arange(degree + 1) * torch.arccos(t)[:, None])
    # A copy, because some activations write over their input.
    wanted = activation(points.clone())[:, None]
    polynomial.coefficients.data = torch.linalg.lstsq(basis, wanted, driver="gelsd").solution[:, 0]
    return polynomial


def polynomial_activations(
    net: nn.Module,
    *,
    calibration: Tensor | tuple[Tensor, ...],
    degree: int = 2,
    kinds: tuple[type[nn.Module], ...] = ELEMENTWISE,
    replace_max_pool: bool = False,
) -> nn.Module:
    """A copy of `net` with a `Polynomial` in place of every activation module, ready for `finetune`.

    `calibration` (n, ...) (a tuple for several inputs) shows the values to expect at each place, behind the polynomials
    before it. Ranges and coefficients tell about these rows: use public ones, or treat what they reveal as released.
    Activations of your own go into `kinds`; those that are called as functions stay. `replace_max_pool` puts average
    pooling in place of maximum pooling, which has no encrypted form.

    The fit is least squares over the values seen, so that frequent ones count most. On a LeNet of degree 2 it keeps an
    accuracy of 83 % where the compiler's minimax fit keeps 47 % (`experiments/encrypted_mnist.py`, three seeds), and
    training from it ends nearer to the ReLU network.

    Guarantees: `net` stays as it is; each place has coefficients of its own.
    Raises: BadUsage for a degree outside 2 to 8, no activation module, or one that no calibration value reaches.
    """
    inputs = calibration if isinstance(calibration, tuple) else (calibration,)
    if not 2 <= degree <= MAX_DEGREE:
        raise BadUsage(f"polynomial degree: got {degree}, expected 2 to {MAX_DEGREE}")
    _check_rows("calibration", inputs, len(inputs[0]))
    whole = copy.deepcopy(net)
    for name, layer in list(whole.named_modules(remove_duplicate=False)):
        if replace_max_pool and type(layer) in POOLS:
            _put(whole, name, _average_pool(layer, name).train(layer.training))
        elif name and isinstance(layer, kinds):
            _put(whole, name, _Fitting(layer, degree).train(layer.training))
    fitting = [(name, layer) for name, layer in whole.named_modules() if isinstance(layer, _Fitting)]
    if not fitting:
        raise BadUsage(
            f"network: got no activation module, expected one of {', '.join(kind.__name__ for kind in kinds)}"
        )
    modes = {layer: layer.training for layer in whole.modules()}
    with torch.no_grad():
        whole.eval()(*inputs)
    for layer, mode in modes.items():
        layer.training = mode
    for name, layer in fitting:
        if layer.polynomial is None:
            raise BadUsage(f"layer {name}: got no value from the calibration data, expected it to be in use")
        _put(whole, name, layer.polynomial.train(layer.training))
    return whole


def finetune(
    net: nn.Module,
    *,
    public_x: Tensor | tuple[Tensor, ...],
    public_y: Tensor,
    epochs: int,
    learning_rate: float,
    seed: int,
    batch_size: int = 64,
    distill_from: nn.Module | None = None,
) -> nn.Module:
    """A copy of `net`, which `polynomial_activations` made, with weights and coefficients trained on public rows.

    `public_x` (n, ...) (a tuple for several inputs); `public_y` (n,) of classes, or of 0 and 1 where `net` has one
    output. Given `distill_from`, the network that `net` came from, half of the loss is the squared distance to its
    outputs. Leaving the range of a polynomial is penalised, gradients are clipped, and the step size falls to zero.

    The arguments are named `public_` because the result tells about every row that it was trained on. Fine-tuning on
    private rows is a release and goes through a `PrivacyPlan`: sums of `clipped_gradient` of this network, each
    released by the plan. `experiments/encrypted_mnist.py` does so with the heart-disease table.

    Guarantees: `net` and the global generator stay as they are; the same arguments give the same weights on the same
    machine and number of threads.
    Raises: BadUsage for arguments that cannot be right; NonFinite if training runs away.
    """
    inputs = public_x if isinstance(public_x, tuple) else (public_x,)
    whole = copy.deepcopy(net)
    polynomials = [layer for layer in whole.modules() if isinstance(layer, Polynomial)]
    if not polynomials:
        raise BadUsage("network: got no Polynomial layer, expected what polynomial_activations returns")
    if epochs < 1 or batch_size < 1 or not learning_rate > 0:
        raise BadUsage(f"got {epochs} epochs of {batch_size} rows at rate {learning_rate}, expected all above 0")
    if public_y.dim() != 1:
        raise BadUsage(f"public_y: got shape {tuple(public_y.shape)}, expected (n,)")
    _check_rows("public_x", inputs, len(public_y))
    taught = None if distill_from is None else _outputs(distill_from, inputs)
    excesses: list[Tensor] = []

    def record(layer: Polynomial, arguments: tuple[Tensor, ...], _: Tensor) -> None:
        excesses.append(layer.excess(arguments[0]))

    hooks = [layer.register_forward_hook(record) for layer in polynomials]
    modes = {layer: layer.training for layer in whole.modules()}
    optimiser = torch.optim.Adam(whole.parameters(), lr=learning_rate)
    batches = math.ceil(len(public_y) / batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * batches)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        whole.train()
        for step in range(epochs * batches):
            if step % batches == 0:
                order = torch.randperm(len(public_y))
            chosen = order[step % batches * batch_size :][:batch_size]
            excesses.clear()
            outputs = whole(*(rows[chosen] for rows in inputs))
            loss = _loss(outputs, public_y[chosen])
            if taught is not None:
                loss = (loss + functional.mse_loss(outputs, taught[chosen])) / 2
            loss = loss + RANGE_PENALTY * torch.stack(excesses).sum()
            if not bool(torch.isfinite(loss)):
                raise NonFinite(f"loss: got NaN or infinity in step {step + 1}; use less than {learning_rate} as rate")
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(whole.parameters(), GRADIENT_NORM)
            optimiser.step()
            schedule.step()
    for hook in hooks:
        hook.remove()
    for layer, mode in modes.items():
        layer.training = mode
    return whole


def _loss(outputs: Tensor, y: Tensor) -> Tensor:
    if outputs.shape[1] == 1:
        return functional.binary_cross_entropy_with_logits(outputs[:, 0], y.to(outputs.dtype))
    return functional.cross_entropy(outputs, y)


def _outputs(net: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        outputs: Tensor = copy.deepcopy(net).eval()(*inputs)
    return outputs


def _check_rows(name: str, inputs: tuple[Tensor, ...], count: int) -> None:
    if count < 1 or any(len(rows) != count for rows in inputs):
        raise BadUsage(f"{name}: got {[len(rows) for rows in inputs]} rows, expected {max(count, 1)} of each input")
    if not all(bool(torch.isfinite(rows).all()) for rows in inputs):
        raise BadUsage(f"{name}: got NaN or infinity, expected finite numbers")


def _put(whole: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(whole.get_submodule(parent), leaf, layer)


def _average_pool(layer: Any, name: str) -> nn.Module:
    pool = POOLS[type(layer)]
    if hasattr(layer, "output_size"):
        return pool(layer.output_size)
    if layer.dilation not in (1, (1, 1)):
        raise BadUsage(f"layer {name}: got a dilation of {layer.dilation}, expected 1, which average pooling has")
    # Maximum pooling pads with nothing that counts.
    return pool(layer.kernel_size, layer.stride, layer.padding, layer.ceil_mode, count_include_pad=False)
