"""What crosses between client and server: checked byte by byte, fresh every time, and no more than is needed."""

import functools
import pickle
import random
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedinfer.encrypted import (
    Compiled,
    EncryptedClient,
    EncryptedEngine,
    EncryptedSession,
    PublicCircuit,
    compile_model,
)
from fedinfer.encrypted.frames import join, pack, split, unpack
from fedinfer.encrypted.params import Parameters
from fedinfer.errors import BadUsage, EncryptedError, FedinferError, MessageTooLarge, WireError
from fedinfer.wire import Frame, Kind, decode, encode
from tests.encrypted.networks import Square

ROWS = torch.randn(32, 6, generator=torch.Generator().manual_seed(4)) * 0.5


def net_of(seed: int, hidden: int = 0, inputs: int = 6) -> nn.Module:
    torch.manual_seed(seed)
    if not hidden:
        return nn.Linear(inputs, 1)
    return nn.Sequential(nn.Linear(inputs, hidden), Square(), nn.Linear(hidden, 2))


@functools.cache
def compiled(hidden: int = 0) -> Compiled:
    return compile_model(net_of(1, hidden), ROWS[:1], calibration=ROWS)


@functools.cache
def opened(hidden: int = 0) -> tuple[EncryptedClient, EncryptedSession]:
    client = EncryptedClient.generate(compiled(hidden).public)
    return client, EncryptedEngine(compiled(hidden)).open(client.evaluation_keys())


@given(st.lists(st.integers(2, (1 << 48) - 1), min_size=1, max_size=4), st.data())
def test_residues_round_trip(primes: list[int], data: st.DataObject) -> None:
    rows = [data.draw(st.lists(st.integers(0, p - 1), min_size=5, max_size=5)) for p in primes]
    residues = np.array(rows, np.uint64)[None]
    assert (unpack(pack(residues, primes), primes, 5, polynomials=1, what="test") == residues).all()


def test_a_residue_that_is_none_is_refused() -> None:
    with pytest.raises(WireError, match="not below its prime"):
        unpack(pack(np.array([[[101]]], np.uint64), [101]), [101], 1, polynomials=1, what="query")
    with pytest.raises(WireError, match="got 2 bytes, expected 1"):
        unpack(b"ab", [101], 1, polynomials=1, what="query")


def test_the_public_circuit_round_trips_and_holds_no_weight() -> None:
    public = compiled(8).public
    again = PublicCircuit.from_bytes(public.to_bytes())
    assert again.digest == public.digest
    assert again.to_bytes() == public.to_bytes()
    # Whole numbers that say where and how, four sizes of values and noise, and nothing else.
    header = decode(public.to_bytes(), Kind.CIRCUIT, max_bytes=1 << 20).header
    (first,) = header.pop("inputs")
    real = {"scale", "error", "approximation"}
    assert {key for key, value in header.items() if isinstance(value, float)} == real
    assert {type(value) for value in first["shape"] + first["held"]} == {int}
    assert np.log2(first["bound"]) == np.rint(np.log2(first["bound"]))
    assert header["about"] == {}


def test_a_server_cannot_talk_a_client_into_weak_parameters() -> None:
    with pytest.raises(EncryptedError, match="got 288 bits at degree 8192, expected at most 218"):
        Parameters(degree=8192, prime_bits=(48,) * 6, special=True, scale_bits=30.0)
    frame = decode(compiled(8).public.to_bytes(), Kind.CIRCUIT, max_bytes=1 << 20)
    weaker = {**frame.header["parameters"], "degree": 4096}
    hostile = encode(Frame(kind=Kind.CIRCUIT, header={**frame.header, "parameters": weaker}, body=frame.body))
    with pytest.raises(EncryptedError, match="expected at most 109"):
        PublicCircuit.from_bytes(hostile)


@pytest.mark.parametrize(
    "change",
    [
        {"classes": 3},
        {"outputs": 0},
        {"rotations": [[0, 1]]},
        {"rotations": [[1, 99]]},
        {"relinearisation": -1},
        {"scale": 0.0},
        {"format": 1},
        {"inputs": []},
        {"inputs": [{"shape": [6], "held": [1, 3], "bound": 1.0}]},
        {"inputs": [{"shape": [10**12], "held": [1, 8], "bound": 1.0}]},
        {"scale": "x"},
    ],
)
def test_a_circuit_whose_parts_do_not_fit_is_refused(change: dict[str, object]) -> None:
    frame = decode(compiled(8).public.to_bytes(), Kind.CIRCUIT, max_bytes=1 << 20)
    with pytest.raises(FedinferError):
        PublicCircuit.from_bytes(encode(Frame(kind=Kind.CIRCUIT, header={**frame.header, **change}, body=frame.body)))


def test_the_secret_key_is_not_among_the_keys_and_is_not_copied() -> None:
    client, _ = opened()
    with pytest.raises(TypeError, match="a secret key is not copied"):
        pickle.dumps(client)
    assert "secret" not in repr(client).lower()
    frame = decode(client.evaluation_keys(), Kind.EVALUATION_KEYS, max_bytes=1 << 26)
    assert len(frame.header["sizes"]) == compiled().public.keys.parts()


@pytest.mark.parametrize("hidden", [0, 8])
def test_keys_and_queries_are_fresh_and_of_constant_size(hidden: int) -> None:
    client, session = opened(hidden)
    other = EncryptedClient.generate(compiled(hidden).public)
    assert len(client.evaluation_keys()) == len(other.evaluation_keys())
    assert client.evaluation_keys() != other.evaluation_keys()
    zeros, ones = client.encrypt(np.zeros((1, 6))), client.encrypt(np.ones((1, 6)))
    assert len(zeros) == len(ones)
    assert client.encrypt(np.zeros((1, 6))) != zeros
    assert len(session.run(zeros)) == len(session.run(ones))


def test_messages_for_another_circuit_or_of_another_kind_are_refused() -> None:
    client, session = opened()
    other = compile_model(net_of(2), ROWS[:1], calibration=ROWS, about={"name": "another"})
    stranger = EncryptedClient.generate(other.public)
    with pytest.raises(EncryptedError, match="made for another circuit"):
        session.run(stranger.encrypt(np.zeros((1, 6))))
    with pytest.raises(EncryptedError, match="made for another circuit"):
        EncryptedEngine(compiled()).open(stranger.evaluation_keys())
    with pytest.raises(WireError, match="got kind 2, expected 3"):
        session.run(client.evaluation_keys())
    with pytest.raises(MessageTooLarge, match="expected at most"):
        EncryptedEngine(compiled()).open(opened(8)[0].evaluation_keys())


def test_keys_that_are_not_whole_are_refused() -> None:
    client, _ = opened(8)
    engine, digest = EncryptedEngine(compiled(8)), compiled(8).public.digest
    parts = split(client.evaluation_keys(), Kind.EVALUATION_KEYS, digest, max_bytes=1 << 26, max_parts=99)
    for wrong in (parts[:-1], [*parts[:-1], parts[-1][:-1]], [b"", *parts[1:]], [*parts[:-1], parts[0]]):
        with pytest.raises(FedinferError):
            engine.open(join(Kind.EVALUATION_KEYS, digest, wrong))


KINDS = {"query": Kind.QUERY, "keys": Kind.EVALUATION_KEYS, "answer": Kind.ANSWER}


def messages(kind: str) -> tuple[bytes, Callable[[bytes], object]]:
    """A message and who reads it."""
    client, session = opened()
    query = client.encrypt(np.zeros((1, 6)))
    readers = {"query": session.run, "keys": EncryptedEngine(compiled(), workers=1).open, "answer": client.decrypt}
    made = {"query": query, "keys": client.evaluation_keys(), "answer": session.run(query)}
    return made[kind], readers[kind]


def mutant(message: bytes, generator: random.Random) -> bytes:
    """The message with a few bytes changed, near its start or anywhere, or cut, or longer."""
    out = bytearray(message)
    for _ in range(generator.choice([1, 2, 8])):
        reach = generator.choice([40, 300, len(out)])
        out[generator.randrange(min(len(out), reach))] = generator.randrange(256)
    if generator.random() < 0.2:
        del out[generator.randrange(len(out)) :]
    return bytes(out + bytes(generator.randrange(64))) if generator.random() < 0.1 else bytes(out)


@pytest.mark.parametrize(("kind", "count"), [("query", 6000), ("keys", 2000), ("answer", 2000)])
def test_every_mutated_frame_is_a_typed_error(kind: str, count: int) -> None:
    message, read = messages(kind)
    generator = random.Random(5)
    for _ in range(count):
        changed = mutant(message, generator)
        if changed != message:
            with pytest.raises(FedinferError):
                read(changed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_frame_with_a_right_checksum_is_an_error_or_an_answer_in_bounded_memory(kind: str) -> None:
    message, read = messages(kind)
    digest = compiled().public.digest
    (part, *_) = split(message, KINDS[kind], digest, max_bytes=1 << 26, max_parts=99)
    rest = split(message, KINDS[kind], digest, max_bytes=1 << 26, max_parts=99)[1:]
    generator = random.Random(7)
    refused = 0
    tracemalloc.start()
    for _ in range(400):
        try:
            read(
                join(
                    KINDS[kind], digest, [mutant(part, generator), *rest], rows=generator.choice([1, 1, 1, 2, 1 << 40])
                )
            )
        except FedinferError:
            refused += 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refused > 100
    assert peak < 1 << 24


def test_what_is_released_is_noisy_and_rounded() -> None:
    client, session = opened()
    answer = session.run(client.encrypt(np.ones((2, 6)) * 0.25))
    plain = client.decrypt(answer)
    error = compiled().public.error
    released = np.stack([client.release(answer, releases=1000, bits=10) for _ in range(200)])
    deviation = error * np.sqrt(12000.0) * 2.0**5
    assert np.abs(released.mean(axis=0) - plain).max() < 0.4 * deviation
    assert 0.8 < (released - plain).std() / deviation < 1.2
    steps = released / (deviation / 4)
    assert np.abs(steps - np.rint(steps)).max() < 1e-6
    assert client.labels(answer, releases=1000, bits=2).shape == (2,)
    with pytest.raises(BadUsage, match="got 1 releases"):
        client.release(answer, releases=1)
