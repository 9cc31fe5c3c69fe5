"""The ring of a parameter set: its primes, their transforms, the automorphisms, and vectors of slots as residues.

Orders: a polynomial in NTT form is (C, R) flattened, R * C = N; SEAL's is its transpose. Slot i of a message is the
value at zeta^(3^i), zeta a primitive 2N-th root of one, so that rotating by k slots is the automorphism X -> X^(3^k).
Reference: Cheon et al. 2017, eprint 2016/421; SEAL 4.1 manual for the order of slots.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedinfer.encrypted import kernels
from fedinfer.encrypted.kernels import Residues
from fedinfer.encrypted.params import Parameters

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


def _bit_reversed(n: int) -> Indices:
    bits = n.bit_length() - 1
    out = np.zeros(n, np.int64)
    for b in range(bits):
        out |= ((np.arange(n) >> b) & 1) << (bits - 1 - b)
    return out


def _root(prime: int, order: int) -> int:
    """The smallest primitive root of one of that order (a power of two), which is the one that SEAL takes."""
    base = 2
    while pow(root := pow(base, (prime - 1) // order, prime), order // 2, prime) != prime - 1:
        base += 1
    square, power, smallest = root * root % prime, root, root
    for _ in range(order // 2):
        smallest = min(smallest, power)
        power = power * square % prime
    return smallest


def _powers(root: int, prime: int, n: int) -> list[int]:
    out = [1]
    for _ in range(n - 1):
        out.append(out[-1] * root % prime)
    return out


class Ring:
    """Tables for arithmetic modulo the primes of `parameters`; `ring_of` keeps the last few.

    `factors` and `backward` are what the kernels take: twiddle factors of both halves, and of the way back.
    """

    def __init__(self, parameters: Parameters, primes: tuple[int, ...]) -> None:
        n = parameters.degree
        rows = 1 << ((n.bit_length() - 1) // 2)
        columns = n // rows
        self.degree, self.slots, self.primes = n, n // 2, primes
        self.levels = parameters.levels
        self.p = np.array(primes, np.float64)
        self._shape = (rows, columns)
        reversed_order = _bit_reversed(n)
        tables: list[list[Floats]] = [[], []]
        for prime in primes:
            root = _root(prime, 2 * n)
            for direction, base in enumerate((root, pow(root, -1, prime))):
                powers = np.array(_powers(base, prime, n), np.float64)[reversed_order]
                tables[direction].append(np.where(powers > prime // 2, powers - prime, powers))
        self.factors = self._halves(np.array(tables[0]))
        self.backward = self._halves(np.array(tables[1]))
        self.n_inverse = np.array([self.centre(pow(n, -1, prime), prime) for prime in primes])
        # Position of X -> X^(3^k): NTT index j holds the value at root^(2 * reversed(j) + 1).
        self._exponent = 2 * reversed_order + 1
        self._index = np.empty(2 * n, np.int64)
        self._index[self._exponent] = np.arange(n)
        self._orders: dict[int, Indices] = {}
        powers_of_three = np.array(_powers(3, 2 * n, n // 2), np.int64)
        self._slot = (powers_of_three - 1) // 2
        self._twist = np.exp(1j * np.pi * np.arange(n) / n)

    def _halves(self, w: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        rows, columns = self._shape
        second = np.zeros((len(w), columns, rows))
        m = 1
        while m < columns:
            second[:, m : 2 * m] = w[:, m * rows : 2 * m * rows].reshape(len(w), rows, m).transpose(0, 2, 1)
            m *= 2
        first = np.ascontiguousarray(w[:, :rows])
        return first, first / self.p[:, None], second, second / self.p[:, None, None]

    @staticmethod
    def centre(value: int, prime: int) -> float:
        """A residue as a number around zero."""
        return float(value - prime if value > prime // 2 else value)

    def chosen(self, level: int, *, special: bool = False) -> Indices:
        """Indices of the primes at a level (a count of primes), with the key-switching prime last if `special`."""
        return np.array([*range(level), len(self.primes) - 1] if special else range(level), np.int64)

    def inverse_of(self, index: int, level: int) -> Floats:
        """1 / prime[index] modulo each of the first `level` primes, centred."""
        return np.array([self.centre(pow(self.primes[index], -1, prime), prime) for prime in self.primes[:level]])

    def from_seal(self, residues: NDArray[np.uint64], chosen: Indices) -> Residues:
        """Residues (..., n, N) in SEAL's order, below each prime, as ours."""
        out = np.empty(residues.shape)
        flat, words = out.reshape(-1, len(chosen), self.degree), residues.reshape(-1, len(chosen), self.degree)
        for polynomial, source in zip(flat, words, strict=True):
            for row, word, k in zip(polynomial, source, chosen, strict=True):
                kernels.from_words(word, self.p[k], *self._shape, row)
        return out

    def to_seal(self, residues: Residues, chosen: Indices) -> NDArray[np.uint64]:
        """The other way."""
        p = self.p[chosen][:, None]
        shape = residues.shape
        values = residues.reshape(*shape[:-1], *self._shape[::-1]).swapaxes(-1, -2).reshape(shape)
        return np.where(values < 0, values + p, values).astype(np.uint64)

    def order(self, steps: int) -> Indices:
        """Where NTT form finds its numbers after a rotation by `steps`, in our order."""
        steps %= self.slots
        if steps not in self._orders:
            element = pow(3, steps, 2 * self.degree)
            seal = self._index[(self._exponent * element) % (2 * self.degree)]
            rows, columns = self._shape
            ours = (seal % columns) * rows + seal // columns
            self._orders[steps] = np.ascontiguousarray(ours.reshape(rows, columns).T).reshape(-1)
        return self._orders[steps]

    def forward(self, coefficients: Floats, chosen: Indices) -> Residues:
        """Integer coefficients (N,) of any size as NTT residues (n, N)."""
        # fmod is exact in floating point, whatever the size.
        values = np.fmod(coefficients[None, :], self.p[chosen][:, None])
        kernels.transform_all(values, chosen, *self.factors, self.p)
        return values

    def transformed(self, residues: Floats, chosen: Indices) -> Residues:
        """Coefficients (n, N), row i modulo prime i, below it, as NTT residues."""
        values = residues.copy()
        kernels.transform_all(values, chosen, *self.factors, self.p)
        return values

    def inverse(self, values: Residues, chosen: Indices) -> Residues:
        """Coefficients, centred, of NTT residues (n, N)."""
        out = values.copy()
        kernels.inverse_all(out, chosen, *self.backward, self.p, self.n_inverse)
        return out

    def multiply_add(self, total: Residues, x: Residues, y: Residues, chosen: Indices) -> None:
        """total += x * y, all (n, N)."""
        for row, a, b, k in zip(total, x, y, chosen, strict=True):
            kernels.multiply_add(row, a, b, self.p[k])

    def reduced(self, values: Residues, chosen: Indices) -> Residues:
        """Centre sums of residues (..., n, N), in place."""
        for part in values.reshape(-1, len(chosen), self.degree):
            for row, k in zip(part, chosen, strict=True):
                kernels.reduce(row, self.p[k])
        return values

    def coefficients(self, slots: Floats) -> Floats:
        """The real polynomial (N,) whose slots are the real numbers `slots` (N / 2,)."""
        values = np.empty(self.degree, np.complex128)
        values[self._slot] = slots
        values[self.degree - 1 - self._slot] = slots
        out: Floats = (np.fft.fft(values) / self.degree * np.conj(self._twist)).real
        return out

    def values(self, coefficients: Floats) -> Floats:
        """The real parts of the slots of a polynomial (N,)."""
        out: Floats = (np.fft.ifft(coefficients * self._twist) * self.degree)[self._slot].real
        return out

    def encode(self, slots: Floats, scale: float, chosen: Indices) -> Residues:
        """Slots times `scale`, rounded, as NTT residues (n, N)."""
        return self.forward(np.rint(self.coefficients(slots) * scale), chosen)


def held_by(coefficients: Floats) -> Floats:
    """What a polynomial (2Q,) says of the sums of its real slots by class, as Q numbers.

    A sum over all slots that are alike modulo Q lies in the subring of X^(N / 2Q), whose coefficients are these 2Q;
    its real part depends on their first and on the differences of pairs only. All other coefficients say nothing of it.
    """
    q = len(coefficients) // 2
    out = coefficients[:q].copy()
    out[1:] -= coefficients[:q:-1]
    return out


def joined(rows: Sequence[Floats], primes: Sequence[int]) -> Floats:
    """Whole numbers around zero from their residues modulo each prime, by the Chinese remainder theorem."""
    modulus = math.prod(primes)
    if len(primes) == 1:
        return np.asarray(rows[0] - primes[0] * np.rint(rows[0] / primes[0]), np.float64)
    factors = [modulus // prime * pow(modulus // prime, -1, prime) for prime in primes]
    whole = [sum(int(x) * f for x, f in zip(column, factors, strict=True)) % modulus for column in np.stack(rows).T]
    return np.array([float(x - modulus if x > modulus // 2 else x) for x in whole])


def outputs_of(held: Floats) -> Floats:
    """The mean of the slots of each class, from `held_by`."""
    q = len(held)
    coefficients = np.concatenate([held[:1], held[1:] / 2, np.zeros(1), -held[:0:-1] / 2])
    slot = (np.array(_powers(3, 4 * q, q), np.int64) - 1) // 2
    twist = np.exp(1j * np.pi * np.arange(2 * q) / (2 * q))
    out: Floats = (np.fft.ifft(coefficients * twist) * (2 * q))[slot].real
    return out


def held_for(outputs: Floats) -> Floats:
    """The inverse of `outputs_of`."""
    q = len(outputs)
    slot = (np.array(_powers(3, 4 * q, q), np.int64) - 1) // 2
    values = np.empty(2 * q)
    values[slot] = outputs
    values[2 * q - 1 - slot] = outputs
    twist = np.exp(-1j * np.pi * np.arange(2 * q) / (2 * q))
    return held_by((np.fft.fft(values) / (2 * q) * twist).real)


@lru_cache(maxsize=8)
def ring_of(parameters: Parameters, primes: tuple[int, ...]) -> Ring:
    """The tables of a parameter set, made once."""
    return Ring(parameters, primes)
