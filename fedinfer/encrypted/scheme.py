"""The seam between circuits and cryptography: one circuit runs under CKKS for real and in the clear for tests.

A `SecretSide` belongs to the client and holds the secret key; it has no serialiser. A `ServerSide` holds the client's
public keys only. An `Encoder` makes plaintexts, once for all clients. Ciphertexts cross as bytes.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedinfer.encrypted import frames, noise
from fedinfer.encrypted.evaluator import Ciphertext, Evaluator, Term
from fedinfer.encrypted.frames import packed_bytes, unpack
from fedinfer.encrypted.keys import KeyPlan, read_keys
from fedinfer.encrypted.params import Parameters
from fedinfer.encrypted.ring import Ring, held_by, ring_of
from fedinfer.encrypted.sampling import ternary_and_errors, wide_noise
from fedinfer.encrypted.xof import SEED_BYTES, uniform_residues
from fedinfer.errors import EncryptedError, WireError

Floats = NDArray[np.float64]


class SecretSide(Protocol):
    """The client's half: keys, encryption and decryption."""

    def public_keys(self) -> Sequence[bytes]: ...
    def encrypt(self, slots: Floats) -> bytes: ...
    def decrypt(self, answer: bytes, *, outputs: int, scale: float) -> Floats: ...


class Encoder(Protocol):
    """Plaintexts: vectors of slots at a scale and level, ready to multiply (`extended` for use between turns)."""

    def encode(self, slots: Floats, scale: float, level: int, *, extended: bool) -> Any: ...


class ServerSide(Protocol):
    """The server's half: arithmetic on vectors of slots that it cannot see. Ciphertexts have `level` and `scale`."""

    def read(self, query: bytes) -> Any: ...
    def write(self, answer: Any, *, outputs: int, flood: float) -> bytes: ...
    def linear(
        self, sources: Sequence[Any], outputs: Sequence[Sequence[Term]], plains: Sequence[Any], scale: float
    ) -> list[Any]: ...
    def rotate_and_sum(self, x: Any, steps: Sequence[int]) -> Any: ...
    def multiply(self, x: Any, y: Any) -> Any: ...
    def add_plain(self, x: Any, plain: Any) -> Any: ...
    def rescale(self, x: Any, level: int) -> Any: ...
    def align(self, x: Any, level: int, factor: int) -> Any: ...


class Scheme(Protocol):
    """How to make the parts for given parameters and keys."""

    def secret_side(self, parameters: Parameters, plan: KeyPlan) -> SecretSide: ...
    def server_side(self, parameters: Parameters, plan: KeyPlan, keys: Sequence[bytes]) -> ServerSide: ...
    def encoder(self, parameters: Parameters) -> Encoder: ...


class TenSeal:
    """CKKS: SEAL, through TenSEAL's bindings, holds the secrets; the server computes with `evaluator`."""

    def secret_side(self, parameters: Parameters, plan: KeyPlan) -> SecretSide:
        from fedinfer.encrypted.seal import SealSecretSide

        return SealSecretSide(parameters, plan)

    def server_side(self, parameters: Parameters, plan: KeyPlan, keys: Sequence[bytes]) -> ServerSide:
        return ResidueServerSide(parameters, plan, keys)

    def encoder(self, parameters: Parameters) -> Encoder:
        return ResidueEncoder(parameters)


class ResidueEncoder:
    """Plaintexts as residues in NTT form."""

    def __init__(self, parameters: Parameters) -> None:
        self._ring = ring_of(parameters, parameters.primes)

    def encode(self, slots: Floats, scale: float, level: int, *, extended: bool) -> Any:
        return self._ring.encode(slots, scale, self._ring.chosen(level, special=extended))


class ResidueServerSide:
    """The server's half on residues. What comes in is checked byte by byte and never given to SEAL.

    Raises: WireError or EncryptedError unless `keys` are just the keys of the plan.
    """

    def __init__(self, parameters: Parameters, plan: KeyPlan, keys: Sequence[bytes]) -> None:
        self._parameters = parameters
        self._ring: Ring = ring_of(parameters, parameters.primes)
        self._keys = read_keys(self._ring, parameters, plan, keys)
        self._evaluator = Evaluator(self._ring, self._keys.rotations, self._keys.relinearisation)
        self.rotate_and_sum = self._evaluator.rotate_and_sum
        self.multiply = self._evaluator.multiply
        self.add_plain = self._evaluator.add_plain
        self.rescale = self._evaluator.rescale
        self.align = self._evaluator.align

    def read(self, query: bytes) -> Ciphertext:
        """Read a fresh query: a seed and a polynomial at the top level."""
        ring, primes = self._ring, self._parameters.primes[: self._parameters.levels]
        if len(query) != SEED_BYTES + packed_bytes(primes, ring.degree):
            raise WireError(f"query: got {len(query)} bytes, expected {SEED_BYTES + packed_bytes(primes, ring.degree)}")
        chosen = ring.chosen(len(primes))
        first = unpack(query[SEED_BYTES:], primes, ring.degree, polynomials=1, what="query")[0]
        second = uniform_residues(query[:SEED_BYTES], primes, ring.degree)
        parts = np.stack([ring.from_seal(first, chosen), ring.from_seal(second, chosen)])
        return Ciphertext(parts=parts, scale=self._parameters.scale)

    def linear(
        self, sources: Sequence[Ciphertext], outputs: Sequence[Sequence[Term]], plains: Sequence[Any], scale: float
    ) -> list[Ciphertext]:
        return [Ciphertext(parts=p, scale=scale) for p in self._evaluator.linear(sources, outputs, plains)]

    def write(self, answer: Ciphertext, *, outputs: int, flood: float) -> bytes:
        """An answer: re-randomised, and without any number that is not one of its outputs.

        Of the first polynomial only the `outputs` differences of coefficients that hold the outputs are sent, which
        says exactly nothing of all other slots; `outputs` is a power of two, and the last map has no weights for those
        beyond what the network has. `flood` is the largest noise, in units of the ciphertext, that each is given.
        """
        ring, prime = self._ring, self._ring.primes[0]
        parts = self._rerandomised(answer.parts)
        chosen = ring.chosen(1)
        held = held_by(ring.inverse(parts[0], chosen)[0][:: ring.degree // (2 * outputs)])
        held = np.mod(held + wide_noise(outputs, flood), float(prime)).astype(np.uint64)
        return frames.pack(ring.to_seal(parts[1], chosen), (prime,)) + frames.pack(held[None], (prime,))

    def _rerandomised(self, parts: Any) -> Any:
        """Add an encryption of zero under the client's public key: u * key + errors, u and the errors fresh."""
        ring, chosen = self._ring, self._ring.chosen(1)
        u, *errors = (ring.forward(poly, chosen) for poly in ternary_and_errors(ring.degree))
        out = parts.copy()
        for k, error in enumerate(errors):
            ring.multiply_add(out[k], u, self._keys.public[k], chosen)
            out[k] += error
        return ring.reduced(out, chosen)


class InsecureClear:
    """No encryption at all, the same arithmetic in fixed point, with noise of the size of CKKS's. For tests.

    `noise` is a seed, or None for exact arithmetic.
    """

    def __init__(self, noise: int | None = None) -> None:
        self._seed = noise

    def secret_side(self, parameters: Parameters, plan: KeyPlan) -> SecretSide:
        return ClearSide(parameters, self._seed)

    def server_side(self, parameters: Parameters, plan: KeyPlan, keys: Sequence[bytes]) -> ServerSide:
        return ClearSide(parameters, self._seed)

    def encoder(self, parameters: Parameters) -> Encoder:
        return ClearSide(parameters, self._seed)


class ClearCiphertext:
    """Slots in the clear."""

    def __init__(self, slots: Floats, level: int, scale: float) -> None:
        self.slots, self.level, self.scale = slots, level, scale


class ClearSide:
    """Both halves of the clear scheme."""

    def __init__(self, parameters: Parameters, seed: int | None) -> None:
        self._parameters = parameters
        self._generator = None if seed is None else np.random.default_rng(seed)

    def _noisy(self, slots: Floats, deviation: float, scale: float) -> Floats:
        if self._generator is None:
            return slots
        return np.asarray(slots + self._generator.normal(0.0, deviation / scale, slots.shape))

    def public_keys(self) -> Sequence[bytes]:
        return [b""]

    def encrypt(self, slots: Floats) -> bytes:
        noisy = self._noisy(slots, noise.fresh(self._parameters.degree), self._parameters.scale)
        return noisy.astype("<f8").tobytes()

    def decrypt(self, answer: bytes, *, outputs: int, scale: float) -> Floats:
        slots = np.frombuffer(answer, "<f8").astype(np.float64)
        if len(slots) != outputs:
            raise EncryptedError(f"answer: got {len(slots)} numbers, expected {outputs}")
        return slots / scale

    def encode(self, slots: Floats, scale: float, level: int, *, extended: bool) -> Any:
        return self._noisy(slots, noise.rounded(self._parameters.degree), scale)

    def read(self, query: bytes) -> ClearCiphertext:
        return ClearCiphertext(
            np.frombuffer(query, "<f8").astype(np.float64), self._parameters.levels, self._parameters.scale
        )

    def write(self, answer: Any, *, outputs: int, flood: float) -> bytes:
        means: Floats = answer.slots.reshape(-1, outputs).mean(axis=0) * answer.scale
        means = self._noisy(means, noise.answered(self._parameters.degree, outputs), 1.0)
        return means.astype("<f8").tobytes()

    def linear(
        self, sources: Sequence[Any], outputs: Sequence[Sequence[Term]], plains: Sequence[Any], scale: float
    ) -> list[Any]:
        level = sources[0].level
        turned: dict[tuple[int, int], Floats] = {}
        for term in (term for terms in outputs for term in terms):
            if (term.source, term.baby) not in turned:
                x = sources[term.source]
                moved = np.roll(x.slots, -term.baby)
                turned[term.source, term.baby] = self._switched(moved, level, x.scale) if term.baby else moved
        done = []
        for terms in outputs:
            total = np.zeros(self._parameters.slots)
            for giant in sorted({term.giant for term in terms}):
                part = np.zeros(self._parameters.slots)
                for term in terms:
                    if term.giant == giant:
                        part += turned[term.source, term.baby] * plains[term.plain]
                if giant:
                    part = self._switched(self._divided(np.roll(part, -giant), scale), level, scale)
                total += part
            if any(term.baby or term.giant for term in terms):
                total = self._divided(total, scale)
            done.append(ClearCiphertext(total, level, scale))
        return done

    def _divided(self, slots: Floats, scale: float) -> Floats:
        return self._noisy(slots, noise.divided(self._parameters.degree), scale)

    def _switched(self, slots: Floats, level: int, scale: float) -> Floats:
        bits = [math.log2(prime) for prime in self._parameters.primes]
        return self._noisy(slots, noise.switched(self._parameters.degree, bits[:level], bits[-1]), scale)

    def rotate_and_sum(self, x: Any, steps: Sequence[int]) -> Any:
        total = x.slots.copy()
        for step in steps:
            total += self._switched(np.roll(x.slots, -step), x.level, x.scale)
        return ClearCiphertext(self._divided(total, x.scale), x.level, x.scale)

    def multiply(self, x: Any, y: Any) -> Any:
        scale = x.scale * y.scale
        product = self._switched(x.slots * y.slots, x.level, scale)
        return ClearCiphertext(self._divided(product, scale), x.level, scale)

    def add_plain(self, x: Any, plain: Any) -> Any:
        return ClearCiphertext(x.slots + plain, x.level, x.scale)

    def rescale(self, x: Any, level: int) -> Any:
        if level == x.level:
            return x
        scale = x.scale / float(np.prod(np.array(self._parameters.primes[level : x.level], np.float64)))
        return ClearCiphertext(self._divided(x.slots, scale), level, scale)

    def align(self, x: Any, level: int, factor: int) -> Any:
        if factor == 1:
            return ClearCiphertext(x.slots, level, x.scale)
        return self.rescale(ClearCiphertext(x.slots, x.level, x.scale * factor), level)
