"""Runs any ClientApp in a pool of processes; a node's state is carried there and back with its message."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool

import torch
from flwr.app import Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from joblib.externals.loky import ProcessPoolExecutor  # type: ignore[import-untyped]

from fedinfer.simulation.engines import CohortSum, Task, answer, identity, sealed, total_of

# So many pieces of work a process and wave: a slow client holds up a piece and not half of the cohort.
PIECES = 4


class Processes:
    """A pool of `workers` processes, each with its own copy of the ClientApp.

    The processes are started afresh, not forked, so that no lock or noise stream of this one lives on in them. If one
    dies, the clients of this wave that had no answer yet give error replies, and the pool starts again for the next.
    """

    def __init__(self, client_app: ClientApp, *, workers: int | None = None) -> None:
        self._client_app = client_app
        self._workers = workers or os.cpu_count() or 1
        self._pool = self._start()

    def replies(self, tasks: Sequence[Task]) -> Iterator[Message]:
        size = -(-len(tasks) // (self._workers * PIECES)) or 1
        pieces = [tasks[start : start + size] for start in range(0, len(tasks), size)]
        running = {self._pool.submit(_answers, piece): piece for piece in pieces}
        died = False
        for future in as_completed(running):
            piece = running[future]
            try:
                outcomes = future.result()
            except BrokenProcessPool:
                died = True
                for task in piece:
                    error = Error(ErrorCode.CLIENT_APP_CRASHED, "a process died")
                    yield sealed(Message(error, reply_to=task.message()))
                continue
            for task, (reply, state) in zip(piece, outcomes, strict=True):
                task.context.state = state
                yield reply
        if died:
            self.close()
            self._pool = self._start()

    def total(self, tasks: Sequence[Task]) -> CohortSum:
        # In the order of the tasks: a sum of floats must not depend on who was first.
        place = {task.context.node_id: number for number, task in enumerate(tasks)}
        replies = sorted(self.replies(tasks), key=lambda reply: place[reply.metadata.src_node_id])
        return total_of(tasks, replies)

    def close(self) -> None:
        self._pool.shutdown(wait=True, kill_workers=True)

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(max_workers=self._workers, initializer=_Worker.begin, initargs=(self._client_app,))


class _Worker:
    """What a process of the pool keeps between pieces of work."""

    client_app: ClientApp

    @staticmethod
    def begin(client_app: ClientApp) -> None:
        torch.set_num_threads(1)
        _Worker.client_app = client_app


def _answers(tasks: Sequence[Task]) -> list[tuple[Message, RecordDict]]:
    with identity(tasks[0].context.run_id):
        return [(answer(_Worker.client_app, task), task.context.state) for task in tasks]
