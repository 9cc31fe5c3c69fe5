"""The demo's table: what each of its methods is, who is compared with whom, and the processes that train them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedinfer.cli.evaluation import ALL, Evaluation
from fedinfer.cli.methods import PRIVATE, Method, Sums, Trained, Way, methods, plan_of, splits, train
from fedinfer.models import build
from fedinfer.privacy import DistributedPlan, PrivacyPlan
from fedinfer.settings import RunConfig
from fedinfer.sums.rounds import SecureSum, SecureSums, SumTask

ROUNDS = 2


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[SecureSum]:
    """The secure sums that the server took, as they come."""
    taken: list[SecureSum] = []
    total = SecureSums.total

    def noted(self: SecureSums, task: SumTask) -> SecureSum:
        taken.append(total(self, task))
        return taken[-1]

    monkeypatch.setattr(SecureSums, "total", noted)
    return taken


def test_together_goes_through_secure_sums_and_nothing_else_does(tmp_path: Path, sums: list[SecureSum]) -> None:
    split = next(splits([0], tmp_path))
    method = Method(way="together", epsilon=2.0)
    (trained,) = train(method, method.federations(split), ROUNDS)
    assert [(one.survivors, one.members) for one in sums] == [(4, 4)] * ROUNDS
    assert trained.sums == Sums(members=4, min_honest=3, colluders=1, bits=24, overshoot=4 / 3, count=ROUNDS)
    assert trained.trajectory.shape == (ROUNDS + 1, len(trained.trajectory[0]))
    sums.clear()
    for other in methods([2.0]):
        if other != method:
            found = train(other, other.federations(split), ROUNDS)
            assert len(found) == (4 if other.way == "alone" else 1)
            assert [one.sums for one in found] == [None] * len(found)
    assert sums == []


def test_ways_to_an_epsilon_differ_in_who_holds_rows_and_noise_alone() -> None:
    together, apart, pooled = (plan_of(Method(way=way, epsilon=1.0), rounds=40) for way in PRIVATE)
    assert isinstance(together, DistributedPlan)
    assert isinstance(apart, PrivacyPlan)
    assert isinstance(pooled, PrivacyPlan)
    for plan in (together, apart, pooled):
        assert (plan.steps, plan.delta, plan.clip_norm, plan.sampling_rate) == (42, 1e-5, 1.0, 0.5)
        assert 0.9998 <= plan.epsilon() <= 1.0
    assert together.divisor == pooled.divisor == 4 * apart.divisor
    # What a sum of three shares has is what the one party adds, but for rounding.
    assert pooled.noise_multiplier <= together.noise_multiplier <= 1.01 * pooled.noise_multiplier
    assert apart.noise_multiplier == pooled.noise_multiplier


def test_together_is_compared_split_by_split_with_the_other_ways(tmp_path: Path) -> None:
    table = Evaluation(seeds=[0], methods=methods([4.0, 1.0]), rounds=1)
    size = sum(weights.numel() for weights in build(RunConfig().spec).state_dict().values())
    generator = np.random.default_rng(0)
    for number, split in enumerate(splits([0], tmp_path)):
        for method in table.methods:
            trained = [
                Trained(trajectory=generator.normal(size=(2, size)).astype(np.float32), sums=None)
                for _ in method.federations(split)
            ]
            table.score(method, number, split.test, trained)
    pairs = {(pair["method"], pair["against"]): pair for pair in table.to_json()["paired"] if pair["site"] == ALL}
    same = {(f"together{epsilon}", f"{way}{epsilon}") for way in ("apart", "pooled") for epsilon in (4, 1)}
    assert set(pairs) == same | {(method.key, "alone") for method in table.methods if method.way != "alone"}
    for (method_key, against), pair in pairs.items():
        differences = np.subtract(table.aucs(method_key, ALL), table.aucs(against, ALL))
        assert pair["difference"] == pytest.approx(differences.mean())
        assert pair["standard_error"] == pytest.approx(differences.std(ddof=1) / 2)
        assert pair["low"] < pair["difference"] - pair["standard_error"]


@pytest.mark.parametrize("way", PRIVATE)
def test_who_an_epsilon_holds_against_is_said_for_the_ways_of_the_table(way: Way, tmp_path: Path) -> None:
    method = Method(way=way, epsilon=8.0)
    table = Evaluation(seeds=[0], methods=[method], rounds=1)
    for number, split in enumerate(splits([0], tmp_path)):
        if number == 0:
            trained = train(method, method.federations(split), 1)
        table.score(method, number, split.test, trained)
    (promise,) = table.to_json()["against"]
    words = {
        "together": "with 1 of the 4 hospitals: the noise of 3 is counted on, and a sum had at most 1.33 times",
        "apart": "all other hospitals together",
        "pooled": "that party holds all rows",
    }
    assert words[way] in promise["text"]
    assert (table.to_json()["secure_sums"] is not None) == (way == "together")


PARENT = """
import os, signal, time
from fedinfer.cli.workers import without_interrupts, workers

if __name__ == "__main__":
    came = []
    signal.signal(signal.SIGINT, lambda *_: came.append(True))
    with workers() as pool:
        with without_interrupts():
            worker = pool.submit(os.getpid)
            os.killpg(0, signal.SIGINT)
            assert not came
        worker = worker.result()
        os.killpg(0, signal.SIGINT)
        assert pool.submit(abs, -7).result() == 7
        print(worker, len(came), flush=True)
        time.sleep(60)
"""


def test_workers_do_not_mind_ctrl_c_and_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    ) as parent:
        assert parent.stdout is not None
        worker, interrupts = map(int, parent.stdout.readline().split())
        assert interrupts == 2
        parent.send_signal(signal.SIGKILL)
        try:
            # It ends when everybody who could write to it has ended.
            _, said = parent.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            os.kill(worker, signal.SIGKILL)
            raise
    assert "Traceback" not in said
