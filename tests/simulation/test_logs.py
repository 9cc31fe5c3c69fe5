"""Logs of a run: what they hold, where a resumed run goes on, and who can write them."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from flwr.serverapp import ServerApp
from hypothesis import given, settings
from hypothesis import strategies as st

from fedinfer.errors import BadInput, BadUsage
from fedinfer.simulation import CsvLog, JsonLines, ProgressBar, RoundLog, TensorBoard, simulate
from tests.simulation.test_federation import Seen
from tests.simulation.test_simulate import CLIENTS, fedavg, load, task_of
from tests.simulation.third_party import numpy_app


def record(number: int, **metrics: float) -> RoundLog:
    loss = None if number == 0 else 1.0 / number
    return RoundLog(round=number, clients=4, replies=3, errors=1, seconds=0.5, loss=loss, metrics=metrics)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_csv_has_a_line_a_round_and_blanks_where_nothing_was_measured(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "new" / "log.csv")
    log.begin(0)
    for number in range(3):
        log.round(record(number, accuracy=0.25) if number != 1 else record(number))
    log.end()
    lines = (tmp_path / "new" / "log.csv").read_text().splitlines()
    assert lines == [
        "round,clients,replies,errors,seconds,updates_per_s,loss,accuracy",
        "0,4,3,1,0.5,6.0,,0.25",
        "1,4,3,1,0.5,6.0,1.0,",
        "2,4,3,1,0.5,6.0,0.5,0.25",
    ]


def test_json_has_an_object_a_round_and_null_for_what_is_no_number(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "log.jsonl")
    log.begin(0)
    log.round(record(0, accuracy=0.25))
    log.round(record(1, perplexity=float("inf")))
    log.end()
    first, second = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert (first["round"], first["loss"], first["accuracy"]) == (0, None, 0.25)
    assert (second["round"], second["loss"], second["perplexity"]) == (1, 1.0, None)


@settings(max_examples=25)
@given(done=st.integers(0, 6), written=st.integers(0, 6), torn=st.integers(0, 40))
def test_a_resumed_log_holds_each_round_once(
    tmp_path_factory: pytest.TempPathFactory, done: int, written: int, torn: int
) -> None:
    folder = tmp_path_factory.mktemp("logs")
    for log, path in ((CsvLog, folder / "log.csv"), (JsonLines, folder / "log.jsonl")):
        first = log(path)
        first.begin(0)
        for number in range(written + 1):
            first.round(record(number, accuracy=0.5))
        first.end()
        # A kill may cut off the last lines, and the log may be behind its checkpoint or before it.
        path.write_bytes(path.read_bytes()[: -torn or None])
        second = log(path)
        second.begin(done)
        for number in range(done + 1, 8):
            second.round(record(number, accuracy=0.5))
        second.end()
        if log is CsvLog:
            rounds = [int(row["round"]) for row in rows_of(path)]
            assert all(row["accuracy"] == "0.5" for row in rows_of(path))
        else:
            rounds = [json.loads(line)["round"] for line in path.read_text().splitlines()]
        assert rounds == sorted(set(rounds))
        assert set(range(done + 1, 8)) <= set(rounds)
        if not torn:
            assert set(rounds) >= (set(range(min(done, written) + 1)) if done else set())


def test_a_new_run_begins_its_log_anew(tmp_path: Path) -> None:
    for _ in range(2):
        log = CsvLog(tmp_path / "log.csv")
        log.begin(0)
        log.round(record(1))
        log.end()
    assert len(rows_of(tmp_path / "log.csv")) == 1


def test_a_log_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "log.csv")
    log.begin(0)
    log.round(record(1))
    with pytest.raises(BadUsage, match="got accuracy in round 2, expected the columns of its first line"):
        log.round(record(2, accuracy=0.5))
    with pytest.raises(BadUsage, match="got loss, expected other names"):
        log.round(record(3, loss=0.5))
    log.end()
    for unopened in (CsvLog(tmp_path / "a"), JsonLines(tmp_path / "b")):
        with pytest.raises(BadUsage, match="before `begin`"):
            unopened.round(record(1))
        unopened.end()
    (tmp_path / "binary").write_bytes(b"\x89PNG\xff\n")
    with pytest.raises(BadInput, match="move it away to resume"):
        CsvLog(tmp_path / "binary").begin(1)


def test_a_stock_strategy_is_logged_by_what_the_grid_sees(tmp_path: Path) -> None:
    task, seen = task_of(), Seen()
    log = CsvLog(tmp_path / "log.csv")
    app = fedavg(task, 3, share=1.0)
    simulate(app, task.client_app(load), num_clients=CLIENTS, seed=0, callbacks=[seen, log])
    told = [(r.round, r.clients, r.replies, r.errors, r.loss) for r in seen.records]
    assert told == [(number, CLIENTS, CLIENTS - 1, 1, None) for number in (1, 2, 3)]
    assert all(r.updates_per_s > 0.0 for r in seen.records)
    assert (seen.begun, seen.ended) == ([0], 1)
    assert [row["replies"] for row in rows_of(tmp_path / "log.csv")] == [str(CLIENTS - 1)] * 3


def test_messages_that_train_nobody_are_no_round() -> None:
    seen = Seen()
    simulate(*numpy_app(), num_clients=4, run_config={"lr": 0.5}, callbacks=[seen])
    assert [record.round for record in seen.records] == [1, 2, 3], "three evaluations came between"


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::Warning")
def test_flowers_own_simulation_is_logged_too() -> None:
    task, seen = task_of(), Seen()
    app = fedavg(task, 2, share=1.0)
    simulate(app, task.client_app(load), num_clients=CLIENTS, backend="flower", seed=0, callbacks=[seen])
    told = [(record.round, record.replies, record.errors) for record in seen.records]
    assert told == [(1, CLIENTS - 1, 1), (2, CLIENTS - 1, 1)]
    assert (seen.begun, seen.ended) == ([0], 1)


def test_callbacks_are_told_that_a_failed_run_is_over() -> None:
    app, seen = ServerApp(), Seen()

    @app.main()
    def main(*_: object) -> None:
        raise RuntimeError("the strategy")

    task = task_of()
    with pytest.raises(RuntimeError, match="the strategy"):
        simulate(app, task.client_app(load), num_clients=CLIENTS, callbacks=[seen])
    assert (seen.begun, seen.ended) == ([0], 1)


def test_the_bar_is_silent_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar(3)
    bar.begin(1)
    bar.round(record(2))
    bar.end()
    assert capfd.readouterr() == ("", "")


def test_the_bar_shows_rounds_and_speed_on_a_terminal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    bar = ProgressBar(3)
    bar.begin(1)
    bar.round(record(2))
    bar.end()
    out, err = capfd.readouterr()
    assert out == ""
    assert "2/3" in err
    assert "6 updates/s" in err


def test_tensorboard_that_is_not_installed_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(BadUsage, match="pip install tensorboard"):
        TensorBoard(tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for done, last in ((0, 4), (2, 3)):
        log = TensorBoard(tmp_path)
        log.begin(done)
        for number in range(done + 1, last + 1):
            log.round(record(number, accuracy=float(number + done)))
        log.end()
    events = reading.EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "replies", "updates_per_s", "accuracy"}
    assert [(event.step, event.value) for event in events.Scalars("accuracy")] == [(1, 1.0), (2, 2.0), (3, 5.0)]


def test_the_device_is_checked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadUsage, match="torch finds no GPU on this machine; expected 'cpu'"):
        simulate(ServerApp(), task.client_app(load), num_clients=2, device="cuda")
