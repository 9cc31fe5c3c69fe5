"""State that must not be used twice: one thread at a time, and no forked copy."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fedinfer.errors import ProtocolViolation


class Alone:
    """A lock that belongs to the process that made it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._ended = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Nobody else works on the state meanwhile.

        Raises: ProtocolViolation in a process that was forked from the maker's: it would answer a second time; and
            after `end`.
        """
        if os.getpid() != self._process:
            raise ProtocolViolation("secure sum: got a forked process, expected the maker's; set up anew there")
        with self._lock:
            if self._ended:
                raise ProtocolViolation("secure sum: got a step of a member that was suspended; resume it first")
            yield

    def end(self) -> None:
        """The state has moved elsewhere; call it inside the lock."""
        self._ended = True
