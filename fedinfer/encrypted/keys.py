"""Which evaluation keys a circuit needs, and how the server reads them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedinfer.encrypted.frames import packed_bytes, unpack
from fedinfer.encrypted.kernels import Residues
from fedinfer.encrypted.params import Parameters
from fedinfer.encrypted.ring import Indices, Ring
from fedinfer.encrypted.xof import SEED_BYTES, uniform_residues
from fedinfer.errors import EncryptedError, WireError


@dataclass(frozen=True, kw_only=True)
class KeyPlan:
    """Public: the level of answers, the highest that relinearises (0: none does), each rotation's steps and highest."""

    answer: int
    relinearisation: int
    rotations: tuple[tuple[int, int], ...]

    def parts(self) -> int:
        """Messages that carry these keys: the public key, the relinearisation key, a key for each rotation."""
        return 1 + bool(self.relinearisation) + len(self.rotations)

    def size_bytes(self, parameters: Parameters) -> int:
        """Bytes of these keys on the wire."""
        primes, degree = parameters.primes, parameters.degree
        levels = [level for _, level in self.rotations] + [self.relinearisation] * bool(self.relinearisation)
        return (
            SEED_BYTES
            + packed_bytes(primes[: self.answer], degree)
            + sum(level * (SEED_BYTES + packed_bytes((*primes[:level], primes[-1]), degree)) for level in levels)
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationKeys:
    """A client's public keys, read: `public` (2, level, N) at that of answers; the others (digits, 2, primes, N)."""

    public: Residues
    relinearisation: Residues | None
    rotations: Mapping[int, Residues]


def read_keys(ring: Ring, parameters: Parameters, plan: KeyPlan, parts: Sequence[bytes]) -> EvaluationKeys:
    """Read what `public_keys` wrote.

    Guarantees: memory is bounded by the plan; every residue is below its prime.
    Raises: WireError or EncryptedError unless the parts are just the keys of the plan.
    """
    if len(parts) != plan.parts():
        raise EncryptedError(f"keys: got {len(parts)} of them, expected {plan.parts()}")
    public = _read_pair(ring, ring.primes[: plan.answer], ring.chosen(plan.answer), parts[0], "public key")
    rest = list(parts[1:])
    relinearisation = None
    if plan.relinearisation:
        relinearisation = _read_key(ring, plan.relinearisation, rest.pop(0), "relinearisation key")
    rotations = {
        step: _read_key(ring, level, part, "rotation key")
        for (step, level), part in zip(plan.rotations, rest, strict=True)
    }
    return EvaluationKeys(public=public, relinearisation=relinearisation, rotations=rotations)


def _read_pair(ring: Ring, drawn: Sequence[int], chosen: Indices, part: bytes, what: str) -> Residues:
    primes = [ring.primes[k] for k in chosen]
    if len(part) != SEED_BYTES + packed_bytes(primes, ring.degree):
        raise WireError(f"{what}: got {len(part)} bytes, expected {SEED_BYTES + packed_bytes(primes, ring.degree)}")
    first = unpack(part[SEED_BYTES:], primes, ring.degree, polynomials=1, what=what)[0]
    second = uniform_residues(part[:SEED_BYTES], tuple(drawn), ring.degree)[chosen]
    return np.stack([ring.from_seal(first, chosen), ring.from_seal(second, chosen)])


def _read_key(ring: Ring, level: int, part: bytes, what: str) -> Residues:
    chosen = ring.chosen(level, special=True)
    size = SEED_BYTES + packed_bytes([ring.primes[k] for k in chosen], ring.degree)
    if len(part) != level * size:
        raise WireError(f"{what}: got {len(part)} bytes, expected {level * size}")
    digits = [part[i * size : (i + 1) * size] for i in range(level)]
    return np.stack([_read_pair(ring, ring.primes, chosen, digit, what) for digit in digits])
