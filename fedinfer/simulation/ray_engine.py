"""Runs the clients of a `LocalTask` in whole cohorts on Ray workers, each with a share of the nodes.

A worker keeps the rows of its nodes. What a node's `Context` holds travels there and back, so that a worker that dies
takes nothing with it: its share is done again by the worker that takes its place.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from flwr.app import Message, RecordDict
from ray.exceptions import RayActorError

from fedinfer.errors import RemoteError
from fedinfer.local_app import LocalApp
from fedinfer.simulation.engines import CohortSum, Summing, Task, identity
from fedinfer.simulation.vectorised import Vectorised

TRIES = 3


class Worker:
    """What runs on a Ray worker: a vectorised engine of one thread."""

    def __init__(self, app: LocalApp, memory_bytes: int) -> None:
        self._engine = Vectorised(app, memory_bytes=memory_bytes, workers=1)

    def replies(self, tasks: Sequence[Task]) -> tuple[list[Message], list[RecordDict]]:
        """The replies, and the nodes' states in the order of `tasks`."""
        with identity(tasks[0].context.run_id):
            return list(self._engine.replies(tasks)), [task.context.state for task in tasks]

    def total(self, tasks: Sequence[Task]) -> tuple[CohortSum, list[RecordDict]]:
        """The sum, and the nodes' states in the order of `tasks`."""
        with identity(tasks[0].context.run_id):
            return self._engine.total(tasks), [task.context.state for task in tasks]


class RayCohorts:
    """A `LocalApp` on `workers` Ray workers (default: as many as the cluster has CPUs).

    Raises: RemoteError if a share of the work kills three workers in a row.
    """

    def __init__(self, app: LocalApp, *, memory_bytes: int, workers: int | None = None) -> None:
        self._started = not ray.is_initialized()
        if self._started:
            _connect(workers)
        count = workers or int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
        remote: Any = ray.remote(Worker)
        held = ray.put(app)
        # What takes a dead worker's place asks for no processor: where a node was lost, none may be free.
        self._make: Callable[[int], Any] = lambda cpus: remote.options(num_cpus=cpus).remote(held, memory_bytes)
        self._workers = [self._make(1) for _ in range(count)]

    def replies(self, tasks: Sequence[Task]) -> Iterator[Message]:
        for _, replies in self._shared("replies", tasks):
            yield from replies

    def total(self, tasks: Sequence[Task]) -> CohortSum:
        summing = Summing()
        # In the order of the workers: a sum of floats must not depend on who was first.
        for _, total in sorted(self._shared("total", tasks), key=lambda done: done[0]):
            summing.join(total)
        return summing.result()

    def close(self) -> None:
        for worker in self._workers:
            ray.kill(worker)
        if self._started:
            ray.shutdown()

    def _shared(self, method: str, tasks: Sequence[Task]) -> Iterator[tuple[int, Any]]:
        """Each worker's number and what its `method` gives for its share of the tasks, in the order they are done."""
        running: dict[Any, tuple[int, Sequence[Task], int]] = {}
        for index, worker in enumerate(self._workers):
            # A node goes to the same worker in each round, which has its rows.
            own: Sequence[Task] = [task for task in tasks if task.context.node_id % len(self._workers) == index]
            if own:
                running[getattr(worker, method).remote(own)] = (index, own, 1)
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            index, share, tried = running.pop(done)
            try:
                outcome, states = ray.get(done)
            except RayActorError:
                if tried == TRIES:
                    raise RemoteError(
                        f"ray: got {TRIES} dead workers on the same {len(share)} clients; see Ray's logs"
                    ) from None
                self._workers[index] = self._make(0)
                again = getattr(self._workers[index], method).remote(share)
                running[again] = (index, share, tried + 1)
                continue
            for task, state in zip(share, states, strict=True):
                task.context.state = state
            yield index, outcome


def _connect(workers: int | None) -> None:
    """To the cluster of RAY_ADDRESS, or to one that is started here."""
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
        return
    # A worker imports from where this process does.
    path = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}
    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, runtime_env=path)
