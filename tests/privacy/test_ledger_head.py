"""The head: it never goes back, belongs to one ledger, and a ledger that has forgotten something is refused."""

import json
import shutil
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedinfer.errors import LedgerError
from fedinfer.privacy.heads import HeadFile, Mark
from fedinfer.privacy.ledger import PrivacyLedger
from tests.privacy.charges import Light

PLAN = Light()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger with a head file in another folder, and three releases."""
    path = tmp_path / "ledger"
    PrivacyLedger.create(path, epsilon=1.0, delta=1e-6, head=tmp_path / "away" / "head").close()
    spend(path, 3)
    return path


def head_of(path: Path) -> Path:
    return path.parent / "away" / "head"


def spend(path: Path, times: int) -> None:
    with PrivacyLedger.open(path) as ledger:
        for _ in range(times):
            ledger.reserve(run="a", round=1, plan=PLAN)


def mark(number: int, enrolment: str = "e") -> Mark:
    return Mark(enrolment=enrolment, number=number, hash=f"h{number}")


def test_a_head_never_goes_back_whoever_advances_it(tmp_path: Path) -> None:
    head = HeadFile(tmp_path / "head")
    assert head.read() is None
    head.advance(mark(5))
    head.advance(mark(3))
    assert head.read() == mark(5)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: head.advance(mark(number)), [9, 30, 12, 28, 7, 29, 16, 11]))
    assert head.read() == mark(30)


def test_a_head_is_of_one_ledger(tmp_path: Path) -> None:
    head = HeadFile(tmp_path / "head")
    head.advance(mark(5))
    with pytest.raises(LedgerError, match="got the head of ledger e, expected f; each ledger needs a head file"):
        head.advance(mark(9, "f"))
    assert head.read() == mark(5)
    with pytest.raises(LedgerError, match="got one of another ledger"):
        PrivacyLedger.create(tmp_path / "ledger", epsilon=1.0, delta=1e-6, head=tmp_path / "head")
    assert not (tmp_path / "ledger").exists()


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"format": 2}', b'{"format": 1, "enrolment": 1}', b"\xff"])
def test_a_file_that_is_no_head_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "head").write_bytes(content)
    with pytest.raises(LedgerError, match="not a head of format 1"):
        HeadFile(tmp_path / "head").read()


def test_a_head_that_cannot_be_written_stops_the_release_and_leaves_it_spent(path: Path) -> None:
    class Full(HeadFile):
        def advance(self, mark: Mark) -> None:
            kept = self.read()
            if kept is not None and mark.number > kept.number:
                raise LedgerError("head: no space left")

    with PrivacyLedger.open(path, head=Full(head_of(path))) as ledger:
        for _ in range(4):
            with pytest.raises(LedgerError, match="no space left"):
                ledger.reserve(run="a", round=1, plan=PLAN)
        # The first is spent. The others were stopped before, so that the head does not fall further behind.
        assert ledger.summary().runs[0].reserved == 4
    spend(path, 1)
    with PrivacyLedger.open(path) as ledger:
        assert ledger.summary().runs[0].reserved == 5


def test_the_head_is_advanced_after_each_entry_is_on_disk(path: Path) -> None:
    with PrivacyLedger.open(path) as ledger:
        for _ in range(3):
            reservation = ledger.reserve(run="a", round=2, plan=PLAN)
            kept = HeadFile(head_of(path)).read()
            assert kept is not None
            assert kept.number == ledger.verify()
            ledger.commit(reservation)


@pytest.mark.parametrize("with_journal", [True, False])
def test_an_older_copy_is_refused_with_and_without_its_journal(with_journal: bool, path: Path) -> None:
    names = [path, Path(f"{path}-wal")]
    with PrivacyLedger.open(path) as ledger:
        ledger.reserve(run="a", round=2, plan=PLAN)
        copies = [(name, name.read_bytes()) for name in names[: 1 + with_journal]]
        ledger.reserve(run="a", round=3, plan=PLAN)
    for name in path.parent.glob("ledger-*"):
        name.unlink()
    for name, data in copies:
        name.write_bytes(data)
    with pytest.raises(LedgerError, match="rolled back: its head knows of"):
        PrivacyLedger.open(path)
    with pytest.raises(LedgerError, match="rolled back"):
        PrivacyLedger.open_with_new_head(path, head=head_of(path))
    # Another head file is no way around the one that is recorded.
    with pytest.raises(LedgerError, match="rolled back"):
        PrivacyLedger.open_with_new_head(path, head=path.parent / "fresh")


def test_an_open_ledger_whose_entries_vanish_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    with PrivacyLedger.create(path, epsilon=1.0, delta=1e-6) as ledger:
        ledger.reserve(run="a", round=1, plan=PLAN)
        connection = sqlite3.connect(path)
        connection.execute("DELETE FROM entries WHERE number = 3")
        connection.commit()
        connection.close()
        with pytest.raises(LedgerError, match="rolled back: it had an entry that is gone"):
            ledger.reserve(run="a", round=1, plan=PLAN)


def test_a_lost_head_is_refused_and_made_anew_by_the_data_holder(path: Path) -> None:
    head_of(path).unlink()
    for attempt in (lambda: PrivacyLedger.open(path), lambda: spend(path, 1)):
        with pytest.raises(LedgerError, match=r"its head .* is missing; if you know why, `fedinfer ledger verify"):
            attempt()
    PrivacyLedger.open_with_new_head(path, head=head_of(path)).close()
    spend(path, 1)
    with PrivacyLedger.open(path) as ledger:
        assert ledger.summary().runs[0].reserved == 4


def test_an_old_copy_of_the_head_is_refused_and_brought_up_by_the_data_holder(path: Path) -> None:
    old = head_of(path).read_bytes()
    spend(path, 2)
    head_of(path).write_bytes(old)
    # As far behind as a crash leaves it.
    PrivacyLedger.open(path).close()
    spend(path, 1)
    head_of(path).write_bytes(old)
    with pytest.raises(LedgerError, match=r"stands at entry 5 of 8: an old copy of the head"):
        PrivacyLedger.open(path)
    PrivacyLedger.open_with_new_head(path, head=head_of(path)).close()
    spend(path, 1)


def test_a_head_is_moved_and_the_ledger_remembers(path: Path) -> None:
    moved = path.parent / "moved" / "head"
    PrivacyLedger.open_with_new_head(path, head=moved).close()
    shutil.rmtree(head_of(path).parent)
    spend(path, 1)
    with PrivacyLedger.open(path) as ledger:
        assert ledger.summary().head == str(moved)
        kept = HeadFile(moved).read()
        assert kept is not None
        assert kept.number == ledger.verify()


def test_a_head_is_given_to_a_ledger_that_had_none(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    PrivacyLedger.create(path, epsilon=1.0, delta=1e-6).close()
    spend(path, 1)
    PrivacyLedger.open_with_new_head(path, head=tmp_path / "head").close()
    old = path.read_bytes()
    spend(path, 2)
    path.write_bytes(old)
    with pytest.raises(LedgerError, match="rolled back"):
        PrivacyLedger.open(path)


class Server:
    """A keeper that is no file, as a server's would be."""

    def __init__(self) -> None:
        self.kept: Mark | None = None

    def read(self) -> Mark | None:
        return self.kept

    def advance(self, mark: Mark) -> None:
        if self.kept is None or self.kept.number < mark.number:
            self.kept = mark


def test_whatever_reads_and_advances_keeps_a_head(tmp_path: Path) -> None:
    path, server = tmp_path / "ledger", Server()
    with PrivacyLedger.create(path, epsilon=1.0, delta=1e-6) as ledger:
        server.kept = Mark(enrolment=ledger.summary().enrolment, number=1, hash=ledger.entries()[0].hash)
    old = path.read_bytes()
    with PrivacyLedger.open(path, head=server) as ledger:
        ledger.commit(ledger.reserve(run="a", round=1, plan=PLAN))
        assert server.kept.number == 4
    for name in tmp_path.glob("ledger-*"):
        name.unlink()
    path.write_bytes(old)
    with pytest.raises(LedgerError, match="rolled back"):
        PrivacyLedger.open(path, head=server)


def test_a_head_holds_nothing_of_the_runs(path: Path) -> None:
    assert set(json.loads(head_of(path).read_text())) == {"format", "enrolment", "number", "hash"}
