"""The rounds of training: ask every device for a step, take the mean, let the rule move the weights."""

import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedinfer.arrays import Vector, flatten
from fedinfer.errors import RoundFailed, ShapeMismatch
from fedinfer.flower import STEP, error_kind, reply_from_content, task_to_content
from fedinfer.models import build
from fedinfer.rules import RuleState
from fedinfer.settings import RunConfig
from fedinfer.training import StepReply, StepTask

log = logging.getLogger("fedinfer.server")
POLL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """What a server sees of one round: all of it computed from noised releases or from sizes."""

    round: int
    devices: int
    update_norm: float
    seconds: float
    bytes_up: int
    bytes_down: int
    void: bool


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

    Raises: RoundFailed if fewer than `min_devices` devices answer with a step.
    """
    devices = wait_for_devices(grid, config)
    rule = config.server_rule()
    schema_digest = config.public_schema.digest()
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
        content = task_to_content(task)
        messages = [Message(content, device, STEP, group_id=str(task.round)) for device in devices]
        replies, bytes_up = _collect(grid, messages, config, task)
        weights, rule_state = rule.step(state.weights, _mean(replies), state.rule_state)
        record = RoundRecord(
            round=task.round,
            devices=len(replies),
            update_norm=float(np.linalg.norm(weights - state.weights)),
            seconds=time.monotonic() - started,
            bytes_up=bytes_up,
            bytes_down=len(devices) * _size(content),
            void=any(reply.void for reply in replies),
        )
        state = RoundState(
            run=state.run,
            round=task.round,
            weights=weights,
            rule_state=rule_state,
            history=(*state.history, record),
        )
        yield state


def _collect(grid: Grid, messages: list[Message], config: RunConfig, task: StepTask) -> tuple[list[StepReply], int]:
    """The steps of the devices that answered, in the order of their ids, and the bytes they sent."""
    answers = answers_of(grid, messages, config, f"round {task.round}")
    replies = []
    for device, content in answers.items():
        reply = reply_from_content(content)
        if reply.gradient.shape != task.weights.shape:
            raise ShapeMismatch(
                got=reply.gradient.shape, expected=task.weights.shape, what=f"device {device}, gradient"
            )
        replies.append(reply)
    return replies, sum(_size(content) for content in answers.values())


def answers_of(grid: Grid, messages: list[Message], config: RunConfig, what: str) -> dict[int, RecordDict]:
    """What the devices answered that did not fail, in the order of their ids.

    Raises: RoundFailed if fewer than `min_devices` did.
    """
    contents: dict[int, RecordDict] = {}
    failures: dict[int, str] = {}
    replies = grid.send_and_receive(messages, timeout=config.timeout_s)
    for reply in sorted(replies, key=lambda message: message.metadata.src_node_id):
        device = reply.metadata.src_node_id
        kind = "InternalError" if reply.has_error() else error_kind(reply.content)
        if kind is None:
            contents[device] = reply.content
        else:
            failures[device] = kind
    silent = len(messages) - len(contents) - len(failures)
    if len(contents) < config.min_devices:
        raise RoundFailed(
            f"{what}: got {len(contents)} answers of {len(messages)} devices, expected at least "
            f"{config.min_devices} ({_reasons(failures, silent)}); the device's own log says why"
        )
    if failures or silent:
        log.warning("%s goes on without some devices: %s", what, _reasons(failures, silent))
    return contents


def _reasons(failures: Mapping[int, str], silent: int) -> str:
    kinds = [f"{list(failures.values()).count(kind)} {kind}" for kind in sorted(set(failures.values()))]
    return ", ".join(kinds + ([f"{silent} without an answer"] if silent else []))


def _mean(replies: list[StepReply]) -> Vector:
    weight = math.fsum(reply.weight for reply in replies)
    if weight == 0.0:
        return np.zeros_like(replies[0].gradient)
    # In double precision the order of the devices does not show in the float32 mean.
    total = sum(np.float64(reply.weight) * reply.gradient.astype(np.float64) for reply in replies)
    return np.asarray(total / weight, np.float32)


def _size(content: RecordDict) -> int:
    return sum(record.count_bytes() for record in content.values())
