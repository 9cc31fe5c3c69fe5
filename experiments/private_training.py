"""Training for the experiments: gradient descent that learns of rows through the releases of plans, and without.

One plan serves one data holder: it samples (all rows, or a Poisson sample), bounds, adds noise from the operating
system and accounts. With several data holders each has a plan and noise of its own, and the mean of their releases
moves the weights. The mean of the last half of the iterates costs no privacy, because each of them is public already.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedinfer.arrays import flatten, unflatten
from fedinfer.inference import unsafe_auc
from fedinfer.privacy import PrivacyPlan, clipped_gradient, os_noise
from fedinfer.privacy.samplers import Poisson
from fedinfer.rules import FedSgd
from fedinfer.training import logistic_loss

DELTA = 1e-5
Part = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained under a plan. All of it is public."""

    clip_norm: float
    learning_rate: float
    steps: int = 60
    sampling_rate: float = 1.0
    momentum: float = 0.0
    average: bool = True


def linear(inputs: int, classes: int) -> nn.Module:
    """A linear map from zero; one output for two classes. The bias is a feature of the rows."""
    net = nn.Linear(inputs, classes if classes > 2 else 1, bias=False)
    nn.init.zeros_(net.weight)
    return net


def convolutional(seed: int) -> nn.Module:
    """The tanh network for MNIST of Papernot et al. 2021 (arXiv:2007.14191), 26,010 parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 8, 2, padding=3), nn.Tanh(), nn.MaxPool2d(2, 1),
            nn.Conv2d(16, 32, 4, 2), nn.Tanh(), nn.MaxPool2d(2, 1),
            nn.Flatten(), nn.Linear(512, 32), nn.Tanh(), nn.Linear(32, 10),
        )  # fmt: skip


def losses(output: Tensor, target: Tensor) -> Tensor:
    """Per-example loss (B,) of logits (B, classes), or (B, 1) for two classes."""
    if output.shape[1] == 1:
        return logistic_loss(output, target)
    return functional.cross_entropy(output, target, reduction="none")


def train(net: nn.Module, parts: Sequence[Part], recipe: Recipe, *, examples: int, epsilon: float) -> PrivacyPlan:
    """Train `net` in place on the rows of `parts`; each is a data holder with a plan and noise of its own.

    Guarantees: every holder's rows reach `net` through `recipe.steps` releases of the plan that is returned, and
    through nothing else.
    """
    plan = PrivacyPlan.calibrate(
        epsilon=epsilon,
        delta=DELTA,
        steps=recipe.steps,
        clip_norm=recipe.clip_norm,
        sampler=Poisson(rate=recipe.sampling_rate),
        divisor=recipe.sampling_rate * examples / len(parts),
    )
    streams = [os_noise() for _ in parts]
    shapes = dict(net.named_parameters())
    weights, rule = flatten(shapes), FedSgd(learning_rate=recipe.learning_rate, momentum=recipe.momentum)
    state, total, late = rule.init(weights), np.zeros_like(weights), recipe.steps // 2
    for step in range(recipe.steps):
        releases = []
        for (x, y), stream in zip(parts, streams, strict=True):
            rows = torch.from_numpy(plan.sample(len(y), stream))
            taken = (x, y) if len(rows) == len(y) else (x[rows], y[rows])
            sums = clipped_gradient(net, losses, *taken, clip_norm=plan.clip_norm)
            releases.append(plan.release(flatten({name: sums[name] for name in shapes}), stream))
        weights, state = rule.step(weights, np.mean(releases, axis=0), state)
        net.load_state_dict(unflatten(weights, shapes))
        if step >= late:
            total += weights
    if recipe.average:
        net.load_state_dict(unflatten(total / np.float32(recipe.steps - late), shapes))
    return plan


def unsafe_fit(net: nn.Module, x: Tensor, y: Tensor, *, penalty: float) -> None:
    """The same linear model without privacy: the optimum of the mean loss and an L2 penalty, by L-BFGS."""
    optimiser = torch.optim.LBFGS(net.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimiser.zero_grad()
        loss = losses(net(x), y).mean() + penalty * sum(p.square().sum() for p in net.parameters())
        torch.autograd.backward(loss)
        return float(loss.detach())

    optimiser.step(closure)  # type: ignore[no-untyped-call]


def unsafe_epochs(net: nn.Module, x: Tensor, y: Tensor, *, epochs: int, seed: int) -> None:
    """The convolutional network without privacy, by Adam."""
    optimiser, rng = torch.optim.Adam(net.parameters(), lr=2e-3), np.random.default_rng(seed)
    for _ in range(epochs):
        for rows in torch.split(torch.from_numpy(rng.permutation(len(y))), 64):
            optimiser.zero_grad()
            torch.autograd.backward(losses(net(x[rows]), y[rows]).mean())
            optimiser.step()


def scored(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """Accuracy, and the area under the ROC curve where there are two classes."""
    with torch.no_grad():
        output = net(x)
    if output.shape[1] > 1:
        return {"accuracy": float((output.argmax(1) == y).float().mean())}
    found = {"accuracy": float(((output[:, 0] > 0) == (y > 0.5)).float().mean())}
    auc = unsafe_auc(y.numpy(), output[:, 0].double().numpy())
    return found if auc is None else {**found, "AUC": auc}
