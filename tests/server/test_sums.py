"""Rounds by secure sums over Flower: who may drop out when, what is charged, and how many waves it takes."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedinfer.arrays import Vector
from fedinfer.errors import BadUsage, RoundFailed
from fedinfer.settings import RunConfig
from fedinfer.sums.messages import MASKED, OFFER, OPEN, REVEAL, SHARE, SIGN
from server.rounds import RoundState, first_state, rounds
from tests.server.federation import Lose, LossyGrid, charged, hospitals, nothing_lost, on, restart

# Of five, one may work with the server and one may drop out.
CONFIG = RunConfig(rounds=2, min_devices=5, dropout=0.2, spare_steps=4, epsilon=4.0, timeout_s=0.1)


def states(grid: LossyGrid, config: RunConfig) -> list[RoundState]:
    with on(grid):  # type: ignore[attr-defined]
        return list(rounds(grid, config, first_state(config, "a-run")))


def test_a_set_up_takes_three_waves_and_a_round_three_more(tmp_path: Path) -> None:
    config, nodes = hospitals(tmp_path, CONFIG)
    grid = LossyGrid(nodes, lose=nothing_lost)
    found = states(grid, config)
    assert [record.devices for record in found[-1].history] == [5, 5]
    assert Counter(kind for kind, _ in grid.sent) == {
        OFFER: 5, OPEN: 5, SHARE: 5, MASKED: 10, SIGN: 10, REVEAL: 10,
    }  # fmt: skip
    assert [charged(node) for node in nodes] == [(2, 2)] * 5
    assert found[-1].history[0].overshoot == pytest.approx(5 / 3)


def test_the_sum_is_the_step_that_one_holder_of_all_rows_would_make(tmp_path: Path) -> None:
    # Nearly no noise, everybody sampled: the secure step is the plain clipped step over all rows.
    config = RunConfig(rounds=1, min_devices=3, epsilon=20.0, delta=1e-3, sampling_rate=1.0, spare_steps=0)
    config, nodes = hospitals(tmp_path, config, rows=30)
    for node in nodes:
        del node["ledger"]
        node["public-data"] = True
    (state,) = states(LossyGrid(nodes, lose=nothing_lost), config)
    plan = config.plan
    assert plan is not None
    moved = first_state(config, "a-run").weights - state.weights
    expected = _clipped_step(nodes, config) * np.float32(config.learning_rate / plan.divisor)
    noise = config.learning_rate * plan.noise_multiplier / plan.divisor
    assert np.abs(moved - expected).max() < 8 * noise
    assert np.linalg.norm(expected) > 30 * noise


def _clipped_step(nodes: list[dict[str, object]], config: RunConfig) -> Vector:
    import torch

    from fedinfer.data import heart_schema, read_table
    from fedinfer.models import build
    from fedinfer.privacy import clipped_gradient
    from fedinfer.training import logistic_loss

    total = np.zeros(config.spec.inputs + 1, np.float32)
    for node in nodes:
        table = read_table(Path(str(node["data"])), heart_schema())
        net = build(config.spec, seed=config.model_seed)
        x, y = torch.from_numpy(table.features), torch.from_numpy(table.labels)
        sums = clipped_gradient(net, logistic_loss, x, y, clip_norm=config.clip_norm)
        total += torch.cat([gradient.reshape(-1) for gradient in sums.values()]).numpy()
    return total


@pytest.mark.parametrize("stage", [MASKED, SIGN, REVEAL])
def test_one_may_drop_out_at_any_stage_of_a_round_and_comes_back(tmp_path: Path, stage: str) -> None:
    config, nodes = hospitals(tmp_path, CONFIG)
    seen: Counter[str] = Counter()

    def lose(kind: str, node: int) -> bool:
        seen[kind] += node == 1
        return (kind, node, seen[kind]) == (stage, 1, 1)

    grid = LossyGrid(nodes, lose=lose)
    found = states(grid, config)
    assert len(found) == 2
    expected = 4 if stage == MASKED else 5
    assert found[-1].history[0].devices == expected
    # Whoever missed the masked wave is asked for an offer in the next one, and is back in the round after it.
    assert Counter(kind for kind, _ in grid.sent)[OFFER] == 5
    assert found[-1].history[1].devices == expected
    if stage == MASKED:
        assert (SHARE, 1) in grid.sent[-20:]


def test_a_device_that_was_away_takes_part_again(tmp_path: Path) -> None:
    config, nodes = hospitals(tmp_path, RunConfig(rounds=3, min_devices=5, dropout=0.2, epsilon=4.0, timeout_s=0.1))
    seen: Counter[str] = Counter()

    def lose(kind: str, node: int) -> bool:
        seen[kind] += node == 1
        return (kind, node, seen[kind]) == (MASKED, 1, 1)

    found = states(LossyGrid(nodes, lose=lose), config)
    assert [record.devices for record in found[-1].history] == [4, 4, 5]


def test_a_device_that_restarts_in_a_round_drops_out_and_sets_up_again(tmp_path: Path) -> None:
    config, nodes = hospitals(tmp_path, replace(CONFIG, rounds=3))
    restarted: list[str] = []

    def lose(kind: str, node: int) -> bool:
        if kind == SIGN and node == 0 and not restarted:
            restarted.append(kind)
            # Its memory is gone between two messages.
            restart(nodes[0])
        return False

    grid = LossyGrid(nodes, lose=lose)
    found = states(grid, config)
    # Everybody lives in this process, so everybody restarted: the round fails, and all set up anew.
    assert len(found) == 3
    assert Counter(kind for kind, _ in grid.sent)[OFFER] == 10
    assert {charged(node) for node in nodes} == {(4, 4)}


def test_places_on_disk_outlive_the_process(tmp_path: Path) -> None:
    config, nodes = hospitals(tmp_path, CONFIG)
    for node in nodes:
        del node["sessions"]

    def lose(kind: str, node: int) -> bool:
        # Each message finds another process.
        restart(nodes[node])
        return False

    found = states(LossyGrid(nodes, lose=lose), config)
    assert [record.devices for record in found[-1].history] == [5, 5]
    assert [charged(node) for node in nodes] == [(2, 2)] * 5


@pytest.mark.parametrize("lost", [1, 2, 5])
@pytest.mark.parametrize("stage", [MASKED, SIGN, REVEAL])
def test_too_many_dropouts_give_no_sum_and_the_ledgers_stay_charged(tmp_path: Path, stage: str, lost: int) -> None:
    # Four of five must be left, and sign; and three of anybody's four neighbours must reveal.
    fatal = lost >= 2

    def lose(kind: str, node: int) -> bool:
        return kind == stage and node < lost

    config, nodes = hospitals(tmp_path, CONFIG)
    grid = LossyGrid(nodes, lose=lose)
    if not fatal:
        assert len(states(grid, config)) == 2
        return
    with pytest.raises(RoundFailed):
        states(grid, config)
    tries = 2
    assert Counter(kind for kind, _ in grid.sent)[OFFER] == 5 * tries
    assert [charged(node)[0] for node in nodes] == [0 if stage == MASKED and n < lost else tries for n in range(5)]


@pytest.mark.parametrize("stage", [OFFER, OPEN, SHARE])
def test_one_who_keeps_silent_in_the_set_up_is_left_out_or_stops_it(tmp_path: Path, stage: str) -> None:
    config, nodes = hospitals(tmp_path, CONFIG)
    lose: Lose = lambda kind, node: kind == stage and node == 2  # noqa: E731
    if stage == SHARE:
        # It is in the session, and not active: one of five may drop out.
        found = states(LossyGrid(nodes, lose=lose), config)
        assert [record.devices for record in found[-1].history] == [4, 4]
        return
    with pytest.raises(RoundFailed, match="set-up: got 4 commits, expected at least 5"):
        states(LossyGrid(nodes, lose=lose), config)
    assert [charged(node) for node in nodes] == [(0, 0)] * 5


def test_an_answer_that_is_lost_counts_as_a_dropout_and_is_charged(tmp_path: Path) -> None:
    config, nodes = hospitals(tmp_path, CONFIG)
    grid = LossyGrid(nodes, lose=nothing_lost, lose_answer=lambda kind, node: (kind, node) == (MASKED, 4))
    found = states(grid, config)
    assert found[-1].history[0].devices == 4
    assert charged(nodes[4])[0] >= 1


def test_a_roster_is_cut_where_one_member_more_would_not_be_safe(tmp_path: Path) -> None:
    # Twelve of sixty may be corrupt: 19 members are enough, and 20, of whom one more may drop out, are not.
    config = RunConfig(rounds=1, min_devices=60, corrupt=0.2, dropout=0.2, epsilon=4.0)
    config, nodes = hospitals(tmp_path, config, rows=5)
    config = replace(config, min_devices=19)
    with pytest.raises(BadUsage, match="got 20 clients with 12 corrupt"):
        config.policy.parameters(clients=20, members=60)
    (state,) = states(LossyGrid(nodes[:20], lose=nothing_lost), config)
    assert state.history[0].devices == 19
