"""One wave: messages out, answers back, and who failed."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Array, Message, RecordDict
from flwr.serverapp import Grid

from fedinfer.sums.messages import error_kind

log = logging.getLogger("fedinfer.server")


@dataclass(frozen=True, kw_only=True)
class Wave:
    """What came back: answers and kinds of errors by node, in the order of their ids; and how many said nothing."""

    contents: Mapping[int, RecordDict]
    failures: Mapping[int, str]
    silent: int

    def reasons(self) -> str:
        """Who is missing and why, in words: "1 BudgetExceeded, 2 without an answer"."""
        kinds = list(self.failures.values())
        words = [f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))]
        return ", ".join(words + ([f"{self.silent} without an answer"] if self.silent else []))


def send(grid: Grid, messages: Sequence[Message], *, timeout_s: float) -> Wave:
    """Send all of `messages` and wait for the answers."""
    contents: dict[int, RecordDict] = {}
    failures: dict[int, str] = {}
    replies = grid.send_and_receive(messages, timeout=timeout_s)
    for reply in sorted(replies, key=lambda message: message.metadata.src_node_id):
        node = reply.metadata.src_node_id
        kind = "InternalError" if reply.has_error() else error_kind(reply.content)
        if kind is None:
            contents[node] = reply.content
        else:
            failures[node] = kind
    return Wave(contents=contents, failures=failures, silent=len(messages) - len(contents) - len(failures))


def size_of(content: RecordDict) -> int:
    """The bytes of a message's records, whatever a device put there: Flower's own count refuses empty values."""
    return sum(len(key) + _size(value) for record in content.values() for key, value in record.items())


def _size(value: object) -> int:
    if isinstance(value, Array):
        return len(value.data)
    if isinstance(value, bytes | str):
        return len(value)
    return sum(map(_size, value)) if isinstance(value, list) else 8
