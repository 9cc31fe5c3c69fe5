"""The ledger under faults: killed at any step, and with any write lost that was not yet on disk.

A kill leaves the operating system's page cache, so it says nothing about `fsync`. What a power cut leaves is made by
hand: of the bytes written since the last `fsync`, some sectors are there, some are not, some are rubbish.
"""

import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from fedinfer.errors import LedgerError
from fedinfer.privacy import ledger_store
from fedinfer.privacy.heads import HeadFile
from fedinfer.privacy.ledger import PrivacyLedger
from tests.privacy.charges import Light
from tests.privacy.test_ledger_migration import old_ledger

PLAN = Light(steps=3)
TRACED = ("ledger.py", "ledger_store.py", "ledger_migration.py", "heads.py", "signing.py", "files.py")
MEMORY = Path("/dev/shm")
SECTOR = 512
FRAME = 24 + 4096
Tell = Callable[[], None]


def enrol_and_release(folder: Path, tell: Tell) -> None:
    """A ledger's whole life: made, two releases of a run and one of another."""
    path = folder / "ledger"
    PrivacyLedger.create(path, epsilon=1.0, delta=1e-6, head=folder / "away" / "head").close()
    with PrivacyLedger.open(path) as ledger:
        for run, round in (("a", 1), ("a", 2), ("b", 1)):
            reservation = ledger.reserve(run=run, round=round, plan=PLAN)
            tell()
            ledger.commit(reservation)


def migrate_and_release(folder: Path, tell: Tell) -> None:
    """A ledger of format 1 is opened, and pays for a release."""
    with PrivacyLedger.open(folder / "ledger") as ledger:
        reservation = ledger.reserve(run="new", round=1, plan=PLAN)
        tell()
        ledger.commit(reservation)


LIVES = {"enrol": enrol_and_release, "migrate": migrate_and_release}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place: neither a kill nor a made-up power cut needs a disk to wait for."""
    if MEMORY.is_dir():
        with tempfile.TemporaryDirectory(dir=MEMORY) as name:
            yield Path(name)
    else:
        yield tmp_path


def prepare(life: str, folder: Path) -> None:
    folder.mkdir()
    if life == "migrate":
        old_ledger(folder / "ledger")


def by_lines(at: int, end: Callable[[], None]) -> Callable[[], int]:
    """Call `end` before line `at` of the ledger's code; the result tells how many lines there were."""
    seen = 0

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal seen
        if os.path.basename(frame.f_code.co_filename) not in TRACED or "fedinfer" not in frame.f_code.co_filename:
            return None
        if event == "line":
            seen += 1
            if seen == at:
                end()
        return trace

    sys.settrace(trace)
    return lambda: seen


def by_statements(at: int, end: Callable[[], None]) -> Callable[[], int]:
    """Call `end` as SQLite begins statement `at`; the result tells how many statements there were."""
    seen = 0
    connect = sqlite3.connect

    def count(_statement: str) -> None:
        nonlocal seen
        seen += 1
        if seen == at:
            end()

    def traced(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = connect(*arguments, **options)
        connection.set_trace_callback(count)
        return connection

    ledger_store.sqlite3.connect = traced  # type: ignore[assignment]
    return lambda: seen


WAYS = {"line": by_lines, "statement": by_statements}


def lived(life: str, way: str, at: int, folder: Path) -> tuple[int, int]:
    """Live in a process of its own that is killed at step `at` (0: never); releases made, and steps if it survived."""
    prepare(life, folder)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            steps = WAYS[way](at, lambda: os.kill(os.getpid(), signal.SIGKILL))
            LIVES[life](folder, lambda: os.write(writer, b"r") and None)
            sys.settrace(None)
            os.write(writer, f" {steps()}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    told = b""
    while more := os.read(reader, 4096):
        told += more
    os.close(reader)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) == (at != 0), "the child ended otherwise than it should"
    releases, _, steps_said = told.decode().partition(" ")
    return len(releases), int(steps_said or 0)


def check_after(life: str, folder: Path, releases: int) -> None:
    """No release without a charge; the ledger opens, verifies and goes on."""
    path = folder / "ledger"
    if not path.exists():
        assert releases == 0
        PrivacyLedger.create(path, epsilon=1.0, delta=1e-6, head=folder / "away" / "head").close()
    head = folder / "away" / "head"
    if life == "enrol" and not head.exists():
        # Killed after the ledger was made and before its head was.
        assert releases == 0
        with pytest.raises(LedgerError, match="is missing"):
            PrivacyLedger.open(path)
        PrivacyLedger.open_with_new_head(path, head=head).close()
    with PrivacyLedger.open(path) as ledger:
        ledger.verify()
        new = [run for run in ledger.summary().runs if life == "enrol" or run.run == "new"]
        assert sum(run.committed for run in new) <= releases <= sum(run.reserved for run in new)
        ledger.commit(ledger.reserve(run="after", round=1, plan=PLAN))
        ledger.verify()


def kill_at(life: str, way: str, chosen: Callable[[int], Iterable[int]], folder: Path) -> int:
    """Be killed at the steps that are chosen when their number is known; how many there were."""
    _, steps = lived(life, way, 0, folder / "whole")
    points = list(chosen(steps))
    for at in points:
        place = folder / str(at)
        releases, _ = lived(life, way, at, place)
        check_after(life, place, releases)
        shutil.rmtree(place)
    return len(points)


@pytest.mark.parametrize(("life", "least"), [("enrol", 60), ("migrate", 25)])
def test_killed_at_each_statement(life: str, least: int, folder: Path) -> None:
    assert kill_at(life, "statement", lambda steps: range(1, steps + 1), folder) >= least


@pytest.mark.parametrize(("life", "count"), [("enrol", 80), ("migrate", 40)])
def test_killed_between_statements(life: str, count: int, folder: Path) -> None:
    assert kill_at(life, "line", lambda steps: {1 + i * steps // count for i in range(count)}, folder) == count


@pytest.mark.long
@pytest.mark.parametrize("part", range(8))
@pytest.mark.parametrize("life", LIVES)
def test_killed_at_each_line(life: str, part: int, folder: Path) -> None:
    assert kill_at(life, "line", lambda steps: range(1 + part, steps + 1, 8), folder) > 60


@dataclass(frozen=True)
class OnDisk:
    """What is certainly on disk at some moment, and the releases made by then."""

    database: bytes
    journal: bytes
    shared: bytes
    head: bytes
    reserved: int
    committed: int


@pytest.fixture(scope="module")
def moments(tmp_path_factory: pytest.TempPathFactory) -> list[OnDisk]:
    """A ledger after each operation: runs are charged, releases reserved and committed, the journal is moved over."""
    folder = tmp_path_factory.mktemp("moments")
    path, head = folder / "ledger", folder / "head"
    ledger = PrivacyLedger.create(path, epsilon=100.0, delta=1e-3, head=head)
    mover = sqlite3.connect(path)
    taken: list[OnDisk] = []
    reserved = committed = 0

    def take() -> None:
        files = [path, Path(f"{path}-wal"), Path(f"{path}-shm"), head]
        taken.append(OnDisk(*(file.read_bytes() for file in files), reserved, committed))

    take()
    for number in range(24):
        reservation = ledger.reserve(run=f"run {number // 3}", round=number, plan=PLAN)
        reserved += 1
        take()
        ledger.commit(reservation)
        committed += 1
        take()
        if number % 5 == 4:
            mover.execute("PRAGMA wal_checkpoint(PASSIVE)")
            take()
    mover.close()
    ledger.close()
    assert max(len(moment.journal) for moment in taken) > 10 * FRAME
    return taken


def sectors(old: bytes, new: bytes, generator: random.Random) -> bytes:
    """A file on its way from `old` to `new`: each changed sector is old, new or rubbish, and its end may be cut."""
    length = generator.randint(min(len(old), len(new)), max(len(old), len(new)))
    result = bytearray(new[:length])
    lost = generator.choice((0.1, 0.5, 0.9))
    for start in range(0, length, SECTOR):
        piece = slice(start, min(start + SECTOR, length))
        size = piece.stop - start
        before = old[piece].ljust(size, b"\0")
        if before != new[piece] and generator.random() < lost:
            rubbish = generator.randbytes(size)
            # A sector that held something is never half of it after a power cut, but a new one may be.
            result[piece] = before if start < len(old) or generator.random() < 0.7 else rubbish
    return bytes(result)


def on_disk(old: bytes, new: bytes) -> int:
    """Up to where a journal was synced: what two moments have in common, in whole frames, or nothing after a restart.

    A journal that was moved over is written again from its start, over frames that no longer count.
    """
    common = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    return 32 + (common - 32) // FRAME * FRAME if common >= 32 else 0


def frames(old: bytes, new: bytes, generator: random.Random) -> bytes:
    """A journal whose new frames (pages with a header of 24 bytes) are out of order, doubled, or not all there."""
    start = max(on_disk(old, new), 32)
    slots = [at for at in range(start, len(new), FRAME) if old[at : at + FRAME] != new[at : at + FRAME]]
    fresh = [new[at : at + FRAME] for at in generator.choices(slots, k=len(slots))]
    if generator.random() < 0.5:
        fresh = [new[at : at + FRAME] for at in generator.sample(slots, len(slots))]
    result = bytearray(new)
    for at, frame in zip(slots, fresh, strict=True):
        lost = generator.random() < 0.2
        result[at : at + FRAME] = (old[at : at + FRAME] or bytes(FRAME)) if lost else frame
    return bytes(result)


def cut(old: bytes, new: bytes, generator: random.Random) -> bytes:
    """A journal cut at any byte after what was on disk."""
    return new[: generator.randint(on_disk(old, new), len(new))]


def power_cut(moments: list[OnDisk], seed: int, folder: Path) -> tuple[Path, OnDisk, OnDisk]:
    """Lay out what the disk may hold if power goes between two moments."""
    generator = random.Random(seed)
    index = generator.randrange(len(moments) - 1)
    old, new = moments[index], moments[index + 1]
    path = folder / "ledger"
    if old.journal == new.journal:
        database, journal = sectors(old.database, new.database, generator), old.journal
    else:
        database, journal = old.database, generator.choice((sectors, frames, cut))(old.journal, new.journal, generator)
    path.write_bytes(database)
    Path(f"{path}-wal").write_bytes(journal)
    shared = generator.choice((None, old.shared, new.shared, generator.randbytes(len(new.shared))))
    Path(f"{path}-shm").unlink(missing_ok=True)
    if shared is not None:
        Path(f"{path}-shm").write_bytes(shared)
    (folder / "head").write_bytes(old.head)
    return path, old, new


def survive(moments: list[OnDisk], seed: int, folder: Path) -> bool:
    """Open what a power cut left, check it and go on; whether the operation under way is in it."""
    path, old, new = power_cut(moments, seed, folder)
    with PrivacyLedger.open(path, head=HeadFile(folder / "head")) as ledger:
        ledger.verify()
        runs = ledger.summary().runs
        reserved, committed = sum(run.reserved for run in runs), sum(run.committed for run in runs)
    assert old.reserved <= reserved <= new.reserved
    assert old.committed <= committed <= new.committed
    return (reserved, committed) == (new.reserved, new.committed)


def test_power_cuts(moments: list[OnDisk], folder: Path) -> None:
    finished = [survive(moments, seed, folder) for seed in range(200)]
    # Both ends are met: an operation that was lost, and one that was just in time.
    assert 20 < sum(finished) < 180


@pytest.mark.long
@pytest.mark.parametrize("part", range(10))
def test_ten_thousand_power_cuts(part: int, moments: list[OnDisk], folder: Path) -> None:
    for seed in range(1000 * (part + 1), 1000 * (part + 2)):
        survive(moments, seed, folder)


@pytest.mark.parametrize("seed", range(20))
def test_a_disk_that_lies_about_fsync_is_found_out_by_the_head(seed: int, moments: list[OnDisk], folder: Path) -> None:
    generator = random.Random(seed)
    index = generator.randrange(4, len(moments))
    earlier = moments[generator.randrange(index - 3)]
    path = folder / "ledger"
    path.write_bytes(earlier.database)
    Path(f"{path}-wal").write_bytes(earlier.journal[: generator.randint(0, len(earlier.journal))])
    (folder / "head").write_bytes(moments[index].head)
    with pytest.raises(LedgerError, match="rolled back"):
        PrivacyLedger.open(path, head=HeadFile(folder / "head"))


def test_the_database_waits_for_the_disk(tmp_path: Path) -> None:
    PrivacyLedger.create(tmp_path / "ledger", epsilon=1.0, delta=1e-6).close()
    store = ledger_store.Store.open(tmp_path / "ledger")
    pragmas = [store._connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("synchronous", "journal_mode")]
    store.close()
    assert pragmas == [2, "wal"]
