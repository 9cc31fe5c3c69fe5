"""Where a device keeps its places in secure sums between two messages: each is taken once.

A SuperNode starts a process for each message, so that memory does not reach from one stage to the next. What lies here
are secrets of rounds that are open; they never leave the device. To take a place is to remove it, durably, before
anything is computed with it: whatever crashes or runs twice afterwards has nothing to answer a second time with, and
the device has dropped out of the session.
"""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from fedinfer.errors import ProtocolViolation
from fedinfer.files import replace_file, sync_folder

# Each set-up has a chance of 2^-40 to be an unsafe one, and a server can ask for one as often as it likes.
MOST_SET_UPS = 10_000
# Places in other runs that are kept; an older one was left behind.
MOST_PLACES = 16
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Sessions(Protocol):
    """Places by the name of their run."""

    def take(self, run: str) -> bytes:
        """The place in `run`, which is no longer there afterwards.

        Raises: ProtocolViolation if there is none.
        """
        ...

    def put(self, run: str, held: bytes) -> None:
        """Begin a place in `run`; one that was there is over."""
        ...

    def put_back(self, run: str, held: bytes) -> None:
        """A place that was taken, as it is now; it is over if another was begun meanwhile."""
        ...

    def count_set_up(self) -> None:
        """Raises: ProtocolViolation for one more set-up than this device takes part in."""
        ...


class MemorySessions:
    """In this process alone."""

    def __init__(self) -> None:
        self._places: dict[str, bytes] = {}
        self._set_ups = 0

    def take(self, run: str) -> bytes:
        held = self._places.pop(run, None)
        if held is None:
            raise _no_place(run)
        return held

    def put(self, run: str, held: bytes) -> None:
        self._places[run] = held
        while len(self._places) > MOST_PLACES:
            self._places.pop(next(iter(self._places)))

    def put_back(self, run: str, held: bytes) -> None:
        if run not in self._places:
            self.put(run, held)

    def count_set_up(self) -> None:
        self._set_ups = _one_more(self._set_ups)


class FolderSessions:
    """In a folder that only its owner may read, and only until the machine restarts.

    Guarantees: of processes that take the same place at once, one gets it. A place from before a restart, such as one
    out of a backup, is none. The number of set-ups stays.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def take(self, run: str) -> bytes:
        with self._locked():
            path = self._place(run)
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                raise _no_place(run) from None
            path.unlink()
            sync_folder(self._folder)
        mark = _boot_mark()
        if data[: len(mark)] != mark:
            raise _no_place(run)
        return data[len(mark) :]

    def put(self, run: str, held: bytes) -> None:
        with self._locked():
            self._write(run, held)

    def put_back(self, run: str, held: bytes) -> None:
        with self._locked():
            if not self._place(run).exists():
                self._write(run, held)

    def count_set_up(self) -> None:
        with self._locked():
            path = self._folder / "set-ups"
            try:
                before = int(path.read_text(encoding="ascii")) if path.exists() else 0
            except ValueError:
                raise ProtocolViolation(f"{path}: got no number, expected how often this device has set up") from None
            replace_file(path, str(_one_more(before)).encode(), mode=0o600)

    def _write(self, run: str, held: bytes) -> None:
        # What a crash left of a file that was being written, and places that nobody may take any more.
        for path in self._folder.glob(".*.part"):
            path.unlink()
        replace_file(self._place(run), _boot_mark() + held, mode=0o600)
        places = sorted(self._folder.glob("*.place"), key=lambda path: path.stat().st_mtime_ns)
        for number, path in enumerate(reversed(places)):
            if number >= MOST_PLACES or not _is_of_this_start(path):
                path.unlink()

    def _place(self, run: str) -> Path:
        return self._folder / f"{hashlib.sha256(run.encode()).hexdigest()[:32]}.place"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(self._folder / "lock", os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _no_place(run: str) -> ProtocolViolation:
    return ProtocolViolation(
        f"secure sum: got run {run!r}, in which this device has no place or has answered already, expected the next "
        "step of a session; set up again"
    )


def _one_more(set_ups: int) -> int:
    if set_ups >= MOST_SET_UPS:
        raise ProtocolViolation(
            f"set-ups: got {set_ups} of this device already, expected fewer; a server may be trying for a bad one. "
            "Make a new identity to go on"
        )
    return set_ups + 1


def _boot_mark() -> bytes:
    """32 bytes that are others after a restart."""
    return hashlib.sha256(BOOT_ID.read_bytes() if BOOT_ID.exists() else b"").digest()


def _is_of_this_start(path: Path) -> bool:
    mark = _boot_mark()
    with path.open("rb") as file:
        return file.read(len(mark)) == mark
