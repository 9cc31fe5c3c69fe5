"""Histograms of every feature over all devices, by one secure sum: a first look at data that nobody may see."""

from typing import Any

import numpy as np
from flwr.serverapp import Grid

from fedinfer.counting import HistogramTask
from fedinfer.errors import BadUsage
from fedinfer.flower import histograms_to_content
from fedinfer.settings import RunConfig
from fedinfer.sums.messages import HISTOGRAMS
from fedinfer.sums.rounds import SumTask

from .rounds import secure_sums, wait_for_devices


def histograms(grid: Grid, config: RunConfig, run: str) -> dict[str, Any]:
    """Ask every device for its counts and read their sum, in JSON values; `run` names it in their ledgers.

    Raises: BadUsage without a PKI file; RoundFailed if too few devices answer.
    """
    sums = secure_sums(grid, config, run)
    if sums is None:
        raise BadUsage("histograms: got no PKI file, expected pki and pki-digest; they are shown as a secure sum alone")
    wait_for_devices(grid, config)
    release = config.feature_histograms
    task = HistogramTask(run=run, schema_digest=config.public_schema.digest(), release=release)
    found = sums.total(
        SumTask(
            action=HISTOGRAMS,
            content=histograms_to_content(task),
            spec=task.sum_spec,
            model=task.digest(),
            group="histograms",
        )
    )
    return {
        "run": run,
        "devices": found.survivors,
        "void": found.void,
        "release": release.to_json(),
        "epsilon": release.epsilon(),
        "delta": release.delta,
        "standard_error": release.sigma * (found.survivors / release.min_honest) ** 0.5,
        "counts": release.read(found.total.view(np.int64)).tolist(),
    }
