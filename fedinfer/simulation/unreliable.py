"""Nodes that are not always there."""

from collections.abc import Iterator, Sequence

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from fedinfer.privacy import NoiseStream
from fedinfer.simulation.engines import CohortSum, Engine, Summing, Task, sealed


class Unreliable:
    """An engine that each task reaches with probability 1 - `dropout`; the others give a SuperLink's error."""

    def __init__(self, engine: Engine, dropout: float, stream: NoiseStream) -> None:
        self._engine = engine
        self._dropout = dropout
        self._stream = stream

    def replies(self, tasks: Sequence[Task]) -> Iterator[Message]:
        there, lost = self._cast(tasks)
        yield from lost
        yield from self._engine.replies(there)

    def total(self, tasks: Sequence[Task]) -> CohortSum:
        there, lost = self._cast(tasks)
        summing = Summing()
        summing.join(self._engine.total(there))
        summing.errors += lost
        return summing.result()

    def close(self) -> None:
        self._engine.close()

    def _cast(self, tasks: Sequence[Task]) -> tuple[list[Task], list[Message]]:
        there, lost = [], []
        for task, number in zip(tasks, self._stream.uniform(len(tasks)).tolist(), strict=True):
            if number >= self._dropout:
                there.append(task)
            else:
                error = Error(ErrorCode.NODE_UNAVAILABLE, "Node Unavailable — the destination node did not answer")
                lost.append(sealed(Message(error, reply_to=task.message())))
        return there, lost
