"""Ledgers of format 1, as fedinfer 0.1.0 wrote them, open in this version with everything that they hold."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedinfer.errors import LedgerError
from fedinfer.privacy.ledger import PrivacyLedger
from fedinfer.privacy.ledger_store import Store
from tests.privacy.charges import Light

SQL = Path(__file__).parent / "data" / "ledger_format_1.sql"


def old_ledger(path: Path) -> None:
    """Lay out a ledger of format 1."""
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.executescript(SQL.read_text(encoding="utf-8"))
    connection.close()


def test_a_ledger_of_format_1_keeps_what_it_holds_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    old_ledger(path)
    with PrivacyLedger.open(path) as ledger:
        summary = ledger.summary()
        assert summary.enrolment == "110780f06d1a72673419b870bb36edab"
        assert (summary.budget_epsilon, summary.budget_delta) == (4.0, 2e-5)
        assert (summary.spent_epsilon, summary.spent_delta) == (2.464921728834309, 2e-6)
        assert summary.filter == {"name": "basic"}
        first, second = summary.runs
        assert (first.run, first.steps, first.reserved, first.committed, first.repeated) == ("a", 4, 3, 2, 1)
        assert (second.run, second.void, second.reserved) == ("b", True, 1)
        assert ledger.verify(public_key=summary.public_key) == 11
        ledger.commit(ledger.reserve(run="c", round=1, plan=Light()))
    with PrivacyLedger.open(path) as again:
        assert again.verify() == 14
    assert Path(f"{path}.key").stat().st_mode & 0o777 == 0o600
    assert not Path(f"{path}.key.new").exists()


def test_several_openers_migrate_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    old_ledger(path)

    def entries(_: int) -> int:
        with PrivacyLedger.open(path) as ledger:
            return ledger.verify()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(entries, range(16))) == {11}


def test_a_migration_cut_short_finds_its_key_again(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    old_ledger(path)
    PrivacyLedger.open(path).close()
    Path(f"{path}.key").rename(f"{path}.key.new")
    with PrivacyLedger.open(path) as ledger:
        ledger.reserve(run="c", round=1, plan=Light())
        assert ledger.verify() == 13


@pytest.mark.parametrize(
    "change",
    ["UPDATE entries SET body = replace(body, '4.0', '9.0') WHERE number = 1", "DELETE FROM entries WHERE number = 4"],
)
def test_a_changed_ledger_of_format_1_is_not_signed(change: str, tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    old_ledger(path)
    with sqlite3.connect(path) as connection:
        assert connection.execute(change).rowcount == 1
    connection.close()
    with pytest.raises(LedgerError, match="was changed, removed or put in later"):
        PrivacyLedger.open(path)
    assert not list(tmp_path.glob("*.key*"))


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    PrivacyLedger.create(path, epsilon=1.0, delta=1e-6).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 3")
    connection.close()
    with pytest.raises(LedgerError, match="expected ledger format 2 or older"):
        Store.open(path)
