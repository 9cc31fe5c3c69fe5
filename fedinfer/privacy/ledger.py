"""The privacy ledger: on the data holder's disk, what was promised and what was released.

A release is reserved (and on disk) before rows are used, and committed after it left. A crash in between leaves it
spent. The ledger is an append-only list of entries in SQLite (`ledger_store.py`), each with the hash of the one before
and a signature (`signing.py`), and decides by reading them (`ledger_history.py`).

A plan that is fixed in advance is charged whole, at its first release. Plans and single releases of any kind compose
by the filter that was chosen when the ledger was made (`filters.py`), also when each is chosen by the answers before.
A repeated round draws fresh noise and is one more release of the plan; when its steps are used up, the ledger refuses.

Adversary: crashes, retries, several processes at once, a server that asks again; whoever changes entries without the
signing key; with a head kept elsewhere (`heads.py`), whoever puts an old copy from after the head was given in the
ledger's place. A ledger says itself which key and which head it has. So whoever puts another ledger in its place, or a
copy from before the head, is found out only if the data holder pins them at `open`. Not: somebody who may write ledger
and key, and the head or how it is pinned.
"""

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedinfer.errors import BadUsage, BudgetExceeded, LedgerError
from fedinfer.privacy.filters import Charge, FilterName, choose_filter
from fedinfer.privacy.heads import Head, HeadFile, Mark, check_head, check_not_rolled_back, rolled_back
from fedinfer.privacy.ledger_export import check_entries
from fedinfer.privacy.ledger_history import Charged, History, Run, charge_to_json
from fedinfer.privacy.ledger_migration import beside, finish_migration, migrate
from fedinfer.privacy.ledger_store import FORMAT, Entry, Store, make_entry
from fedinfer.privacy.ledger_summary import LedgerSummary, RunSummary, summarise
from fedinfer.privacy.signing import SigningKey

__all__ = ["Charge", "LedgerSummary", "PrivacyLedger", "Reservation", "RunSummary"]

Write = Callable[[str, str, int, int, Mapping[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """One release that the ledger has on disk as spent.

    `repeated` says that it was reserved before: whoever holds it may send again the very bytes that were made then,
    and must not draw noise for it.
    """

    run: str
    round: int
    attempt: int
    repeated: bool = False


class PrivacyLedger:
    """An open ledger. One object belongs to one thread; several processes may hold the same file.

    >>> with PrivacyLedger.scratch(epsilon=1.0, delta=1e-5) as ledger:
    ...     summary = ledger.summary()
    >>> summary.budget_epsilon, summary.spent_epsilon, summary.filter
    (1.0, 0.0, {'name': 'basic'})
    """

    def __init__(
        self, store: Store, name: str, *, key: SigningKey | None, head: Head | None, public_key: str | None
    ) -> None:
        self._store = store
        self._name = name
        self._signing_key = key
        self._pinned_head = head
        self._pinned_key = public_key
        self._history = History(name)

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        epsilon: float,
        delta: float,
        filter: FilterName = "basic",
        key: Path | None = None,
        head: Path | None = None,
    ) -> Self:
        """Make a new ledger file with a budget and a random enrolment id, and open it.

        `key` is where the signing key is, or is made (default: `PATH.key`); `head` where to keep a head file.
        Raises: LedgerError if the file is there already, or an old one's journal or head is; BadUsage for a budget
        that cannot be.
        """
        key_path = None if key is None else key.absolute()
        keeper = None if head is None else HeadFile(head.absolute())
        draft = _enrolment(epsilon=epsilon, delta=delta, filter=filter, key=key_path, head=keeper)
        if path.exists():
            raise LedgerError(f"ledger {path}: got an existing file, expected none; a budget is set once")
        if keeper is not None and keeper.read() is not None:
            raise LedgerError(
                f"head file {keeper.path}: got one of another ledger, expected none; choose another place"
            )
        signing_key = SigningKey.open_or_make(key_path or beside(path))
        first = _first(signing_key, draft)
        Store.create(path, first)
        if keeper is not None:
            keeper.advance(Mark(enrolment=draft["enrolment"], number=first.number, hash=first.hash))
        return cls.open(path)

    @classmethod
    def scratch(cls, *, epsilon: float, delta: float) -> Self:
        """A ledger in memory, for evaluations on public data: it protects nobody and is gone with the process."""
        key = SigningKey.generate()
        draft = _enrolment(epsilon=epsilon, delta=delta, filter="basic", key=None, head=None)
        return cls(Store.in_memory(_first(key, draft)), ":memory:", key=key, head=None, public_key=None)

    @classmethod
    def open(cls, path: Path, *, head: Head | None = None, public_key: str | None = None) -> Self:
        """Open a ledger file; one of format 1 is brought to this format, unless something is pinned.

        `head` and `public_key` (hex) are what the data holder knows of the ledger from elsewhere. `head` is asked
        instead of the recorded one, and advanced.

        Guarantees: with `public_key`, no ledger of another key opens; with `head`, no other ledger does, and no copy
        that lacks a release that was made. With either, a file of format 1 is refused and left as it was: it has no
        key, and no head knows it.
        Raises: LedgerError if there is none, or it is not a ledger, or its entries do not verify, or its head says
        that it was set back, or it is not the one that was pinned.
        """
        store = _of_this_format(path, pinned=head is not None or public_key is not None)
        ledger = cls(store, str(path), key=None, head=head, public_key=public_key)
        try:
            with ledger._reading():
                pass
        except BaseException:
            ledger.close()
            raise
        return ledger

    @classmethod
    def open_with_new_head(cls, path: Path, *, head: Path, public_key: str | None = None) -> Self:
        """Open a ledger and keep its head in the file `head` from now on: the old one was lost, moved, or never there.

        The entries are verified first, under `public_key` if it is given. It is for the data holder to decide: what
        an old copy of the ledger has forgotten, nobody remembers once the head that knew it is gone.
        Raises: LedgerError if they do not verify, or if the recorded head or the one in `head` knows of entries that
        this ledger has not: then it was rolled back.
        """
        keeper = HeadFile(head.absolute())
        store = _of_this_format(path, pinned=public_key is not None)
        ledger = cls(store, str(path), key=None, head=keeper, public_key=public_key)
        try:
            with ledger._store.transaction():
                ledger._store.check_file()
                history = check_entries(str(path), ledger._store.entries(), public_key=public_key)
                known = {keeper.path, history.head_path or keeper.path}
                for kept in (HeadFile(place).read() for place in known):
                    if kept is not None:
                        check_not_rolled_back(str(path), kept, history.mark, ledger._store.hash_at)
            keeper.advance(history.mark)
            if history.head_path != keeper.path:
                with ledger._writing() as write:
                    write("head", "", 0, ledger._history.number, {"head": str(keeper.path)})
        except BaseException:
            ledger.close()
            raise
        return ledger

    def close(self) -> None:
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def reserve(
        self, *, run: str, round: int, plan: Charge, attempt: int | None = None, void: bool = False
    ) -> Reservation:
        """Write one release of `plan` to disk as spent, before any row is used for it.

        Without `attempt` it is a new release with fresh noise. With the number of an attempt that was reserved
        before, nothing is written and the same reservation comes back as `repeated`: its holder may only send again
        the bytes that it stored.

        Guarantees: after it returns, no crash can lose it; after BudgetExceeded, nothing was written. Reservations of
        a run never exceed the plan's steps, and what all runs were charged never exceeds the budget.
        Raises: BudgetExceeded; LedgerError if the run was charged for another plan, an attempt before this one is
        missing, or the release is on disk but the head cannot be advanced (it is then spent, and must not be made).
        """
        if attempt is not None and attempt < 1:
            raise BadUsage(f"attempt: got {attempt}, expected at least 1")
        with self._writing() as write:
            known = self._known(run, plan)
            made = 0 if known is None else known.attempts.get(round, 0)
            if attempt is not None and attempt <= made:
                return Reservation(run=run, round=round, attempt=attempt, repeated=True)
            if attempt is not None and attempt != made + 1:
                raise LedgerError(
                    f"run {run!r}, round {round}: got attempt {attempt}, expected {made + 1}; none may be left out"
                )
            if known is None:
                write("charge", run, 0, 0, charge_to_json(self._affordable(plan)))
            elif known.reserved >= known.charge.steps:
                raise BudgetExceeded(
                    f"run {run!r}: got {known.reserved} releases of {known.charge.steps} planned; start a new run"
                )
            write("reserve", run, round, made + 1, {"void": void})
        return Reservation(run=run, round=round, attempt=made + 1)

    def check(self, *, run: str, plan: Charge, releases: int = 1) -> None:
        """Raise if `reserve` would refuse one of the next `releases` releases of `plan`, and write nothing.

        Raises: BudgetExceeded; LedgerError if the run was charged for another plan.
        """
        with self._reading():
            known = self._known(run, plan)
            if known is None:
                self._affordable(plan)
            left = plan.steps - (0 if known is None else known.reserved)
            if left < releases:
                raise BudgetExceeded(
                    f"run {run!r}: got {left} releases left of {plan.steps} in {self._name}, expected {releases} for "
                    "the rounds to go; this run cannot be finished: start a new one, without --resume"
                )

    def commit(self, reservation: Reservation) -> None:
        """Note that the release left the device. For a repeated one that is noted already, nothing is written.

        Raises: LedgerError if it was not reserved, or is committed already.
        """
        place = (reservation.round, reservation.attempt)
        with self._writing() as write:
            run = self._history.runs.get(reservation.run)
            if run is None or not 1 <= reservation.attempt <= run.attempts.get(reservation.round, 0):
                raise LedgerError(f"run {reservation.run!r}, round {reservation.round}: got a release never reserved")
            if place not in run.committed:
                write("commit", reservation.run, *place, {})
            elif not reservation.repeated:
                raise LedgerError(
                    f"run {reservation.run!r}, round {reservation.round}: got a commit that is there already"
                )

    def summary(self) -> LedgerSummary:
        """Budget and spending, read in one transaction."""
        with self._reading():
            return summarise(self._history)

    def verify(self, *, public_key: str | None = None) -> int:
        """Check the file, the head, and hash, signature and sense of each entry; return the number of entries.

        `public_key` is the one that the ledger is expected to have, from another source than the ledger.
        Raises: LedgerError at the first entry that is not right.
        """
        with self._reading():
            self._store.check_file()
            return check_entries(self._name, self._store.entries(), public_key=public_key).number

    def entries(self) -> tuple[Entry, ...]:
        """All entries, for an export."""
        with self._reading():
            return tuple(self._store.entries())

    def _head(self) -> Head | None:
        if self._pinned_head is not None:
            return self._pinned_head
        return None if self._history.head_path is None else HeadFile(self._history.head_path)

    def _key(self) -> SigningKey:
        if self._signing_key is None:
            path = self._history.key_path or beside(Path(self._name))
            finish_migration(path)
            key = SigningKey.open(path)
            if key.public != self._history.public_key:
                raise LedgerError(f"ledger key {path}: got the key of another ledger; put this ledger's key there")
            self._signing_key = key
        return self._signing_key

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with self._store.transaction():
            self._catch_up()
            yield

    @contextmanager
    def _writing(self) -> Iterator[Write]:
        """A transaction that ends with its entries on disk and, after that, the head at the last of them."""
        added: list[Entry] = []

        def write(kind: str, run: str, round: int, attempt: int, body: Mapping[str, Any]) -> None:
            number, before = (added[-1].number, added[-1].hash) if added else (self._history.number, self._history.hash)
            entry = make_entry(
                self._key(),
                number=number + 1,
                before=before,
                kind=kind,
                run=run,
                round=round,
                attempt=attempt,
                body=body,
            )
            self._store.append(entry)
            added.append(entry)

        with self._store.transaction():
            self._catch_up()
            # Brought up to date under the lock, the head never falls more than one transaction behind.
            self._advance_head()
            yield write
        for entry in added:
            self._history.add(entry, signature=False)
        if added:
            self._advance_head()

    def _catch_up(self) -> None:
        """Read what was added since the last time, and ask the head whether anything is missing."""
        history = self._history
        if history.number and self._store.hash_at(history.number) != history.hash:
            raise rolled_back(self._name, "it had an entry that is gone")
        fresh = list(self._store.entries(after=history.number))
        if fresh:
            # The last signature vouches for the others; until it is checked, none of them may be kept.
            history = deepcopy(history)
        for entry in fresh:
            history.add(entry, signature=entry is fresh[-1])
        history.check_key(self._pinned_key)
        self._history = history
        head = self._head()
        if head is not None:
            check_head(self._name, head, history.mark, self._store.hash_at)

    def _advance_head(self) -> None:
        head = self._head()
        if head is not None:
            head.advance(self._history.mark)

    def _known(self, run: str, plan: Charge) -> Run | None:
        """The run if it was charged for, then for this plan."""
        known = self._history.runs.get(run)
        if known is not None and known.charge.digest != plan.digest():
            raise LedgerError(f"run {run!r}: got another plan than the one charged, expected a new run name")
        return known

    def _affordable(self, plan: Charge) -> Charged:
        """What `plan` is charged.

        Raises: BudgetExceeded if it does not fit; LedgerError if it is for other neighbours, or has no such numbers.
        """
        rule = self._history.enrolment.filter
        body, steps = plan.to_json(), plan.steps
        if type(steps) is not int or steps < 1:
            raise LedgerError(f"steps: got {steps}, expected a whole number of at least 1")
        charge = Charged(
            kind=str(body.get("kind", type(plan).__name__)),
            digest=plan.digest(),
            steps=steps,
            cost=rule.cost(plan),
            plan=body,
        )
        self._history.check_neighbours(charge)
        try:
            rule.check(self._history.spent, charge.cost)
        except BudgetExceeded as refused:
            raise BudgetExceeded(f"ledger {self._name}: {refused}") from None
        return charge


def _of_this_format(path: Path, *, pinned: bool) -> Store:
    """Open a ledger file, and bring it to this format unless a key or a head is pinned: then it must have one."""
    store = Store.open(path)
    try:
        if store.format != FORMAT:
            if pinned:
                raise LedgerError(
                    f"ledger {path}: got format {store.format}, which has no key and no head, expected the ledger "
                    "whose key or head is pinned; put that back"
                )
            migrate(store, path)
    except BaseException:
        store.close()
        raise
    return store


def _enrolment(
    *, epsilon: float, delta: float, filter: FilterName, key: Path | None, head: HeadFile | None
) -> dict[str, Any]:
    rule = choose_filter(filter, epsilon=epsilon, delta=delta)
    return {
        "enrolment": secrets.token_hex(16),
        "epsilon": float(epsilon),
        "delta": float(delta),
        "filter": rule.to_json(),
        "key": None if key is None else str(key),
        "head": None if head is None else str(head.path),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _first(key: SigningKey, draft: Mapping[str, Any]) -> Entry:
    body = {**draft, "public_key": key.public}
    return make_entry(key, number=1, before="", kind="enrol", run="", round=0, attempt=0, body=body)
