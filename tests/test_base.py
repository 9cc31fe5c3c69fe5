"""The base: vectors, frames, files, rules, settings and messages."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedinfer.arrays import digest, flatten, unflatten
from fedinfer.errors import BadUsage, FedinferError, MessageTooLarge, ShapeMismatch, UnsupportedVersion, WireError
from fedinfer.files import replace_file
from fedinfer.flower import (
    reply_from_content,
    reply_to_content,
    task_from_content,
    task_to_content,
)
from fedinfer.models import ModelSpec
from fedinfer.privacy import Poisson, PrivacyPlan
from fedinfer.rules import RULES, FedAdaptive, FedSgd, rule_named
from fedinfer.settings import RunConfig
from fedinfer.sums.messages import error_kind, error_to_content
from fedinfer.training import StepReply, StepTask
from fedinfer.wire import Frame, Kind, decode, encode

PLAN = PrivacyPlan(clip_norm=1.0, noise_multiplier=4.0, sampler=Poisson(rate=0.5), delta=1e-6, steps=3, divisor=10.0)


@given(st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=4))
def test_flatten_and_unflatten_are_inverse(shapes: list[list[int]]) -> None:
    state = {str(i): torch.randn(shape) for i, shape in enumerate(shapes)}
    back = unflatten(flatten(state), state)
    assert all(back[name].equal(tensor) for name, tensor in state.items())
    with pytest.raises(ShapeMismatch):
        unflatten(np.append(flatten(state), np.float32(0)), state)


def test_the_digest_of_a_vector_is_a_known_answer() -> None:
    # printf '\x00\x00\x80\x3f\x00\x00\x00\xc0' | sha256sum: 1 and -2 as little-endian float32.
    known = "ee4ac73c2bd27756ab82780f27c73a7bc4d3f0bb6acb37e008bc27eccd7e588b"
    assert digest(np.array([1.0, -2.0], np.float32)) == known


@given(st.binary(max_size=200), st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=4))
def test_frames_round_trip(body: bytes, header: dict[str, object]) -> None:
    frame = Frame(kind=Kind.QUERY, header=header, body=body)
    assert decode(encode(frame), Kind.QUERY, max_bytes=10_000) == frame


@given(st.binary(max_size=100))
def test_bytes_that_are_no_frame_give_a_wire_error(data: bytes) -> None:
    with pytest.raises(WireError):
        decode(data, Kind.QUERY, max_bytes=1000)


def test_a_frame_is_checked_by_size_version_and_kind() -> None:
    good = encode(Frame(kind=Kind.QUERY, header={}, body=b"abc"))
    with pytest.raises(MessageTooLarge):
        decode(good, Kind.QUERY, max_bytes=len(good) - 1)
    with pytest.raises(UnsupportedVersion):
        decode(good[:4] + b"\x09" + good[5:], Kind.QUERY, max_bytes=1000)
    with pytest.raises(WireError, match="got kind 3, expected 4"):
        decode(good, Kind.ANSWER, max_bytes=1000)
    for end in range(len(good)):
        with pytest.raises(WireError):
            decode(good[:end], Kind.QUERY, max_bytes=1000)
    deep = b"[" * 100_000
    prefix = encode(Frame(kind=Kind.QUERY, header={}))[:6] + len(deep).to_bytes(4, "big") + (0).to_bytes(8, "big")
    with pytest.raises(WireError, match="is not JSON"):
        decode(prefix + deep, Kind.QUERY, max_bytes=1 << 20)


def test_replace_file_leaves_the_old_file_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    replace_file(path, b"old")

    def crash(_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="no space"):
        replace_file(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with path.open("rb") as reader:  # who had the old file open goes on reading the old file, whole
        replace_file(path, b"new")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("name", RULES)
def test_every_rule_keeps_the_contract(name: str) -> None:
    rule = rule_named(name, learning_rate=0.1, momentum=0.5)
    weights = np.linspace(-1, 1, 7, dtype=np.float32)
    state = rule.init(weights)
    before = weights.copy()
    for _ in range(3):
        weights, state = rule.step(weights, np.ones(7, np.float32), state)
    assert weights.dtype == np.float32
    assert all(vector.dtype == np.float32 and vector.shape == (7,) for vector in state.values())
    assert (weights < before).all()
    still, _ = rule.step(before, np.zeros(7, np.float32), rule.init(before))
    np.testing.assert_array_equal(still, before)


def test_rules_follow_their_papers() -> None:
    # Reddi et al. 2021, algorithm 2, written out: first, second moment and step, for two steps of one weight.
    for yogi in (False, True):
        rule = FedAdaptive(learning_rate=0.1, momentum=0.9, decay=0.99, floor=1e-3, yogi=yogi)
        w, m, v = 1.0, 0.0, 1e-6
        weights = np.array([1.0], np.float32)
        state = rule.init(weights)
        for g in (0.5, -0.25):
            m = 0.9 * m + 0.1 * g
            v = v - 0.01 * g * g * np.sign(v - g * g) if yogi else 0.99 * v + 0.01 * g * g
            w = w - 0.1 * m / (np.sqrt(v) + 1e-3)
            weights, state = rule.step(weights, np.array([g], np.float32), state)
        assert weights[0] == pytest.approx(w, rel=1e-5)
    sgd = FedSgd(learning_rate=0.5, momentum=0.5)
    one, state = sgd.step(np.zeros(1, np.float32), np.ones(1, np.float32), sgd.init(np.zeros(1, np.float32)))
    two, _ = sgd.step(one, np.ones(1, np.float32), state)
    assert (one[0], two[0]) == (-0.5, -1.25)
    with pytest.raises(BadUsage, match="expected one of fedsgd, fedadam, fedyogi"):
        rule_named("adamw", learning_rate=1.0, momentum=0.0)


def test_settings_round_trip_and_refuse_what_they_do_not_know() -> None:
    config = RunConfig(rounds=7, epsilon=1.5, rule="fedyogi")
    assert RunConfig.from_flat(config.to_flat()) == config
    assert RunConfig.from_flat({"epsilon": 3}).epsilon == 3.0
    for wrong in ({"roundz": 3}, {"rounds": 3.5}, {"rounds": True}, {"model": 3}, {"rule": "x"}, {"model": "x"}):
        with pytest.raises(BadUsage):
            RunConfig.from_flat(wrong)
    assert config.digest() == RunConfig(rounds=7, epsilon=1.5, rule="fedyogi", out="elsewhere").digest()
    assert config.digest() != RunConfig(rounds=8, epsilon=1.5, rule="fedyogi").digest()


@given(st.integers(1, 50), st.booleans(), st.integers(1, 10**6))
def test_messages_round_trip(inputs: int, private: bool, round: int) -> None:
    task = StepTask(
        run="a",
        round=round,
        spec=ModelSpec(family="logistic", inputs=inputs),
        schema_digest="d",
        weights=np.random.default_rng(inputs).normal(size=inputs + 1).astype(np.float32),
        plan=PLAN if private else None,
    )
    back = task_from_content(task_to_content(task))
    assert back.weights.tobytes() == task.weights.tobytes()
    assert (back.run, back.round, back.spec, back.plan) == (task.run, task.round, task.spec, task.plan)
    reply = StepReply(gradient=task.weights, weight=1.0, void=private)
    again = reply_from_content(reply_to_content(reply))
    assert again.gradient.tobytes() == reply.gradient.tobytes()
    assert (again.weight, again.void) == (1.0, private)


HOSTILE = {
    "empty": RecordDict(),
    "no plan field of the right type": RecordDict({"task": ConfigRecord({"plan": 3})}),
    "not finite": RecordDict(
        {"gradient": ArrayRecord([np.array([np.nan], np.float32)]), "reply": MetricRecord({"weight": 1.0, "void": 0})}
    ),
    "doubles": RecordDict({"gradient": ArrayRecord([np.zeros(3)]), "reply": MetricRecord({"weight": 1.0, "void": 0})}),
    "negative weight": RecordDict(
        {"gradient": ArrayRecord([np.zeros(3, np.float32)]), "reply": MetricRecord({"weight": -1.0, "void": 0})}
    ),
    "two arrays": RecordDict(
        {"gradient": ArrayRecord([np.zeros(3, np.float32)] * 2), "reply": MetricRecord({"weight": 1.0, "void": 0})}
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_messages_give_a_typed_error(name: str) -> None:
    with pytest.raises(FedinferError):
        reply_from_content(HOSTILE[name])
    with pytest.raises(FedinferError):
        task_from_content(HOSTILE[name])


def test_an_error_travels_as_its_kind() -> None:
    assert error_kind(error_to_content(BadUsage("line 3 says 17"))) == "BadUsage"
    assert error_kind(error_to_content(ValueError("17"))) == "InternalError"
    assert "17" not in str(error_to_content(BadUsage("line 3 says 17")))
    assert error_kind(RecordDict()) is None
