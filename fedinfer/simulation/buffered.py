"""Asynchronous training with a buffer (FedBuff): nobody waits for the slow.

Some clients are at work at any time, each from the model of its own start. Every K answers the server takes a step with
their mean, in which an answer weighs the less, the more steps were taken since its client started.

Under a plan the unit is a client, and the relation "add or remove one, slots fixed": a client's answer counts as
zeros, and nobody else's place changes. Each answer is clipped whole and weighs at most 1, so that one client moves the
sum of a buffer by at most the clip norm; the sum gets the plan's noise, and nothing else of the answers is used. Of any
`period` steps in a row a client is in one at most, which is what a Cyclic sampler accounts. No sampling is claimed,
because whoever is free is asked and whoever is fast answers. Who answers, and when, is public: it must not depend on
rows. The server is trusted.

Reference: Nguyen et al. 2022, arXiv:2106.06639 (algorithm 1; weights 1 / sqrt(1 + staleness)).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedinfer.arrays import Vector
from fedinfer.errors import BadInput, BadUsage, RoundFailed
from fedinfer.local_app import ARRAYS, METRICS
from fedinfer.privacy import NoiseStream, PrivacyPlan
from fedinfer.privacy.clipping import clip_update
from fedinfer.privacy.samplers import Cyclic
from fedinfer.rules import FedSgd, ServerRule
from fedinfer.simulation.populated import POLL_S, PopulatedGrid

# A server that finds nobody so many times in a row gives up: a week.
MOST_POLLS = 10_080
# So many clients are drawn for each that is wanted, and each time so many times more, before all are looked through.
DRAWS = 16


class Model(NamedTuple):
    """What clients are sent, and the same numbers as one vector (d,)."""

    content: RecordDict
    weights: Vector


@dataclass(frozen=True, kw_only=True)
class BufferedStep:
    """A step of the server: `staleness` has a number for each answer in it, `lost` counts errors since the last step.

    `loss` is the mean of the losses that clients told, None if one did not, or under a plan.
    """

    number: int
    at_s: float
    arrays: ArrayRecord = field(repr=False)
    staleness: tuple[int, ...]
    lost: int
    loss: float | None = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class FedBuff:
    """Buffered asynchronous aggregation: a step every `buffer` answers, with `concurrency` clients at work.

    `rule` takes the step; its gradient is minus the mean of the weighted updates. All arrays count as trained: under a
    plan all get noise.

    Guarantees: under a plan, `run` releases at most `plan.steps` noised sums and nothing else; in each a client weighs
    at most `plan.clip_norm`; of any `period` in a row a client is in one at most.
    Raises: BadUsage for numbers that cannot be, or a plan that claims anything else.
    """

    buffer: int
    concurrency: int
    rule: ServerRule = field(default_factory=lambda: FedSgd(learning_rate=1.0))
    plan: PrivacyPlan | None = None

    def __post_init__(self) -> None:
        for name in ("buffer", "concurrency"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise BadUsage(f"{name}: got {value}, expected a whole number of at least 1")
        if self.plan is None:
            return
        if self.plan.unit != "client" or not isinstance(self.plan.sampler, Cyclic):
            raise BadUsage(
                f"plan: got unit {self.plan.unit!r} and {type(self.plan.sampler).__name__}, expected 'client' and "
                "Cyclic: whoever is free is asked and whoever is fast answers, so that no sampling can be claimed"
            )
        if self.plan.divisor != self.buffer:
            raise BadUsage(f"plan: got a divisor of {self.plan.divisor:g}, expected the buffer's {self.buffer}")

    @property
    def period(self) -> int | None:
        """Of so many steps in a row a client is in one at most; None without a plan."""
        return self.plan.sampler.period if self.plan and isinstance(self.plan.sampler, Cyclic) else None

    def run(
        self, grid: PopulatedGrid, arrays: ArrayRecord, *, steps: int, stream: NoiseStream
    ) -> Iterator[BufferedStep]:
        """Train from `arrays`; yields each step when it is taken. `stream` chooses clients and makes the noise.

        Raises: BadUsage for more steps than the plan has, a plan that is not that of the clients' task, or too few
        clients for the plan's period; RoundFailed if nobody is there for a week.
        """
        if self.plan is not None and steps > self.plan.steps:
            raise BadUsage(f"steps: got {steps}, expected at most the plan's {self.plan.steps}")
        if grid.plan is not None and grid.plan.unit == "client" and grid.plan != self.plan:
            raise BadUsage("plan: got clients whose updates need a plan, expected the same plan for the buffer")
        if len(grid.nodes) < self.buffer * (self.period or 1):
            raise BadUsage(
                f"clients: got {len(grid.nodes)}, expected at least {self.buffer * (self.period or 1)}, for whom a "
                "period is long enough"
            )
        return self._steps(grid, arrays, steps, stream)

    def _steps(
        self, grid: PopulatedGrid, arrays: ArrayRecord, steps: int, stream: NoiseStream
    ) -> Iterator[BufferedStep]:
        model = Model(RecordDict({ARRAYS: arrays}), _flat(arrays, arrays))
        state = self.rule.init(model.weights)
        crew = Crew(grid, concurrency=self.concurrency, period=self.period, stream=stream)
        buffer = Buffer(size=len(model.weights), plan=self.plan)
        number = 0
        while number < steps:
            crew.start(model, number)
            for reply in grid.pull_messages(crew.at_work):
                sent, staleness = crew.land(reply, number)
                if reply.has_error():
                    buffer.lost += 1
                    continue
                buffer.add(reply, sent, staleness)
                if len(buffer.staleness) < self.buffer:
                    continue
                weights, state = self.rule.step(model.weights, -buffer.mean(stream), state)
                record = _record(weights, arrays)
                model = Model(RecordDict({ARRAYS: record}), weights)
                number += 1
                yield BufferedStep(
                    number=number,
                    at_s=grid.clock.now_s,
                    arrays=record,
                    staleness=tuple(buffer.staleness),
                    lost=buffer.lost,
                    loss=buffer.loss,
                )
                if number == steps:
                    return
                buffer = Buffer(size=len(weights), plan=self.plan)


class Crew:
    """Who is at work, from which model and since which step; and who has been in which step."""

    def __init__(self, grid: PopulatedGrid, *, concurrency: int, period: int | None, stream: NoiseStream) -> None:
        self._grid = grid
        self._concurrency = concurrency
        self._period = period
        self._stream = stream
        self._flights: dict[str, tuple[int, int, Model]] = {}
        self._busy: set[int] = set()
        self._last_step: dict[int, int] = {}

    @property
    def at_work(self) -> list[str]:
        """The ids of the messages that have no answer yet."""
        return list(self._flights)

    def start(self, model: Model, number: int) -> None:
        """Send `model`, that of step `number`, until enough are at work; wait for somebody, if need be.

        Raises: RoundFailed if nobody comes.
        """
        for _ in range(MOST_POLLS):
            chosen = self._chosen(self._concurrency - len(self._busy), number)
            messages = [self._grid.create_message(model.content, "train", node, str(number + 1)) for node in chosen]
            for key, node in zip(self._grid.push_messages(messages), chosen, strict=True):
                self._flights[key] = (node, number, model)
            self._busy.update(chosen)
            if self._flights:
                return
            self._grid.clock.move_to(self._grid.clock.now_s + POLL_S)
        raise RoundFailed(f"step {number + 1}: got nobody to ask for a week, expected somebody; look at the trace")

    def land(self, reply: Message, number: int) -> tuple[Model, int]:
        """What the sender of `reply` had been sent, and how many of the `number` steps were taken since."""
        node, since, model = self._flights.pop(reply.metadata.reply_to_message_id)
        self._busy.remove(node)
        if not reply.has_error():
            self._last_step[node] = number + 1
        return model, number - since

    def _chosen(self, count: int, number: int) -> list[int]:
        """At most `count` nodes, uniformly from those that are there, idle and not in one of the last steps."""
        if not count:
            return []
        nodes = self._grid.nodes
        found: list[int] = []
        draws = DRAWS * count
        while len(found) < count and draws < len(nodes):
            drawn = nodes.start + np.floor(self._stream.uniform(draws) * len(nodes)).astype(np.int64)
            found = list(dict.fromkeys([*found, *self._free(drawn.tolist(), number)]))[:count]
            draws *= DRAWS
        if len(found) < count:
            rest = sorted(set(self._free(nodes, number)) - set(found))
            order = np.argsort(self._stream.uniform(len(rest)), kind="stable")
            found += [rest[place] for place in order[: count - len(found)].tolist()]
        return found

    def _free(self, nodes: Sequence[int], number: int) -> list[int]:
        there = [nodes[place] for place in np.flatnonzero(self._grid.there(nodes)).tolist()]
        return [node for node in there if node not in self._busy and not self._rests(node, number)]

    def _rests(self, node: int, number: int) -> bool:
        """Whether a client might come into two steps of one period: if it starts now, it is in the next or later."""
        last = self._last_step.get(node)
        return last is not None and self._period is not None and number + 1 < last + self._period


class Buffer:
    """Answers on their way into a step; under a plan each is clipped, and only a noised sum comes out."""

    def __init__(self, *, size: int, plan: PrivacyPlan | None) -> None:
        self._sum = np.zeros(size)
        self._plan = plan
        self._losses: list[float] = []
        self.staleness: list[int] = []
        self.lost = 0

    @property
    def loss(self) -> float | None:
        """The mean loss, if everybody told one and no plan forbids it."""
        if self._plan is not None or len(self._losses) < len(self.staleness):
            return None
        return float(np.mean(self._losses))

    def add(self, reply: Message, sent: Model, staleness: int) -> None:
        """Add an update, weighted by 1 / sqrt(1 + staleness).

        Raises: BadInput if the reply has no arrays, or others than were sent.
        """
        before, after = _arrays(sent.content), _arrays(reply.content)
        if set(before) != set(after):
            raise BadInput(f"reply: got arrays {sorted(after)}, expected {sorted(before)}")
        update = _flat(after, before) - sent.weights
        if self._plan is not None:
            update = clip_update(update, clip_norm=self._plan.clip_norm)
        self._sum += update.astype(np.float64) / np.sqrt(1.0 + staleness)
        self.staleness.append(staleness)
        metrics = reply.content.get(METRICS)
        if isinstance(metrics, MetricRecord) and isinstance(loss := metrics.get("loss"), int | float):
            self._losses.append(loss)

    def mean(self, stream: NoiseStream) -> Vector:
        """The mean (d,), with the plan's noise if there is one."""
        if self._plan is not None:
            return self._plan.release(self._sum, stream)
        return (self._sum / len(self.staleness)).astype(np.float32)


def _arrays(content: RecordDict) -> ArrayRecord:
    record = content.get(ARRAYS)
    if not isinstance(record, ArrayRecord):
        raise BadInput(f"reply: got no ArrayRecord {ARRAYS!r}, expected the new weights")
    return record


def _flat(arrays: ArrayRecord, names: ArrayRecord) -> Vector:
    """The arrays end to end, in the order of `names`, in single precision."""
    parts: list[NDArray[np.float32]] = [arrays[name].numpy().astype(np.float32).ravel() for name in names]
    return np.concatenate(parts)


def _record(weights: Vector, like: ArrayRecord) -> ArrayRecord:
    """Cut `weights` (d,) into arrays of the names, shapes and types of `like`."""
    record, start = ArrayRecord(), 0
    for name, array in like.items():
        values = array.numpy()
        part = weights[start : start + values.size].reshape(values.shape)
        record[name] = Array(part.astype(values.dtype))
        start += values.size
    return record
