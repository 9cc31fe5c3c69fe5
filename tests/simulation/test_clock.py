"""Rounds on the virtual clock: for whom a server waits, how long that takes, and what becomes of the late."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedinfer.errors import BadUsage
from fedinfer.simulation import LogNormalSeconds, PopulatedGrid, Population, Wait, simulate
from fedinfer.simulation.clock import VirtualClock
from tests.simulation.test_simulate import CLIENTS, load, task_of


@dataclass(frozen=True, kw_only=True)
class Given:
    """Client i takes `seconds[i]`."""

    seconds: tuple[float, ...]

    def of(self, clients: NDArray[np.int64], *, seed: int) -> NDArray[np.float64]:
        return np.array(self.seconds)[clients]


def counting() -> ClientApp:
    """Says how often this node was asked, this time included."""
    client = ClientApp()

    @client.query()
    def query(message: Message, context: Context) -> Message:
        record = context.state.config_records.setdefault("calls", ConfigRecord({"n": 0}))
        record["n"] = int(record["n"]) + 1
        return Message(RecordDict({"calls": ConfigRecord({"n": record["n"]})}), reply_to=message)

    return client


def on_grid(seconds: tuple[float, ...], do: Callable[[PopulatedGrid], None], *, backend: str = "vectorised") -> None:
    app, done = ServerApp(), []

    @app.main()
    def main(grid: PopulatedGrid, context: Context) -> None:
        do(grid)
        done.append(True)

    population = Population(seconds=Given(seconds=seconds))
    simulate(app, counting(), num_clients=len(seconds), population=population, backend=backend, workers=1)
    assert done


def asked(grid: PopulatedGrid, *clients: int) -> list[Message]:
    return [Message(RecordDict(), grid.nodes[client], "query") for client in clients]


def came(grid: PopulatedGrid, replies: list[Message]) -> list[tuple[int, int]]:
    """Who answered, in the order of the answers, and what."""
    return [(reply.metadata.src_node_id - grid.nodes.start, reply.content["calls"]["n"]) for reply in replies]


@given(
    # Times often come together.
    st.lists(st.tuples(st.sampled_from([0.0, 1.0, 2.5]) | st.floats(0.0, 1e3), st.booleans()), max_size=12),
    st.one_of(st.none(), st.floats(0.0, 1e3)),
    st.one_of(st.none(), st.integers(1, 14)),
)
def test_a_round_lasts_until_enough_have_answered_all_are_heard_of_or_the_time_is_up(
    fates: list[tuple[float, bool]], timeout_s: float | None, first: int | None
) -> None:
    heard_s, answered = np.array([at for at, _ in fates]), np.array([yes for _, yes in fates], np.bool_)
    lasts_s, in_time = Wait(timeout_s=timeout_s, first=first).closes(heard_s, answered)
    ends = [max(heard_s, default=0.0)]
    if timeout_s is not None:
        ends.append(timeout_s)
    if first is not None and answered.sum() >= first:
        ends.append(sorted(heard_s[answered])[first - 1])
    assert lasts_s == min(ends)
    assert (heard_s[in_time] <= lasts_s).all()
    taken = in_time & answered
    assert taken.sum() == min(first or math.inf, (answered & (heard_s <= lasts_s)).sum())
    if taken.any():
        assert heard_s[answered & ~in_time].min(initial=math.inf) >= heard_s[taken].max(), "nobody is passed over"
    assert (in_time | answered)[heard_s <= lasts_s].all()


def test_a_server_that_waits_for_all_waits_for_the_slowest() -> None:
    def do(grid: PopulatedGrid) -> None:
        replies = grid.send_and_receive(asked(grid, 0, 1, 2))
        assert came(grid, replies) == [(1, 1), (2, 1), (0, 1)]
        assert grid.clock.now_s == 9.0
        grid.send_and_receive(asked(grid, 1))
        assert grid.clock.now_s == 10.0
        assert grid.send_and_receive([]) == []

    on_grid((9.0, 1.0, 4.0), do)


def test_who_is_late_has_worked_for_nothing_and_is_busy_meanwhile() -> None:
    def do(grid: PopulatedGrid) -> None:
        assert came(grid, grid.send_and_receive(asked(grid, 0, 1), timeout=3.0)) == [(1, 1)]
        assert grid.clock.now_s == 3.0
        # Client 0 is busy until 9 and then works until 18; what it did for the first round is in its state.
        assert came(grid, grid.send_and_receive(asked(grid, 0, 1))) == [(1, 2), (0, 2)]
        assert grid.clock.now_s == 18.0
        assert not grid._replies
        assert not grid._trips

    on_grid((9.0, 1.0), do)


@pytest.mark.long
def test_a_node_that_was_asked_twice_does_one_thing_after_the_other_in_processes_too() -> None:
    def do(grid: PopulatedGrid) -> None:
        grid.send_and_receive(asked(grid, 0, 1), timeout=3.0)
        assert came(grid, grid.send_and_receive(asked(grid, 0, 1))) == [(1, 2), (0, 2)]

    on_grid((9.0, 1.0), do, backend="process")


def test_of_more_than_enough_the_first_are_taken() -> None:
    def do(grid: PopulatedGrid) -> None:
        grid.wait = Wait(first=2)
        assert came(grid, grid.send_and_receive(asked(grid, 0, 1, 2, 3))) == [(3, 1), (1, 1)]
        assert grid.clock.now_s == 4.0
        grid.wait = Wait(first=2, timeout_s=0.5)
        assert came(grid, grid.send_and_receive(asked(grid, 3, 1))) == []
        grid.wait = Wait(first=3)
        # Node 2 is idle, and its answer comes together with nobody's.
        assert came(grid, grid.send_and_receive(asked(grid, 2, 3), timeout=2.0)) == [(3, 3)]

    on_grid((9.0, 4.0, 5.0, 1.0), do)


def test_a_server_that_pulls_waits_for_the_next_answer() -> None:
    def do(grid: PopulatedGrid) -> None:
        ids = list(grid.push_messages(asked(grid, 0, 1, 2, 1)))
        assert grid.clock.now_s == 0.0
        seen = []
        while replies := list(grid.pull_messages(ids)):
            seen.append((grid.clock.now_s, came(grid, replies)))
        # Client 1 has two things to do.
        assert seen == [(1.0, [(1, 1)]), (2.0, [(1, 2)]), (4.0, [(0, 1), (2, 1)])]
        assert list(grid.pull_messages(ids)) == []

    on_grid((4.0, 1.0, 4.0), do)


def test_a_sum_is_over_those_in_time_and_the_late_have_made_their_releases() -> None:
    task, app = task_of(private=True), ServerApp()
    seconds = Given(seconds=(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 7.0, 7.0, 7.0))

    @app.main()
    def main(grid: PopulatedGrid, context: Context) -> None:
        content = RecordDict({"arrays": ArrayRecord(task.model.state_dict())})
        grid.wait = Wait(timeout_s=2.0)
        total = grid.sum_of_updates(content, grid.nodes)
        # Client 4 raises, and that is heard of in time.
        assert (total.replies, len(total.errors), grid.clock.now_s) == (5, 1, 2.0)
        grid.clock.move_to(100.0)
        grid.wait = Wait()
        # A plan of four releases pays for two rounds, and the late were in two by now.
        assert grid.sum_of_updates(content, grid.nodes).replies == 8
        assert grid.sum_of_updates(content, grid.nodes).replies == 0

    simulate(app, task.client_app(load), num_clients=CLIENTS, seed=0, population=Population(seconds=seconds))


def test_sum_and_replies_are_the_same() -> None:
    task, app = task_of(), ServerApp()
    sums, means = [], []

    @app.main()
    def main(grid: PopulatedGrid, context: Context) -> None:
        content = RecordDict({"arrays": ArrayRecord(task.model.state_dict())})
        grid.wait = Wait(first=4)
        for _ in range(3):
            if context.run_config["sum"]:
                sums.append(grid.sum_of_updates(content, grid.nodes).update)
                continue
            replies = grid.send_and_receive([Message(content, node, "train") for node in grid.nodes])
            good = [reply.content for reply in replies if reply.has_content()]
            means.append(
                {
                    name: sum(
                        own["metrics"]["num-examples"] * (own["arrays"][name].numpy() - start.numpy()) for own in good
                    )
                    for name, start in content["arrays"].items()
                }
            )

    for summed in (True, False):
        simulate(
            app,
            task.client_app(load),
            num_clients=CLIENTS,
            seed=0,
            run_config={"sum": summed},
            population=Population(seconds=LogNormalSeconds(median_s=5.0, sigma=1.0), dropout=0.2, seed=3),
        )
    assert len(sums) == len(means) == 3
    for one, other in zip(sums, means, strict=True):
        assert all(np.allclose(one[name], other[name], rtol=1e-4, atol=1e-5) for name in one)


def test_a_seed_repeats_the_clock() -> None:
    times = []

    def do(grid: PopulatedGrid) -> None:
        for _ in range(5):
            grid.send_and_receive([Message(RecordDict(), node, "query") for node in grid.nodes])
            times.append(grid.clock.now_s)

    for seed in (0, 0, 1):
        app = ServerApp()
        app.main()(lambda grid, context: do(grid))
        seconds = LogNormalSeconds(median_s=5.0, sigma=1.0)
        simulate(app, counting(), num_clients=20, population=Population(seconds=seconds, dropout=0.3, seed=seed))
    assert times[:5] == times[5:10]
    assert times[10:] != times[:5]


def test_time_never_goes_back_and_always_comes() -> None:
    clock = VirtualClock()
    clock.move_to(5.0)
    clock.move_to(3.0)
    assert clock.now_s == 5.0
    with pytest.raises(BadUsage, match="expected a time that comes"):
        clock.move_to(math.inf)


@pytest.mark.parametrize("fields", [{"timeout_s": -1.0}, {"timeout_s": math.nan}, {"first": 0}, {"first": 1.5}])
def test_a_wait_that_cannot_be_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(BadUsage, match="expected"):
        Wait(**fields)
