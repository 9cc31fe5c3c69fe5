"""Weights for which the last bit of a row decides: with a fast product one row more moves many others."""

import math
from itertools import islice, pairwise, permutations

import numpy as np
import pytest
import torch
from torch import nn

from fedinfer.data import Table
from fedinfer.errors import BadUsage
from fedinfer.evaluating import EvaluationTask, private_evaluation
from fedinfer.models import ModelSpec, build
from fedinfer.privacy import Poisson, PrivacyPlan, clipped_gradient, insecure_seeded_noise
from fedinfer.privacy.evaluation import EvaluationRelease
from fedinfer.privacy.row_by_row import product, row_by_row
from fedinfer.training import StepTask, logistic_loss, private_step

INPUTS = 35
ROW = np.random.default_rng(0).uniform(-1, 1, INPUTS).astype(np.float32)
LENGTHS = (*range(1, 40), 63, 64, 65, 199, 200)


def hostile_weights(i: int, j: int, m: int) -> torch.Tensor:
    """Two terms that cancel, and a third that is kept or swallowed by the order in which they are added."""
    weights = torch.zeros(1, INPUTS, dtype=torch.float64)
    weights[0, i], weights[0, j], weights[0, m] = float(ROW[j]) * 2.0**110, -float(ROW[i]) * 2.0**110, 2.0**40
    return weights


HOSTILE = [hostile_weights(*each) for each in islice(permutations(range(INPUTS), 3), 0, None, 97)]


def network(weights: torch.Tensor) -> nn.Sequential:
    """A hidden unit whose sign is the last bit, and a weight that makes of it all or nothing."""
    net = nn.Sequential(nn.Linear(INPUTS, 1), nn.Linear(1, 1)).double()
    state = {"0.weight": weights, "0.bias": torch.tensor([-(2.0**39) * float(ROW[0])])}
    net.load_state_dict({**net.state_dict(), **state, "1.weight": torch.tensor([[-(2.0**120)]])})
    return net


def clipped_sum(net: nn.Module, rows: int) -> torch.Tensor:
    x = torch.from_numpy(np.repeat(ROW[None], rows, 0)).double()
    sums = clipped_gradient(net, logistic_loss, x, torch.ones(rows, dtype=torch.float64), clip_norm=1.0)
    return torch.cat([gradient.reshape(-1) for gradient in sums.values()])


def furthest(make: bool) -> float:
    """How far one row more moves the sum of clipped gradients, over all hostile weights."""
    moved = 0.0
    for weights in HOSTILE:
        net = row_by_row(network(weights)) if make else network(weights)
        sums = [clipped_sum(net, rows) for rows in (196, 197, 198, 199, 200)]
        moved = max(moved, *(float((one - other).norm()) for one, other in pairwise(sums)))
    return moved


def test_one_row_moves_the_sum_by_no_more_than_the_clip() -> None:
    assert furthest(make=True) <= 1.0 + 1e-9


def test_a_fast_product_is_moved_by_several_clips() -> None:
    if furthest(make=False) <= 1.5:
        pytest.skip("the matrix product of this machine adds up every row in the same order")
    assert furthest(make=False) > 2.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("outputs", [1, 3])
def test_a_row_is_computed_alone_whatever_stands_beside_it(dtype: torch.dtype, outputs: int) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(outputs, INPUTS, generator=generator).to(dtype)
    weight[0] = HOSTILE[3][0].to(dtype)
    x = torch.randn(200, INPUTS, generator=generator).to(dtype)
    alone = torch.cat([product(row[None], weight, None) for row in x])
    for rows in LENGTHS:
        assert torch.equal(product(x[:rows], weight, None), alone[:rows])
        assert torch.equal(product(x[-rows:], weight, None), alone[-rows:])
    assert torch.allclose(alone[:, 1:], (x @ weight.T)[:, 1:], rtol=1e-4)
    assert product(x[:0], weight, torch.zeros(outputs)).shape == (0, outputs)


def test_gradients_through_a_product_are_those_of_a_linear_layer() -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (
        torch.randn(*size, generator=generator).double().requires_grad_() for size in ((4, 5), (3, 5), (3,))
    )
    assert torch.autograd.gradcheck(product, (x, weight, bias))


@pytest.mark.parametrize("weight", [1e10, -1e30, math.inf, math.nan])
def test_weights_that_overflow_are_refused(weight: float) -> None:
    weights = np.full(INPUTS + 1, weight, np.float32)
    plan = PrivacyPlan.calibrate(epsilon=1.0, delta=1e-5, steps=1, clip_norm=1.0, sampler=Poisson(rate=1.0))
    release = EvaluationRelease.calibrate(epsilon=1.0, delta=1e-5, loss_bound=4.0)
    spec = ModelSpec(family="logistic", inputs=INPUTS)
    with pytest.raises(BadUsage, match="expected ordinary weights"):
        StepTask(run="a", round=1, spec=spec, schema_digest="", weights=weights, plan=plan)
    with pytest.raises(BadUsage, match="expected ordinary weights"):
        EvaluationTask(run="a", spec=spec, schema_digest="", weights=weights, release=release)


def test_training_and_evaluation_compute_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedinfer.training.MAX_WEIGHT", math.inf)
    # What is left without noise shows the rounding.
    quiet = lambda stream, *, variance, count: np.zeros(count, np.int64)  # noqa: E731
    monkeypatch.setattr("fedinfer.privacy.plan.discrete_gaussian", quiet)
    monkeypatch.setattr("fedinfer.privacy.integer_noise.discrete_gaussian", quiet)
    plan = PrivacyPlan.calibrate(epsilon=1.0, delta=1e-5, steps=1, clip_norm=1.0, sampler=Poisson(rate=1.0))
    release = EvaluationRelease.calibrate(epsilon=1.0, delta=1e-5, loss_bound=4.0)
    stream = insecure_seeded_noise("rounding")
    tables = [
        Table(features=np.repeat(ROW[None], rows, 0), labels=np.ones(rows, np.float32)) for rows in (197, 198, 199, 200)
    ]
    mlp = ModelSpec(family="mlp", inputs=INPUTS, hidden=1)
    logistic = ModelSpec(family="logistic", inputs=INPUTS)
    for i, j, m in islice(permutations(range(INPUTS), 3), 0, None, 293):
        hidden = hostile_weights(i, j, m)[0].numpy()
        hidden[m] /= float(ROW[m])
        # The hidden unit is 2**39 or its opposite, by the order of its terms, and then nothing or everything.
        weights = np.array([*hidden, -(2.0**39), -(2.0**120), 0.0], np.float32)
        step = StepTask(run="a", round=1, spec=mlp, schema_digest="", weights=weights, plan=plan)
        small = np.append(hostile_weights(i, j, m)[0].numpy() / 2.0**60, 0.0).astype(np.float32)
        task = EvaluationTask(run="a", spec=logistic, schema_digest="", weights=small, release=release)
        sums = [private_step(step, build(mlp), table, stream).gradient for table in tables]
        counts = [private_evaluation(task, build(logistic), table, stream).counts / 2**20 for table in tables]
        for one, other in pairwise(sums):
            assert np.linalg.norm(other - one) <= 1.0 + 1e-4
        for one, other in pairwise(counts):
            assert np.linalg.norm(other - one) <= math.sqrt(1.25) + 1e-9
