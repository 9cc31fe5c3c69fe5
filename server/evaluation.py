"""One evaluation of a model by every device: noised counts come back, and are added up before they are read."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedinfer.arrays import flatten
from fedinfer.evaluating import EvaluationTask
from fedinfer.flower import COUNTS, counts_from_content, evaluation_to_content
from fedinfer.models import Model
from fedinfer.settings import RunConfig
from fedinfer.sums.messages import COUNTED
from fedinfer.sums.rounds import SecureSums, SumTask

from .rounds import answers_of, secure_sums, wait_for_devices

# The sum of counts, how many devices are in it, and whether any noise was void.
Counted = tuple[NDArray[np.int64], int, bool]


def evaluate(grid: Grid, config: RunConfig, model: Model, run: str) -> dict[str, Any]:
    """Ask every device for its counts and summarise their sum, in JSON values; `run` names it in their ledgers.

    Raises: RoundFailed if fewer than `min_devices` devices answer.
    """
    devices, release = wait_for_devices(grid, config), config.evaluation
    task = EvaluationTask(
        run=run,
        spec=model.spec,
        schema_digest=model.schema_digest,
        weights=flatten(model.state),
        release=release,
    )
    sums = secure_sums(grid, config, run)
    total, count, void = _each_alone(grid, config, task, devices) if sums is None else _together(sums, task)
    return {
        "run": run,
        "devices": count,
        "void": void,
        "release": release.to_json(),
        "epsilon": release.epsilon(),
        "delta": release.delta,
        "metrics": asdict(release.summarise(total, releases=count)),
    }


def _each_alone(grid: Grid, config: RunConfig, task: EvaluationTask, devices: Sequence[int]) -> Counted:
    """The sum of what devices release, each with noise that is enough for itself."""
    content = evaluation_to_content(task)
    messages = [Message(content, device, COUNTS, group_id="evaluation") for device in devices]
    answers = answers_of(grid, messages, config, "evaluation")
    replies = [counts_from_content(content, size=task.release.size) for content in answers.values()]
    total = np.sum([reply.counts for reply in replies], axis=0)
    return total, len(replies), any(reply.void for reply in replies)


def _together(sums: SecureSums, task: EvaluationTask) -> Counted:
    """The sum of what devices masked."""
    content = evaluation_to_content(task)
    found = sums.total(
        SumTask(action=COUNTED, content=content, spec=task.sum_spec, model=task.digest(), group="evaluation")
    )
    return found.total.view(np.int64), found.survivors, found.void
