"""Max-pooling as clients that take turns do it is torch's own, to the last bit and place."""

import pytest
import torch
from torch import nn

from fedinfer.simulation.turns import QuickMaxPool2d, quicken


@pytest.mark.parametrize(
    "layer",
    [
        nn.MaxPool2d(2),
        nn.MaxPool2d((3, 2), stride=2, padding=1),
        nn.MaxPool2d(3, stride=(1, 2), dilation=2),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
    ],
)
def test_values_and_places_of_gradients_are_those_of_the_layer(layer: nn.MaxPool2d) -> None:
    generator = torch.Generator().manual_seed(0)
    # Three values alone, so that most windows have their maximum in more than one place.
    x = torch.randint(0, 3, (2, 5, 13, 11), generator=generator).float()
    x[0, 0, 3, 3] = torch.nan
    x.requires_grad_()
    expected, got = layer(x), QuickMaxPool2d(layer)(x)
    assert torch.equal(expected.nan_to_num(9.0), got.nan_to_num(9.0))
    at_outputs = torch.randn(got.shape, generator=generator)
    (want,), (have,) = (torch.autograd.grad(output, x, at_outputs) for output in (expected, got))
    assert torch.allclose(have, want, rtol=0.0, atol=1e-6)
    assert torch.equal(have != 0.0, want != 0.0)


def test_only_layers_that_give_values_alone_are_replaced() -> None:
    net = nn.Sequential(nn.MaxPool2d(2), nn.Sequential(nn.MaxPool2d(2, return_indices=True)), nn.MaxPool1d(2))
    quicken(net)
    assert [type(module) for module in net.modules() if not isinstance(module, nn.Sequential)] == [
        QuickMaxPool2d,
        nn.MaxPool2d,
        nn.MaxPool1d,
    ]
