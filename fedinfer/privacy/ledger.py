"""The privacy ledger: on the data holder's disk, what was promised and what was released.

A release is reserved (and on disk) before rows are used, and committed after it left. A crash in between leaves it
spent. The ledger is an append-only list of entries in SQLite, each with the hash of the one before.

A plan that is fixed in advance is charged whole, at its first release. Plans compose by adding their ε and their δ,
which holds for plans chosen adaptively too (Rogers et al. 2016, arXiv:1605.08294, basic composition filter). A
repeated round draws fresh noise and is one more release of the plan; when its steps are used up, the ledger refuses.

Adversary: crashes, retries, a server that asks again. Not: somebody who may write the data holder's disk.
"""

import hashlib
import json
import os
import secrets
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from fedinfer.errors import BudgetExceeded, LedgerError
from fedinfer.privacy.checks import check_delta, check_epsilon

APPLICATION_ID = 0x46454449
FORMAT = 1
LOCK_TIMEOUT_S = 60.0
# Sums of decimal budgets: 0.1 + 0.2 may be spent from 0.3.
SLACK = 1e-9

TABLE = """
CREATE TABLE entries (
    number INTEGER PRIMARY KEY, kind TEXT NOT NULL, run TEXT NOT NULL, round INTEGER NOT NULL,
    attempt INTEGER NOT NULL, body TEXT NOT NULL, hash TEXT NOT NULL
);
CREATE UNIQUE INDEX once ON entries (kind, run, round, attempt);
"""


class Charge(Protocol):
    """What a ledger needs of a plan."""

    @property
    def steps(self) -> int: ...
    @property
    def delta(self) -> float: ...
    def epsilon(self) -> float: ...
    def digest(self) -> str: ...
    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """One release that the ledger has on disk as spent."""

    run: str
    round: int
    attempt: int


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """One plan in the ledger: what it was charged, and how many of its releases were reserved and committed."""

    run: str
    epsilon: float
    delta: float
    steps: int
    reserved: int
    committed: int
    repeated: int
    void: bool
    plan: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class LedgerSummary:
    """The budget, and what is spent of it. Both are public; so is the random enrolment id."""

    enrolment: str
    budget_epsilon: float
    budget_delta: float
    spent_epsilon: float
    spent_delta: float
    runs: tuple[RunSummary, ...]


class PrivacyLedger:
    """An open ledger. One object belongs to one thread; several processes may hold the same file."""

    def __init__(self, connection: sqlite3.Connection, name: str) -> None:
        self._connection = connection
        self._name = name

    @classmethod
    def create(cls, path: Path, *, epsilon: float, delta: float) -> Self:
        """Make a new ledger file with a budget and a random enrolment id, and open it.

        Raises: LedgerError if the file is there already, or an old one's journal is; BadUsage for a budget that
        cannot be.
        """
        check_epsilon(epsilon)
        check_delta(delta)
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in (Path(f"{path}-wal"), Path(f"{path}-shm")):
            # SQLite would replay an old journal into the new ledger.
            if leftover.exists() and not path.exists():
                raise LedgerError(f"ledger {path}: got {leftover.name} of a ledger that was removed; remove that too")
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with cls._connect(str(unfinished)) as ledger:
                ledger._enrol(epsilon, delta)
            # Unlike a rename, a link never replaces a ledger that is already there.
            os.link(unfinished, path)
        except FileExistsError:
            raise LedgerError(f"ledger {path}: got an existing file, expected none; a budget is set once") from None
        except sqlite3.Error as error:
            raise LedgerError(f"ledger {path}: cannot be written there ({error})") from None
        finally:
            for suffix in ("", "-wal", "-shm"):
                Path(f"{unfinished}{suffix}").unlink(missing_ok=True)
        return cls.open(path)

    @classmethod
    def scratch(cls, *, epsilon: float, delta: float) -> Self:
        """A ledger in memory, for evaluations on public data: it protects nobody and is gone with the process."""
        ledger = cls._connect(":memory:")
        ledger._enrol(epsilon, delta)
        return ledger

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a ledger file.

        Raises: LedgerError if there is none, or it is not a ledger of this format.
        """
        if not path.is_file():
            raise LedgerError(
                f"ledger {path}: got no such file; the data holder makes one with "
                "`fedinfer ledger init PATH --epsilon E --delta D`"
            )
        try:
            ledger = cls._connect(str(path))
            (application,) = ledger._connection.execute("PRAGMA application_id").fetchone()
            (version,) = ledger._connection.execute("PRAGMA user_version").fetchone()
        except sqlite3.DatabaseError as error:
            raise LedgerError(f"ledger {path}: got a file that is not a ledger ({error})") from None
        if application != APPLICATION_ID or version != FORMAT:
            ledger.close()
            raise LedgerError(
                f"ledger {path}: got a database of another kind or format, expected ledger format {FORMAT}"
            )
        return ledger

    @classmethod
    def _connect(cls, name: str) -> Self:
        connection = sqlite3.connect(name, timeout=LOCK_TIMEOUT_S, isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        return cls(connection, name)

    def _enrol(self, epsilon: float, delta: float) -> None:
        self._connection.executescript(TABLE)
        self._connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        self._connection.execute(f"PRAGMA user_version = {FORMAT}")
        body = {
            "enrolment": secrets.token_hex(16),
            "epsilon": epsilon,
            "delta": delta,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with self._transaction():
            self._append("enrol", "", 0, 0, body)

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def reserve(self, *, run: str, round: int, plan: Charge, void: bool = False) -> Reservation:
        """Write one release of `plan` to disk as spent, before any row is used for it.

        Guarantees: after it returns, no crash can lose it; after it raises, nothing was written. Reservations of a
        run never exceed the plan's steps, and the charges of all runs never exceed the budget, in ε and in δ.
        Raises: BudgetExceeded; LedgerError if the run was charged for another plan.
        """
        with self._transaction():
            charge = self._charged(run, plan) or self._charge(run, plan)
            used = self._count("reserve", run)
            if used >= charge["steps"]:
                raise BudgetExceeded(f"run {run!r}: got {used} releases of {charge['steps']} planned; start a new run")
            attempt = 1 + self._count("reserve", run, round)
            self._append("reserve", run, round, attempt, {"void": void})
        return Reservation(run=run, round=round, attempt=attempt)

    def check(self, *, run: str, plan: Charge, releases: int = 1) -> None:
        """Raise if `reserve` would refuse one of the next `releases` releases of `plan`, and write nothing.

        Raises: BudgetExceeded; LedgerError if the run was charged for another plan.
        """
        with self._transaction():
            charge = self._charged(run, plan)
            if charge is None:
                self._affordable(plan)
            left = plan.steps - self._count("reserve", run)
            if left < releases:
                raise BudgetExceeded(
                    f"run {run!r}: got {left} releases left of {plan.steps} in {self._name}, expected {releases} for "
                    "the rounds to go; this run cannot be finished: start a new one, without --resume"
                )

    def commit(self, reservation: Reservation) -> None:
        """Note that the release left the device.

        Raises: LedgerError if it was not reserved, or is committed already.
        """
        place = (reservation.run, reservation.round, reservation.attempt)
        with self._transaction():
            known = self._connection.execute(
                "SELECT count(*) FROM entries WHERE kind = 'reserve' AND run = ? AND round = ? AND attempt = ?", place
            ).fetchone()[0]
            if not known:
                raise LedgerError(f"run {reservation.run!r}, round {reservation.round}: got a release never reserved")
            self._append("commit", *place, {})

    def summary(self) -> LedgerSummary:
        """Budget and spending, read in one transaction."""
        with self._transaction():
            enrolment = self._enrolment()
            charges = self._connection.execute("SELECT run, body FROM entries WHERE kind = 'charge' ORDER BY number")
            runs = tuple(self._run(run, json.loads(body)) for run, body in charges.fetchall())
        return LedgerSummary(
            enrolment=enrolment["enrolment"],
            budget_epsilon=enrolment["epsilon"],
            budget_delta=enrolment["delta"],
            spent_epsilon=sum(run.epsilon for run in runs),
            spent_delta=sum(run.delta for run in runs),
            runs=runs,
        )

    def verify(self) -> int:
        """Check the file and the chain of hashes from the first entry to the last; return the number of entries.

        Raises: LedgerError at the first entry that does not follow from the one before.
        """
        with self._transaction():
            (integrity,) = self._connection.execute("PRAGMA integrity_check(1)").fetchone()
            if integrity != "ok":
                raise LedgerError(f"ledger {self._name}: the database is damaged ({integrity})")
            before, expected = "", 1
            for row in self._connection.execute("SELECT * FROM entries ORDER BY number"):
                if row[0] != expected or row[-1] != _hash(before, row[:-1]):
                    raise LedgerError(f"ledger {self._name}: entry {expected} was changed, removed or put in later")
                before, expected = row[-1], expected + 1
            self._enrolment()
        return expected - 1

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")
        except sqlite3.IntegrityError:
            raise LedgerError(f"ledger {self._name}: got an entry that is there already") from None
        except sqlite3.Error as error:
            raise LedgerError(f"ledger {self._name}: cannot be read or written ({error})") from None

    def _append(self, kind: str, run: str, round: int, attempt: int, body: Mapping[str, Any]) -> None:
        last = self._connection.execute("SELECT number, hash FROM entries ORDER BY number DESC LIMIT 1").fetchone()
        number, before = last or (0, "")
        row = (number + 1, kind, run, round, attempt, json.dumps(body, sort_keys=True))
        self._connection.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)", (*row, _hash(before, row)))

    def _charged(self, run: str, plan: Charge) -> dict[str, Any] | None:
        charge = self._body("charge", run)
        if charge is not None and charge["digest"] != plan.digest():
            raise LedgerError(f"run {run!r}: got another plan than the one charged, expected a new run name")
        return charge

    def _charge(self, run: str, plan: Charge) -> dict[str, Any]:
        body = {
            "digest": plan.digest(),
            "epsilon": self._affordable(plan),
            "delta": plan.delta,
            "steps": plan.steps,
            "plan": plan.to_json(),
        }
        self._append("charge", run, 0, 0, body)
        return body

    def _affordable(self, plan: Charge) -> float:
        epsilon = plan.epsilon()
        budget = self._enrolment()
        rows = self._connection.execute("SELECT body FROM entries WHERE kind = 'charge'").fetchall()
        charges = [json.loads(body) for (body,) in rows]
        for name, asked in (("epsilon", epsilon), ("delta", plan.delta)):
            spent = sum(charge[name] for charge in charges)
            if spent + asked > budget[name] * (1.0 + SLACK):
                raise BudgetExceeded(
                    f"{name}: got a plan of {asked:.6g} with {spent:.6g} of {budget[name]:.6g} spent in "
                    f"{self._name}; nothing was released or spent. The data holder decides whether to enrol anew"
                )
        return epsilon

    def _enrolment(self) -> dict[str, Any]:
        body = self._body("enrol", "")
        if body is None:
            raise LedgerError(f"ledger {self._name}: got no enrolment, expected one as its first entry")
        return body

    def _body(self, kind: str, run: str) -> dict[str, Any] | None:
        row = self._connection.execute("SELECT body FROM entries WHERE kind = ? AND run = ?", (kind, run)).fetchone()
        return None if row is None else json.loads(row[0])

    def _count(self, kind: str, run: str, round: int | None = None) -> int:
        where = "kind = ? AND run = ?" + ("" if round is None else " AND round = ?")
        values = (kind, run) if round is None else (kind, run, round)
        return int(self._connection.execute(f"SELECT count(*) FROM entries WHERE {where}", values).fetchone()[0])

    def _run(self, run: str, charge: Mapping[str, Any]) -> RunSummary:
        rows = self._connection.execute("SELECT attempt, body FROM entries WHERE kind = 'reserve' AND run = ?", (run,))
        releases = rows.fetchall()
        return RunSummary(
            run=run,
            epsilon=charge["epsilon"],
            delta=charge["delta"],
            steps=charge["steps"],
            reserved=len(releases),
            committed=self._count("commit", run),
            repeated=sum(attempt > 1 for attempt, _ in releases),
            void=any(json.loads(body)["void"] for _, body in releases),
            plan=charge["plan"],
        )


def _hash(before: str, row: tuple[Any, ...]) -> str:
    return hashlib.sha256(json.dumps([before, *row]).encode()).hexdigest()
