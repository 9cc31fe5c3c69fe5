"""Apps that were written for plain federated averaging, behind `secure` and `SecureFedAvg`: the README's few lines."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Strategy

from fedinfer.cli.federation import Node, enlist
from fedinfer.errors import RoundFailed, WireError
from fedinfer.privacy import PrivacyLedger
from fedinfer.rules import FedAdaptive
from fedinfer.settings import RunConfig
from fedinfer.simulation import InProcessGrid, run_in_process
from fedinfer.simulation.grid import run_on
from fedinfer.sums import SecureFedAvg, secure
from fedinfer.sums.messages import error_kind
from fedinfer.sums.updates import arrays_of, content_digest, floats_in, update_of, with_floats
from tests.simulation.third_party import numpy_app, sklearn_app, torch_app

CLIENTS = 4
ROUNDS = 2


def nodes_in(folder: Path, budget: float = 20.0) -> tuple[RunConfig, list[Node]]:
    nodes: list[Node] = []
    for number in range(CLIENTS):
        ledger = folder / f"{number}.ledger"
        PrivacyLedger.create(ledger, epsilon=budget, delta=1e-4).close()
        nodes.append({"ledger": str(ledger), "partition-id": number, "num-partitions": CLIENTS})
    return enlist(RunConfig(min_devices=CLIENTS), nodes, folder)


def server(make: Callable[[], Strategy], initial: ArrayRecord, rounds: int = ROUNDS) -> ServerApp:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        from flwr.app import ConfigRecord

        config = ConfigRecord({"lr": 0.1})
        result = make().start(grid=grid, initial_arrays=initial, train_config=config, num_rounds=rounds)
        context.state["arrays"] = result.arrays
        context.state["metrics"] = result.train_metrics_clientapp[rounds]

    return app


def strategy(config: RunConfig, **more: object) -> Callable[[], SecureFedAvg]:
    return lambda: SecureFedAvg(
        **{  # type: ignore[arg-type]
            "epsilon": 20.0,
            "delta": 1e-4,
            "rounds": ROUNDS,
            "clip_norm": 5.0,
            "min_devices": CLIENTS,
            "pki": config.pki,
            "pki_digest": config.pki_digest,
            **more,
        }
    )


INITIAL = {
    "torch": lambda: ArrayRecord(_network_state()),
    "sklearn": lambda: ArrayRecord([np.zeros((1, 4)), np.zeros(1)]),
    "numpy": lambda: ArrayRecord([np.zeros(4)]),
}
# About the largest norm of a client's update in the first round.
CLIPS = {"torch": 0.4, "sklearn": 6.0, "numpy": 1.0}
APPS: dict[str, Callable[[], tuple[ServerApp, ClientApp]]] = {
    "torch": torch_app,
    "sklearn": sklearn_app,
    "numpy": numpy_app,
}


def _network_state() -> dict[str, object]:
    import torch
    from torch import nn

    torch.manual_seed(0)
    return dict(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).state_dict())


@pytest.mark.parametrize("name", sorted(APPS))
def test_an_app_for_plain_averaging_gives_its_average_up_to_the_noise(name: str, tmp_path: Path) -> None:
    config, nodes = nodes_in(tmp_path, budget=45.0)
    _, app = APPS[name]()
    made: list[SecureFedAvg] = []

    def make() -> SecureFedAvg:
        # As little noise as there may be, and a clip that is just wide enough.
        made.append(strategy(config, rounds=1, spare=0, epsilon=45.0, clip_norm=CLIPS[name])())
        return made[0]

    context = run_in_process(server(make, INITIAL[name](), 1), secure(app), nodes=nodes, run_config={})
    plain = run_in_process(server(FedAvg, INITIAL[name](), 1), app, nodes=nodes, run_config={})
    got, expected = (floats_in(arrays_of(c.state.array_records["arrays"])) for c in (context, plain))
    plan = made[0].plan
    assert plan is not None
    noise = plan.noise_multiplier * plan.clip_norm * np.sqrt(CLIENTS / plan.min_honest) / plan.divisor
    moved = expected - floats_in(arrays_of(INITIAL[name]()))
    assert np.abs(got - expected).max() < 7 * noise
    assert np.linalg.norm(moved) > noise * np.sqrt(len(moved))
    metrics = context.state.metric_records["metrics"]
    assert dict(metrics) == {"clients": CLIENTS, "waves": 6, "overshoot": pytest.approx(4 / 3)}
    for node in nodes:
        with PrivacyLedger.open(Path(str(node["ledger"]))) as ledger:
            (run,) = ledger.summary().runs
        assert (run.reserved, run.committed, run.void) == (1, 1, False)
        assert run.epsilon == pytest.approx(45.0, abs=1e-3)


def test_any_of_our_rules_moves_the_weights(tmp_path: Path) -> None:
    config, nodes = nodes_in(tmp_path)
    _, app = numpy_app()
    make = strategy(config, rule=FedAdaptive(learning_rate=0.1, yogi=True))
    context = run_in_process(server(make, INITIAL["numpy"]()), secure(app), nodes=nodes, run_config={})
    moved = floats_in(arrays_of(context.state.array_records["arrays"]))
    # A step of FedYogi is about as long as its learning rate in each coordinate.
    assert 0.0 < np.abs(moved).max() <= 0.1 * ROUNDS * 2


def test_a_device_answers_nothing_but_secure_sums(tmp_path: Path) -> None:
    _, nodes = nodes_in(tmp_path)
    _, app = numpy_app()
    kinds: list[str | None] = []

    class Asking(FedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[None, None]:
            kinds.extend(error_kind(reply.content) for reply in replies)
            return None, None

        def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> None:
            kinds.extend(error_kind(reply.content) for reply in replies)

    inner = ServerApp()

    @inner.main()
    def main(grid: Grid, context: Context) -> None:
        Asking().start(grid=grid, initial_arrays=INITIAL["numpy"](), num_rounds=1)

    run_in_process(inner, secure(app), nodes=nodes, run_config={})
    assert kinds == ["UnprotectedRefused"] * (2 * CLIENTS)


class Wiretap(InProcessGrid):
    """Keeps what the server was sent."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        self.seen = [*getattr(self, "seen", []), *(reply.content for reply in replies)]
        return replies


def test_no_metric_and_no_count_reaches_the_server(tmp_path: Path) -> None:
    config, nodes = nodes_in(tmp_path)
    _, app = torch_app()
    grid = Wiretap(secure(app), nodes, {})
    run_on(server(strategy(config), INITIAL["torch"](), 1), grid, {})
    names = {key for content in grid.seen for record in content.values() for key in record}
    assert names <= {"run", "round", "void", "commit", "opening", "offer", "masked", "endorsement", "reveal"}


def test_an_empty_budget_stops_the_round_and_nothing_leaves(tmp_path: Path) -> None:
    config, nodes = nodes_in(tmp_path, budget=1.0)
    _, app = numpy_app()
    with pytest.raises(RoundFailed, match="masked vectors: got 0"):
        run_in_process(server(strategy(config), INITIAL["numpy"]()), secure(app), nodes=nodes, run_config={})


def test_arrays_that_are_no_floats_stay_and_others_come_back_in_their_types() -> None:
    before = arrays_of(ArrayRecord([np.ones((2, 2), np.float32), np.array([7]), np.zeros(3, np.float64)]))
    after = with_floats(before, np.arange(7.0))
    found = arrays_of(after)
    assert [array.dtype for array in found.values()] == [np.float32, np.int64, np.float64]
    assert [array.tolist() for array in found.values()] == [[[0.0, 1.0], [2.0, 3.0]], [7], [4.0, 5.0, 6.0]]
    np.testing.assert_array_equal(update_of(before, found), np.arange(7.0) - [1, 1, 1, 1, 0, 0, 0])
    with pytest.raises(WireError, match="got no floats"):
        floats_in({"counter": np.array([1])})


def test_the_digest_of_a_message_is_of_all_it_says() -> None:
    def content(scale: float = 1.0, lr: float = 0.1, name: str = "arrays") -> RecordDict:
        from flwr.app import ConfigRecord

        return RecordDict({name: ArrayRecord([scale * np.ones(2)]), "config": ConfigRecord({"lr": lr, "key": b"\x00"})})

    digests = {content_digest(c) for c in (content(), content(2.0), content(lr=0.2), content(name="other"))}
    assert len(digests) == 4
    assert content_digest(content()) == content_digest(content())
    more = content()
    more["metrics"] = MetricRecord({"lr": 0.1})
    assert content_digest(more) not in digests
