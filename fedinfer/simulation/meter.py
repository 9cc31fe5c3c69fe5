"""How many updates a simulation made, and when it began."""

import time
from collections.abc import Iterator, Sequence

from flwr.app import Message

from fedinfer.simulation.engines import CohortSum, Engine, Task


class Meter:
    """Counts updates from `started` on, which is moved by `begin` once."""

    def __init__(self) -> None:
        self._made = self.started = time.monotonic()
        self._running = False
        self.updates = 0

    @property
    def startup_s(self) -> float:
        return self.started - self._made

    def begin(self) -> None:
        """The start-up is over, if it was not before."""
        if not self._running:
            self._running = True
            self.started = time.monotonic()

    def count(self, reply: Message) -> None:
        """Count a reply if it is an update."""
        self.updates += reply.has_content() and is_training(reply.metadata.message_type)


class Metered:
    """An engine whose replies are counted."""

    def __init__(self, engine: Engine, meter: Meter) -> None:
        self._engine = engine
        self._meter = meter

    def replies(self, tasks: Sequence[Task]) -> Iterator[Message]:
        self._meter.begin()
        for reply in self._engine.replies(tasks):
            self._meter.count(reply)
            yield reply

    def total(self, tasks: Sequence[Task]) -> CohortSum:
        self._meter.begin()
        total = self._engine.total(tasks)
        self._meter.updates += total.replies
        return total

    def close(self) -> None:
        self._engine.close()


def is_training(message_type: str) -> bool:
    """Whether a message asks for an update, or is one."""
    return message_type.split(".")[0] == "train"
