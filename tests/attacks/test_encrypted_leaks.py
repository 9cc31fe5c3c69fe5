"""What answers give away of the weights, and decrypted values of the key: all on the naive path, nothing on ours.

Each attack is run against the way of a tutorial, where it succeeds, and against an answer of ours, where it fails.
"""

import functools

import numpy as np
import pytest
import tenseal.sealapi as seal
import torch
from torch import nn

from fedinfer.encrypted import Compiled, EncryptedClient, EncryptedEngine, compile_model, residues
from fedinfer.encrypted.circuit import MapStep
from fedinfer.encrypted.evaluator import Ciphertext
from fedinfer.encrypted.frames import join, packed_bytes, split, unpack
from fedinfer.encrypted.residues import ResidueServerSide
from fedinfer.encrypted.ring import Ring, held_by, held_for, ring_of
from fedinfer.encrypted.sampling import ternary_and_errors
from fedinfer.wire import Kind

INPUTS = 30
ROWS = torch.randn(64, INPUTS, generator=torch.Generator().manual_seed(0)) * 0.5


@functools.cache
def served() -> tuple[nn.Linear, Compiled]:
    torch.manual_seed(7)
    net = nn.Linear(INPUTS, 1)
    return net, compile_model(net, ROWS[:1], calibration=ROWS)


class Naive:
    """A server of the same plan that sends what it computes, whole, and does not re-randomise."""

    def __init__(self, compiled: Compiled, client: EncryptedClient) -> None:
        public = compiled.public
        parts = split(client.evaluation_keys(), Kind.EVALUATION_KEYS, public.digest, max_bytes=1 << 26, max_parts=99)
        self.side = ResidueServerSide(public.parameters, public.keys, parts)
        self.encoded = compiled.private.encode(
            EncryptedEngine(compiled)._scheme.encoder(public.parameters), public.parameters
        )
        (self.step,) = compiled.private.steps
        self.public = public

    def product(self, query: bytes) -> tuple[Ciphertext, Ciphertext]:
        (part,) = split(query, Kind.QUERY, self.public.digest, max_bytes=1 << 26, max_parts=1)
        x = self.side.read(part)
        assert isinstance(self.step, MapStep)
        weights, _ = self.encoded[self.step.target]
        return x, self.side.linear([x], self.step.terms, weights, self.step.scale)[0]


def weights_by_ratio(asked: np.ndarray, answered: np.ndarray, compiled: Compiled) -> np.ndarray:
    """Divide the second polynomials: a product with a plaintext is the plaintext times the query, modulo the prime."""
    public = compiled.public
    ring, prime = ring_of(public.parameters, public.parameters.primes), public.parameters.primes[0]
    ratio = [int(b) * pow(int(a), -1, prime) % prime for a, b in zip(asked, answered, strict=True)]
    centred = np.array([r - prime if r > prime // 2 else r for r in ratio], np.float64)[None]
    coefficients = ring.inverse(centred, ring.chosen(1))[0]
    (step,) = compiled.private.steps
    assert isinstance(step, MapStep)
    slots = ring.values(coefficients) / step.plain_scales[0]
    held = public.inputs[0].layout.over(public.parameters.slots)[0]
    return np.array([slots[held == k].mean() for k in range(INPUTS)])


def test_one_naive_answer_gives_every_weight_by_a_division() -> None:
    net, compiled = served()
    client = EncryptedClient.generate(compiled.public)
    x, y = Naive(compiled, client).product(client.encrypt(np.ones((1, INPUTS)) * 0.5))
    found = weights_by_ratio(x.parts[1, 0], y.parts[1, 0], compiled)
    np.testing.assert_allclose(found, net.weight.detach().numpy()[0], atol=1e-3)


def test_a_rerandomised_answer_gives_none() -> None:
    net, compiled = served()
    client = EncryptedClient.generate(compiled.public)
    session = EncryptedEngine(compiled).open(client.evaluation_keys())
    query = client.encrypt(np.ones((1, INPUTS)) * 0.5)
    (part,) = split(query, Kind.QUERY, compiled.public.digest, max_bytes=1 << 26, max_parts=1)
    asked = session._server.read(part).parts[1, 0]
    (answer,) = split(session.run(query), Kind.ANSWER, compiled.public.digest, max_bytes=1 << 26, max_parts=1)
    public = compiled.public
    ring, prime = ring_of(public.parameters, public.parameters.primes), public.parameters.primes[0]
    size = packed_bytes((prime,), ring.degree)
    second = unpack(answer[:size], (prime,), ring.degree, polynomials=1, what="answer")[0]
    found = weights_by_ratio(asked, ring.from_seal(second, ring.chosen(1))[0], compiled)
    assert (np.abs(found - net.weight.detach().numpy()[0]) < 1e-2).sum() <= 2
    assert session.run(query) != session.run(query)


@pytest.mark.parametrize("seeded", [False, True])
def test_a_public_key_of_zeros_does_not_switch_the_randomness_off(seeded: bool) -> None:
    """A client that may choose both polynomials sends zeros, averages the errors of many answers away, and divides.

    Ours chooses one of them only; the server draws the other from its seed.
    """
    net, compiled = served()
    client = EncryptedClient.generate(compiled.public)
    public = compiled.public
    kinds = {"max_bytes": 1 << 26, "max_parts": 99}
    parts = split(client.evaluation_keys(), Kind.EVALUATION_KEYS, public.digest, **kinds)
    parts[0] = bytes(len(parts[0]))
    session = EncryptedEngine(compiled, workers=1).open(join(Kind.EVALUATION_KEYS, public.digest, parts))
    side = session._server
    if not seeded:
        side._keys.public[:] = 0.0  # type: ignore[attr-defined]
    query = client.encrypt(np.ones((1, INPUTS)) * 0.5)
    ring, prime = ring_of(public.parameters, public.parameters.primes), public.parameters.primes[0]
    chosen, size = ring.chosen(1), packed_bytes((prime,), ring.degree)

    def second() -> np.ndarray:
        (answer,) = split(session.run(query), Kind.ANSWER, public.digest, **kinds)
        words = unpack(answer[:size], (prime,), ring.degree, polynomials=1, what="answer")[0]
        return ring.inverse(ring.from_seal(words, chosen), chosen)[0]

    first, total, count = second(), np.zeros(ring.degree), 100 if seeded else 1200
    for _ in range(count):
        difference = second() - first
        total += difference - prime * np.rint(difference / prime)
    exact = np.mod(first + np.rint(total / count), prime)
    (part,) = split(query, Kind.QUERY, public.digest, **kinds)
    found = weights_by_ratio(side.read(part).parts[1, 0], ring.forward(exact, chosen)[0], compiled)
    near = np.abs(found - net.weight.detach().numpy()[0]) < 1e-3
    assert near.sum() <= 1 if seeded else near.all()


@pytest.mark.parametrize("errors", [False, True])
def test_two_answers_to_one_query_do_not_give_their_randomness(errors: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their difference over the public key is that of two small polynomials, unless errors were added to each."""
    _, compiled = served()
    if not errors:
        monkeypatch.setattr(residues, "ternary_and_errors", lambda n: (ternary_and_errors(n)[0], *np.zeros((2, n))))
    client = EncryptedClient.generate(compiled.public)
    session = EncryptedEngine(compiled).open(client.evaluation_keys())
    query, public = client.encrypt(np.ones((1, INPUTS)) * 0.5), compiled.public
    ring, prime = ring_of(public.parameters, public.parameters.primes), public.parameters.primes[0]
    size, found = packed_bytes((prime,), ring.degree), []
    for _ in range(2):
        (answer,) = split(session.run(query), Kind.ANSWER, public.digest, max_bytes=1 << 26, max_parts=9)
        words = unpack(answer[:size], (prime,), ring.degree, polynomials=1, what="answer")[0]
        found.append(ring.from_seal(words, ring.chosen(1))[0])
    key = session._server._keys.public[1, 0]  # type: ignore[attr-defined]
    ratio = [int(a - b) * pow(int(k), -1, prime) % prime for a, b, k in zip(*found, key, strict=True)]
    centred = np.array([r - prime if r > prime // 2 else r for r in ratio], np.float64)[None]
    small = np.abs(ring.inverse(centred, ring.chosen(1))[0]) <= 2
    assert small.mean() < 0.01 if errors else small.all()


def test_the_slots_of_one_naive_answer_give_every_weight() -> None:
    net, compiled = served()
    client = EncryptedClient.generate(compiled.public)
    naive = Naive(compiled, client)
    _, y = naive.product(client.encrypt(np.ones((1, INPUTS)) * 0.5))
    ring = naive.side._ring
    coefficients = secret_coefficients(client, y, ring)
    slots = ring.values(coefficients) / y.scale / 0.5
    held = compiled.public.inputs[0].layout.over(compiled.public.parameters.slots)[0]
    found = np.array([slots[held == k].mean() for k in range(INPUTS)])
    np.testing.assert_allclose(found, net.weight.detach().numpy()[0], atol=1e-3)


def secret_key(client: EncryptedClient, ring: Ring) -> np.ndarray:
    key = client._secret._generator.secret_key()  # type: ignore[attr-defined]
    words = key.data()
    return ring.from_seal(np.array([[words[i] for i in range(ring.degree)]], np.uint64), ring.chosen(1))


def secret_coefficients(client: EncryptedClient, y: Ciphertext, ring: Ring) -> np.ndarray:
    """What the key holder sees of a whole ciphertext: c0 + c1 s, by asking for each pair of coefficients in turn."""
    chosen = ring.chosen(1)
    key = secret_key(client, ring)
    total = y.parts[0].copy()
    ring.multiply_add(total, y.parts[1], key, chosen)
    return ring.inverse(ring.reduced(total, chosen), chosen)[0]


def test_an_answer_holds_its_outputs_and_nothing_of_any_other_slot() -> None:
    """The bytes of the first polynomial are as many numbers as there are outputs: the others were never sent.

    With one output that is the constant coefficient, the mean of all slots; a ciphertext with every other coefficient
    of the message changed gives the same bytes there.
    """
    _, compiled = served()
    client = EncryptedClient.generate(compiled.public)
    session = EncryptedEngine(compiled).open(client.evaluation_keys())
    (answer,) = split(
        session.run(client.encrypt(np.ones((1, INPUTS)) * 0.5)),
        Kind.ANSWER, compiled.public.digest, max_bytes=1 << 26, max_parts=1,
    )  # fmt: skip
    prime, degree = compiled.public.parameters.primes[0], compiled.public.parameters.degree
    assert len(answer) == packed_bytes((prime,), degree) + packed_bytes((prime,), compiled.public.classes)
    rng = np.random.default_rng(0)
    for outputs in (1, 2, 16):
        message, other = rng.integers(-1000, 1000, 2 * outputs).astype(float), rng.normal(size=2 * outputs)
        # What a pair has in common is the imaginary part of a slot, which no honest query has: it is not sent either.
        common = other.copy()
        common[0] = 0.0
        common[1:outputs] = common[:outputs:-1]
        np.testing.assert_allclose(held_by(message + common), held_by(message))


def test_outputs_beyond_those_declared_are_empty() -> None:
    """Three outputs lie among four classes: the fourth has no weights, whatever the query."""
    torch.manual_seed(3)
    compiled = compile_model(nn.Linear(INPUTS, 3), ROWS[:1], calibration=ROWS)
    client = EncryptedClient.generate(compiled.public)
    session = EncryptedEngine(compiled).open(client.evaluation_keys())
    answer = session.run(client.encrypt(ROWS[:4].numpy()))
    parts = split(answer, Kind.ANSWER, compiled.public.digest, max_bytes=1 << 26, max_parts=4)
    seen = np.stack([client._secret.decrypt(part, outputs=4, scale=compiled.public.scale) for part in parts])
    assert np.abs(seen[:, :3]).max() > 0.1
    assert np.abs(seen[:, 3]).max() <= compiled.public.error


@pytest.mark.parametrize("shared", ["decrypted", "released"])
def test_a_shared_decryption_gives_the_key_and_a_released_one_does_not(shared: str) -> None:
    """Li and Micciancio 2021: encode the shared values again, subtract c0, divide by c1, and the key is there."""
    torch.manual_seed(1)
    net = nn.Linear(8, 1024)
    rows = torch.randn(16, 8) * 0.5
    compiled = compile_model(net, rows[:1], calibration=rows, accept_disagreement=True)
    client = EncryptedClient.generate(compiled.public)
    session = EncryptedEngine(compiled).open(client.evaluation_keys())
    answer = session.run(client.encrypt(rows[:1].numpy()))
    values = client.decrypt(answer) if shared == "decrypted" else client.release(answer, releases=1024, bits=20)
    public = compiled.public
    ring, (prime,) = ring_of(public.parameters, public.parameters.primes), public.parameters.primes[:1]
    (part,) = split(answer, Kind.ANSWER, public.digest, max_bytes=1 << 26, max_parts=1)
    size = packed_bytes((prime,), ring.degree)
    second = unpack(part[:size], (prime,), ring.degree, polynomials=1, what="answer")[0]
    held = unpack(part[size:], (prime,), public.classes, polynomials=1, what="answer")[0, 0]
    # Every number of an answer is one linear equation of the key, c1 being known: four such answers give as many as it
    # has coefficients. The test holds the equations against the true key instead of solving them.
    message = np.rint(held_for(values[0] * public.scale))
    known = np.mod(message - held.astype(np.float64), prime)
    chosen = ring.chosen(1)
    key = secret_key(client, ring)
    product = np.zeros((1, ring.degree))
    ring.multiply_add(product, ring.from_seal(second, chosen), key, chosen)
    step = ring.degree // (2 * public.classes)
    truth = np.mod(held_by(ring.inverse(ring.reduced(product, chosen), chosen)[0][::step]), prime)
    share = float((known == truth).mean())
    assert share > 0.99 if shared == "decrypted" else share < 0.01
    assert isinstance(client._secret._generator, seal.KeyGenerator)  # type: ignore[attr-defined]
