"""Our own server loop as a Flower ServerApp: cohorts by a sampler, sums and never single updates, a rule, a plan.

A stock Flower strategy gets a thousand replies to add up; this loop asks the grid for the cohort's sum, which is what
a secure sum would hand to a server. It runs on the grids of this package, which can sum.

Every round draws from streams of its own, named by the seed and the round: where a run stands is its round, and a run
that is resumed goes on as if nothing had happened.
"""

import copy
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray
from torch import Tensor, nn

from fedinfer.algorithms import Scaffold
from fedinfer.arrays import Vector, flatten, unflatten
from fedinfer.errors import BadUsage, BudgetExceeded, RoundFailed
from fedinfer.local_app import ARRAYS, CONTROL, SEED_KEY, charge
from fedinfer.local_task import LocalTask
from fedinfer.privacy import NoiseStream, PrivacyPlan, insecure_seeded_noise, os_noise
from fedinfer.privacy.samplers import Poisson, Sampler, sampler_to_json
from fedinfer.rules import FedSgd, RuleState, ServerRule
from fedinfer.simulation.callbacks import Callback, RoundLog, tell
from fedinfer.simulation.engines import CohortSum
from fedinfer.simulation.grid import SimulatedGrid
from fedinfer.simulation.loop_state import Checkpoint, LoopState, load_state, save_state
from fedinfer.simulation.populated import PopulatedGrid
from fedinfer.simulation.scaffold import ServerControl

log = logging.getLogger("fedinfer.simulation")
Evaluate = Callable[[Mapping[str, Tensor]], Mapping[str, float]]
MEAN = FedSgd(learning_rate=1.0)
EVERYBODY = Poisson(rate=1.0)


def federation(
    task: LocalTask,
    *,
    rounds: int,
    cohort: Sampler | None = None,
    rule: ServerRule = MEAN,
    evaluate: Evaluate | None = None,
    evaluate_every: int = 1,
    callbacks: Sequence[Callback] = (),
    checkpoint: Checkpoint | None = None,
) -> ServerApp:
    """A ServerApp that trains `task.model` for `rounds` rounds with the clients of `task.client_app(...)`.

    In a round the `cohort` (default: everybody) trains, and `rule` moves the weights by the mean of the updates,
    weighted by examples; its default is federated averaging. Weights that are not trained, such as running
    statistics, take their mean. `evaluate(state_dict)` gives metrics before the first round, every `evaluate_every`
    rounds and after the last. Rules compute in single precision.

    Where `task.plan` protects clients, the plan rules: its sampler chooses the cohort, each client clips its update,
    and the sum is released by the plan, failed clients counting as zero. The server and whoever sees the logs are
    trusted. Where the plan protects examples, the clients release, and the mean counts each of them alike.

    What it leaves in `context.state`: "arrays", the weights; "loop", with `round` and, for a plan of clients,
    `releases`: how many the plan has to account for.

    Guarantees: with a seed (`simulate(..., seed=)`) a run that is resumed gives bit for bit the weights of one that
    was not interrupted. Without a seed, no release that may have been made is made again for free: a round that was
    begun and not finished is charged, before any row is touched.
    Raises: BadUsage for an argument that cannot be, or a grid of another kind; BudgetExceeded if the plan has too few
    releases for the rounds to go; RoundFailed if nobody of a cohort answers and no plan hides that; CheckpointError.
    Reference: McMahan et al. 2017, arXiv:1602.05629; Reddi et al. 2021, arXiv:2003.00295; McMahan et al. 2018,
    arXiv:1710.06963 (plans of clients).
    """
    if type(rounds) is not int or rounds < 1:
        raise BadUsage(f"rounds: got {rounds}, expected a whole number of at least 1")
    if type(evaluate_every) is not int or evaluate_every < 1:
        raise BadUsage(f"evaluate_every: got {evaluate_every}, expected a whole number of at least 1")
    plan = task.plan if task.plan is not None and task.plan.unit == "client" else None
    if plan is not None and cohort is not None and cohort != plan.sampler:
        raise BadUsage(f"cohort: got {cohort}, expected that of the plan, {plan.sampler}; leave it out")
    loop = Loop(
        task=task,
        rounds=rounds,
        cohort=plan.sampler if plan is not None else cohort or EVERYBODY,
        rule=rule,
        plan=plan,
        evaluate=evaluate,
        evaluate_every=evaluate_every,
        callbacks=callbacks,
        checkpoint=checkpoint,
    )
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        if not isinstance(grid, SimulatedGrid):
            raise BadUsage(
                f"federation: got a {type(grid).__name__}, expected a grid of fedinfer.simulation, which sums updates; "
                "elsewhere use a Flower strategy"
            )
        seed = context.node_config.get(SEED_KEY)
        try:
            state = loop.run(grid, None if seed is None else int(seed))
        finally:
            for callback in callbacks:
                callback.end()
        context.state[ARRAYS] = ArrayRecord(dict(state.weights))
        context.state["loop"] = MetricRecord({"round": state.round, "releases": state.releases})

    return app


@dataclass(frozen=True, kw_only=True, eq=False)
class Loop:
    """The arguments of `federation`, checked, and the rounds themselves."""

    task: LocalTask
    rounds: int
    cohort: Sampler
    rule: ServerRule
    plan: PrivacyPlan | None
    evaluate: Evaluate | None
    evaluate_every: int
    callbacks: Sequence[Callback]
    checkpoint: Checkpoint | None

    def run(self, grid: SimulatedGrid, seed: int | None) -> LoopState:
        """All rounds that are still to be done; the last state."""
        digest = self._digest(len(grid.nodes), seed)
        state = self._start(grid, seed, digest)
        self._check_releases(state)
        for callback in self.callbacks:
            callback.begin(state.round)
        if state.round == 0 and self.evaluate is not None:
            tell(
                self.callbacks,
                RoundLog(round=0, clients=0, replies=0, errors=0, seconds=0.0, metrics=self._metrics(state)),
            )
        while state.round < self.rounds:
            state, record = self._round(grid, state, seed, digest)
            due = state.round == self.rounds or (
                self.checkpoint is not None and state.round % self.checkpoint.every == 0
            )
            try:
                tell(self.callbacks, record)
            except BaseException:
                # A callback that stops the run does not undo the round.
                due = True
                raise
            finally:
                if due and self.checkpoint is not None:
                    save_state(replace(state, nodes=grid.node_states()), self.checkpoint.path, digest=digest)
        return state

    def _start(self, grid: SimulatedGrid, seed: int | None, digest: str) -> LoopState:
        """The state to begin with, and the grid's nodes as they were."""
        if self.checkpoint is not None and isinstance(grid, PopulatedGrid):
            raise BadUsage("checkpoint: got a grid with a population, whose clock is not kept; expected none there")
        if self.checkpoint is None or not self.checkpoint.resume:
            weights = {name: tensor.detach().clone() for name, tensor in self.task.model.state_dict().items()}
            vector = flatten(_trained(self.task.model))
            return LoopState(round=0, weights=weights, rule_state=self.rule.init(vector), nodes={})
        state = load_state(self.checkpoint.path, digest=digest)
        # The file keeps names in an order of its own.
        state = replace(state, weights={name: state.weights[name] for name in self.task.model.state_dict()})
        if state.begun is not None:
            # Noise from the operating system does not come again: what that round released, it has released.
            log.warning("round %d was begun before and is charged again", state.round + 1)
            for node_id in state.begun:
                with suppress(BudgetExceeded):
                    charge(state.nodes.setdefault(node_id, RecordDict()), self.task)
        grid.restore(state.nodes)
        return replace(state, nodes={}, begun=None)

    def _check_releases(self, state: LoopState) -> None:
        to_go = self.rounds - state.round
        if self.plan is not None and state.releases + to_go > self.plan.steps:
            raise BudgetExceeded(
                f"federation: got {state.releases} releases made and {to_go} rounds to go, expected at most "
                f"{self.plan.steps} in all; calibrate the plan for more steps"
            )

    def _round(
        self, grid: SimulatedGrid, state: LoopState, seed: int | None, digest: str
    ) -> tuple[LoopState, RoundLog]:
        """The state after one more round, and what there is to say of it."""
        started, number = time.monotonic(), state.round + 1
        # A release that was lost has had its turn in the sampler's schedule.
        step = number if self.plan is None else state.releases + 1
        if seed is not None:
            # Layers that draw numbers take them from here, whether the run was interrupted or not.
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:7], "big"))
        chosen = self.cohort.choose(len(grid.nodes), step, _stream(seed, number, "cohort"))
        asked = tuple(grid.nodes[index] for index in chosen.tolist())
        releases = state.releases + (self.plan is not None)
        if seed is None and self.task.plan is not None and self.checkpoint is not None:
            begun = replace(state, nodes=grid.node_states(), releases=releases, begun=asked)
            save_state(begun, self.checkpoint.path, digest=digest)
        control = self._control(state.control)
        content = RecordDict({ARRAYS: ArrayRecord(dict(state.weights))})
        if control is not None:
            content[CONTROL] = control.record
        total = grid.sum_of_updates(content, asked)
        if asked and not total.replies and self.task.plan is None:
            reason = next((error.error.reason for error in total.errors), "none of them said why")
            raise RoundFailed(f"round {number}: got no answer of {len(asked)} clients, expected at least one; {reason}")
        weights, rule_state = self._moved(state, total, _stream(seed, number, "noise"))
        moved = {}
        if control is not None:
            control.move(total.auxiliary, devices=len(grid.nodes))
            moved = {name: array.numpy() for name, array in control.record.items()}
        seconds = time.monotonic() - started
        after = LoopState(
            round=number, weights=weights, rule_state=rule_state, nodes={}, control=moved, releases=releases
        )
        due = self.evaluate is not None and (number % self.evaluate_every == 0 or number == self.rounds)
        return after, RoundLog(
            round=number,
            clients=len(asked),
            replies=total.replies,
            errors=len(total.errors),
            seconds=seconds,
            loss=total.loss,
            metrics=self._metrics(after) if due else {},
        )

    def _metrics(self, state: LoopState) -> Mapping[str, float]:
        return {} if self.evaluate is None else dict(self.evaluate(state.weights))

    def _control(self, values: Mapping[str, NDArray[Any]]) -> ServerControl | None:
        """The server's part of SCAFFOLD where it was left; None for other algorithms."""
        if not isinstance(self.task.algorithm, Scaffold):
            return None
        control = ServerControl(self.task)
        control.move(values, devices=1)
        return control

    def _moved(self, state: LoopState, total: CohortSum, stream: NoiseStream) -> tuple[dict[str, Tensor], RuleState]:
        net = copy.deepcopy(self.task.model)
        net.load_state_dict(dict(state.weights))
        trained = _trained(net)
        vector = flatten(trained)
        moved, rule_state = self.rule.step(vector, -self._mean(total, trained, len(vector), stream), state.rule_state)
        with torch.no_grad():
            for name, tensor in unflatten(moved, trained).items():
                trained[name].copy_(tensor)
        weights = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
        if self.task.plan is None and total.weight:
            ruled = {name for name, p in net.named_parameters(remove_duplicate=False) if p.requires_grad}
            for name, tensor in weights.items():
                if name not in ruled and tensor.is_floating_point() and name in total.update:
                    tensor.add_(torch.from_numpy(np.asarray(total.update[name] / total.weight)).to(tensor.dtype))
        return weights, rule_state

    def _mean(self, total: CohortSum, trained: Mapping[str, Tensor], size: int, stream: NoiseStream) -> Vector:
        """The mean of the updates (d,), or the plan's release of their sum."""
        update: NDArray[np.float64] = np.zeros(size)
        if total.replies:
            update = np.concatenate([np.asarray(total.update[name], np.float64).reshape(-1) for name in trained])
        if self.plan is not None:
            return self.plan.release(update, stream)
        return np.asarray(update / total.weight if total.weight else update, np.float32)

    def _digest(self, clients: int, seed: int | None) -> str:
        """SHA-256 of what decides the weights after a round, as far as it is data and not code."""
        kept = {f.name: repr(getattr(self.task, f.name)) for f in fields(self.task) if f.name not in ("model", "loss")}
        values = {
            "task": kept,
            "shapes": {name: list(tensor.shape) for name, tensor in self.task.model.state_dict().items()},
            "cohort": sampler_to_json(self.cohort),
            "rule": repr(self.rule),
            "clients": clients,
            "seed": seed,
        }
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _trained(net: nn.Module) -> dict[str, Tensor]:
    """The parameters that training moves, each once."""
    return {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}


def _stream(seed: int | None, number: int, purpose: str) -> NoiseStream:
    return os_noise() if seed is None else insecure_seeded_noise(f"federation {seed}/{number}/{purpose}")
