"""One evaluation on a device: from weights and its own rows to noised counts, the only metrics that leave it."""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedinfer.arrays import Vector, unflatten
from fedinfer.data import Table
from fedinfer.errors import BadUsage
from fedinfer.models import ModelSpec
from fedinfer.privacy import NoiseStream
from fedinfer.privacy.evaluation import EvaluationRelease
from fedinfer.training import logistic_loss


@dataclass(frozen=True, kw_only=True)
class EvaluationTask:
    """What a server asks of a device to measure a model. `run` names the release in the device's ledger."""

    run: str
    spec: ModelSpec
    schema_digest: str
    weights: Vector = field(repr=False)
    release: EvaluationRelease

    def __post_init__(self) -> None:
        if not np.isfinite(self.weights).all():
            raise BadUsage("weights: got NaN or infinity, expected finite numbers")


@dataclass(frozen=True, kw_only=True)
class EvaluationReply:
    """What leaves the device: noised counts (cells,), and whether their noise was void."""

    counts: NDArray[np.int64] = field(repr=False)
    void: bool


def private_evaluation(task: EvaluationTask, net: nn.Module, table: Table, stream: NoiseStream) -> EvaluationReply:
    """Score every row and count the scores by label, with the noise of the task's release.

    Guarantees: those of `EvaluationRelease`.
    """
    net.load_state_dict(unflatten(task.weights, net.state_dict()))
    with torch.inference_mode():
        output = net.float().eval()(torch.from_numpy(table.features))
        losses = logistic_loss(output, torch.from_numpy(table.labels))
        scores = torch.sigmoid(output[:, 0].double())
    counts = task.release.counts(scores.numpy(), table.labels, losses.double().numpy(), stream)
    return EvaluationReply(counts=counts, void=stream.void)
