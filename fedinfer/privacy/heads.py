"""How far a ledger has come, kept where the ledger is not: so an old copy put in its place is found out.

A ledger on one disk cannot tell that the disk was set back. A `Head` can: it remembers the number and the hash of the
newest entry and never goes back. `HeadFile` keeps it in a file, which belongs on another disk or under another account
than the ledger. A server may keep it too: whatever has `read` and `advance` will do. The ledger notes where its
head is, so another ledger in its place may name another head or none: who opens it should say which to ask.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from fedinfer.errors import LedgerError
from fedinfer.files import replace_file

FORMAT = 1
MAX_BYTES = 4096
# A transaction writes at most a charge and a reservation; a crash after it leaves the head that far behind.
MOST_BEHIND = 2


@dataclass(frozen=True, kw_only=True)
class Mark:
    """The newest entry of a ledger that somebody has seen."""

    enrolment: str
    number: int
    hash: str


class Head(Protocol):
    """Keeps the newest mark of one ledger."""

    def read(self) -> Mark | None:
        """The newest mark, or None if there was never one.

        Raises: LedgerError if it cannot be read.
        """
        ...

    def advance(self, mark: Mark) -> None:
        """Keep `mark`, durably, unless a newer one is kept already: a head never goes back.

        Raises: LedgerError if it cannot be kept, or the head is another ledger's.
        """
        ...


@dataclass(frozen=True)
class HeadFile:
    """A head in a file, which is replaced whole; several processes and threads may advance it.

    A file beside it, `PATH.lock`, is what they wait for.
    """

    path: Path

    def read(self) -> Mark | None:
        try:
            with self.path.open("rb") as file:
                fields = json.loads(file.read(MAX_BYTES))
            if fields.pop("format") != FORMAT:
                raise ValueError
            mark = Mark(**fields)
            if (type(mark.enrolment), type(mark.number), type(mark.hash)) != (str, int, str):
                raise ValueError
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LedgerError(f"head file {self.path}: cannot be read ({error.strerror})") from None
        except (ValueError, TypeError, KeyError, AttributeError):
            raise LedgerError(f"head file {self.path}: got a file that is not a head of format {FORMAT}") from None
        return mark

    def advance(self, mark: Mark) -> None:
        try:
            with self._locked():
                kept = self.read()
                if kept is not None and kept.enrolment != mark.enrolment:
                    raise LedgerError(
                        f"head file {self.path}: got the head of ledger {kept.enrolment}, expected {mark.enrolment}; "
                        "each ledger needs a head file of its own"
                    )
                if kept is None or kept.number < mark.number:
                    replace_file(self.path, json.dumps({"format": FORMAT, **asdict(mark)}).encode())
        except OSError as error:
            raise LedgerError(f"head file {self.path}: cannot be written ({error.strerror})") from None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def check_head(name: str, head: Head, mark: Mark, hash_at: Callable[[int], str | None]) -> None:
    """Ask `head` whether ledger `name`, whose newest entry is `mark`, is the one it knows, and whole.

    Raises: LedgerError for a ledger that was rolled back, and for a head that is missing, older than a crash leaves
    it, or another ledger's.
    """
    kept = head.read()
    place = head.path if isinstance(head, HeadFile) else "kept elsewhere"
    way_out = f"if you know why, `fedinfer ledger verify {name} --head FILE` checks the ledger and makes a new head"
    if kept is None:
        raise LedgerError(f"ledger {name}: its head ({place}) is missing; {way_out}")
    check_not_rolled_back(name, kept, mark, hash_at)
    if mark.number - kept.number > MOST_BEHIND:
        raise LedgerError(
            f"ledger {name}: its head ({place}) stands at entry {kept.number} of {mark.number}: an old copy of the "
            f"head is in its place; {way_out}"
        )


def check_not_rolled_back(name: str, kept: Mark, mark: Mark, hash_at: Callable[[int], str | None]) -> None:
    """Raises: LedgerError if a head knows of an entry (`kept`) that is not in the ledger, or is another ledger's."""
    if kept.enrolment != mark.enrolment:
        raise LedgerError(
            f"ledger {name}: got the head of ledger {kept.enrolment}, expected {mark.enrolment}; each ledger needs a "
            "head of its own, and if it has, another ledger was put in this one's place"
        )
    if kept.number > mark.number:
        raise rolled_back(name, f"its head knows of {kept.number} entries, it has {mark.number}")
    if hash_at(kept.number) != kept.hash:
        raise rolled_back(name, f"its head knows another entry {kept.number}")


def rolled_back(name: str, how: str) -> LedgerError:
    """The error for a ledger that has forgotten something."""
    return LedgerError(
        f"ledger {name}: rolled back: {how}. An older copy is in its place: put the newest back, or enrol anew with a "
        "smaller budget, because what the lost entries spent stays spent"
    )
