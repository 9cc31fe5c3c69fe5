"""Histograms of every feature over a federation: what is asked of a device, and what it adds to a secure sum."""

from dataclasses import dataclass

import numpy as np

from fedinfer.data import Table
from fedinfer.models import ModelSpec
from fedinfer.privacy import NoiseStream
from fedinfer.privacy.histograms import FeatureHistograms
from fedinfer.secagg import SumSpec, Words
from fedinfer.training import task_digest

SUM_BITS = 64
# A histogram is about no model.
NO_WEIGHTS = np.zeros(0, np.float32)


@dataclass(frozen=True, kw_only=True)
class HistogramTask:
    """What a server asks of devices to see where their rows lie. `run` names the release in a device's ledger."""

    run: str
    schema_digest: str
    release: FeatureHistograms

    @property
    def sum_spec(self) -> SumSpec:
        """What devices add up: counts in cells, modulo 2^64."""
        return SumSpec(length=self.release.size, bits=SUM_BITS)

    def digest(self) -> bytes:
        """SHA-256 of everything that is asked."""
        spec = ModelSpec(family="logistic", inputs=self.release.features)
        return task_digest("histograms", self.run, spec, self.schema_digest, self.release.digest(), NO_WEIGHTS)


def histogram_summand(task: HistogramTask, table: Table, stream: NoiseStream) -> Words:
    """What a device adds: its counts with a share of the noise, modulo 2^64.

    Guarantees: those of `FeatureHistograms`.
    """
    return task.release.counts(table.features, stream).view(np.uint64)
