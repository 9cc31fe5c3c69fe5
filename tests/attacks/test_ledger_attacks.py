"""Attacks on the ledger: each succeeds on a naive book of charges and fails on ours, where SECURITY.md promises it.

The naive books are what is often used: a JSON file that is read, added to and written, with the charge noted after
the release; and a table whose entries are chained by hashes, but not signed.
"""

import json
import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from fedinfer.errors import BudgetExceeded, LedgerError
from fedinfer.privacy.heads import HeadFile
from fedinfer.privacy.ledger import PrivacyLedger
from fedinfer.privacy.ledger_store import Entry
from fedinfer.privacy.signing import SigningKey
from tests.privacy.charges import Light

QUARTER = Light(steps=1, epsilon_=0.25, delta=1e-9)


class JsonBook:
    """A budget of ε = 1 in a JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.charges: list[float] = json.loads(path.read_text()) if path.exists() else []

    def charge(self, epsilon: float) -> None:
        if sum(self.charges) + epsilon > 1.0:
            raise BudgetExceeded("spent")
        self.charges.append(epsilon)
        self.path.write_text(json.dumps(self.charges))


def chained(entries: list[Entry]) -> bool:
    """What a table that is chained and not signed can check."""
    before = ""
    for number, entry in enumerate(entries, 1):
        if entry.number != number or entry.hash != entry.expected_hash(before):
            return False
        before = entry.hash
    return True


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger with its head elsewhere, three quarters spent."""
    path = tmp_path / "holder" / "ledger"
    PrivacyLedger.create(path, epsilon=1.0, delta=1e-6, head=tmp_path / "elsewhere" / "head").close()
    spend(path, "abc")
    return path


def spend(path: Path, runs: str) -> int:
    """Ask for one release a run; how many were given."""
    given = 0
    for run in runs:
        with PrivacyLedger.open(path) as ledger:
            try:
                ledger.commit(ledger.reserve(run=run, round=1, plan=QUARTER))
            except BudgetExceeded:
                return given
        given += 1
    return given


def entries_of(path: Path) -> list[Entry]:
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT * FROM entries ORDER BY number").fetchall()
    connection.close()
    return [Entry(**dict(zip(Entry.__dataclass_fields__, row, strict=True))) for row in rows]


def write_entries(path: Path, entries: list[Entry]) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("DELETE FROM entries")
        connection.executemany("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?)", map(astuple, entries))
    connection.close()


def rechain(entries: list[Entry], key: SigningKey | None = None) -> list[Entry]:
    """Numbers and hashes made right again; signatures too, by `key`."""
    done: list[Entry] = []
    for number, entry in enumerate(entries, 1):
        entry = replace(entry, number=number)
        digest = entry.expected_hash(done[-1].hash if done else "")
        done.append(replace(entry, hash=digest, signature=key.sign(digest) if key else entry.signature))
    return done


def cheaper(entries: list[Entry]) -> list[Entry]:
    """Every charge costs a tenth of what it did."""
    return [replace(entry, body=entry.body.replace('"epsilon": 0.25', '"epsilon": 0.025')) for entry in entries]


def drop_last(entries: list[Entry]) -> list[Entry]:
    return entries[:-3]


def drop_middle(entries: list[Entry]) -> list[Entry]:
    """A whole run that never was."""
    return [entry for entry in entries if entry.run != "b"]


def swap(entries: list[Entry]) -> list[Entry]:
    """The commit of run b and the charge of run c change places, which is allowed in itself."""
    before, commit, charge, after = entries[:6], entries[6], entries[7], entries[8:]
    assert (commit.kind, charge.kind) == ("commit", "charge")
    return [*before, replace(charge, number=commit.number), replace(commit, number=charge.number), *after]


def renumber(entries: list[Entry]) -> list[Entry]:
    return [replace(entry, number=entry.number + (entry.number > 4)) for entry in entries]


EDITS: list[Callable[[list[Entry]], list[Entry]]] = [cheaper, drop_last, drop_middle, swap, renumber]


@pytest.mark.parametrize("edit", EDITS)
def test_editing_entries_is_found_out(edit: Callable[[list[Entry]], list[Entry]], path: Path) -> None:
    write_entries(path, edit(entries_of(path)))
    with pytest.raises(LedgerError):
        spend(path, "defg")


@pytest.mark.parametrize("edit", [cheaper, drop_middle, swap])
def test_editing_entries_and_making_the_hashes_right_is_found_out_by_the_signatures(
    edit: Callable[[list[Entry]], list[Entry]], tmp_path: Path
) -> None:
    path = tmp_path / "ledger"
    PrivacyLedger.create(path, epsilon=1.0, delta=1e-6).close()
    spend(path, "abc")
    edited = rechain(edit(entries_of(path)))
    assert chained(edited), "a book that is only chained believes it"
    write_entries(path, edited)
    with pytest.raises(LedgerError, match="got a signature that is not of the ledger's key"):
        spend(path, "defg")


def test_dropping_the_last_entries_is_found_out_by_the_head(path: Path) -> None:
    edited = drop_last(entries_of(path))
    assert chained(edited)
    write_entries(path, edited)
    with pytest.raises(LedgerError, match="rolled back"):
        spend(path, "defg")


def test_a_json_book_believes_an_edit(tmp_path: Path) -> None:
    book = JsonBook(tmp_path / "book")
    for _ in range(4):
        book.charge(0.25)
    (tmp_path / "book").write_text("[]")
    JsonBook(tmp_path / "book").charge(1.0)


@pytest.mark.parametrize("edit", EDITS)
def test_signing_anew_with_another_key_is_found_out(edit: Callable[[list[Entry]], list[Entry]], path: Path) -> None:
    thief = SigningKey.generate()
    with PrivacyLedger.open(path) as ledger:
        public = ledger.summary().public_key
    first, *rest = edit(entries_of(path))
    forged = replace(first, body=first.body.replace(public, thief.public))
    write_entries(path, rechain([forged, *rest], thief))
    # In itself the forged ledger is in order.
    with pytest.raises(LedgerError, match="rolled back: its head knows"):
        PrivacyLedger.open(path)
    headless = json.dumps({**json.loads(forged.body), "head": None}, sort_keys=True)
    write_entries(path, rechain([replace(forged, body=headless), *rest], thief))
    with PrivacyLedger.open(path) as ledger:
        with pytest.raises(LedgerError, match="got the public key"):
            ledger.verify(public_key=public)
        with pytest.raises(LedgerError, match="got the key of another ledger"):
            ledger.reserve(run="d", round=1, plan=QUARTER)


def head_of(path: Path) -> Path:
    return path.parents[1] / "elsewhere" / "head"


def test_stripping_signatures_and_calling_it_format_1_is_found_out(path: Path) -> None:
    first, *rest = entries_of(path)
    body = json.loads(first.body)
    old = {name: body[name] for name in ("created", "delta", "enrolment", "epsilon")} | {"epsilon": 900.0}
    unsigned = [replace(entry, signature="") for entry in (replace(first, body=json.dumps(old)), *rest)]
    write_entries(path, rechain(unsigned))
    with sqlite3.connect(path) as connection:
        connection.execute("ALTER TABLE entries DROP COLUMN signature")
        connection.execute("PRAGMA user_version = 1")
    connection.close()
    with pytest.raises(LedgerError, match="got format 1, which is not signed, beside a signing key"):
        PrivacyLedger.open(path)


def test_an_unsigned_entry_is_not_taken_when_the_one_after_it_was_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    PrivacyLedger.create(path, epsilon=1.0, delta=1e-6, key=tmp_path / "key").close()
    with PrivacyLedger.open(path) as ledger:
        entries = list(ledger.entries())
        body = json.dumps({"head": str(tmp_path / "elsewhere")})
        unsigned = [
            Entry(number=0, kind="head", run="", round=0, attempt=number, body=body, hash="", signature="")
            for number in (0, 1)
        ]
        for forged in (rechain([*entries, *unsigned]), rechain([*entries, unsigned[0]])):
            write_entries(path, forged)
            with pytest.raises(LedgerError, match="got a signature that is not of the ledger's key"):
                ledger.reserve(run="a", round=1, plan=QUARTER)


def test_a_second_public_key_is_not_taken(path: Path) -> None:
    thief = SigningKey.generate()
    body = json.dumps({"from": 1, "to": 2, "public_key": thief.public})
    entries = entries_of(path)
    extra = Entry(
        number=len(entries) + 1, kind="migrate", run="", round=0, attempt=0, body=body, hash="", signature=""
    )  # fmt: skip
    digest = extra.expected_hash(entries[-1].hash)
    write_entries(path, [*entries, replace(extra, hash=digest, signature=thief.sign(digest))])
    with pytest.raises(LedgerError, match="got a second public key"):
        PrivacyLedger.open(path)


def copy_of(path: Path, to: Path) -> Path:
    shutil.copytree(path.parent, to)
    return to / path.name


def test_restoring_an_old_copy_is_found_out_by_the_head(path: Path, tmp_path: Path) -> None:
    book = JsonBook(tmp_path / "book")
    old = copy_of(path, tmp_path / "old")
    assert spend(path, "defg") == 1
    for name in path.parent.iterdir():
        name.unlink()
    for name in old.parent.iterdir():
        shutil.copy2(name, path.parent)
    with pytest.raises(LedgerError, match="rolled back"):
        spend(path, "efg")
    # A book without a head cannot tell.
    book.charge(1.0)
    (tmp_path / "book").unlink()
    JsonBook(tmp_path / "book").charge(1.0)


def test_deleting_the_journal_is_found_out_by_the_head(path: Path) -> None:
    with PrivacyLedger.open(path) as ledger:
        ledger.reserve(run="d", round=1, plan=QUARTER)
        database, journal = path.read_bytes(), Path(f"{path}-wal")
        assert journal.stat().st_size > 0
    for name in path.parent.glob("ledger-*"):
        name.unlink()
    path.write_bytes(database)
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
    with pytest.raises(LedgerError, match="rolled back"):
        spend(path, "e")


def test_spending_from_two_copies_is_found_out_by_their_one_head(path: Path, tmp_path: Path) -> None:
    copy = copy_of(path, tmp_path / "copy")
    assert spend(copy, "d") == 1
    with pytest.raises(LedgerError, match="rolled back"):
        spend(path, "e")
    # Not even if the other copy catches up in number.
    head = head_of(path)
    kept = head.read_bytes()
    head.unlink()
    PrivacyLedger.open_with_new_head(path, head=head).close()
    assert spend(path, "e") == 1
    head.write_bytes(kept)
    with pytest.raises(LedgerError, match="rolled back: its head knows another entry"):
        PrivacyLedger.open(path)


def test_one_head_for_two_ledgers_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="got one of another ledger"):
        PrivacyLedger.create(tmp_path / "second", epsilon=1.0, delta=1e-6, head=head_of(path))


def test_without_a_head_an_old_copy_is_not_found_out(tmp_path: Path) -> None:
    # SECURITY.md says so; whoever needs more keeps a head.
    path = tmp_path / "holder" / "ledger"
    PrivacyLedger.create(path, epsilon=1.0, delta=1e-6).close()
    old = copy_of(path, tmp_path / "old")
    assert spend(path, "abcdef") == 4
    shutil.copy2(old, path)
    assert spend(path, "ghijkl") == 4


def put_in_place(path: Path, other: Path) -> None:
    """What somebody does who may write the ledger file, and neither its key nor its head."""
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    shutil.copy2(other, path)


def replaced_whole(path: Path, loot: Path) -> None:
    """Another ledger: a key of the thief, a larger budget, no head."""
    PrivacyLedger.create(loot / "evil", epsilon=900.0, delta=0.1, key=loot / "evil.key").close()
    put_in_place(path, loot / "evil")


def copy_from_before_the_head(path: Path, loot: Path) -> None:
    put_in_place(path, loot / "early")


def forged_format_1(path: Path, loot: Path) -> None:
    """The enrolment of the true ledger with a larger budget, and no signature."""
    enrolment = json.loads(entries_of(path)[0].body)["enrolment"]
    body = json.dumps({"created": "", "delta": 0.1, "enrolment": enrolment, "epsilon": 900.0})
    first = Entry(number=1, kind="enrol", run="", round=0, attempt=0, body=body, hash="", signature="")
    shutil.copy2(path, loot / "forged")
    write_entries(loot / "forged", rechain([first]))
    with sqlite3.connect(loot / "forged") as connection:
        connection.execute("ALTER TABLE entries DROP COLUMN signature")
        connection.execute("PRAGMA user_version = 1")
    connection.close()
    put_in_place(path, loot / "forged")


def another_of_the_same_key(path: Path, loot: Path) -> None:
    """A larger budget that the data holder gave to other rows, under the same key."""
    put_in_place(path, loot / "sister")


@dataclass(frozen=True)
class Pins:
    """What the data holder keeps of a ledger where only they may write."""

    path: Path
    loot: Path
    head: HeadFile
    public_key: str


@pytest.fixture
def pins(tmp_path: Path) -> Pins:
    """A ledger whose budget is spent; key and head are elsewhere, and the head came after a first copy."""
    path, loot, elsewhere = (tmp_path / name for name in ("holder/ledger", "loot", "elsewhere"))
    loot.mkdir()
    PrivacyLedger.create(path, epsilon=1.0, delta=1e-6, key=elsewhere / "key").close()
    shutil.copy2(path, loot / "early")
    PrivacyLedger.create(loot / "sister", epsilon=9.0, delta=1e-6, key=elsewhere / "key").close()
    PrivacyLedger.open_with_new_head(path, head=elsewhere / "head").close()
    assert spend(path, "abcde") == 4
    with PrivacyLedger.open(path) as ledger:
        return Pins(path, loot, HeadFile(elsewhere / "head"), ledger.summary().public_key)


Attack = Callable[[Path, Path], None]
OTHERS: list[Attack] = [replaced_whole, copy_from_before_the_head, forged_format_1, another_of_the_same_key]


@pytest.mark.parametrize("attack", OTHERS)
def test_a_ledger_that_is_asked_for_its_own_key_and_head_is_believed(attack: Attack, pins: Pins) -> None:
    # This is the naive way, and what a ledger that is not pinned can do; SECURITY.md says so.
    attack(pins.path, pins.loot)
    with PrivacyLedger.open(pins.path) as ledger:
        ledger.verify()
    assert spend(pins.path, "efgh") == 4


@pytest.mark.parametrize("attack", OTHERS)
@pytest.mark.parametrize("with_key", [True, False])
def test_a_pinned_head_finds_out_every_other_ledger(attack: Attack, with_key: bool, pins: Pins) -> None:
    attack(pins.path, pins.loot)
    found, kept = pins.path.read_bytes(), pins.head.read()
    with pytest.raises(LedgerError, match=r"rolled back|got the head of ledger|got format 1|got the public key"):
        PrivacyLedger.open(pins.path, head=pins.head, public_key=pins.public_key if with_key else None)
    assert (pins.path.read_bytes(), pins.head.read()) == (found, kept)
    assert not list(pins.path.parent.glob("*.key*"))


@pytest.mark.parametrize(
    ("attack", "said"), [(replaced_whole, "got the public key"), (forged_format_1, "got format 1, which has no key")]
)
def test_a_pinned_public_key_finds_out_whoever_has_not_the_key(attack: Attack, said: str, pins: Pins) -> None:
    attack(pins.path, pins.loot)
    found = pins.path.read_bytes()
    fresh = pins.path.parent / "fresh"
    for opening in (
        lambda: PrivacyLedger.open(pins.path, public_key=pins.public_key),
        lambda: PrivacyLedger.open_with_new_head(pins.path, head=fresh, public_key=pins.public_key),
    ):
        with pytest.raises(LedgerError, match=said):
            opening()
    assert pins.path.read_bytes() == found
    assert not fresh.exists()
    assert not list(pins.path.parent.glob("*.key*"))


@pytest.mark.parametrize("attack", [copy_from_before_the_head, another_of_the_same_key])
def test_a_pinned_public_key_alone_does_not_find_out_what_it_signed(attack: Attack, pins: Pins) -> None:
    # SECURITY.md says so; whoever needs more pins the head too.
    attack(pins.path, pins.loot)
    with PrivacyLedger.open(pins.path, public_key=pins.public_key) as ledger:
        ledger.reserve(run="e", round=1, plan=QUARTER)


def test_a_replaced_ledger_is_found_out_while_it_is_open(pins: Pins) -> None:
    with PrivacyLedger.open(pins.path, head=pins.head, public_key=pins.public_key.upper()) as ledger:
        write_entries(pins.path, entries_of(pins.loot / "sister"))
        with pytest.raises(LedgerError, match="rolled back"):
            ledger.reserve(run="e", round=1, plan=QUARTER)


def test_the_pinned_ledger_goes_on_as_before(pins: Pins) -> None:
    with PrivacyLedger.open(pins.path, head=pins.head, public_key=pins.public_key) as ledger:
        with pytest.raises(BudgetExceeded):
            ledger.reserve(run="e", round=1, plan=QUARTER)
        first = ledger.reserve(run="a", round=1, attempt=1, plan=QUARTER)
        assert first.repeated
        kept = pins.head.read()
        assert kept is not None
        assert kept.number == ledger.verify(public_key=pins.public_key)


def naive_life(folder: Path, release: Callable[[], None]) -> None:
    """Make the release, then note it, as an accountant that is told what was done does."""
    for _ in range(3):
        book = JsonBook(folder / "book")
        release()
        book.charge(0.25)


def our_life(folder: Path, release: Callable[[], None]) -> None:
    with PrivacyLedger.open(folder / "ledger") as ledger:
        for run in "abc":
            reservation = ledger.reserve(run=run, round=1, plan=QUARTER)
            release()
            ledger.commit(reservation)


def killed(life: Callable[[Path, Callable[[], None]], None], folder: Path, line: int) -> tuple[int, bool]:
    """Run `life` in a process that is killed before its line `line`; releases made, and whether it came to an end."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        seen = 0

        def trace(frame: FrameType, event: str, _argument: Any) -> Any:
            nonlocal seen
            if frame.f_code.co_filename != __file__ or frame.f_code.co_name not in (life.__name__, "charge"):
                return None
            seen += event == "line"
            if seen == line:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        try:
            sys.settrace(trace)
            life(folder, lambda: os.write(writer, b"r") and None)
        finally:
            os._exit(0)
    os.close(writer)
    told = b""
    while more := os.read(reader, 64):
        told += more
    os.close(reader)
    _, status = os.waitpid(child, 0)
    return len(told), not os.WIFSIGNALED(status)


def uncharged(life: Callable[[Path, Callable[[], None]], None], count: Callable[[Path], int], folder: Path) -> int:
    """Over kills at every line: the most releases that no charge stands for."""
    worst, line, ended = 0, 1, False
    while not ended:
        place = folder / str(line)
        place.mkdir(parents=True)
        if life is our_life:
            PrivacyLedger.create(place / "ledger", epsilon=1.0, delta=1e-6).close()
        releases, ended = killed(life, place, line)
        worst = max(worst, releases - count(place))
        line += 1
    assert line > 8
    return worst


def test_killing_at_every_line_gives_a_free_release_of_the_naive_book_only(tmp_path: Path) -> None:
    def naive_count(folder: Path) -> int:
        try:
            return len(JsonBook(folder / "book").charges)
        except ValueError:
            return 0

    def our_count(folder: Path) -> int:
        with PrivacyLedger.open(folder / "ledger") as ledger:
            ledger.verify()
            return sum(run.reserved for run in ledger.summary().runs)

    assert uncharged(naive_life, naive_count, tmp_path / "naive") >= 1
    assert uncharged(our_life, our_count, tmp_path / "ours") == 0


def test_two_writers_at_once_lose_a_charge_of_the_naive_book_only(path: Path, tmp_path: Path) -> None:
    one, other = JsonBook(tmp_path / "book"), JsonBook(tmp_path / "book")
    for book in (one, other):
        for _ in range(4):
            book.charge(0.25)
    assert JsonBook(tmp_path / "book").charges == [0.25] * 4, "eight releases, four charges"
    given = 0
    with PrivacyLedger.open(path) as first, PrivacyLedger.open(path) as second:
        for ledger, run in ((first, "d"), (second, "e"), (first, "f"), (second, "g")):
            try:
                ledger.reserve(run=run, round=1, plan=QUARTER)
                given += 1
            except BudgetExceeded:
                pass
        assert given == 1
        assert first.summary().spent_epsilon == second.summary().spent_epsilon == 1.0


def test_a_repeated_attempt_draws_no_second_noise_for_one_charge(path: Path) -> None:
    # Naive: a retry under the same number is believed to be the same release, whatever noise it has.
    plan = Light(steps=2, epsilon_=0.25, delta=1e-9)
    with PrivacyLedger.open(path) as ledger:
        told = [ledger.reserve(run="d", round=1, plan=plan, attempt=1).repeated for _ in range(3)]
        assert told == [False, True, True]
        assert ledger.summary().runs[-1].reserved == 1
        ledger.reserve(run="d", round=1, plan=plan)
        with pytest.raises(BudgetExceeded):
            ledger.reserve(run="d", round=1, plan=plan)
