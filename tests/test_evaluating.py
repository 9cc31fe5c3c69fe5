"""Federated evaluation: counts leave with noise and after a charge, and what the server makes of them is right."""

from pathlib import Path

import numpy as np
import pytest
from flwr.app import RecordDict

from clients.app import app as client_app
from clients.sdk import Device
from fedinfer.arrays import flatten
from fedinfer.cli.methods import write_rows
from fedinfer.data import encode, heart_rows, heart_schema
from fedinfer.data.heart import SCHEMA_PATH
from fedinfer.errors import BadUsage, BudgetExceeded, SchemaError, WireError
from fedinfer.evaluating import EvaluationTask
from fedinfer.flower import (
    COUNTS,
    counts_from_content,
    counts_to_content,
    evaluation_from_content,
    evaluation_to_content,
)
from fedinfer.models import ModelSpec, build
from fedinfer.privacy import PrivacyLedger
from fedinfer.privacy.evaluation import EvaluationRelease
from fedinfer.simulation import InProcessGrid
from fedinfer.simulation.grid import _task_of
from fedinfer.sums.messages import error_kind

SCHEMA = heart_schema()
SPEC = ModelSpec(family="logistic", inputs=SCHEMA.width)
RELEASE = EvaluationRelease.calibrate(epsilon=1.0, delta=1e-6, loss_bound=4.0)
ROWS = encode(heart_rows()["Cleveland"], SCHEMA, with_target=True)


def task(**changes: object) -> EvaluationTask:
    weights = flatten(build(SPEC, seed=3).state_dict())
    fields = {"run": "e", "spec": SPEC, "schema_digest": SCHEMA.digest(), "weights": weights, "release": RELEASE}
    return EvaluationTask(**{**fields, **changes})  # type: ignore[arg-type]


def device(ledger: PrivacyLedger) -> Device:
    return Device(table=ROWS, schema=SCHEMA, ledger=ledger)


def test_an_evaluation_is_charged_before_it_leaves_and_only_within_the_budget() -> None:
    ledger = PrivacyLedger.scratch(epsilon=1.5, delta=1e-5)
    reply = device(ledger).evaluate(task())
    assert reply.counts.shape == (RELEASE.size,)
    (run,) = ledger.summary().runs
    assert (run.run, run.epsilon, run.reserved, run.committed) == ("e", RELEASE.epsilon(), 1, 1)
    for again in (task(), task(run="f")):
        with pytest.raises(BudgetExceeded):
            device(ledger).evaluate(again)
    with pytest.raises(SchemaError):
        device(ledger).evaluate(task(schema_digest="other"))
    assert len(ledger.summary().runs) == 1


def test_two_evaluations_of_the_same_rows_differ_by_the_noise_that_is_claimed() -> None:
    ledger = PrivacyLedger.scratch(epsilon=1e6, delta=0.9)
    counts = np.stack([device(ledger).evaluate(task(run=str(run))).counts for run in range(60)]).astype(float)
    summary = [RELEASE.summarise(row.astype(np.int64)).examples.value for row in counts]
    error = RELEASE.summarise(counts[0].astype(np.int64)).examples.standard_error
    assert 0.6 < np.std(summary) / error < 1.5
    assert abs(np.mean(summary) - len(ROWS)) < 6 * error / np.sqrt(60)


def test_a_score_of_one_half_is_a_positive_answer() -> None:
    loud = EvaluationRelease.calibrate(epsilon=30.0, delta=1e-6, loss_bound=4.0)
    undecided = task(weights=np.zeros(SCHEMA.width + 1, np.float32), release=loud)
    told = loud.summarise(device(PrivacyLedger.scratch(epsilon=99.0, delta=0.5)).evaluate(undecided).counts)
    assert told.accuracy is not None
    assert told.loss is not None
    assert told.accuracy.value == pytest.approx(ROWS.labels.mean(), abs=0.02)
    assert told.loss.value == pytest.approx(np.log(2), abs=0.05)


def test_messages_round_trip_and_others_are_refused() -> None:
    got = evaluation_from_content(evaluation_to_content(task()))
    assert (got.run, got.spec, got.schema_digest, got.release) == ("e", SPEC, SCHEMA.digest(), RELEASE)
    reply = device(PrivacyLedger.scratch(epsilon=9.0, delta=1e-3)).evaluate(task())
    assert (counts_from_content(counts_to_content(reply), size=RELEASE.size).counts == reply.counts).all()
    with pytest.raises(WireError, match=r"expected int64 \(3,\)"):
        counts_from_content(counts_to_content(reply), size=3)
    with pytest.raises(WireError):
        evaluation_from_content(RecordDict())
    with pytest.raises(WireError):
        counts_from_content(RecordDict(), size=3)
    with pytest.raises(BadUsage, match="NaN"):
        task(weights=np.full(SCHEMA.width + 1, np.nan, np.float32))
    for changed in ({"sigma": 0.0}, {"relation": "replace one"}, {"extra": 1}):
        with pytest.raises(BadUsage):
            EvaluationRelease.from_json({**RELEASE.to_json(), **changed})


def test_a_server_learns_of_a_refusal_only_its_kind(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.csv", heart_rows()["Cleveland"][:20])
    PrivacyLedger.create(tmp_path / "ledger", epsilon=0.5, delta=1e-5).close()
    node = {"data": str(rows), "schema": str(SCHEMA_PATH), "ledger": str(tmp_path / "ledger")}
    grid = InProcessGrid(client_app, [node], {})
    with _task_of(grid.run):
        message = grid.create_message(evaluation_to_content(task()), COUNTS, next(iter(grid.get_node_ids())), "1")
        (reply,) = grid.send_and_receive([message])
    assert error_kind(reply.content) == "BudgetExceeded"
    assert list(reply.content) == ["error"]
