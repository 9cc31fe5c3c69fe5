"""The rounds of training: a step of every device, alone or by a secure sum; then the rule moves the weights."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedinfer.arrays import Vector, flatten
from fedinfer.combiners import Combiner
from fedinfer.errors import RoundFailed, ShapeMismatch
from fedinfer.flower import STEP, reply_from_content, task_to_content
from fedinfer.models import build
from fedinfer.privacy import DistributedPlan
from fedinfer.rules import RuleState
from fedinfer.settings import RunConfig
from fedinfer.sums.messages import MASKED
from fedinfer.sums.rounds import SecureSums, SumTask
from fedinfer.sums.waves import Wave, size_of
from fedinfer.training import StepTask

log = logging.getLogger("fedinfer.server")
POLL_S = 0.5
# How often the sum of a round is asked for; a second time takes one of the plan's spare steps.
SUM_TRIES = 2


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """What a server sees of one round: all of it computed from noised releases or from sizes.

    `overshoot` is how much more noise variance was in the sum than is accounted for: in a secure sum all survivors
    add a share, and only `min_honest` are counted on.
    """

    round: int
    devices: int
    update_norm: float
    seconds: float
    bytes_up: int
    bytes_down: int
    void: bool
    overshoot: float


@dataclass(frozen=True, kw_only=True)
class RoundState:
    """All that is needed to go on after a round."""

    run: str
    round: int
    weights: Vector = field(repr=False)
    rule_state: RuleState = field(repr=False)
    history: tuple[RoundRecord, ...] = field(repr=False)


def first_state(config: RunConfig, run: str) -> RoundState:
    """The state before the first round, from public constants."""
    weights = flatten(build(config.spec, seed=config.model_seed).state_dict())
    return RoundState(
        run=run,
        round=0,
        weights=weights,
        rule_state=config.server_rule().init(weights),
        history=(),
    )


def wait_for_devices(grid: Grid, config: RunConfig) -> list[int]:
    """The ids of the devices, in ascending order, as soon as there are enough.

    Raises: RoundFailed if there are not enough within the timeout.
    """
    deadline = time.monotonic() + config.timeout_s
    while len(devices := sorted(grid.get_node_ids())) < config.min_devices:
        if time.monotonic() > deadline:
            raise RoundFailed(
                f"devices: got {len(devices)} within {config.timeout_s:g} s, expected at least {config.min_devices}; "
                "start more SuperNodes or lower min-devices"
            )
        time.sleep(POLL_S)
    return devices


def rounds(grid: Grid, config: RunConfig, state: RoundState) -> Iterator[RoundState]:
    """Run the rounds after `state`, one state each.

    Raises: RoundFailed if fewer than `min_devices` devices answer with a step, or a secure sum comes to nothing.
    """
    devices = wait_for_devices(grid, config)
    rule, combiner = config.server_rule(), config.combiner()
    schema_digest = config.public_schema.digest()
    sums = secure_sums(grid, config, state.run)
    while state.round < config.rounds:
        started = time.monotonic()
        task = StepTask(
            run=state.run,
            round=state.round + 1,
            spec=config.spec,
            schema_digest=schema_digest,
            weights=state.weights,
            plan=config.plan,
        )
        step = _each_alone(grid, config, task, devices, combiner) if sums is None else _together(sums, task)
        weights, rule_state = rule.step(state.weights, step.mean, state.rule_state)
        record = RoundRecord(
            round=task.round,
            devices=step.devices,
            update_norm=float(np.linalg.norm(weights - state.weights)),
            seconds=time.monotonic() - started,
            bytes_up=step.bytes_up,
            bytes_down=step.bytes_down,
            void=step.void,
            overshoot=step.overshoot,
        )
        state = RoundState(
            run=state.run,
            round=task.round,
            weights=weights,
            rule_state=rule_state,
            history=(*state.history, record),
        )
        yield state


def secure_sums(grid: Grid, config: RunConfig, run: str) -> SecureSums | None:
    """The secure sums of a run; None if each device adds all of its noise itself."""
    if config.federation is None:
        return None
    return SecureSums(
        grid,
        run=run,
        pki=config.federation,
        policy=config.policy,
        min_devices=config.min_devices,
        min_honest=config.min_honest,
        timeout_s=config.timeout_s,
    )


@dataclass(frozen=True, kw_only=True)
class _Step:
    """What a round gave: the mean, and what a record says of it."""

    mean: Vector
    devices: int
    bytes_up: int
    bytes_down: int
    void: bool
    overshoot: float


def _together(sums: SecureSums, task: StepTask) -> _Step:
    """One step that nobody computed: the sum of what devices masked, by a plan for all of them."""
    plan = task.plan
    assert isinstance(plan, DistributedPlan)
    found = sums.total(
        SumTask(
            action=MASKED,
            content=task_to_content(task),
            spec=task.sum_spec,
            model=task.digest(),
            group=str(task.round),
            tries=SUM_TRIES,
        )
    )
    plan.check_total(found.total, survivors=found.survivors)
    return _Step(
        mean=plan.decode(found.total, rotation=task.rotation),
        devices=found.survivors,
        bytes_up=found.bytes_up,
        bytes_down=found.bytes_down,
        void=found.void,
        overshoot=plan.overshoot(found.survivors),
    )


def _each_alone(grid: Grid, config: RunConfig, task: StepTask, devices: Sequence[int], combiner: Combiner) -> _Step:
    """One update of what devices release, each with noise that is enough for itself."""
    content = task_to_content(task)
    messages = [Message(content, device, STEP, group_id=str(task.round)) for device in devices]
    answers = answers_of(grid, messages, config, f"round {task.round}")
    replies = []
    for device, answer in answers.items():
        reply = reply_from_content(answer)
        if reply.gradient.shape != task.weights.shape:
            raise ShapeMismatch(
                got=reply.gradient.shape, expected=task.weights.shape, what=f"device {device}, gradient"
            )
        # Under a plan all devices weigh the same, whatever one says of itself.
        replies.append(reply if task.plan is None else replace(reply, weight=1.0))
    return _Step(
        mean=combiner.combine([reply.gradient for reply in replies], [reply.weight for reply in replies]),
        devices=len(replies),
        bytes_up=sum(size_of(answer) for answer in answers.values()),
        bytes_down=len(devices) * size_of(content),
        void=any(reply.void for reply in replies),
        overshoot=1.0,
    )


def answers_of(grid: Grid, messages: Sequence[Message], config: RunConfig, what: str) -> Mapping[int, RecordDict]:
    """What the devices answered that did not fail, in the order of their ids.

    Raises: RoundFailed if fewer than `min_devices` did.
    """
    wave = Wave(grid, messages, timeout_s=config.timeout_s, name=what)
    contents = dict(sorted(wave))
    if len(contents) < config.min_devices:
        raise RoundFailed(
            f"{what}: got {len(contents)} answers of {len(messages)} devices, expected at least "
            f"{config.min_devices} ({wave.reasons()}); the device's own log says why"
        )
    return contents
