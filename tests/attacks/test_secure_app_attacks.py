"""Attacks on an existing app behind `secure`: by a server that lies in its plan, and by an app that says too much."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

import fedinfer.sums.client
from fedinfer.cli.federation import Node, enlist
from fedinfer.errors import RoundFailed
from fedinfer.privacy import DistributedPlan, PrivacyLedger
from fedinfer.settings import RunConfig
from fedinfer.simulation import InProcessGrid
from fedinfer.simulation.grid import run_on
from fedinfer.sums import SecureFedAvg, secure
from fedinfer.sums.updates import arrays_of, floats_in

CLIENTS, SIZE = 4, 4
SECRET = "patient 17: 93.5 mg"
Train = Callable[[ArrayRecord], ArrayRecord]


class Wiretap(InProcessGrid):
    """Keeps all that devices send."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        self.seen = [*getattr(self, "seen", []), *(reply.content for reply in replies)]
        return replies


class Lying(SecureFedAvg):
    """A strategy whose plan is not what its devices' policy allows."""

    def __init__(self, lie: dict[str, int], config: RunConfig) -> None:
        super().__init__(
            epsilon=20.0,
            delta=1e-4,
            rounds=1,
            clip_norm=1.0,
            min_devices=CLIENTS,
            pki=config.pki,
            pki_digest=config.pki_digest,
        )
        self._lie = lie

    def _plan_for(self, arrays: ArrayRecord) -> DistributedPlan:
        return replace(super()._plan_for(arrays), **self._lie)


def federation(
    folder: Path, train: Train, lie: dict[str, int]
) -> tuple[list[Node], Wiretap, Callable[[], ArrayRecord]]:
    nodes: list[Node] = []
    for number in range(CLIENTS):
        ledger = folder / f"{number}.ledger"
        PrivacyLedger.create(ledger, epsilon=40.0, delta=1e-3).close()
        nodes.append({"ledger": str(ledger)})
    config, nodes = enlist(RunConfig(min_devices=CLIENTS), nodes, folder)
    app, server = ClientApp(), ServerApp()

    @app.train()
    def trained(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 93})
        content = RecordDict({"arrays": train(message.content.array_records["arrays"]), "metrics": metrics})
        return Message(content, reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        zeros = ArrayRecord([np.zeros(SIZE)])
        result = Lying(lie, config).start(grid=grid, initial_arrays=zeros, train_config=ConfigRecord({}), num_rounds=1)
        context.state["arrays"] = result.arrays

    grid = Wiretap(secure(app), nodes, {})
    return nodes, grid, lambda: run_on(server, grid, {}).state.array_records["arrays"]


def charged(nodes: list[Node]) -> list[int]:
    found = []
    for node in nodes:
        with PrivacyLedger.open(Path(str(node["ledger"]))) as ledger:
            found.append(sum(run.reserved for run in ledger.summary().runs))
    return found


@pytest.mark.parametrize("lie", [{"min_honest": CLIENTS, "colluders": 0}, {"dimension": SIZE - 1}])
def test_a_plan_that_does_not_hold_here_costs_nothing_and_trains_nothing(tmp_path: Path, lie: dict[str, int]) -> None:
    calls: list[int] = []

    def train(arrays: ArrayRecord) -> ArrayRecord:
        calls.append(1)
        return arrays

    nodes, _, run = federation(tmp_path, train, lie)
    with pytest.raises(RoundFailed, match="masked vectors: got 0"):
        run()
    assert (calls, charged(nodes)) == ([], [0] * CLIENTS)


def test_without_the_check_a_server_has_less_noise_than_is_charged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fedinfer.sums.client, "check_charge", lambda plan, parameters: None)
    nodes, _, run = federation(tmp_path, lambda arrays: arrays, {"min_honest": CLIENTS, "colluders": 0})
    run()
    assert charged(nodes) == [1] * CLIENTS


def test_what_an_app_says_when_it_fails_stays_on_the_device(tmp_path: Path) -> None:
    def train(arrays: ArrayRecord) -> ArrayRecord:
        raise ValueError(SECRET)

    nodes, grid, run = federation(tmp_path, train, {})
    with pytest.raises(RoundFailed) as caught:
        run()
    assert SECRET not in str(caught.value) + repr(grid.seen)
    errors = [dict(content.config_records["error"]) for content in grid.seen if "error" in content]
    assert errors == [{"kind": "InternalError"}] * len(errors) != []
    # The rows may have been used: it is charged.
    assert charged(nodes) == [2] * CLIENTS


@pytest.mark.parametrize("value", [1e30, -1e300, float("nan"), float("inf"), 93.5])
def test_whatever_an_app_returns_counts_for_one_clip_norm(tmp_path: Path, value: float) -> None:
    _, _, run = federation(tmp_path, lambda arrays: ArrayRecord([np.full(SIZE, value)]), {})
    moved = floats_in(arrays_of(run()))
    # Four clients of norm one, over four; and noise of which the check of the total would say if it were more.
    assert np.linalg.norm(moved) < 1.0 + 3.0 * np.sqrt(SIZE)
    assert np.isfinite(moved).all()


@pytest.mark.parametrize(
    "returned",
    [
        ArrayRecord([np.full(SIZE, 93)]),
        ArrayRecord([np.full(1, 93.5)]),
        ArrayRecord([np.full(SIZE, 93.5), np.full(1, 93.5)]),
        ArrayRecord([np.full(SIZE, 93.5j)]),
    ],
    ids=["integers", "another shape", "one more", "complex"],
)
def test_arrays_that_are_not_those_sent_are_no_update(tmp_path: Path, returned: ArrayRecord) -> None:
    _, grid, run = federation(tmp_path, lambda arrays: returned, {})
    with pytest.raises(RoundFailed, match="masked vectors: got 0"):
        run()
    kinds = {content.config_records["error"]["kind"] for content in grid.seen if "error" in content}
    assert kinds <= {"WireError", "ShapeMismatch"}
