"""One evaluation on a device: from weights and its own rows to noised counts, the only metrics that leave it."""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logit
from torch import nn

from fedinfer.arrays import Vector, unflatten
from fedinfer.data import Table
from fedinfer.models import ModelSpec
from fedinfer.privacy import NoiseStream
from fedinfer.privacy.evaluation import EvaluationRelease
from fedinfer.privacy.row_by_row import row_by_row
from fedinfer.secagg import SumSpec, Words
from fedinfer.training import check_weights, task_digest

SUM_BITS = 64


@dataclass(frozen=True, kw_only=True)
class EvaluationTask:
    """What a server asks of a device to measure a model. `run` names the release in the device's ledger."""

    run: str
    spec: ModelSpec
    schema_digest: str
    weights: Vector = field(repr=False)
    release: EvaluationRelease

    def __post_init__(self) -> None:
        check_weights(self.weights)

    @property
    def sum_spec(self) -> SumSpec:
        """What devices add up in a secure sum: counts in cells, modulo 2^64."""
        return SumSpec(length=self.release.size, bits=SUM_BITS)

    def digest(self) -> bytes:
        """SHA-256 of everything that is asked."""
        return task_digest("counts", self.run, self.spec, self.schema_digest, self.release.digest(), self.weights)


@dataclass(frozen=True, kw_only=True)
class EvaluationReply:
    """What leaves the device: noised counts (cells,), and whether their noise was void."""

    counts: NDArray[np.int64] = field(repr=False)
    void: bool


def private_evaluation(task: EvaluationTask, net: nn.Module, table: Table, stream: NoiseStream) -> EvaluationReply:
    """Score every row and count the scores by label, with the noise of the task's release.

    Each row is computed as if it were alone. Scores are put into their bins by their logits: a sigmoid may round
    differently at the end of a batch, and a server may choose weights that put many rows on the edge of a bin.

    Guarantees: those of `EvaluationRelease`.
    """
    return EvaluationReply(counts=_counts(task, net, table, stream), void=stream.void)


def evaluation_summand(task: EvaluationTask, net: nn.Module, table: Table, stream: NoiseStream) -> Words:
    """What a device adds to a secure sum: the counts of `private_evaluation` with a share of the noise, modulo 2^64."""
    return _counts(task, net, table, stream).view(np.uint64)


def _counts(task: EvaluationTask, net: nn.Module, table: Table, stream: NoiseStream) -> NDArray[np.int64]:
    net = row_by_row(net).double().eval()
    net.load_state_dict(unflatten(task.weights, net.state_dict()))
    with torch.inference_mode():
        logits = net(torch.from_numpy(table.features).double())[:, 0].numpy()
    bins = task.release.bins
    edges = logit(np.arange(1, bins) / bins)
    middles = (np.searchsorted(edges, logits, side="right") + 0.5) / bins
    losses = np.logaddexp(0.0, (1.0 - 2.0 * table.labels.astype(np.float64)) * logits)
    return task.release.counts(middles, table.labels, losses, stream)
