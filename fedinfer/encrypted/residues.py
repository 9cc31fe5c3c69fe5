"""The server's half of CKKS on raw residues: plaintexts, queries, arithmetic and answers.

Everything here is public to the server: ciphertexts, evaluation keys and its own weights, never a secret key.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from fedinfer.encrypted import frames, wide
from fedinfer.encrypted.evaluator import Ciphertext, Evaluator, Term
from fedinfer.encrypted.frames import packed_bytes, unpack
from fedinfer.encrypted.keys import KeyPlan, read_keys
from fedinfer.encrypted.params import Parameters
from fedinfer.encrypted.ring import Ring, held_by, ring_of
from fedinfer.encrypted.sampling import ternary_and_errors, wide_noise
from fedinfer.encrypted.xof import SEED_BYTES, uniform_residues
from fedinfer.errors import WireError

Floats = NDArray[np.float64]


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
        ring, level = self._ring, answer.level
        primes, chosen = ring.primes[:level], ring.chosen(level)
        parts = self._rerandomised(answer.parts)
        coefficients = ring.inverse(parts[0], chosen)[:, :: ring.degree // (2 * outputs)]
        drawn = wide_noise(outputs, flood)
        held = [
            np.mod(held_by(row).astype(np.int64) + np.array([number % prime for number in drawn]), prime)
            for row, prime in zip(coefficients, primes, strict=True)
        ]
        return frames.pack(ring.to_seal(parts[1], chosen), primes) + frames.pack(np.stack(held), primes)

    def _rerandomised(self, parts: Any) -> Any:
        """Add an encryption of zero under the client's public key: u * key + errors, u and the errors fresh."""
        ring, chosen = self._ring, self._ring.chosen(parts.shape[1])
        u, *errors = (ring.forward(poly, chosen) for poly in ternary_and_errors(ring.degree))
        out = parts.copy()
        for k, error in enumerate(errors):
            ring.multiply_add(out[k], u, self._keys.public[k], chosen)
            out[k] += error
        return ring.reduced(out, chosen)

    def weigh(
        self, sources: Sequence[Ciphertext], weights: sp.csr_matrix, constants: Floats, scale: float, level: int,
        each: Callable[..., Any],
    ) -> list[Ciphertext]:  # fmt: skip
        """Whole weights times all sources, rescaled to `level`, plus constants: one ciphertext an element."""
        ring, top = self._ring, sources[0].level
        parts = wide.weigh([x.parts for x in sources], weights, ring.p[:top], each)

        def finished(index: int) -> Ciphertext:
            y = self._evaluator.rescale(Ciphertext(parts=parts[index], scale=scale), level)
            whole = np.rint(constants[index] * y.scale)
            y.parts[0] += np.fmod(whole, ring.p[:level])[:, None]
            return Ciphertext(parts=ring.reduced(y.parts, ring.chosen(level)), scale=y.scale)

        return list(each(finished, range(len(parts))))
