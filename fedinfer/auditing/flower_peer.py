"""Flower's differential privacy under audit: its strategies with fixed and adaptive clipping, and its local mod.

Messages are answered in this process; the strategies and the mod are Flower's own. A unit is a client, and its row is
the update that it sends, as two arrays. The server knows its clients, so that their number is public.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod
from flwr.serverapp import Grid, NeighboringRelation, PrivacyConfig, RdpAccountant, SamplingMethod, ServerApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
)
from numpy.typing import NDArray

from fedinfer.auditing.subjects import Floats, Subject, Trace, Units, whole_plan
from fedinfer.errors import RoundFailed
from fedinfer.privacy import NoiseStream, PrivacyPlan
from fedinfer.privacy.audit_clipping import ClipRule
from fedinfer.privacy.plan import Unit
from fedinfer.simulation.grid import run_in_process

# Of the count of clipped clients: enough that Flower accepts the noise multiplier.
COUNT_NOISE = 2.0


def flower() -> tuple[Subject, ...]:
    """Each of Flower's mechanisms as a subject."""
    return (
        FixedClipping(),
        FixedClipping(name="flower fixed clipping, accountant", accounted=True),
        AdaptiveClipping(),
        LocalNoise(),
    )


class _Fixed(DifferentialPrivacyServerSideFixedClipping):
    """The strategy, which also keeps each mean that it is about to add noise to."""

    before: Floats

    def _add_noise_to_aggregated_arrays(self, aggregated_arrays: ArrayRecord) -> ArrayRecord:
        self.before = _flat(aggregated_arrays)
        return super()._add_noise_to_aggregated_arrays(aggregated_arrays)


class _Adaptive(DifferentialPrivacyServerSideAdaptiveClipping):
    """The strategy, which also keeps each mean that it is about to add noise to."""

    before: Floats

    def _add_noise_to_aggregated_arrays(self, aggregated: ArrayRecord) -> ArrayRecord:
        self.before = _flat(aggregated)
        return super()._add_noise_to_aggregated_arrays(aggregated)


@dataclass(frozen=True, kw_only=True)
class FixedClipping:
    """`DifferentialPrivacyServerSideFixedClipping` around `FedAvg`, with Flower's accountant or without.

    Without one it states no ε: what counts is that of its noise multiplier with everybody in every round.
    """

    name: str = "flower fixed clipping"
    unit: Unit = "client"
    fixed_units: bool = True
    sampled: bool = False
    slow: bool = True
    accounted: bool = False

    def run(self, units: Units, plan: PrivacyPlan, stream: NoiseStream) -> Trace:
        clients = len(units)
        strategy = _Fixed(
            _fed_avg(clients),
            plan.noise_multiplier,
            plan.clip_norm,
            clients,
            accountant=_accountant(clients, plan.delta) if self.accounted else None,
        )
        before: list[Floats] = []
        released: list[Floats] = []

        updates = [_arrays(row) for row in units.rows]

        def play(grid: Grid) -> None:
            for number in range(1, plan.steps + 1):
                released.append(_round(strategy, grid, updates, units, number) * clients)
                before.append(strategy.before * clients)

        _serve(play, clients, stream)
        return Trace(
            before=np.stack(before),
            released=np.stack(released),
            sigma=plan.noise_multiplier * plan.clip_norm,
            claim=whole_plan(plan) if strategy.accountant is None else strategy.accountant.get_epsilon,
        )

    def clip_rule(self, units: int, stream: NoiseStream) -> ClipRule | None:
        return None


@dataclass(frozen=True, kw_only=True)
class AdaptiveClipping:
    """`DifferentialPrivacyServerSideAdaptiveClipping` around `FedAvg`.

    Sums are in units of the clip norm that was used in their round, which is what one client may move them by.
    """

    name: str = "flower adaptive clipping"
    unit: Unit = "client"
    fixed_units: bool = True
    sampled: bool = False
    slow: bool = True

    def run(self, units: Units, plan: PrivacyPlan, stream: NoiseStream) -> Trace:
        clients = len(units)
        strategy = _Adaptive(
            _fed_avg(clients),
            plan.noise_multiplier,
            clients,
            initial_clipping_norm=plan.clip_norm,
            clipped_count_stddev=COUNT_NOISE * plan.noise_multiplier,
        )
        before: list[Floats] = []
        released: list[Floats] = []

        updates = [_arrays(row) for row in units.rows]

        def play(grid: Grid) -> None:
            for number in range(1, plan.steps + 1):
                scale = clients * plan.clip_norm / strategy.clipping_norm
                released.append(_round(strategy, grid, updates, units, number) * scale)
                before.append(strategy.before * scale)

        _serve(play, clients, stream)
        return Trace(
            before=np.stack(before),
            released=np.stack(released),
            sigma=strategy.noise_multiplier * plan.clip_norm,
            claim=whole_plan(plan),
        )

    def clip_rule(self, units: int, stream: NoiseStream) -> ClipRule | None:
        """The strategy's own update without noise; it is told how many clients it clipped."""

        def rule(clip_norm: float, below: int) -> float:
            strategy = _Adaptive(_fed_avg(units), 0.0, units, initial_clipping_norm=clip_norm)
            strategy._geometric_update(strategy._noisy_fraction(units - below, units))
            return float(strategy.clipping_norm)

        return rule


@dataclass(frozen=True, kw_only=True)
class LocalTrace(Trace):
    """What each of `clients` released by itself, end to end: (T, clients * d)."""

    clients: int

    def along(self, directions: Floats) -> Floats:
        """Each canary's release, in that canary's direction."""
        each = self.released.reshape(len(self.released), self.clients, -1)
        products: Floats = np.einsum("tcd,cd->tc", each, directions)
        return products


@dataclass(frozen=True, kw_only=True)
class LocalNoise:
    """`LocalDpMod` on each client, set to the plan's ε, which is "the privacy budget" in its documentation."""

    name: str = "flower LocalDpMod"
    unit: Unit = "client"
    fixed_units: bool = True
    sampled: bool = False
    slow: bool = True

    def run(self, units: Units, plan: PrivacyPlan, stream: NoiseStream) -> Trace:
        epsilon = plan.epsilon()
        noisy, clipped = (
            LocalDpMod(clipping_norm=plan.clip_norm, sensitivity=sensitivity, epsilon=epsilon, delta=plan.delta)
            for sensitivity in (plan.clip_norm, 0.0)
        )
        before: list[Floats] = []
        released: list[Floats] = []

        updates = [_arrays(row) for row in units.rows]
        start = _arrays(np.zeros(units.rows.shape[1], np.float32))

        def play(grid: Grid) -> None:
            before.append(_send(clipped, grid, start, updates))
            released.extend(_send(noisy, grid, start, updates) for _ in range(plan.steps))

        _serve(play, len(units), stream)
        return LocalTrace(
            before=np.tile(before[0], (plan.steps, 1)),
            released=np.stack(released),
            sigma=plan.clip_norm * float(np.sqrt(2 * np.log(1.25 / plan.delta))) / epsilon,
            claim=lambda delta: epsilon if delta >= plan.delta else np.inf,
            clients=len(units),
        )

    def clip_rule(self, units: int, stream: NoiseStream) -> ClipRule | None:
        return None


def _serve(play: Callable[[Grid], None], clients: int, stream: NoiseStream) -> None:
    """Run `play` as a ServerApp with so many clients in this process."""
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        play(grid)

    with _silent(), _randomness(stream):
        run_in_process(server_app, ClientApp(), nodes=[{}] * clients, run_config={})


def _round(
    strategy: _Fixed | _Adaptive, grid: Grid, updates: Sequence[ArrayRecord], units: Units, number: int
) -> Floats:
    """One round from zero weights, in which each client adds its row; returns the new weights."""
    start = _arrays(np.zeros(units.rows.shape[1], np.float32))
    messages = strategy.configure_train(number, start, ConfigRecord(), grid)
    contributions = zip(messages, updates, units.examples, strict=True)
    replies = [_answer(message, update, int(examples)) for message, update, examples in contributions]
    arrays, _ = strategy.aggregate_train(number, replies)
    if arrays is None:
        raise RoundFailed("flower: got no aggregate of the round")
    return _flat(arrays)


def _send(mod: LocalDpMod, grid: Grid, start: ArrayRecord, updates: Sequence[ArrayRecord]) -> Floats:
    """What the clients send behind `mod`, end to end."""
    content = RecordDict({"arrays": start, "config": ConfigRecord()})
    context = Context(run_id=0, node_id=0, node_config={}, state=RecordDict(), run_config={})
    sent = []
    for node, update in zip(grid.get_node_ids(), updates, strict=True):
        answer = mod(Message(content, node, "train"), context, _client(update))
        sent.append(_flat(answer.content.array_records["arrays"]))
    return np.concatenate(sent)


def _client(update: ArrayRecord) -> Callable[[Message, Context], Message]:
    return lambda message, context: _answer(message, update, 1)


def _answer(message: Message, update: ArrayRecord, examples: int) -> Message:
    content = RecordDict({"arrays": update, "metrics": MetricRecord({"num-examples": examples})})
    return Message(content, reply_to=message)


def _arrays(vector: NDArray[np.float32]) -> ArrayRecord:
    half = len(vector) // 2
    return ArrayRecord({"first": Array(vector[:half].copy()), "second": Array(vector[half:].copy())})


def _flat(arrays: ArrayRecord) -> Floats:
    return np.concatenate([array.ravel() for array in arrays.to_numpy_ndarrays()]).astype(np.float64)


def _fed_avg(clients: int) -> FedAvg:
    return FedAvg(min_train_nodes=clients, min_available_nodes=clients)


def _accountant(clients: int, delta: float) -> RdpAccountant:
    return RdpAccountant(
        PrivacyConfig(
            target_delta=delta,
            population_size=clients,
            neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
            sampling_method=SamplingMethod.NO_AMPLIFICATION,
        )
    )


@contextmanager
def _randomness(stream: NoiseStream) -> Iterator[None]:
    """NumPy's global generator as it is, unless the audit itself is to be repeated."""
    state = np.random.get_state()
    if stream.void:
        np.random.seed(int.from_bytes(stream.take(4), "big"))
    yield
    if stream.void:
        np.random.set_state(state)


@contextmanager
def _silent() -> Iterator[None]:
    """A line for each round and client would bury the report, and so would NumPy's warnings of what rows hold."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        logger.setLevel(level)
