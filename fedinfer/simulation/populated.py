"""A grid whose nodes come and go and take their time, on a virtual clock.

A ServerApp written for Flower sees what it would see of such a federation: only those who are there have a node id,
a message to one that is not gives the error of a node that is not there, and who is late is not among the replies.
Clients do their work when its answer is first needed, together with all others who were asked by then; what they
answer does not depend on it.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import compress
from typing import NamedTuple

import numpy as np
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from numpy.typing import NDArray

from fedinfer.errors import BadUsage
from fedinfer.privacy import PrivacyPlan
from fedinfer.simulation.clock import Floats, VirtualClock, Wait
from fedinfer.simulation.engines import CohortSum, Engine, Summing, Task, sealed
from fedinfer.simulation.grid import Config, SimulatedGrid
from fedinfer.simulation.population import Answers, Population, check_claim
from fedinfer.simulation.waves import Waves

# How long a server waits before it asks again who is there. Flower's strategies ask twice before they begin to wait.
POLL_S = 60.0
ASKED_AT_ONCE = 2


class Trip(NamedTuple):
    """A message on its way: what will be heard of it, and when."""

    task: Task
    heard_s: float
    answered: bool


class PopulatedGrid(SimulatedGrid):
    """A simulated grid with a `population` and a `clock`; node i is client i of the population.

    Time passes while the server waits: `send_and_receive` waits by `wait` and its own timeout, `pull_messages` for the
    next answer; and to ask again and again who is there takes `POLL_S` each time. A node that is still busy begins its
    next task when it is done.

    `plan` is that of the clients' task, if they have one.
    Raises: BadUsage for a plan that claims more than the population allows (`check_claim`).
    """

    def __init__(
        self,
        engine: Engine,
        *,
        population: Population,
        plan: PrivacyPlan | None,
        nodes: int,
        configure: Callable[[int], Config],
        run_config: Config,
        waves: Waves | None = None,
    ) -> None:
        super().__init__(engine, nodes=nodes, configure=configure, run_config=run_config, waves=waves)
        if plan is not None:
            check_claim(plan, population)
        self.population = population
        self.plan = plan
        self.clock = VirtualClock()
        self._wait = Wait()
        self._asked = 0
        self._numbers = 0
        self._free_s: dict[int, float] = {}
        self._trips: dict[str, Trip] = {}
        self._waiting: list[Task] = []

    @property
    def wait(self) -> Wait:
        """How long rounds wait for stragglers."""
        return self._wait

    @wait.setter
    def wait(self, wait: Wait) -> None:
        """Raises: BadUsage for the first answers only, under a plan whose clients may be removed.

        Without one of the first, another client would be among them: the sum would change by two contributions.
        """
        plan = self.plan if self.plan is not None and self.plan.unit == "client" else None
        if wait.first is not None and plan is not None and plan.relation != "add or remove one, slots fixed":
            raise BadUsage(
                f"wait: got the first {wait.first} answers under a plan for {plan.relation!r}, in which one client's "
                "place would go to another; expected all answers, a deadline or a Cyclic sampler"
            )
        self._wait = wait

    def there(self, node_ids: Sequence[int] | range) -> NDArray[np.bool_]:
        """Which of the nodes are there now."""
        return self.population.there(np.asarray(node_ids, np.int64) - self._nodes.start, self.clock.now_s)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes that are there; a third question in a row, and each that follows, comes `POLL_S` later."""
        if self._asked >= ASKED_AT_ONCE:
            self.clock.move_to(self.clock.now_s + POLL_S)
        self._asked += 1
        return (np.flatnonzero(self.there(self._nodes)) + self._nodes.start).tolist()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send all messages and return their ids."""
        return list(self._push(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """What has come of `message_ids` and was not pulled before; if nothing has, wait for the next to come."""
        trips = {message_id: self._trips[message_id] for message_id in message_ids if message_id in self._trips}
        if trips:
            self.clock.move_to(min(trip.heard_s for trip in trips.values()))
        return self._pulled([key for key, trip in trips.items() if trip.heard_s <= self.clock.now_s])

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages, and return what came of them while the server waited, in the order in which it came.

        `timeout` is in virtual seconds. Who is late has done its work for nothing.
        """
        wait = self._wait
        if timeout is not None:
            wait = replace(wait, timeout_s=timeout if wait.timeout_s is None else min(timeout, wait.timeout_s))
        started = time.monotonic()
        trips = self._push(messages)
        asked = [trip.task for trip in trips.values()]
        heard_s = np.array([trip.heard_s for trip in trips.values()], np.float64)
        in_time = self._until_closed(wait, heard_s, np.array([trip.answered for trip in trips.values()], np.bool_))
        taken = list(compress(trips, in_time))
        for late in trips.keys() - taken:
            del self._trips[late]
        replies = self._pulled(taken)
        self._told(replies, asked, started)
        return replies

    def sum_of_updates(self, content: RecordDict, node_ids: Iterable[int], *, message_type: str = "train") -> CohortSum:
        """The sum of the updates that came while the server waited; who was late is in neither sum nor errors."""
        started = time.monotonic()
        tasks = [Task(content, message_type, self._context(node_id)) for node_id in node_ids]
        fates = self._send(tasks)
        in_time = self._until_closed(self._wait, fates.heard_s, fates.answered)
        self._work()
        summing = Summing()
        taken: list[Task] = []
        for task, answered, heard in zip(tasks, fates.answered, in_time, strict=True):
            if answered:
                (taken if heard else self._waiting).append(task)
            elif heard:
                summing.errors.append(_lost(task))
        summing.join(self._engine.total(taken))
        total = summing.result()
        self._waves.summed(total, asked=len(tasks), seconds=time.monotonic() - started)
        return total

    def _push(self, messages: Iterable[Message]) -> dict[str, Trip]:
        tasks = self._tasks(messages)
        fates = self._send(tasks)
        trips = {
            task.message().metadata.message_id: Trip(task, heard_s, answered)
            for task, heard_s, answered in zip(tasks, fates.heard_s.tolist(), fates.answered.tolist(), strict=True)
        }
        self._trips.update(trips)
        self._waiting += [trip.task for trip in trips.values() if trip.answered]
        return trips

    def _send(self, tasks: Sequence[Task]) -> Answers:
        """What becomes of the tasks, each of which begins when its node has done what it was asked before."""
        self._asked = 0
        nodes = np.array([task.context.node_id for task in tasks], np.int64)
        numbers = np.arange(self._numbers, self._numbers + len(nodes))
        self._numbers += len(nodes)
        heard_s, answered = np.zeros(len(nodes)), np.zeros(len(nodes), np.bool_)
        for wave in _one_each(tasks):
            asked = nodes[wave].tolist()
            begin_s = np.array([max(self.clock.now_s, self._free_s.get(node, 0.0)) for node in asked])
            fates = self.population.ask(nodes[wave] - self._nodes.start, begin_s, numbers[wave])
            heard_s[wave], answered[wave] = fates
            self._free_s.update(zip(asked, fates.heard_s.tolist(), strict=True))
        return Answers(heard_s=heard_s, answered=answered)

    def _until_closed(self, wait: Wait, heard_s: Floats, answered: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Wait, and say who was heard of in time."""
        lasts_s, in_time = wait.closes(heard_s - self.clock.now_s, answered)
        self.clock.move_to(self.clock.now_s + lasts_s)
        return in_time

    def _pulled(self, message_ids: Sequence[str]) -> list[Message]:
        """Answers and errors, in the order in which they were heard of; they are not kept."""
        trips = {key: self._trips[key] for key in sorted(message_ids, key=lambda key: self._trips[key].heard_s)}
        if any(trip.answered and key not in self._replies for key, trip in trips.items()):
            self._work()
        for key in trips:
            del self._trips[key]
        return [self._replies.pop(key) if trip.answered else _lost(trip.task) for key, trip in trips.items()]

    def _work(self) -> None:
        """Run all who have been asked and not run, and keep the answers that somebody may still pull."""
        waiting, self._waiting = self._waiting, []
        for wave in _one_each(waiting):
            for reply in self._answers([waiting[place] for place in wave]):
                if reply.metadata.reply_to_message_id in self._trips:
                    self._replies[reply.metadata.reply_to_message_id] = reply


def _lost(task: Task) -> Message:
    error = Error(ErrorCode.NODE_UNAVAILABLE, "Node Unavailable — the destination node did not answer")
    return sealed(Message(error, reply_to=task.message()))


def _one_each(tasks: Sequence[Task]) -> Iterator[list[int]]:
    """The places of tasks in waves without two tasks for one node: it does one thing after the other."""
    rest = list(range(len(tasks)))
    while rest:
        first: dict[int, int] = {}
        for place in rest:
            first.setdefault(tasks[place].context.node_id, place)
        wave = list(first.values())
        yield wave
        rest = sorted(set(rest) - set(wave))
