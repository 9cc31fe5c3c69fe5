"""Who is there, how fast and how reliably: by seed, by client, at any time; and what a sample of them may claim."""

import math
import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import expon, kstest, norm

from fedinfer.errors import BadInput, BadUsage
from fedinfer.privacy import Cyclic, FixedSize, Poisson, PrivacyPlan, insecure_seeded_noise
from fedinfer.privacy.samplers import Sampler
from fedinfer.simulation import (
    Always,
    LogNormalSeconds,
    OnOff,
    Periodic,
    PopulatedGrid,
    Population,
    RecordedTrace,
    SameSeconds,
    Wait,
    simulate,
)
from fedinfer.simulation.draws import uniform
from fedinfer.simulation.populated import POLL_S
from tests.simulation.test_simulate import CLIENTS, load, task_of

HOUR = 3600.0
TRACES = {
    "always": Always(),
    "periodic": Periodic(period_s=24 * HOUR, share=0.3, spread=0.5),
    "on and off": OnOff(mean_on_s=2 * HOUR, mean_off_s=6 * HOUR),
    "recorded": RecordedTrace(
        client=np.array([3, 1, 3, 7]),
        start_s=np.array([5 * HOUR, 0.0, 0.0, 9 * HOUR]),
        end_s=np.array([6 * HOUR, 50 * HOUR, 2 * HOUR, 9.5 * HOUR]),
    ),
}


@given(
    st.sampled_from(sorted(TRACES)),
    st.lists(st.integers(0, 10**6), min_size=1, max_size=8),
    st.floats(0.0, 1e6),
    st.integers(0, 2**40),
)
def test_a_client_is_there_until_it_goes(name: str, clients: list[int], at_s: float, seed: int) -> None:
    trace, every = TRACES[name], np.array(clients)
    stays = trace.stays_s(every, np.asarray(at_s), seed=seed)
    assert stays.shape == every.shape
    assert (stays >= 0.0).all()
    for client, left in zip(every, stays, strict=True):
        one = np.array([client])
        (alone,) = trace.stays_s(one, np.asarray(at_s), seed=seed)
        assert alone == left, "in whatever company it is asked for"
        if 0.0 < left < math.inf:
            (half,) = trace.stays_s(one, np.asarray(at_s + left / 2), seed=seed)
            assert half == pytest.approx(left / 2, rel=1e-6, abs=1e-3)
            (after,) = trace.stays_s(one, np.asarray(at_s + left + 1e-3), seed=seed)
            assert after == 0.0 or after > 1.0, "it has gone, and not for the blink of an eye that rounding makes"


@pytest.mark.parametrize("name", TRACES)
def test_each_client_may_be_asked_at_a_time_of_its_own(name: str) -> None:
    trace, clients = TRACES[name], np.array([3, 1, 3, 7, 0])
    times = np.array([1.0, 2.0, 5.5, 9.2, 30.0]) * HOUR
    each = [trace.stays_s(clients[[i]], times[[i]], seed=1)[0] for i in range(5)]
    assert trace.stays_s(clients, times, seed=1).tolist() == each


def test_draws_are_uniform_and_keys_and_seeds_are_apart() -> None:
    clients = np.arange(20_000)
    draws = [uniform(0, "a", clients), uniform(0, "b", clients), uniform(1, "a", clients), uniform(0, "a", clients, 1)]
    draws.append(uniform(0, "a", 0, clients))
    for draw in draws:
        # The seeds are fixed, so that this cannot fail by chance.
        assert kstest(draw, "uniform").pvalue > 1e-3
        assert 0.0 < draw.min() <= draw.max() < 1.0
    assert np.abs(np.corrcoef(draws) - np.eye(len(draws))).max() < 0.03
    assert abs(np.corrcoef(draws[0][1:], draws[0][:-1])[0, 1]) < 0.03


def test_a_periodic_client_is_there_at_its_own_hour_each_day() -> None:
    clients, day = np.arange(5000), 24 * HOUR
    trace = Periodic(period_s=day, share=0.25, spread=1.0)
    there = np.array([trace.stays_s(clients, np.asarray(at * HOUR), seed=0) > 0.0 for at in np.arange(0.5, 48.0)])
    assert (there[:24] == there[24:]).all()
    assert set(there[:24].sum(0)) == {6}
    assert np.abs(there.mean(1) - 0.25).max() < 0.03
    together = Periodic(period_s=day, share=0.25, spread=0.0)
    shares = [(together.stays_s(clients, np.asarray(at * HOUR), seed=0) > 0.0).mean() for at in (1, 5, 7, 23, 25)]
    assert shares == [1.0, 1.0, 0.0, 0.0, 1.0]


def test_a_markov_client_has_the_share_the_stays_and_the_memory_of_its_chain() -> None:
    clients, on_s, off_s = np.arange(20_000), 300.0, 900.0
    trace = OnOff(mean_on_s=on_s, mean_off_s=off_s)
    start = 1e6
    stays = trace.stays_s(clients, np.asarray(start), seed=4)
    there = stays > 0.0
    assert there.mean() == pytest.approx(0.25, abs=0.02)
    assert kstest(stays[there], expon(scale=on_s).cdf).pvalue > 1e-3
    # Covariance falls as exp(-t / on - t / off).
    for later_s in (50.0, 200.0, 800.0):
        later = trace.stays_s(clients, np.asarray(start + later_s), seed=4) > 0.0
        kept = np.corrcoef(there, later)[0, 1]
        assert kept == pytest.approx(math.exp(-later_s * (1 / on_s + 1 / off_s)), abs=0.03)


def test_a_recorded_trace_comes_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("client,start_s,end_s\n3,18000,21600\n1,0,180000\n3,0,7200.0\n7,32400,34200\n", encoding="utf-8")
    trace = RecordedTrace.read(path)
    clients = np.arange(9)
    for at_s in (0.0, 7199.0, 7200.0, 20_000.0, 33_000.0, 1e6):
        read, made = (one.stays_s(clients, np.asarray(at_s), seed=0) for one in (trace, TRACES["recorded"]))
        assert np.array_equal(read, made)
    assert trace.stays_s(clients, np.asarray(20_000.0), seed=0).nonzero()[0].tolist() == [1, 3]
    path.write_text("client,start_s,end_s\n", encoding="utf-8")
    assert not RecordedTrace.read(path).stays_s(clients, np.asarray(0.0), seed=0).any()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "first line"),
        ("client,start,end\n", "first line"),
        ("client,start_s,end_s\n1,2\n", "line 2"),
        ("client,start_s,end_s\n1,0,1\n1,x,9\n", "line 3"),
        ("client,start_s,end_s\n1,5,5\n", "does not end after"),
        ("client,start_s,end_s\n-1,5,6\n", "from 0 on"),
        ("client,start_s,end_s\n1,nan,6\n", "does not end after"),
        ("client,start_s,end_s\n1,0,6\n1,6,9\n", "overlap"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadInput, match=expected):
        RecordedTrace.read(path)


def test_speeds_are_log_normal() -> None:
    seconds = LogNormalSeconds(median_s=20.0, sigma=0.7).of(np.arange(20_000), seed=2)
    assert kstest(np.log(seconds / 20.0) / 0.7, norm.cdf).pvalue > 1e-3
    assert (SameSeconds(seconds=3.0).of(np.arange(3), seed=2) == 3.0).all()


def test_who_leaves_before_it_is_done_or_fails_has_not_answered() -> None:
    population = Population(
        availability=RecordedTrace(
            client=np.arange(3), start_s=np.zeros(3), end_s=np.array([math.nextafter(10.0, 11.0), 4.0, 9.0])
        ),
        seconds=SameSeconds(seconds=5.0),
    )
    answers = population.ask(np.arange(4), np.array([5.0, 2.0, 0.0, 0.0]), np.arange(4))
    assert answers.answered.tolist() == [True, False, True, False]
    assert answers.heard_s.tolist() == [10.0, 4.0, 5.0, 0.0]
    failing = Population(dropout=0.3, seed=1)
    fates = failing.ask(np.zeros(10_000, np.int64), np.zeros(10_000), np.arange(10_000)).answered
    assert fates.mean() == pytest.approx(0.7, abs=0.03)
    assert np.array_equal(fates, failing.ask(np.zeros(10_000, np.int64), np.zeros(10_000), np.arange(10_000)).answered)


@pytest.mark.parametrize("trace", [Periodic(share=0.3, spread=1.0), TRACES["on and off"]])
def test_a_million_clients_cost_nothing(trace: Periodic | OnOff) -> None:
    population = Population(availability=trace, seconds=LogNormalSeconds(median_s=10.0, sigma=1.0))
    assert len(pickle.dumps(population)) < 1000
    app, client = ServerApp(), answering()

    @app.main()
    def main(grid: PopulatedGrid, context: Context) -> None:
        nodes = list(grid.get_node_ids())
        assert 1e5 < len(nodes) < 5e5
        replies = list(grid.send_and_receive([Message(RecordDict(), node, "query") for node in nodes[:10]]))
        assert len(replies) == 10
        assert len(grid._contexts) == 10

    simulate(app, client, num_clients=1_000_000, population=population)


def answering() -> ClientApp:
    client = ClientApp()

    @client.query()
    def query(message: Message, context: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    return client


def test_a_stock_strategy_sees_who_is_there_and_waits_in_virtual_time() -> None:
    """Two clients of nine are there from the start, and five a minute later."""
    arrive = np.array([0.0, 0.0, 50.0, 50.0, 50.0, 1e9, 1e9, 1e9, 1e9])
    trace = RecordedTrace(client=np.arange(9), start_s=arrive, end_s=arrive + 1e6)
    task, app = task_of(), ServerApp()

    @app.main()
    def main(grid: PopulatedGrid, context: Context) -> None:
        assert list(grid.get_node_ids()) == [2, 3]
        (error,) = grid.send_and_receive([Message(RecordDict({"c": ConfigRecord()}), 9, "train")])
        assert error.error.code == ErrorCode.NODE_UNAVAILABLE
        assert grid.clock.now_s == 0.0
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=5, min_available_nodes=5)
        strategy.start(grid, ArrayRecord(task.model.state_dict()), num_rounds=2)
        context.state["end"] = ConfigRecord({"s": grid.clock.now_s})

    population = Population(availability=trace, seconds=SameSeconds(seconds=7.0))
    result = simulate(app, task.client_app(load), num_clients=CLIENTS, population=population)
    # The server waits once, and then for two rounds; client 4 of the five raises.
    assert result.context.state["end"]["s"] == POLL_S + 2 * 7.0
    assert result.updates == 2 * 4


AWAY = Population(availability=Periodic(share=0.5))


def plan_of(sampler: Sampler, adversary: str = "outsider", unit: str = "client") -> PrivacyPlan:
    return PrivacyPlan(
        unit=unit, clip_norm=1.0, noise_multiplier=2.0, sampler=sampler, delta=1e-5, steps=4, adversary=adversary
    )


@pytest.mark.parametrize(
    ("plan", "population", "refused"),
    [
        (plan_of(Poisson(rate=0.1)), AWAY, True),
        (plan_of(FixedSize(size=1, population=9)), AWAY, True),
        (plan_of(Poisson(rate=0.1), "server"), AWAY, False),
        (plan_of(Poisson(rate=1.0)), AWAY, False),
        (plan_of(Cyclic(period=3)), AWAY, False),
        (plan_of(Poisson(rate=0.1), unit="example"), AWAY, False),
        (plan_of(Poisson(rate=0.1)), Population(dropout=0.5, seconds=SameSeconds(seconds=9.0)), False),
    ],
)
def test_no_amplification_is_claimed_for_clients_that_are_not_always_there(
    plan: PrivacyPlan, population: Population, refused: bool
) -> None:
    app = ServerApp()

    @app.main()
    def main(grid: PopulatedGrid, context: Context) -> None: ...

    client_app = replace(task_of(), plan=plan).client_app(load)
    if refused:
        with pytest.raises(BadUsage, match="expected adversary='server' or a Cyclic sampler"):
            simulate(app, client_app, num_clients=CLIENTS, population=population)
    else:
        simulate(app, client_app, num_clients=CLIENTS, population=population)


def test_a_sample_of_those_who_are_there_takes_them_more_often_than_its_plan_says() -> None:
    """Why it is refused: a client that is there at a quiet hour is in nearly every round.

    A sampler that chooses from everybody, of whom the absent are then missing, never does that.
    """
    clients, rounds, sampler = 200, 2000, Poisson(rate=0.1)
    population = Population(availability=Periodic(share=0.05, spread=1.0))
    stream = insecure_seeded_noise("cohorts")
    honest, naive, seen = np.zeros(clients), np.zeros(clients), np.zeros(clients)
    for step in range(1, rounds + 1):
        there = population.there(np.arange(clients), step * 1000.0)
        seen += there
        chosen = sampler.choose(clients, step, stream)
        honest[chosen[there[chosen]]] += 1
        present = np.flatnonzero(there)
        # As many as the plan expects, of whom it can get.
        order = np.argsort(stream.uniform(len(present)))
        naive[present[order[: round(sampler.rate * clients)]]] += 1
    assert honest.sum() / seen.sum() == pytest.approx(sampler.rate, abs=0.02)
    assert honest.max() < sampler.rate * rounds / 2
    assert naive.sum() / seen.sum() > 0.9
    with pytest.raises(BadUsage, match="expected the public population of 200"):
        FixedSize(size=20, population=clients).choose(len(present), 1, stream)


def test_a_cohort_of_the_whole_population_loses_those_who_are_away() -> None:
    task, app = task_of(), ServerApp()
    sampler, stream = Poisson(rate=0.6), insecure_seeded_noise("grid")

    @app.main()
    def main(grid: PopulatedGrid, context: Context) -> None:
        content = RecordDict({"arrays": ArrayRecord(task.model.state_dict())})
        for step in range(1, 20):
            grid.clock.move_to(step * 5 * HOUR)
            there = set(grid.population.there(np.arange(CLIENTS), grid.clock.now_s).nonzero()[0].tolist())
            chosen = set(sampler.choose(CLIENTS, step, stream).tolist())
            total = grid.sum_of_updates(content, [grid.nodes[client] for client in chosen])
            # Client 4 raises.
            assert total.replies == len(chosen & there - {4})
            missing = {error.metadata.src_node_id - grid.nodes.start for error in total.errors}
            assert missing == (chosen - there) | (chosen & there & {4})

    simulate(app, task.client_app(load), num_clients=CLIENTS, population=AWAY)


def test_the_first_answers_are_refused_where_a_place_may_go_to_another() -> None:
    app = ServerApp()

    @app.main()
    def main(grid: PopulatedGrid, context: Context) -> None:
        grid.wait = Wait(timeout_s=5.0)
        if grid.plan == plan_of(Cyclic(period=3)):
            grid.wait = Wait(first=2)
            assert grid.wait.first == 2
            return
        with pytest.raises(BadUsage, match="place would go to another"):
            grid.wait = Wait(first=2)

    for plan in (plan_of(Poisson(rate=0.1), "server"), plan_of(Cyclic(period=3))):
        client_app = replace(task_of(), plan=plan).client_app(load)
        simulate(app, client_app, num_clients=CLIENTS, population=Population())


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Population, {"dropout": 1.0}),
        (Population, {"dropout": -0.1}),
        (Periodic, {"period_s": 0.0}),
        (Periodic, {"share": 0.0}),
        (Periodic, {"spread": 1.5}),
        (OnOff, {"mean_on_s": 0.0, "mean_off_s": 1.0}),
        (OnOff, {"mean_on_s": 1.0, "mean_off_s": math.inf}),
        (SameSeconds, {"seconds": 0.0}),
        (LogNormalSeconds, {"median_s": 1.0, "sigma": -1.0}),
        (LogNormalSeconds, {"median_s": math.nan, "sigma": 1.0}),
    ],
)
def test_a_population_that_cannot_be_is_refused(kind: type, fields: dict[str, float]) -> None:
    with pytest.raises(BadUsage, match="expected"):
        kind(**fields)


def test_the_examples_of_the_page_run(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "simulation.md").read_text(encoding="utf-8")
    # Those that stand alone, but for the thousand clients of the first.
    examples = [
        code
        for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        if "import torch" in code and "num_clients=1000, seed" not in code
    ]
    assert len(examples) == 2
    for code in examples:
        exec(code, {})
    assert "step 20 after" in capsys.readouterr().out
