"""One device of five sends what it likes, by the real apps on the real table: the mean falls, robust rules stand."""

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients.app import app as honest_app
from experiments.robust_rules import auc_of
from fedinfer.cli.methods import Split, splits
from fedinfer.combiners import COMBINERS
from fedinfer.errors import BadUsage
from fedinfer.settings import RunConfig
from fedinfer.simulation import run_in_process
from server.app import app as server_app

ROBUST = [name for name in COMBINERS if name != "mean"]
FLIPPED = "flipped, 10 times"


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    return next(splits([0], tmp_path_factory.mktemp("split")))


@pytest.mark.parametrize("epsilon", [None, 2.0])
def test_one_wrong_device_breaks_the_mean(split: Split, epsilon: float | None) -> None:
    honest = auc_of(split, rule="mean", epsilon=epsilon, attack="nobody", seed="mean")
    attacked = auc_of(split, rule="mean", epsilon=epsilon, attack=FLIPPED, seed="mean")
    assert honest > 0.85
    # Worse than guessing: the model says the opposite.
    assert attacked < 0.5


@pytest.mark.parametrize(("attack", "epsilon"), [(FLIPPED, None), (FLIPPED, 2.0), ("a million times", None)])
@pytest.mark.parametrize("rule", ROBUST)
def test_each_robust_rule_stands_one_wrong_device(split: Split, rule: str, attack: str, epsilon: float | None) -> None:
    assert auc_of(split, rule=rule, epsilon=epsilon, attack=attack, seed=rule) > 0.8


def test_a_device_that_claims_all_the_weight_does_not_get_it() -> None:
    def trained(rule: str, app: ClientApp) -> np.ndarray:
        wrong = 0 if rule == "mean" else 1
        config = RunConfig(combine=rule, wrong_devices=wrong, rounds=3, min_devices=4)
        nodes = [{"partition-id": i, "insecure-seeded-noise": str(i)} for i in range(4)]
        context = run_in_process(server_app, app, nodes=nodes, run_config=config.to_flat())
        (weights,) = context.state.array_records["weights"].to_numpy_ndarrays()
        return weights

    heavy = ClientApp()

    @heavy.train("step")
    def step(message: Message, context: Context) -> Message:
        reply = honest_app(message, context)
        if context.node_config["partition-id"] != 2:
            return reply
        (update,) = reply.content.array_records["gradient"].to_numpy_ndarrays()
        metrics = MetricRecord({"weight": 1e12, "void": 0})
        return Message(RecordDict({"gradient": ArrayRecord([update]), "reply": metrics}), reply_to=message)

    for rule in ("mean", "median", "trimmed-mean", "geometric-median"):
        assert trained(rule, heavy).tobytes() == trained(rule, honest_app).tobytes()


def test_too_few_devices_for_the_rule_are_refused_before_one_is_asked() -> None:
    config = RunConfig(combine="krum", wrong_devices=1, min_devices=4)
    asked: list[int] = []

    def progress(_round: str, node: int) -> None:
        asked.append(node)

    nodes = [{"partition-id": i} for i in range(4)]
    with pytest.raises(BadUsage, match="expected 5 or more for krum"):
        run_in_process(server_app, honest_app, nodes=nodes, run_config=config.to_flat(), progress=progress)
    assert asked == []
