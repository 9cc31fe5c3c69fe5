"""One evaluation of a model by every device: noised counts come back, and are added up before they are read."""

from dataclasses import asdict
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from fedinfer.arrays import flatten
from fedinfer.evaluating import EvaluationTask
from fedinfer.flower import COUNTS, counts_from_content, evaluation_to_content
from fedinfer.models import Model
from fedinfer.settings import RunConfig

from .rounds import answers_of, wait_for_devices


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
    content = evaluation_to_content(task)
    messages = [Message(content, device, COUNTS, group_id="evaluation") for device in devices]
    answers = answers_of(grid, messages, config, "evaluation")
    replies = [counts_from_content(content, size=release.size) for content in answers.values()]
    total = np.sum([reply.counts for reply in replies], axis=0)
    return {
        "run": run,
        "devices": len(replies),
        "void": any(reply.void for reply in replies),
        "release": release.to_json(),
        "epsilon": release.epsilon(),
        "delta": release.delta,
        "metrics": asdict(release.summarise(total, releases=len(replies))),
    }
