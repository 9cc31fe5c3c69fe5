"""The encrypted query: equal to the plain model on both schemes, and strict about everything that comes in."""

import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedinfer.encrypted import EncryptedClient, EncryptedEngine, PublicCircuit
from fedinfer.encrypted.params import MAX_BITS_128, PARAMETERS, Parameters
from fedinfer.encrypted.scheme import InsecureClear, Scheme, TenSeal
from fedinfer.errors import EncryptedError, FedinferError, NonFinite, ShapeMismatch, WireError
from fedinfer.models import Model, ModelSpec, build
from fedinfer.wire import Frame, Kind, decode, encode


def model_of(family: str, inputs: int, hidden: int = 16, seed: int = 0) -> Model:
    net = build(ModelSpec(family=family, inputs=inputs, hidden=hidden), seed=seed)
    with torch.no_grad():
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(seed))
    spec = ModelSpec(family=family, inputs=inputs, hidden=hidden)
    return Model(spec=spec, state=net.state_dict(), schema={}, schema_digest="of a test")


def features_of(rows: int, inputs: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (rows, inputs)).astype(np.float32)


def plain(model: Model, features: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.module()(torch.from_numpy(features)).numpy()


def ask(model: Model, features: np.ndarray, scheme: Scheme) -> np.ndarray:
    engine = EncryptedEngine(model, scheme)
    client = EncryptedClient.generate(PublicCircuit.from_bytes(engine.circuit.to_bytes()), scheme)
    session = engine.open(client.evaluation_keys())
    return client.decrypt(session.run(client.encrypt(features)), rows=len(features))


@settings(max_examples=40)
@given(st.sampled_from(["logistic", "mlp"]), st.integers(1, 60), st.integers(1, 20), st.integers(1, 100))
def test_the_circuit_computes_the_model(family: str, inputs: int, hidden: int, rows: int) -> None:
    model, features = model_of(family, inputs, hidden), features_of(rows, inputs)
    np.testing.assert_allclose(ask(model, features, InsecureClear()), plain(model, features), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "rows"), [("logistic", 1), ("logistic", 65), ("mlp", 5)])
def test_ckks_answers_are_exact_to_1e_3(family: str, rows: int) -> None:
    model, features = model_of(family, 35), features_of(rows, 35)
    np.testing.assert_allclose(ask(model, features, TenSeal()), plain(model, features), rtol=0, atol=1e-3)


@pytest.mark.parametrize("parameters", PARAMETERS.values())
def test_parameters_have_128_bits(parameters: Parameters) -> None:
    assert sum(parameters.prime_bits) <= MAX_BITS_128[parameters.degree]


def test_weak_parameters_are_refused() -> None:
    with pytest.raises(EncryptedError, match="got 300 bits at degree 8192, expected at most 218"):
        Parameters(degree=8192, prime_bits=(60, 60, 60, 60, 60), scale_bits=40)


def test_a_server_cannot_talk_a_client_into_other_parameters() -> None:
    circuit = EncryptedEngine(model_of("logistic", 5), InsecureClear()).circuit
    frame = decode(circuit.to_bytes(), Kind.CIRCUIT, max_bytes=1 << 20)
    weaker = {**frame.header["parameters"], "degree": 16384}
    hostile = encode(Frame(kind=Kind.CIRCUIT, header={**frame.header, "parameters": weaker}))
    with pytest.raises(EncryptedError, match="circuit: got parameters"):
        PublicCircuit.from_bytes(hostile)


def test_the_public_circuit_depends_on_no_weight() -> None:
    circuits = {EncryptedEngine(model_of("mlp", 9, seed=seed), InsecureClear()).circuit.to_bytes() for seed in range(3)}
    assert len(circuits) == 1


def test_the_secret_key_is_not_among_the_keys_and_is_not_copied() -> None:
    circuit = EncryptedEngine(model_of("logistic", 5)).circuit
    client = EncryptedClient.generate(circuit)
    with pytest.raises(TypeError, match="a secret key is not copied"):
        pickle.dumps(client)
    assert "Key" not in repr(client)
    frame = decode(client.evaluation_keys(), Kind.EVALUATION_KEYS, max_bytes=1 << 26)
    assert len(frame.header["sizes"]) == 3


def test_keys_and_queries_are_fresh_and_of_constant_size() -> None:
    circuit = EncryptedEngine(model_of("logistic", 5)).circuit
    one, two = EncryptedClient.generate(circuit), EncryptedClient.generate(circuit)
    assert one.evaluation_keys() != two.evaluation_keys()
    zeros, ones = one.encrypt(np.zeros((1, 5))), one.encrypt(np.ones((1, 5)))
    assert one.encrypt(np.zeros((1, 5))) != zeros
    # SEAL's compression moves the size by some bytes at random, whatever the features: by up to two in a hundred.
    assert abs(len(zeros) - len(ones)) < 0.05 * len(zeros)


def test_features_that_do_not_fit_are_refused() -> None:
    client = EncryptedClient.generate(
        EncryptedEngine(model_of("logistic", 5), InsecureClear()).circuit, InsecureClear()
    )
    with pytest.raises(ShapeMismatch):
        client.encrypt(np.zeros((1, 6)))
    with pytest.raises(NonFinite):
        client.encrypt(np.full((1, 5), np.nan))
    with pytest.raises(EncryptedError, match="got 0 rows"):
        client.encrypt(np.zeros((0, 5)))


def test_a_query_for_another_circuit_is_refused() -> None:
    engine, other = EncryptedEngine(model_of("logistic", 5)), EncryptedEngine(model_of("logistic", 6))
    client, stranger = EncryptedClient.generate(engine.circuit), EncryptedClient.generate(other.circuit)
    session = engine.open(client.evaluation_keys())
    with pytest.raises(EncryptedError, match="made for another circuit"):
        session.run(stranger.encrypt(np.zeros((1, 6))))
    with pytest.raises(EncryptedError, match="made for another circuit"):
        engine.open(stranger.evaluation_keys())
    with pytest.raises(WireError, match="got kind 2, expected 3"):
        session.run(client.evaluation_keys())


def test_mutated_frames_give_a_typed_error_or_an_answer_never_a_crash() -> None:
    engine = EncryptedEngine(model_of("logistic", 5))
    client = EncryptedClient.generate(engine.circuit)
    session = engine.open(client.evaluation_keys())
    query = client.encrypt(np.zeros((1, 5)))
    generator = random.Random(5)
    refused = 0
    for _ in range(300):
        mutant = bytearray(query)
        for _ in range(generator.randint(1, 8)):
            mutant[generator.randrange(min(len(mutant), generator.choice([40, 300, len(mutant)])))] = (
                generator.randrange(256)
            )
        if generator.random() < 0.2:
            del mutant[generator.randrange(len(mutant)) :]
        try:
            session.run(bytes(mutant))
        except FedinferError:
            refused += 1
    assert refused > 150
