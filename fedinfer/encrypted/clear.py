"""No encryption at all: the arithmetic of a circuit in fixed point, with noise of the size of CKKS's, for tests."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from fedinfer.encrypted import noise
from fedinfer.encrypted.evaluator import Term
from fedinfer.encrypted.keys import KeyPlan
from fedinfer.encrypted.params import Parameters
from fedinfer.encrypted.scheme import Encoder, SecretSide, ServerSide
from fedinfer.errors import EncryptedError

Floats = NDArray[np.float64]


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

    def weigh(
        self, sources: Sequence[Any], weights: sp.csr_matrix, constants: Floats, scale: float, level: int,
        each: Callable[..., Any],
    ) -> list[Any]:  # fmt: skip
        whole = weights @ np.stack([x.slots for x in sources]) * (sources[0].scale / scale)
        rescaled = [self.rescale(ClearCiphertext(row, sources[0].level, scale), level) for row in whole]
        return [ClearCiphertext(x.slots + c, x.level, x.scale) for x, c in zip(rescaled, constants, strict=True)]
