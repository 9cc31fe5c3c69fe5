"""One wave: messages out, answers back one by one as they arrive, and who failed."""

import logging
import time
from collections.abc import Iterator, Sequence

from flwr.app import Array, Message, RecordDict
from flwr.serverapp import Grid

from fedinfer.sums.messages import error_kind

log = logging.getLogger("fedinfer.server")
POLL_S = 0.2


class Wave:
    """Messages that are sent when it is made; to be gone through once.

    An answer is held by nobody but whoever takes it: of a thousand masked vectors there are those that a grid hands
    over together, and no others. Afterwards it says who failed, and how many bytes came.
    """

    def __init__(self, grid: Grid, messages: Sequence[Message], *, timeout_s: float, name: str) -> None:
        self._grid, self._name, self._count = grid, name, len(messages)
        self._deadline = time.monotonic() + timeout_s
        self._waiting = dict.fromkeys(grid.push_messages(messages))
        self._good = 0
        self.failures: dict[int, str] = {}
        self.bytes_up = 0

    def __iter__(self) -> Iterator[tuple[int, RecordDict]]:
        """The answers that are not errors, with the ids of their nodes, until all are there or the time is up."""
        for reply in self._arriving():
            node = reply.metadata.src_node_id
            kind = "InternalError" if reply.has_error() else error_kind(reply.content)
            if kind is None:
                self._good += 1
                self.bytes_up += size_of(reply.content)
                yield node, reply.content
            else:
                self.failures[node] = kind
        if self._good < self._count:
            log.warning("wave %r: going on without some (%s)", self._name, self.reasons())

    def reasons(self) -> str:
        """Who is missing and why, in words: "1 BudgetExceeded, 2 without an answer"."""
        kinds = list(self.failures.values())
        words = [f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))]
        silent = self._count - self._good - len(kinds)
        return ", ".join(words + ([f"{silent} without an answer"] if silent else []))

    def _arriving(self) -> Iterator[Message]:
        while self._waiting:
            came = list(self._grid.pull_messages(list(self._waiting)))
            for reply in came:
                self._waiting.pop(reply.metadata.reply_to_message_id, None)
                yield reply
            if self._waiting and not came:
                if time.monotonic() > self._deadline:
                    return
                time.sleep(POLL_S)


def size_of(content: RecordDict) -> int:
    """The bytes of a message's records, whatever a device put there: Flower's own count refuses empty values."""
    return sum(len(key) + _size(value) for record in content.values() for key, value in record.items())


def _size(value: object) -> int:
    if isinstance(value, Array):
        return len(value.data)
    if isinstance(value, bytes | str):
        return len(value)
    return sum(map(_size, value)) if isinstance(value, list) else 8
