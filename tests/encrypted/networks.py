"""Networks of every kind that the compiler takes, with the shapes of their inputs."""

import torch
from torch import nn

from fedinfer.models.families import Quadratic


class Square(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x**2


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.last(h + self.inner(h**2))


class Gated(nn.Module):
    """Two inputs that multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(8, 12), nn.Linear(5, 12), nn.Linear(12, 2)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.last(self.left(x) * self.right(y))


class Joined(nn.Module):
    """Two inputs that are put side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(8, 12), nn.Linear(5, 7), nn.Linear(19, 2)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.last(torch.cat([self.left(x), 2.0 - self.right(y)], dim=1) ** 2)


def networks() -> dict[str, tuple[nn.Module, list[tuple[int, ...]]]]:
    """Each network with the shapes of its inputs for one example; the same weights every time."""
    torch.manual_seed(0)
    return {
        "logistic 30": (nn.Linear(30, 1), [(30,)]),
        "linear 12-5": (nn.Linear(12, 5), [(12,)]),
        "mlp 30-64-2": (nn.Sequential(nn.Linear(30, 64), Square(), nn.Linear(64, 2)), [(30,)]),
        "odd 37-53-11": (nn.Sequential(nn.Linear(37, 53), Quadratic(), nn.Linear(53, 11)), [(37,)]),
        "three layers": (
            nn.Sequential(nn.Linear(20, 32), Quadratic(), nn.Linear(32, 16), Quadratic(), nn.Linear(16, 3)),
            [(20,)],
        ),
        "deep and narrow": (
            nn.Sequential(
                nn.Linear(8, 8), Square(), nn.Linear(8, 8), Square(), nn.Linear(8, 8), Square(), nn.Linear(8, 4)
            ),
            [(8,)],
        ),
        "cubic": (nn.Sequential(nn.Linear(10, 12), Cubic(), nn.Linear(12, 2)), [(10,)]),
        "residual": (Residual(), [(16,)]),
        "gated": (Gated(), [(8,), (5,)]),
        "joined": (Joined(), [(8,), (5,)]),
        "signal": (
            nn.Sequential(
                nn.Conv1d(2, 4, 5, stride=2, padding=2), Square(), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(32, 3)
            ),
            [(2, 32)],
        ),
        "depthwise": (
            nn.Sequential(
                nn.Conv2d(3, 3, 3, groups=3, padding=1),
                nn.BatchNorm2d(3),
                Square(),
                nn.Conv2d(3, 6, 1),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Dropout(),
                nn.Linear(6, 2),
            ),
            [(3, 10, 10)],
        ),
        "tutorial cnn": (
            nn.Sequential(
                nn.Conv2d(1, 4, 7, stride=3), Square(), nn.Flatten(), nn.Linear(256, 64), Square(), nn.Linear(64, 10)
            ),
            [(1, 28, 28)],
        ),
        "mlp 784-128-10": (
            nn.Sequential(nn.Flatten(), nn.Linear(784, 128), Square(), nn.Linear(128, 10)),
            [(1, 28, 28)],
        ),
    }


class Cubic(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.25 * x**3 + 0.5 * x
