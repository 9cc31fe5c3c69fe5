"""The ledger: no release that is not charged, no charge that is lost, whatever is killed and whenever."""

import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from fedinfer.cli.books import verify_ledger
from fedinfer.errors import BadUsage, BudgetExceeded, LedgerError
from fedinfer.privacy import Poisson, PrivacyLedger, PrivacyPlan
from fedinfer.privacy.filters import FilterName
from tests.privacy.charges import Light

PLAN = Light(steps=4, epsilon_=1.25, delta=1e-6)
OTHER = Light(steps=4, epsilon_=1.25, delta=1e-6, mu=0.2)
LONG = Light(steps=10**9)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "hospital.ledger"


def created(path: Path, epsilon: float = 100.0, delta: float = 1e-3) -> PrivacyLedger:
    return PrivacyLedger.create(path, epsilon=epsilon, delta=delta)


def test_a_plan_is_charged_whole_at_its_first_release(path: Path) -> None:
    with created(path) as ledger:
        first = ledger.reserve(run="a", round=1, plan=PLAN)
        assert (first.round, first.attempt) == (1, 1)
        (run,) = ledger.summary().runs
        assert (run.epsilon, run.delta, run.reserved, run.committed) == (PLAN.epsilon(), PLAN.delta, 1, 0)
        ledger.commit(first)
        ledger.commit(ledger.reserve(run="a", round=2, plan=PLAN))
        (run,) = ledger.summary().runs
        assert (run.epsilon, run.reserved, run.committed) == (PLAN.epsilon(), 2, 2)
    with PrivacyLedger.open(path) as again:
        assert again.summary().spent_epsilon == PLAN.epsilon()
        assert again.verify() == 6


def test_a_repeated_round_is_one_more_release_until_the_steps_are_used_up(path: Path) -> None:
    with created(path) as ledger:
        attempts = [ledger.reserve(run="a", round=1, plan=PLAN).attempt for _ in range(PLAN.steps)]
        assert attempts == [1, 2, 3, 4]
        with pytest.raises(BudgetExceeded, match="got 4 releases of 4 planned"):
            ledger.reserve(run="a", round=2, plan=PLAN)
        assert ledger.summary().runs[0].reserved == PLAN.steps


@pytest.mark.parametrize(("epsilon", "delta"), [(PLAN.epsilon() * 0.999, 1.0 - 1e-9), (100.0, PLAN.delta * 0.999)])
def test_a_plan_over_the_budget_writes_nothing(epsilon: float, delta: float, path: Path) -> None:
    with created(path, epsilon, delta) as ledger:
        entries = ledger.verify()
        with pytest.raises(BudgetExceeded, match="nothing was released or spent"):
            ledger.reserve(run="a", round=1, plan=PLAN)
        with pytest.raises(BudgetExceeded):
            ledger.check(run="a", plan=PLAN)
        assert ledger.verify() == entries


def test_a_check_sees_what_is_left_of_a_run_and_writes_nothing(path: Path) -> None:
    with created(path) as ledger:
        ledger.check(run="a", plan=PLAN, releases=PLAN.steps)
        with pytest.raises(BudgetExceeded, match="got 4 releases left of 4"):
            ledger.check(run="a", plan=PLAN, releases=PLAN.steps + 1)
        ledger.reserve(run="a", round=1, plan=PLAN)
        entries = ledger.verify()
        ledger.check(run="a", plan=PLAN, releases=3)
        with pytest.raises(BudgetExceeded, match="got 3 releases left of 4"):
            ledger.check(run="a", plan=PLAN, releases=4)
        with pytest.raises(LedgerError, match="got another plan than the one charged"):
            ledger.check(run="a", plan=OTHER)
        assert ledger.verify() == entries


def test_runs_add_up_to_the_budget_and_no_further(path: Path) -> None:
    with created(path, epsilon=3 * PLAN.epsilon(), delta=1e-3) as ledger:
        for run in ("a", "b", "c"):
            ledger.reserve(run=run, round=1, plan=PLAN)
        with pytest.raises(BudgetExceeded):
            ledger.reserve(run="d", round=1, plan=PLAN)
        assert ledger.summary().spent_epsilon == pytest.approx(3 * PLAN.epsilon())


def test_a_run_cannot_change_its_plan(path: Path) -> None:
    with created(path) as ledger:
        ledger.reserve(run="a", round=1, plan=PLAN)
        with pytest.raises(LedgerError, match="got another plan than the one charged"):
            ledger.reserve(run="a", round=2, plan=OTHER)


def test_a_release_is_committed_once_and_only_if_it_was_reserved(path: Path) -> None:
    with created(path) as ledger:
        reservation = ledger.reserve(run="a", round=1, plan=PLAN)
        ledger.commit(reservation)
        with pytest.raises(LedgerError, match="there already"):
            ledger.commit(reservation)
        with (
            PrivacyLedger.scratch(epsilon=1.0, delta=1e-5) as other,
            pytest.raises(LedgerError, match="never reserved"),
        ):
            other.commit(reservation)


def test_a_budget_is_set_once_and_an_old_journal_is_not_replayed(path: Path) -> None:
    created(path).close()
    with pytest.raises(LedgerError, match="got an existing file"):
        created(path)
    path.unlink()
    Path(f"{path}-wal").write_bytes(b"old")
    with pytest.raises(LedgerError, match="of a ledger that was removed"):
        created(path)
    assert not path.exists()


def test_of_several_that_make_a_ledger_at_once_one_does(path: Path) -> None:
    def make(number: int) -> str | None:
        try:
            with created(path, epsilon=1.0 + number) as ledger:
                return ledger.summary().enrolment
        except LedgerError:
            return None

    with ThreadPoolExecutor(6) as pool:
        made = [enrolment for enrolment in pool.map(make, range(12)) if enrolment is not None]
    with PrivacyLedger.open(path) as ledger:
        assert made == [ledger.summary().enrolment]
        ledger.reserve(run="a", round=1, plan=LONG)
    assert {name.name for name in path.parent.iterdir()} <= {
        path.name + suffix for suffix in ("", ".key", "-wal", "-shm")
    }


@pytest.mark.parametrize(
    ("epsilon", "delta"), [(0.0, 1e-5), (-1.0, 1e-5), (float("inf"), 1e-5), (1.0, 0.0), (1.0, 1.0)]
)
def test_a_budget_that_cannot_be_is_refused(epsilon: float, delta: float, path: Path) -> None:
    with pytest.raises(BadUsage):
        created(path, epsilon, delta)
    assert not path.exists()


def test_enrolment_ids_are_random(tmp_path: Path) -> None:
    ids = {created(tmp_path / str(i)).summary().enrolment for i in range(8)}
    assert len(ids) == 8


@pytest.mark.parametrize("content", [b"", b"text", b"SQLite format 3\0" + bytes(100)])
def test_a_file_that_is_no_ledger_is_refused(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(LedgerError):
        PrivacyLedger.open(path)


def test_another_database_is_refused(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE entries (x)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="another kind or format"):
        PrivacyLedger.open(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE entries SET body = replace(body, '100.0', '900.0') WHERE kind = 'enrol'",
        "DELETE FROM entries WHERE number = 3",
        "UPDATE entries SET number = number + 10 WHERE number > 3",
        "UPDATE entries SET round = 7 WHERE kind = 'reserve'",
    ],
)
def test_verify_finds_a_changed_or_removed_entry(change: str, path: Path) -> None:
    with created(path) as ledger:
        ledger.commit(ledger.reserve(run="a", round=1, plan=PLAN))
        assert ledger.verify() == 4
    connection = sqlite3.connect(path)
    assert connection.execute(change).rowcount > 0
    connection.commit()
    connection.close()
    with pytest.raises(LedgerError, match="was changed, removed or put in later"):
        PrivacyLedger.open(path)


def _spend(path: Path, name: str, count: int) -> None:
    with PrivacyLedger.open(path) as ledger:
        for round in range(count):
            ledger.commit(ledger.reserve(run=name, round=round, plan=LONG))


def _check_spent(path: Path) -> None:
    with PrivacyLedger.open(path) as ledger:
        runs = {run.run: run for run in ledger.summary().runs}
        assert (runs["a"].reserved, runs["b"].reserved) == (32, 16)
        assert (runs["a"].committed, runs["b"].committed) == (32, 16)
        assert ledger.verify() == 1 + 2 + 96


@pytest.mark.parametrize("with_head", [False, True])
def test_several_processes_at_once_lose_no_charge(with_head: bool, path: Path) -> None:
    PrivacyLedger.create(path, epsilon=100.0, delta=1e-3, head=path.with_suffix(".head") if with_head else None).close()
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_spend, args=(path, name, 16)) for name in ("a", "b", "a")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    _check_spent(path)


@pytest.mark.parametrize("with_head", [False, True])
def test_several_threads_each_with_an_object_lose_no_charge(with_head: bool, path: Path) -> None:
    PrivacyLedger.create(path, epsilon=100.0, delta=1e-3, head=path.with_suffix(".head") if with_head else None).close()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda name: _spend(path, name, 16), ("a", "b", "a")))
    _check_spent(path)


def test_the_last_of_a_budget_goes_to_one_of_many(path: Path) -> None:
    PrivacyLedger.create(path, epsilon=0.3, delta=1e-3).close()

    def ask(run: int) -> bool:
        with PrivacyLedger.open(path) as ledger:
            try:
                ledger.reserve(run=str(run), round=1, plan=Light(epsilon_=0.1))
            except BudgetExceeded:
                return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(ask, range(12))) == 3
    with PrivacyLedger.open(path) as ledger:
        assert ledger.summary().spent_epsilon == 0.3


def test_kill_9_at_any_moment_leaves_every_release_charged(path: Path) -> None:
    # `test_ledger_faults.py` kills at chosen steps; here the kill falls anywhere, within a write too.
    created(path).close()
    generator = random.Random(11)
    released = 0
    for _ in range(25):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            with PrivacyLedger.open(path) as ledger:
                for round in range(1000):
                    reservation = ledger.reserve(run="a", round=round, plan=LONG)
                    os.write(writer, b"r")
                    ledger.commit(reservation)
            os._exit(0)
        os.close(writer)
        told = os.read(reader, generator.randint(1, 4))
        for _ in range(generator.randrange(20_000)):
            pass
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while more := os.read(reader, 4096):
            told += more
        os.close(reader)
        released += len(told)
        with PrivacyLedger.open(path) as ledger:
            (run,) = ledger.summary().runs
            ledger.verify()
        assert run.committed <= released <= run.reserved
    assert released >= 25


def test_an_attempt_by_its_number_is_reserved_once(path: Path) -> None:
    with created(path) as ledger:
        first = ledger.reserve(run="a", round=1, plan=PLAN, attempt=1)
        assert (first.attempt, first.repeated) == (1, False)
        entries = ledger.verify()
        again = ledger.reserve(run="a", round=1, plan=PLAN, attempt=1)
        assert (again.attempt, again.repeated) == (1, True)
        assert ledger.verify() == entries
        second = ledger.reserve(run="a", round=1, plan=PLAN)
        assert (second.attempt, second.repeated) == (2, False)
        ledger.commit(again)
        ledger.commit(again)
        assert ledger.verify() == entries + 2
        assert ledger.summary().runs[0].committed == 1


@pytest.mark.parametrize("taken", [0, 2])
def test_no_attempt_may_be_left_out(taken: int, path: Path) -> None:
    with created(path) as ledger:
        for _ in range(taken):
            ledger.reserve(run="a", round=1, plan=PLAN)
        entries = ledger.verify()
        with pytest.raises(LedgerError, match=f"got attempt {taken + 2}, expected {taken + 1}"):
            ledger.reserve(run="a", round=1, plan=PLAN, attempt=taken + 2)
        with pytest.raises(BadUsage, match="attempt: got 0"):
            ledger.reserve(run="a", round=1, plan=PLAN, attempt=0)
        assert ledger.verify() == entries


def test_a_repeated_attempt_still_needs_its_plan_and_comes_back_when_all_is_spent(path: Path) -> None:
    with created(path, epsilon=1.25) as ledger:
        for round in range(PLAN.steps):
            ledger.reserve(run="a", round=round, plan=PLAN, attempt=1)
        assert ledger.reserve(run="a", round=2, plan=PLAN, attempt=1).repeated
        with pytest.raises(LedgerError, match="got another plan"):
            ledger.reserve(run="a", round=2, plan=OTHER, attempt=1)
        with pytest.raises(BudgetExceeded):
            ledger.reserve(run="a", round=2, plan=PLAN, attempt=2)


class Count(Light):
    """A single noised count."""

    def to_json(self) -> dict[str, object]:
        return {"mechanism": "discrete Laplace"}


class Votes(Light):
    """A release that says its kind."""

    def to_json(self) -> dict[str, object]:
        return {"kind": "votes"}


def test_a_single_release_of_any_kind_is_a_charge_of_one_step(path: Path) -> None:
    with created(path) as ledger:
        for run, release in (("metrics/2026-11", Light(steps=1)), ("counts/1", Count(steps=1)), ("v", Votes(steps=1))):
            ledger.commit(ledger.reserve(run=run, round=1, plan=release))
            with pytest.raises(BudgetExceeded, match="1 releases of 1 planned"):
                ledger.reserve(run=run, round=2, plan=release)
        assert [run.kind for run in ledger.summary().runs] == ["Light", "Count", "votes"]


@pytest.mark.parametrize("change", [{"unit": "client"}, {"relation": "replace one"}])
def test_charges_for_other_neighbours_do_not_add_up(change: dict[str, str], path: Path) -> None:
    with created(path) as ledger:
        ledger.reserve(run="silent", round=1, plan=Count())
        ledger.reserve(run="a", round=1, plan=PLAN)
        ledger.reserve(run="b", round=1, plan=replace(PLAN, relation="add or remove one, slots fixed"))
        entries = ledger.verify()
        with pytest.raises(LedgerError, match="the ε of different neighbours do not add up"):
            ledger.reserve(run="c", round=1, plan=replace(PLAN, **change))
        with pytest.raises(LedgerError, match="do not add up"):
            ledger.check(run="c", plan=replace(PLAN, **change))
        assert ledger.verify() == entries


@pytest.mark.parametrize("name", ["basic", "renyi", "gdp"])
def test_a_ledger_keeps_the_filter_that_it_was_made_with(name: FilterName, path: Path) -> None:
    small = Light(epsilon_=0.4, delta=1e-8, mu=0.1)
    PrivacyLedger.create(path, epsilon=1.0, delta=1e-5, filter=name).close()
    most = {"basic": 2, "renyi": 6, "gdp": 7}[name]
    with PrivacyLedger.open(path) as ledger:
        for run in range(most):
            ledger.reserve(run=str(run), round=1, plan=small)
        with pytest.raises(BudgetExceeded):
            ledger.reserve(run=str(most), round=1, plan=small)
    with PrivacyLedger.open(path) as ledger:
        summary = ledger.summary()
        assert (summary.filter["name"], len(summary.runs)) == (name, most)
        assert 0.7 < summary.spent_epsilon <= 1.0
        assert summary.spent_delta <= 1e-5
        ledger.verify()


def test_plans_of_this_version_are_charges(path: Path) -> None:
    plan = PrivacyPlan(clip_norm=1.0, noise_multiplier=4.0, sampler=Poisson(rate=0.5), delta=1e-6, steps=4)
    whole = PrivacyPlan(clip_norm=1.0, noise_multiplier=20.0, sampler=Poisson(rate=1.0), delta=1e-6, steps=4)
    PrivacyLedger.create(path, epsilon=4.0, delta=1e-5, filter="gdp").close()
    with PrivacyLedger.open(path) as ledger:
        ledger.reserve(run="a", round=1, plan=whole)
        with pytest.raises(BudgetExceeded, match="no Gaussian mechanism"):
            ledger.reserve(run="b", round=1, plan=plan)
    with PrivacyLedger.create(path.with_name("r"), epsilon=4.0, delta=1e-5, filter="renyi") as ledger:
        ledger.reserve(run="a", round=1, plan=plan)
        assert 0.0 < ledger.summary().spent_epsilon < 4.0


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True])
def test_steps_that_cannot_be_are_refused(wrong: object, path: Path) -> None:
    with created(path) as ledger, pytest.raises(LedgerError, match="steps: got"):
        ledger.reserve(run="a", round=1, plan=replace(PLAN, steps=wrong))  # type: ignore[arg-type]


def test_an_open_ledger_sees_what_others_add(path: Path) -> None:
    with created(path) as one, PrivacyLedger.open(path) as other:
        one.reserve(run="a", round=1, plan=PLAN)
        assert other.reserve(run="a", round=1, plan=PLAN).attempt == 2
        assert one.summary().runs[0].reserved == 2
        assert one.verify() == other.verify() == 4


TAKE_OVER = """
import sqlite3, sys
try:
    print(sqlite3.connect(sys.argv[1], timeout=0).execute("PRAGMA journal_mode = DELETE").fetchone()[0])
except sqlite3.OperationalError as error:
    print(error)
"""


def test_opening_a_ledger_again_leaves_the_locks_of_the_first(path: Path) -> None:
    # POSIX takes all locks of a process from a file when it closes any descriptor of it, and then another process
    # believes that it is alone.
    with created(path) as ledger:
        ledger.reserve(run="a", round=1, plan=PLAN)
        PrivacyLedger.open(path).close()
        verify_ledger(path, head=None, public_key=None, as_json=True)
        done = subprocess.run([sys.executable, "-c", TAKE_OVER, str(path)], capture_output=True, text=True, check=True)
        assert done.stdout.strip() in ("wal", "database is locked")
        ledger.reserve(run="a", round=2, plan=PLAN)
        assert ledger.verify() == 4


def test_a_long_ledger_opens_quickly(path: Path) -> None:
    with created(path) as ledger:
        for round in range(150):
            ledger.commit(ledger.reserve(run="a", round=round, plan=LONG))
    start = time.perf_counter()
    with PrivacyLedger.open(path):
        pass
    # About 5 ms on a quiet machine; a decision that reads the table again for each entry would take seconds.
    assert time.perf_counter() - start < 1.0


LIGHT = """
import sys
from pathlib import Path
from fedinfer.privacy.ledger import PrivacyLedger
from fedinfer.cli.books import show_ledger
show_ledger(Path(sys.argv[1]), as_json=True)
heavy = {"torch", "dp_accounting", "scipy", "flwr", "opacus", "tenseal"} & set(sys.modules)
sys.exit(f"loaded {sorted(heavy)}" if heavy else 0)
"""


def test_a_ledger_opens_and_is_shown_without_torch_or_the_accountant(path: Path) -> None:
    created(path).close()
    done = subprocess.run([sys.executable, "-c", LIGHT, str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    command = [sys.executable, "-X", "importtime", "-m", "fedinfer.cli", "ledger", "show", str(path)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in shown.stderr.splitlines()}
    assert "sqlite3" in loaded
    assert not loaded & {"torch", "dp_accounting", "scipy"}
