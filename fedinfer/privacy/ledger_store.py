"""A chain of entries in SQLite: each holds the hash of all before it, and a signature of that.

Write-ahead log, `synchronous = FULL`: when a transaction has ended, its entries are on disk. A transaction takes the
write lock at its start, so that what it decides by is what it adds to.
"""

import hashlib
import json
import os
import secrets
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from fedinfer.errors import LedgerError
from fedinfer.files import sync_folder
from fedinfer.privacy.signing import SigningKey

APPLICATION_ID = 0x46454449
FORMAT = 2
LOCK_TIMEOUT_S = 60.0

TABLE = """
CREATE TABLE entries (
    number INTEGER PRIMARY KEY, kind TEXT NOT NULL, run TEXT NOT NULL, round INTEGER NOT NULL,
    attempt INTEGER NOT NULL, body TEXT NOT NULL, hash TEXT NOT NULL, signature TEXT NOT NULL DEFAULT ''
);
CREATE UNIQUE INDEX once ON entries (kind, run, round, attempt);
"""
# What turns the table of a format into that of the next.
MIGRATIONS = {1: "ALTER TABLE entries ADD COLUMN signature TEXT NOT NULL DEFAULT ''"}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a ledger. `body` is the JSON text that was hashed."""

    number: int
    kind: str
    run: str
    round: int
    attempt: int
    body: str
    hash: str
    signature: str

    def fields(self) -> dict[str, Any]:
        """The body, read.

        Raises: LedgerError if it is no JSON object.
        """
        try:
            fields = json.loads(self.body)
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            raise LedgerError(f"entry {self.number}: got a body that is not a JSON object")
        return fields

    def expected_hash(self, before: str) -> str:
        """The hash of this entry after one whose hash is `before`."""
        row = [before, self.number, self.kind, self.run, self.round, self.attempt, self.body]
        return hashlib.sha256(json.dumps(row).encode()).hexdigest()


def make_entry(
    key: SigningKey, *, number: int, before: str, kind: str, run: str, round: int, attempt: int, body: Mapping[str, Any]
) -> Entry:
    """The signed entry `number` that follows the one with hash `before`."""
    draft = Entry(
        number=number,
        kind=kind,
        run=run,
        round=round,
        attempt=attempt,
        body=json.dumps(body, sort_keys=True, allow_nan=False),
        hash="",
        signature="",
    )
    digest = draft.expected_hash(before)
    return replace(draft, hash=digest, signature=key.sign(digest))


class Store:
    """An open database of entries. One object belongs to one thread; several processes may hold the same file."""

    def __init__(self, name: str) -> None:
        self._name = name
        with self._speaking():
            self._connection = sqlite3.connect(name, timeout=LOCK_TIMEOUT_S, isolation_level=None)

    @classmethod
    def create(cls, path: Path, first: Entry) -> None:
        """Make a new file with its first entry, whole and durable or not there.

        Raises: LedgerError if the file is there already, or an old one's journal is.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in (Path(f"{path}-wal"), Path(f"{path}-shm")):
            # SQLite would replay an old journal into the new ledger.
            if leftover.exists() and not path.exists():
                raise LedgerError(f"ledger {path}: got {leftover.name} of a ledger that was removed; remove that too")
        unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
        try:
            store = cls(str(unfinished))
            store._lay_out(first)
            store.close()
            # Unlike a rename, a link never replaces a ledger that is already there.
            os.link(unfinished, path)
            sync_folder(path.parent)
        except FileExistsError:
            raise LedgerError(f"ledger {path}: got an existing file, expected none; a budget is set once") from None
        finally:
            for suffix in ("", "-wal", "-shm"):
                Path(f"{unfinished}{suffix}").unlink(missing_ok=True)

    @classmethod
    def in_memory(cls, first: Entry) -> Self:
        """Entries that are gone with the process."""
        store = cls(":memory:")
        store._lay_out(first)
        return store

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a file of this format or an older one.

        Raises: LedgerError if there is none, or it is something else.
        """
        if not path.is_file():
            raise LedgerError(
                f"ledger {path}: got no such file; the data holder makes one with "
                "`fedinfer ledger init PATH --epsilon E --delta D`"
            )
        if not is_database(path):
            raise LedgerError(f"ledger {path}: got a file that is not a ledger")
        store = cls(str(path))
        if store._application != APPLICATION_ID or not 1 <= store.format <= FORMAT:
            store.close()
            raise LedgerError(
                f"ledger {path}: got a database of another kind or format, expected ledger format {FORMAT} or older"
            )
        store._set_up()
        return store

    @property
    def format(self) -> int:
        with self._speaking():
            return int(self._connection.execute("PRAGMA user_version").fetchone()[0])

    @property
    def _application(self) -> int:
        with self._speaking():
            return int(self._connection.execute("PRAGMA application_id").fetchone()[0])

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Hold the write lock; what was added is on disk when this ends, and nothing of it if it raises.

        Raises: LedgerError if the database cannot be read or written.
        """
        with self._speaking():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def entries(self, after: int = 0) -> Iterator[Entry]:
        """The entries with numbers above `after`, in order."""
        columns = "number, kind, run, round, attempt, body, hash, signature"
        with self._speaking():
            rows = self._connection.execute(f"SELECT {columns} FROM entries WHERE number > ? ORDER BY number", (after,))
            for row in rows:
                yield Entry(**dict(zip(columns.split(", "), row, strict=True)))

    def hash_at(self, number: int) -> str | None:
        """The hash of entry `number`, or None if it is not there."""
        with self._speaking():
            row = self._connection.execute("SELECT hash FROM entries WHERE number = ?", (number,)).fetchone()
        return None if row is None else str(row[0])

    def append(self, entry: Entry) -> None:
        """Add an entry, within a transaction."""
        self._connection.execute(
            "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (entry.number, entry.kind, entry.run, entry.round, entry.attempt, entry.body, entry.hash, entry.signature),
        )

    def migrate(self) -> None:
        """Bring the table to this format, within a transaction."""
        for version in range(self.format, FORMAT):
            self._connection.execute(MIGRATIONS[version])
        self._connection.execute(f"PRAGMA user_version = {FORMAT}")

    def check_file(self) -> None:
        """Raises: LedgerError if the database is damaged."""
        with self._speaking():
            (integrity,) = self._connection.execute("PRAGMA integrity_check(1)").fetchone()
        if integrity != "ok":
            raise LedgerError(f"ledger {self._name}: the database is damaged ({integrity})")

    def _set_up(self) -> None:
        with self._speaking():
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")

    def _lay_out(self, first: Entry) -> None:
        self._set_up()
        with self._speaking():
            self._connection.executescript(TABLE)
            self._connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self._connection.execute(f"PRAGMA user_version = {FORMAT}")
        with self.transaction():
            self.append(first)

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        """Turn the database's errors into ours."""
        try:
            yield
        except sqlite3.Error as error:
            raise LedgerError(f"ledger {self._name}: cannot be read or written ({error})") from None


def is_database(path: Path) -> bool:
    """Whether SQLite can read the file.

    It is SQLite that is asked. Reading the first bytes here would end in a `close`, which takes the locks of every
    other connection of this process from the file, and two processes would write it at once.
    """
    with closing(sqlite3.connect(path, timeout=LOCK_TIMEOUT_S)) as connection:
        try:
            connection.execute("PRAGMA schema_version")
        except sqlite3.OperationalError:
            # It is one, and busy or out of reach; whoever opens it is told so.
            return True
        except sqlite3.DatabaseError:
            return False
    return True
