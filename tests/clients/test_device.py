"""The device: its ledger comes before its rows, and a server learns of an error only its kind."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import RecordDict

from clients.app import app as client_app
from clients.local import LocalModel
from clients.sdk import Device, DeviceConfig
from fedinfer.cli.methods import write_rows
from fedinfer.data import Table, encode, heart_rows, heart_schema, to_json
from fedinfer.data.heart import SCHEMA_PATH
from fedinfer.errors import BadUsage, SchemaError, UnprotectedRefused
from fedinfer.flower import STEP, task_to_content
from fedinfer.models import Model, ModelSpec, build, save
from fedinfer.privacy import Cyclic, FixedSize, Poisson, PrivacyLedger, PrivacyPlan
from fedinfer.simulation import InProcessGrid
from fedinfer.simulation.grid import _task_of
from fedinfer.sums.messages import error_kind
from fedinfer.training import StepTask

SCHEMA = heart_schema()
PLAN = PrivacyPlan(clip_norm=1.0, noise_multiplier=4.0, sampler=Poisson(rate=0.5), delta=1e-6, steps=3, divisor=10.0)


def task(plan: PrivacyPlan | None = PLAN, digest: str | None = None) -> StepTask:
    spec = ModelSpec(family="logistic", inputs=SCHEMA.width)
    weights = np.zeros(SCHEMA.width + 1, np.float32)
    schema_digest = SCHEMA.digest() if digest is None else digest
    return StepTask(run="a", round=1, spec=spec, schema_digest=schema_digest, weights=weights, plan=plan)


CLIENTS = replace(PLAN, unit="client", sampler=Poisson(rate=0.5))


@pytest.mark.parametrize(
    "plan",
    [
        replace(PLAN, sampler=FixedSize(size=10, population=20)),
        replace(PLAN, sampler=Cyclic(period=2)),
        replace(PLAN, min_honest=2),
        replace(CLIENTS, adversary="outsider"),
        replace(CLIENTS, sampler=Cyclic(period=2)),
        replace(CLIENTS, min_honest=2),
    ],
)
def test_a_plan_whose_promise_does_not_hold_here_is_refused_and_nothing_is_spent(plan: PrivacyPlan) -> None:
    ledger = PrivacyLedger.scratch(epsilon=1e6, delta=1e-3)
    device = Device(
        table=encode(heart_rows()["Cleveland"][:20], SCHEMA, with_target=True), schema=SCHEMA, ledger=ledger
    )
    with pytest.raises(UnprotectedRefused, match=f"got a plan for one {plan.unit}"):
        device.step(task(plan=plan))
    assert ledger.summary().runs == ()


def test_a_whole_client_is_clipped_and_pays_for_each_participation() -> None:
    ledger = PrivacyLedger.scratch(epsilon=1e6, delta=1e-3)
    rows = encode(heart_rows()["Cleveland"][:20], SCHEMA, with_target=True)
    table = replace(rows, features=rows.features * np.float32(1e6))
    plan = replace(CLIENTS, clip_norm=0.5, noise_multiplier=0.1, divisor=1.0)
    reply = Device(table=table, schema=SCHEMA, ledger=ledger).step(task(plan=plan))
    noise = plan.noise_multiplier * plan.clip_norm * np.sqrt(SCHEMA.width + 1)
    assert 0.5 * plan.clip_norm < np.linalg.norm(reply.gradient) < plan.clip_norm + 2 * noise
    assert reply.weight == 1.0
    (run,) = ledger.summary().runs
    assert run.epsilon == plan.epsilon() == plan.epsilon(adversary="server")


class Watched(Table):
    """A table that tells when its features are read."""

    def __getattribute__(self, name: str) -> object:
        if name == "features":
            object.__getattribute__(self, "events").append("rows")
        return object.__getattribute__(self, name)


def test_a_release_is_on_disk_before_a_row_is_read_and_committed_after(tmp_path: Path) -> None:
    events: list[str] = []
    plain = encode(heart_rows()["Cleveland"][:20], SCHEMA, with_target=True)
    table = Watched.__new__(Watched)
    for name, value in (("events", events), ("features", plain.features), ("labels", plain.labels), ("clamped", {})):
        object.__setattr__(table, name, value)

    class Ledger(PrivacyLedger):
        def reserve(self, **arguments: object) -> object:  # type: ignore[override]
            reservation = super().reserve(**arguments)  # type: ignore[arg-type]
            with PrivacyLedger.open(tmp_path / "ledger") as other:
                assert other.summary().runs[0].reserved == 1
            events.append("reserved")
            return reservation

        def commit(self, reservation: object) -> None:  # type: ignore[override]
            super().commit(reservation)  # type: ignore[arg-type]
            events.append("committed")

    with Ledger.create(tmp_path / "ledger", epsilon=9.0, delta=1e-3) as ledger:
        device = Device(table=table, schema=SCHEMA, ledger=ledger)
        events.clear()
        device.step(task())
    assert events[0] == "reserved"
    assert events[-1] == "committed"
    assert "rows" in events


def test_no_plan_and_another_schema_are_refused_and_nothing_is_spent() -> None:
    ledger = PrivacyLedger.scratch(epsilon=9.0, delta=1e-3)
    table = encode(heart_rows()["Cleveland"][:20], SCHEMA, with_target=True)
    device = Device(table=table, schema=SCHEMA, ledger=ledger)
    with pytest.raises(UnprotectedRefused, match="got no privacy plan"):
        device.step(task(plan=None))
    with pytest.raises(SchemaError, match="got another schema"):
        device.step(task(digest="other"))
    assert ledger.summary().runs == ()


def test_public_data_may_train_without_a_plan() -> None:
    table = encode(heart_rows()["Cleveland"][:20], SCHEMA, with_target=True)
    ledger = PrivacyLedger.scratch(epsilon=9.0, delta=1e-3)
    reply = Device(table=table, schema=SCHEMA, ledger=ledger, public_data=True).step(task(plan=None))
    assert (reply.weight, reply.void) == (20.0, True)


def test_private_rows_need_a_ledger_and_keys_are_checked() -> None:
    with pytest.raises(BadUsage, match="got no ledger"):
        DeviceConfig.from_node({"data": "rows.csv", "schema": "schema.toml"})
    with pytest.raises(BadUsage, match="node configuration: got sampling-rate"):
        DeviceConfig.from_node({"sampling-rate": 1.0})
    with pytest.raises(BadUsage, match="got public-data of type str"):
        DeviceConfig.from_node({"public-data": "yes"})
    assert DeviceConfig.from_node({"partition-id": 2, "num-partitions": 4}).public_data


def send(node: dict[str, str | bool | int]) -> RecordDict:
    grid = InProcessGrid(client_app, [node], {})
    with _task_of(grid.run):
        message = grid.create_message(task_to_content(task()), STEP, next(iter(grid.get_node_ids())), "1")
        (reply,) = grid.send_and_receive([message])
    return reply.content


def test_the_server_learns_the_kind_of_an_error_and_not_its_text(tmp_path: Path) -> None:
    rows = [dict(row) for row in heart_rows()["Cleveland"][:5]]
    rows[2]["cp"] = "Secretvalue"
    data = write_rows(tmp_path / "rows.csv", rows)
    PrivacyLedger.create(tmp_path / "ledger", epsilon=9.0, delta=1e-3).close()
    content = send({"data": str(data), "schema": str(SCHEMA_PATH), "ledger": str(tmp_path / "ledger")})
    assert error_kind(content) == "SchemaError"
    assert "Secret" not in str(content)
    assert "rows.csv" not in str(content)
    with PrivacyLedger.open(tmp_path / "ledger") as ledger:
        assert ledger.summary().runs == ()


def test_an_unexpected_error_is_an_internal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: DeviceConfig) -> Device:
        raise ValueError("could not convert 'Secretvalue'")

    monkeypatch.setattr("clients.sdk.open_device", fail)
    content = send({"partition-id": 0})
    assert error_kind(content) == "InternalError"
    assert "Secret" not in str(content)


def test_local_prediction_needs_no_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec(family="mlp", inputs=SCHEMA.width)
    state = build(spec, seed=2).state_dict()
    model = Model(spec=spec, state=state, schema=to_json(SCHEMA), schema_digest=SCHEMA.digest(), labels=("no", "yes"))
    save(model, tmp_path / "model.safetensors")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr("socket.socket", refuse)
    answers = LocalModel.open(tmp_path / "model.safetensors").answer(heart_rows()["Hungary"][:7])
    assert len(answers) == 7
    assert all(a.label in ("no", "yes") and 0.5 <= a.confidence <= 1.0 for a in answers)


def test_a_device_asks_the_head_and_the_key_that_its_configuration_names(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.csv", [dict(row) for row in heart_rows()["Cleveland"][:20]])
    ledger, head = tmp_path / "ledger", tmp_path / "elsewhere" / "head"
    with PrivacyLedger.create(ledger, epsilon=9.0, delta=1e-3, head=head) as book:
        public = book.summary().public_key
    node: dict[str, str | bool | int] = {"data": str(rows), "schema": str(SCHEMA_PATH), "ledger": str(ledger)}
    pins: dict[str, str | bool | int] = {"ledger-head": str(head), "ledger-public-key": public}
    assert error_kind(send(node | pins)) is None
    for leftover in tmp_path.glob("ledger*"):
        leftover.unlink()
    PrivacyLedger.create(ledger, epsilon=900.0, delta=0.1).close()
    for pinned in (pins, *({key: value} for key, value in pins.items())):
        assert error_kind(send(node | pinned)) == "LedgerError"
    with PrivacyLedger.open(ledger) as book:
        assert book.summary().runs == ()
    # Asked for its own key and head, the other ledger is believed.
    assert error_kind(send(node)) is None


@pytest.mark.parametrize(
    ("pins", "said"),
    [
        ({"ledger-head": ""}, 'got ledger-head="", expected a value'),
        ({"ledger-public-key": ""}, 'got ledger-public-key="", expected a value'),
        ({"ledger-public-key": 7}, "got ledger-public-key of type int"),
        ({"ledger-public-key": "ab" * 31}, "of 62 characters, expected 64 of hex"),
        ({"ledger-public-key": "xy" * 32}, "expected 64 of hex"),
        ({"ledger": "", "ledger-head": "head"}, "without a ledger"),
        ({"ledger": "", "ledger-public-key": "ab" * 32}, "without a ledger"),
    ],
)
def test_a_pin_that_pins_nothing_is_refused(pins: dict[str, str | int], said: str) -> None:
    with pytest.raises(BadUsage, match=said):
        DeviceConfig.from_node({"ledger": "ledger", "public-data": True, **pins})


def test_steps_of_a_sum_that_use_no_row_load_no_torch() -> None:
    # A SuperNode starts a process for each message.
    script = "import clients.app, sys; assert not {'torch', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
