"""Runs the clients of a `LocalTask` in whole cohorts; what cannot run so runs one after another."""

import copy
import logging
import os
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from flwr.app import Message, RecordDict
from torch import Tensor

from fedinfer.algorithms import Named, control_of, first_memory
from fedinfer.errors import BadUsage
from fedinfer.local_app import (
    ARRAYS,
    CONTROL,
    MEMORY_KEY,
    LocalApp,
    Visit,
    control_in,
    hidden_errors,
    record_of,
    weights_in,
)
from fedinfer.local_task import LocalTask, LocalUpdate, trained
from fedinfer.simulation.cohort import Trained, train_chunk
from fedinfer.simulation.engines import CohortSum, Summing, Task, answer, error_reply, sealed
from fedinfer.simulation.evaluated import evaluations
from fedinfer.simulation.records import Replies, row_record, stacked_arrays
from fedinfer.simulation.rows import CPU, KeptRows, size_bytes
from fedinfer.simulation.stacked import Stack, State, choose

log = logging.getLogger("fedinfer.simulation")
# So much of a cohort is sorted into chunks together. It is a constant, so that the bits of a sum do not depend on the
# memory that somebody grants, as long as this much is granted.
BLOCK_BYTES = 256 << 20
# A chunk's weights, gradients and activations: small enough to stay near the processor.
CHUNK_BYTES = 16 << 20
MOST_CLIENTS = 1024
TRAINING = ("train", "train.default")
EVALUATION = ("evaluate", "evaluate.default")


class Ready(NamedTuple):
    """A client that can train: its task, its turn, its rows and what it was sent."""

    task: Task
    turn: Visit
    state: State
    control: Named
    x: Tensor
    y: Tensor


@dataclass(frozen=True, kw_only=True)
class Done:
    """A chunk after training: stacked weights, or updates one by one where the chunk could not be stacked."""

    clients: Sequence[Ready] = field(repr=False)
    trained: Trained | None = field(repr=False)
    singles: Sequence[LocalUpdate | Exception] = field(repr=False)


class Vectorised:
    """Runs a `LocalApp` a chunk of clients at a time, on `workers` threads, and on `device` what torch computes.

    Rows that `load` gave are kept while `memory_bytes` lasts, and no more than that is held of a cohort at once
    besides. Whether a stack gives what the device's code gives is tried on the first cohort's rows; if none does,
    one line in the log says why and clients run one after another.
    """

    def __init__(
        self,
        app: LocalApp,
        *,
        memory_bytes: int,
        workers: int | None = None,
        device: torch.device = CPU,
    ) -> None:
        if not isinstance(app.task, LocalTask):
            raise BadUsage(f"vectorised: got a {type(app.task).__name__}, expected a LocalTask")
        self._app = app
        self._task = replace(app.task, model=copy.deepcopy(app.task.model).to(device))
        self._workers = workers or os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(self._workers)
        self._block_bytes = min(memory_bytes, BLOCK_BYTES)
        self._kept = KeptRows(app, memory_bytes=memory_bytes, device=device)
        self._make: Callable[[], Stack] | None = None
        self._refused = False
        self._stacks: queue.SimpleQueue[Stack] = queue.SimpleQueue()
        local = self._task.local_names
        self._shared = {place: name for place, name in self._task.places.items() if name not in local}
        kept = first_memory(self._task.algorithm, dict(trained(self._task.model)), local)
        self._client_weights_bytes = sum(map(size_bytes, [*self._task.model.parameters(), *kept.values()]))

    def replies(self, tasks: Sequence[Task]) -> Iterator[Message]:
        for task in tasks:
            if task.message_type not in TRAINING + EVALUATION:
                yield answer(self._app, task)
        asked = [task for task in tasks if task.message_type in EVALUATION]
        yield from evaluations(self._app, self._task, self._kept, asked)
        makers: dict[int, Replies] = {}
        for done in self._done([task for task in tasks if task.message_type in TRAINING]):
            if isinstance(done, Message):
                yield sealed(done)
                continue
            for client, outcome in zip(done.clients, done.singles, strict=False):
                yield sealed(self._single(client, outcome))
            if done.trained is None:
                continue
            weights = stacked_arrays(done.trained.weights)
            controls = stacked_arrays(done.trained.auxiliary)
            for row, index in enumerate(done.trained.order):
                client = done.clients[index]
                maker = makers.get(id(client.state))
                if maker is None:
                    maker = makers[id(client.state)] = Replies(client.state, self._shared)
                loss = None if done.trained.losses is None else done.trained.losses[row]
                yield sealed(maker.reply(client.task.message(), weights, row, loss, self._examples(client), controls))

    def total(self, tasks: Sequence[Task]) -> CohortSum:
        if any(task.message_type not in TRAINING for task in tasks):
            raise BadUsage("sum of updates: got messages of another type, expected 'train'")
        summing = Summing()
        for done in self._done(tasks):
            if isinstance(done, Message):
                summing.errors.append(sealed(done))
            elif done.trained is not None:
                self._add(summing, done.clients, done.trained)
            else:
                for client, outcome in zip(done.clients, done.singles, strict=True):
                    if isinstance(outcome, Exception):
                        summing.errors.append(sealed(error_reply(client.task.message(), outcome)))
                        continue
                    weight = outcome.examples
                    moved = {
                        name: weight * (tensor.double() - client.state[name].double()).cpu().numpy()
                        for name, tensor in outcome.state.items()
                    }
                    summing.add(moved, weight=weight, replies=1)
                    summing.add_auxiliary({name: tensor.cpu().numpy() for name, tensor in outcome.auxiliary.items()})
                    if outcome.loss is not None:
                        summing.add_losses(weight * outcome.loss, 1)
        return summing.result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _add(self, summing: Summing, clients: Sequence[Ready], trained: Trained) -> None:
        ordered = [clients[index] for index in trained.order]
        weight = torch.tensor([float(self._examples(client)) for client in ordered])
        one = all(client.state is ordered[0].state for client in ordered)
        sums: dict[str, Tensor] = {}
        for name, after in trained.weights.items():
            start = ordered[0].state[name][None] if one else torch.stack([client.state[name] for client in ordered])
            # What a plan releases is summed in double precision: its margin for rounding is for such sums.
            end = after.double() if self._task.plan is not None else after
            sums[name] = torch.tensordot(weight.to(end), end - start, dims=1)
        moved = {
            name: (sums[self._shared[name]] if name in self._shared else torch.zeros_like(tensor)).cpu().numpy()
            for name, tensor in ordered[0].state.items()
        }
        summing.add(moved, weight=float(weight.sum()), replies=len(ordered))
        summing.add_auxiliary({name: part.sum(0).cpu().numpy() for name, part in trained.auxiliary.items()})
        if trained.losses is not None:
            weighted = [one * loss for one, loss in zip(weight.tolist(), trained.losses, strict=True)]
            summing.add_losses(sum(weighted), len(ordered))

    def _examples(self, client: Ready) -> int:
        return len(client.x) if self._task.plan is None else 1

    def _single(self, client: Ready, outcome: LocalUpdate | Exception) -> Message:
        if isinstance(outcome, Exception):
            return error_reply(client.task.message(), outcome)
        return self._app.reply(client.task.message(), outcome)

    def _done(self, tasks: Sequence[Task]) -> Iterator[Done | Message]:
        """Chunks as they are done; an error reply for each client that could not be made ready."""
        given: dict[int | tuple[int, int], tuple[State, Named]] = {}
        block: list[Ready] = []
        here: set[int] = set()
        held = 0
        for task in tasks:
            if task.context.node_id in here:
                # A node that is asked twice remembers the first time when it comes to the second.
                yield from self._run(block)
                block, held, here = [], 0, set()
            ready = self._ready(task, given)
            if isinstance(ready, Message):
                yield ready
                continue
            block.append(ready)
            here.add(task.context.node_id)
            held += size_bytes(ready.x) + size_bytes(ready.y) + self._client_weights_bytes
            if held > self._block_bytes:
                yield from self._run(block)
                block, held, here = [], 0, set()
        if block:
            yield from self._run(block)

    def _ready(self, task: Task, given: dict[int | tuple[int, int], tuple[State, Named]]) -> Ready | Message:
        try:
            sent = given.get(id(task.content))
            if sent is None:
                # Contents may differ in what else they hold, and share the weights.
                records = id(task.content.get(ARRAYS)), id(task.content.get(CONTROL))
                if records not in given:
                    given[records] = _checked(task.content, self._task)
                sent = given[id(task.content)] = given[records]
            turn = self._app.visit(task.context)
            return Ready(task, turn, *sent, *self._kept.of(turn.partition, turn.partitions))
        except Exception as error:
            return error_reply(task.message(), error)

    def _run(self, block: Sequence[Ready]) -> Iterator[Done]:
        """Train a block, in chunks of clients with about as many rows each."""
        if self._make is None and not self._refused:
            self._try(block)
        by_size = sorted(block, key=lambda client: len(client.x))
        chunks = list(self._chunks(by_size)) if self._make is not None else [by_size]
        with one_thread_each():
            if self._make is None or len(chunks) == 1:
                yield from map(self._train, chunks)
            else:
                yield from self._pool.map(self._train, chunks)

    def _try(self, block: Sequence[Ready]) -> None:
        with_rows = [client for client in block if len(client.x)]
        if not with_rows:
            return
        try:
            self._make = choose(self._task, with_rows[0].state, [(client.x, client.y) for client in with_rows[:3]])
        except BadUsage as error:
            self._refused = True
            log.warning("clients run one after another: %s", error)

    def _train(self, clients: Sequence[Ready]) -> Done:
        if self._make is not None:
            try:
                stack = self._stacks.get_nowait()
            except queue.Empty:
                stack = self._make()
            try:
                trained = train_chunk(self._task, stack, clients)
                self._remember(clients, trained)
                return Done(clients=clients, trained=trained, singles=())
            except Exception:
                # One client's rows spoil a whole chunk: alone, each gets its own answer or its own error.
                log.debug("a chunk of %d clients runs one after another", len(clients), exc_info=True)
            finally:
                self._stacks.put(stack)
        return Done(clients=clients, trained=None, singles=[self._alone(client) for client in clients])

    def _alone(self, client: Ready) -> LocalUpdate | Exception:
        turn = client.turn
        try:
            with hidden_errors(private=self._task.plan is not None):
                update = self._task.train(
                    client.state,
                    client.x,
                    client.y,
                    turn.stream(),
                    done=turn.done,
                    memory=turn.memory,
                    control=client.control,
                )
        except Exception as error:
            return error
        if update.memory:
            client.task.context.state[MEMORY_KEY] = record_of(update.memory)
        return update

    def _remember(self, clients: Sequence[Ready], trained: Trained) -> None:
        """Give each client's node what its algorithm keeps."""
        if not trained.memory:
            return
        memory = stacked_arrays(trained.memory)
        for row, index in enumerate(trained.order):
            # A copy: one node's row must not hold those of all its chunk.
            own = {name: values[row].copy() for name, values in memory.items()}
            clients[index].task.context.state[MEMORY_KEY] = row_record(own)

    def _chunks(self, clients: Sequence[Ready]) -> Iterator[Sequence[Ready]]:
        fixed = {id(client.state): client.state for client in clients}
        groups = (
            [clients]
            if _alike(list(fixed.values()), self._task.places)
            else [[client for client in clients if client.state is state] for state in fixed.values()]
        )
        for group in groups:
            ends = [0]
            while ends[-1] < len(group):
                size = 1
                while ends[-1] + size < len(group) and size < MOST_CLIENTS:
                    # The last of a run has the most rows, because they are sorted.
                    if (size + 1) * self._client_bytes(group[ends[-1] + size]) > CHUNK_BYTES:
                        break
                    size += 1
                ends.append(ends[-1] + size)
            if self._client_bytes(group[0]) == self._client_bytes(group[-1]):
                # All are as long: the last chunk would be a small one, and some worker would wait for the others.
                chunks = len(ends) - 1
                ends = [len(group) * number // chunks for number in range(chunks + 1)]
            yield from (group[start:end] for start, end in pairwise(ends))

    def _client_bytes(self, client: Ready) -> int:
        rows = max(1, min(self._task.batch_size or len(client.x), len(client.x)))
        return 4 * self._client_weights_bytes + 8 * rows * size_bytes(client.x[:1])


def _checked(content: RecordDict, task: LocalTask) -> tuple[State, Named]:
    """The state and the control variate in the model's own types, as a device would take them.

    Raises: BadUsage, or torch's own RuntimeError, if they are not of this model.
    """
    net = copy.deepcopy(task.model)
    net.load_state_dict(dict(weights_in(content)))
    control = control_of(task.algorithm, dict(trained(net)), control_in(content))
    task.check_sent(net.state_dict(), control)
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}, control


def _alike(states: Sequence[State], aliases: Mapping[str, str]) -> bool:
    """Whether the states differ in trained parameters only."""
    fixed = [name for name in states[0] if name not in aliases]
    return all(torch.equal(state[name], states[0][name]) for state in states[1:] for name in fixed)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Torch's operations use one thread each: chunks run side by side instead."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
