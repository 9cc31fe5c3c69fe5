"""What one answer gives away of the weights: everything on the naive path, the logit alone on ours."""

import numpy as np

from fedinfer.encrypted import EncryptedClient, EncryptedEngine
from fedinfer.encrypted.circuit import PrivateCircuit
from fedinfer.encrypted.frames import split
from fedinfer.encrypted.scheme import SealSecretSide, SealServerSide
from fedinfer.wire import Kind
from tests.encrypted.test_encrypted_query import model_of

INPUTS = 30


def recovered(slots: np.ndarray, weights: np.ndarray) -> float:
    """The share of weights that differences of neighbouring slots give to 1e-3.

    With all-one features in the first block only, slot i holds the sum of the weights from i on.
    """
    guess = slots[:INPUTS] - slots[1 : INPUTS + 1]
    return float((np.abs(guess - weights) < 1e-3).mean())


def attack(naive: bool) -> tuple[float, np.ndarray]:
    """Send one hostile query and look into every slot of its answer."""
    model = model_of("logistic", INPUTS)
    weights = model.state["0.weight"][0].double().numpy()
    engine = EncryptedEngine(model)
    circuit = engine.circuit
    secret = SealSecretSide(circuit.parameters, circuit.steps)
    query = np.zeros(circuit.parameters.slots)
    query[:INPUTS] = 1.0
    if naive:
        server = SealServerSide(circuit.parameters, circuit.steps, secret.public_keys())
        private = PrivateCircuit.of(model)
        x = server.rotate_and_sum(server.times(server.read(secret.encrypt(query)), private.first), circuit.inner_steps)
        # Rotate-and-sum over a whole block and an encryption of zero, as a tutorial would; then down to the last level.
        answer = server.rerandomise(server.times(x, np.ones(circuit.parameters.slots)))
        slots = secret.decrypt(server.write(answer))
    else:
        client = EncryptedClient(circuit, secret)
        session = engine.open(client.evaluation_keys())
        from fedinfer.encrypted.frames import join

        reply = session.run(join(Kind.QUERY, circuit.digest, [secret.encrypt(query)]))
        (part,) = split(reply, Kind.ANSWER, circuit.digest, max_bytes=1 << 25, max_parts=1)
        slots = secret.decrypt(part)
    return recovered(slots, weights), slots


def test_partial_sums_give_all_weights_on_the_naive_path() -> None:
    share, _ = attack(naive=True)
    assert share == 1.0


def test_our_answer_holds_the_logits_and_nothing_else() -> None:
    share, slots = attack(naive=False)
    assert share < 0.2
    stride = EncryptedEngine(model_of("logistic", INPUTS)).circuit.stride
    between = np.delete(slots, np.arange(0, len(slots), stride))
    assert np.abs(between).max() < 1e-4


def test_an_answer_is_never_the_same_ciphertext_twice() -> None:
    engine = EncryptedEngine(model_of("logistic", INPUTS))
    client = EncryptedClient.generate(engine.circuit)
    session = engine.open(client.evaluation_keys())
    query = client.encrypt(np.ones((1, INPUTS)))
    # Without an encryption of zero the answer would be a function of query and weights: its second half, divided
    # by the query's, gives the weights exactly.
    assert session.run(query) != session.run(query)
