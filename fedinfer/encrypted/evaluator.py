"""The server's arithmetic on ciphertexts that it cannot read: sums over rotations, products, rescaling.

A ciphertext is (2, level, N) residues in NTT form, a level being a number of primes. Key switching is hoisted: the
digits of a ciphertext are made once for all its rotations, the rotations stay multiplied by the special prime while
they are weighed and summed, and one division at the end brings the sum back.
Reference: Halevi and Shoup 2018, eprint 2018/244 (hoisting); Bossuat et al. 2021, eprint 2020/1203, section 4 (double
hoisting, with baby and giant steps).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedinfer.encrypted import kernels
from fedinfer.encrypted.kernels import Residues
from fedinfer.encrypted.ring import Indices, Ring


@dataclass(frozen=True, kw_only=True)
class Ciphertext:
    """`parts` (2, level, N), centred residues in NTT form; `scale` is what its slots are multiplied by."""

    parts: Residues = field(repr=False)
    scale: float

    @property
    def level(self) -> int:
        return int(self.parts.shape[1])


@dataclass(frozen=True, kw_only=True)
class Term:
    """One weighed rotation: source `source` turned by `baby`, times plaintext `plain`, all turned by `giant`."""

    source: int
    baby: int
    giant: int
    plain: int


def chain_step(giants: Sequence[int]) -> int | None:
    """The step that reaches sorted giant steps one after the other, if they are its multiples without a gap."""
    if len(giants) > 1 and all(giant == giants[0] * (k + 1) for k, giant in enumerate(giants)):
        return giants[0]
    return None


class Evaluator:
    """Arithmetic under one client's keys, which are (digits, 2, primes, N): `rotations` by steps, one to relinearise.

    Every method returns new ciphertexts and leaves its arguments alone.
    """

    def __init__(self, ring: Ring, rotations: Mapping[int, Residues], relinearisation: Residues | None) -> None:
        self._ring = ring
        self._rotations = rotations
        self._relinearisation = relinearisation
        special = ring.primes[-1]
        self._special = np.array([Ring.centre(special % prime, prime) for prime in ring.primes])
        self._identity = np.arange(ring.degree)

    def linear(
        self, sources: Sequence[Ciphertext], outputs: Sequence[Sequence[Term]], plains: Sequence[Residues]
    ) -> list[Residues]:
        """For each output the sum of its terms, (2, level, N); what turns alike in several is turned once.

        `plains` are (level + 1, N) if any term turns, else (level, N).
        """
        level = sources[0].level
        every = [term for terms in outputs for term in terms]
        if all(term.baby == term.giant == 0 for term in every):
            return [self._weigh_in_place(sources, terms, plains, level) for terms in outputs]
        turned: dict[tuple[int, int], Residues] = {}
        for source in sorted({term.source for term in every}):
            babies = sorted({term.baby for term in every if term.source == source})
            digits = self._digits(sources[source].parts[1]) if babies != [0] else None
            for baby in babies:
                turned[source, baby] = self._turn(sources[source].parts, digits, baby, self._zeros(level))
        return [self._weigh_turned(turned, terms, plains, level) for terms in outputs]

    def _weigh_in_place(
        self, sources: Sequence[Ciphertext], terms: Sequence[Term], plains: Sequence[Residues], level: int
    ) -> Residues:
        chosen = self._ring.chosen(level)
        total = np.zeros((2, level, self._ring.degree))
        for term in terms:
            kernels.weigh(total, sources[term.source].parts, plains[term.plain], chosen, self._ring.p)
        return total

    def _weigh_turned(
        self, turned: Mapping[tuple[int, int], Residues], terms: Sequence[Term], plains: Sequence[Residues], level: int
    ) -> Residues:
        chosen = self._ring.chosen(level, special=True)
        total = self._zeros(level)
        giants = sorted({term.giant for term in terms} - {0})
        step = chain_step(giants)
        for giant in [*reversed(giants), 0]:
            if step is not None and giant < giants[-1]:
                # One key for all: what was summed so far turns by a step, and the next sum is added to it.
                inner, total = self._divide_special(total), self._zeros(level)
                self._turn(inner, self._digits(inner[1]), step, total)
            part = total if giant == 0 or step is not None else self._zeros(level)
            for term in terms:
                if term.giant == giant:
                    kernels.weigh(part, turned[term.source, term.baby], plains[term.plain], chosen, self._ring.p)
            if part is not total:
                inner = self._divide_special(part)
                self._turn(inner, self._digits(inner[1]), giant, total)
        return self._divide_special(total)

    def rotate_and_sum(self, x: Ciphertext, steps: Sequence[int]) -> Ciphertext:
        """x plus its rotation by each of `steps`."""
        digits = self._digits(x.parts[1])
        total = self._zeros(x.level)
        for step in steps:
            self._turn(x.parts, digits, step, total)
        parts = self._divide_special(total)
        kernels.add(parts, x.parts, self._ring.chosen(x.level), self._ring.p)
        return Ciphertext(parts=parts, scale=x.scale)

    def multiply(self, x: Ciphertext, y: Ciphertext) -> Ciphertext:
        """The product of two ciphertexts of one level, relinearised but not rescaled."""
        assert self._relinearisation is not None
        level, chosen = x.level, self._ring.chosen(x.level)
        product = np.empty((3, level, self._ring.degree))
        kernels.tensor(x.parts, y.parts, chosen, self._ring.p, product)
        total = self._zeros(level)
        self._switch(self._digits(product[2]), self._relinearisation, self._identity, total)
        parts = self._divide_special(total)
        kernels.add(parts, product[:2], chosen, self._ring.p)
        return Ciphertext(parts=parts, scale=x.scale * y.scale)

    def add_plain(self, x: Ciphertext, plain: Residues) -> Ciphertext:
        """x plus a plaintext (level, N) of its scale."""
        parts = x.parts.copy()
        kernels.add(parts[:1], plain[None], self._ring.chosen(x.level), self._ring.p)
        return Ciphertext(parts=parts, scale=x.scale)

    def rescale(self, x: Ciphertext, level: int) -> Ciphertext:
        """Divide by the primes above `level`."""
        parts, scale = x.parts, x.scale
        for top in range(x.level, level, -1):
            parts = self._divide(parts, self._ring.chosen(top))
            scale /= self._ring.primes[top - 1]
        return Ciphertext(parts=parts, scale=scale)

    def align(self, x: Ciphertext, level: int, factor: int) -> Ciphertext:
        """x at a lower level: modulo fewer primes if `factor` is one, else times it and divided by those primes."""
        if factor == 1:
            return Ciphertext(parts=np.ascontiguousarray(x.parts[:, :level]), scale=x.scale)
        ring = self._ring
        constants = np.array([Ring.centre(factor % prime, prime) for prime in ring.primes])
        parts = np.zeros_like(x.parts)
        kernels.scale_add(parts, x.parts, constants, ring.chosen(x.level), ring.p)
        return self.rescale(Ciphertext(parts=parts, scale=x.scale * factor), level)

    def _zeros(self, level: int) -> Residues:
        return np.zeros((2, level + 1, self._ring.degree))

    def _digits(self, part: Residues) -> Residues:
        level = len(part)
        out = np.empty((level, level + 1, self._ring.degree))
        chosen = self._ring.chosen(level, special=True)
        ring = self._ring
        kernels.decompose(part, chosen, out, *ring.factors, ring.p, *ring.backward, ring.n_inverse)
        return out

    def _turn(self, parts: Residues, digits: Residues | None, steps: int, total: Residues) -> Residues:
        """Add to `total` (2, level + 1, N) the rotation of a ciphertext, times the special prime."""
        ring, level = self._ring, parts.shape[1]
        chosen = ring.chosen(level)
        if steps == 0:
            kernels.scale_add(total, parts, self._special, chosen, ring.p)
            return total
        assert digits is not None
        order = ring.order(steps)
        moved = np.empty((1, level, ring.degree))
        kernels.permute(parts[0], order, moved[0])
        kernels.scale_add(total[:1], moved, self._special, chosen, ring.p)
        self._switch(digits, self._rotations[steps], order, total)
        return total

    def _switch(self, digits: Residues, key: Residues, order: Indices, total: Residues) -> None:
        level = len(digits)
        columns = np.array([*range(level), key.shape[2] - 1], np.int64)
        kernels.switch(digits, key, columns, order, self._ring.chosen(level, special=True), self._ring.p, total)

    def _divide_special(self, total: Residues) -> Residues:
        return self._divide(total, self._ring.chosen(total.shape[1] - 1, special=True))

    def _divide(self, parts: Residues, chosen: Indices) -> Residues:
        ring, level = self._ring, parts.shape[1] - 1
        out = np.empty((len(parts), level, ring.degree))
        factor = ring.inverse_of(int(chosen[-1]), level)
        kernels.divide(parts, chosen, factor, out, *ring.factors, ring.p, *ring.backward, ring.n_inverse)
        return out
