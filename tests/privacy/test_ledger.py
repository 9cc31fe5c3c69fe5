"""The ledger: no release that is not charged, no charge that is lost, whatever is killed and whenever."""

import multiprocessing
import os
import random
import signal
import sqlite3
from pathlib import Path

import pytest

from fedinfer.errors import BadUsage, BudgetExceeded, LedgerError
from fedinfer.privacy import Poisson, PrivacyLedger, PrivacyPlan

PLAN = PrivacyPlan(clip_norm=1.0, noise_multiplier=4.0, sampler=Poisson(rate=0.5), delta=1e-6, steps=4, divisor=10.0)
OTHER = PrivacyPlan(clip_norm=2.0, noise_multiplier=4.0, sampler=Poisson(rate=0.5), delta=1e-6, steps=4, divisor=10.0)


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
    with pytest.raises(LedgerError, match="another kind or format"):
        PrivacyLedger.open(path)


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
    with PrivacyLedger.open(path) as ledger, pytest.raises(LedgerError, match="was changed, removed or put in later"):
        ledger.verify()


def _spend(path: Path, name: str, count: int) -> None:
    with PrivacyLedger.open(path) as ledger:
        for round in range(count):
            ledger.commit(ledger.reserve(run=name, round=round, plan=_Long()))


class _Long:
    """A charge that costs nothing to compute, of many steps."""

    steps = 1000
    delta = 1e-9

    def epsilon(self) -> float:
        return 0.1

    def digest(self) -> str:
        return "long"

    def to_json(self) -> dict[str, object]:
        return {}


def test_two_processes_at_once_lose_no_charge(path: Path) -> None:
    created(path).close()
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_spend, args=(path, name, 40)) for name in ("a", "b", "a")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    with PrivacyLedger.open(path) as ledger:
        runs = {run.run: run for run in ledger.summary().runs}
        assert (runs["a"].reserved, runs["b"].reserved) == (80, 40)
        assert (runs["a"].committed, runs["b"].committed) == (80, 40)
        assert ledger.verify() == 1 + 2 + 240


def test_kill_9_at_any_point_leaves_every_release_charged(path: Path) -> None:
    created(path).close()
    generator = random.Random(11)
    released = 0
    for _ in range(60):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            with PrivacyLedger.open(path) as ledger:
                for round in range(1000):
                    reservation = ledger.reserve(run="a", round=round, plan=_Many())
                    os.write(writer, b"r")
                    ledger.commit(reservation)
            os._exit(0)
        os.close(writer)
        told = os.read(reader, generator.randint(1, 4))
        # The spin makes the kill fall anywhere between two statements, not only after a write to the pipe.
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
    assert released >= 60


class _Many(_Long):
    steps = 10**9


@pytest.mark.parametrize("seed", range(6))
def test_a_torn_copy_is_readable_or_refused_never_wrong(seed: int, path: Path, tmp_path: Path) -> None:
    ledger = created(path)
    for round in range(20):
        ledger.commit(ledger.reserve(run="a", round=round, plan=_Long()))
    copy = tmp_path / "copy.ledger"
    copy.write_bytes(path.read_bytes())
    journal = Path(f"{path}-wal").read_bytes()
    Path(f"{copy}-wal").write_bytes(journal[: random.Random(seed).randrange(len(journal))])
    with PrivacyLedger.open(copy) as torn:
        torn.verify()
        runs = torn.summary().runs
        assert all(run.committed <= run.reserved <= 20 for run in runs)
    ledger.close()


def test_the_ledger_needs_neither_torch_nor_the_accountant_to_open(path: Path) -> None:
    import subprocess
    import sys

    created(path).close()
    code = "import sys; from fedinfer.privacy.ledger import PrivacyLedger; from pathlib import Path; "
    code += "PrivacyLedger.open(Path(sys.argv[1])).summary(); print('dp_accounting' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
