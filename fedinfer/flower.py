"""Flower messages to our dataclasses and back, in one place."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, ConfigRecordValues, MetricRecord, RecordDict

from fedinfer.arrays import Vector
from fedinfer.counting import HistogramTask
from fedinfer.errors import WireError
from fedinfer.evaluating import EvaluationReply, EvaluationTask
from fedinfer.models import ModelSpec
from fedinfer.privacy import plan_from_json
from fedinfer.privacy.evaluation import EvaluationRelease
from fedinfer.privacy.histograms import FeatureHistograms
from fedinfer.training import StepReply, StepTask

STEP = "train.step"
COUNTS = "evaluate.counts"
MAX_WEIGHTS = 1 << 26


def task_to_content(task: StepTask) -> RecordDict:
    """The content of a `STEP` message."""
    fields = _subject(task) | {"round": task.round}
    if task.plan is not None:
        fields["plan"] = json.dumps(task.plan.to_json())
    return RecordDict({"task": ConfigRecord(fields), "weights": ArrayRecord([task.weights])})


def task_from_content(content: RecordDict) -> StepTask:
    """Read the content of a `STEP` message.

    Raises: WireError if it is not one; BadUsage if a field cannot be.
    """
    try:
        fields = content.config_records["task"]
        plan = _typed(fields, "plan", str) if "plan" in fields else None
        return StepTask(
            run=_typed(fields, "run", str),
            round=_typed(fields, "round", int),
            spec=_spec(fields),
            schema_digest=_typed(fields, "schema", str),
            weights=_vector(content, "weights"),
            plan=plan_from_json(json.loads(plan)) if plan is not None else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"task message: expected a field or a type that is not there ({error})") from None


def reply_to_content(reply: StepReply) -> RecordDict:
    """The content of the answer to a `STEP` message."""
    metrics = MetricRecord({"weight": reply.weight, "void": int(reply.void)})
    return RecordDict({"gradient": ArrayRecord([reply.gradient]), "reply": metrics})


def reply_from_content(content: RecordDict) -> StepReply:
    """Read the answer to a `STEP` message.

    Raises: WireError if it is not one, or holds numbers that are not finite.
    """
    try:
        metrics = content.metric_records["reply"]
        weight = float(_typed(metrics, "weight", float))
        gradient = _vector(content, "gradient")
        if not np.isfinite(gradient).all() or not np.isfinite(weight) or weight < 0.0:
            raise WireError("reply: got NaN, infinity or a negative weight")
        return StepReply(gradient=gradient, weight=weight, void=bool(_typed(metrics, "void", int)))
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"reply message: expected a field or a type that is not there ({error})") from None


def evaluation_to_content(task: EvaluationTask) -> RecordDict:
    """The content of a `COUNTS` message."""
    fields = _subject(task) | {"release": json.dumps(task.release.to_json())}
    return RecordDict({"task": ConfigRecord(fields), "weights": ArrayRecord([task.weights])})


def evaluation_from_content(content: RecordDict) -> EvaluationTask:
    """Read the content of a `COUNTS` message.

    Raises: WireError if it is not one; BadUsage if a field cannot be.
    """
    try:
        fields = content.config_records["task"]
        return EvaluationTask(
            run=_typed(fields, "run", str),
            spec=_spec(fields),
            schema_digest=_typed(fields, "schema", str),
            weights=_vector(content, "weights"),
            release=EvaluationRelease.from_json(json.loads(_typed(fields, "release", str))),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"evaluation message: expected a field or a type that is not there ({error})") from None


def counts_to_content(reply: EvaluationReply) -> RecordDict:
    """The content of the answer to a `COUNTS` message."""
    return RecordDict({"counts": ArrayRecord([reply.counts]), "reply": MetricRecord({"void": int(reply.void)})})


def counts_from_content(content: RecordDict, *, size: int) -> EvaluationReply:
    """Read the answer to a `COUNTS` message, `size` numbers.

    Raises: WireError if it is not one.
    """
    try:
        (counts,) = content.array_records["counts"].to_numpy_ndarrays()
        if counts.dtype != np.int64 or counts.shape != (size,):
            raise WireError(f"counts: got {counts.dtype} of shape {counts.shape}, expected int64 ({size},)")
        return EvaluationReply(counts=counts, void=bool(_typed(content.metric_records["reply"], "void", int)))
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"counts message: expected a field or a type that is not there ({error})") from None


def histograms_to_content(task: HistogramTask) -> RecordDict:
    """The content of a message that asks for histograms."""
    fields = {"run": task.run, "schema": task.schema_digest, "release": json.dumps(task.release.to_json())}
    return RecordDict({"task": ConfigRecord(fields)})  # type: ignore[arg-type]


def histograms_from_content(content: RecordDict) -> HistogramTask:
    """Read the content of a message that asks for histograms.

    Raises: WireError if it is not one; BadUsage if a field cannot be.
    """
    try:
        fields = content.config_records["task"]
        return HistogramTask(
            run=_typed(fields, "run", str),
            schema_digest=_typed(fields, "schema", str),
            release=FeatureHistograms.from_json(json.loads(_typed(fields, "release", str))),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"histogram message: expected a field or a type that is not there ({error})") from None


def _subject(task: StepTask | EvaluationTask) -> dict[str, ConfigRecordValues]:
    return {
        "run": task.run,
        "family": task.spec.family,
        "inputs": task.spec.inputs,
        "hidden": task.spec.hidden,
        "schema": task.schema_digest,
    }


def _spec(fields: Mapping[str, Any]) -> ModelSpec:
    return ModelSpec(
        family=_typed(fields, "family", str),
        inputs=_typed(fields, "inputs", int),
        hidden=_typed(fields, "hidden", int),
    )


def _typed(fields: Mapping[str, Any], name: str, kind: type) -> Any:
    value = fields[name]
    if type(value) is not kind:
        raise TypeError(f"{name}: got {type(value).__name__}, expected {kind.__name__}")
    return value


def _vector(content: RecordDict, name: str) -> Vector:
    (array,) = content.array_records[name].to_numpy_ndarrays()
    if array.dtype != np.float32 or array.ndim != 1 or len(array) > MAX_WEIGHTS:
        raise WireError(f"{name}: got {array.dtype} of shape {array.shape}, expected float32 (d,)")
    return array
