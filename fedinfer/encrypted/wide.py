"""An exact matrix product modulo each prime: whole weights times residues, for one ciphertext a feature.

The weights of a map and the residues of its sources are both whole numbers. A residue is cut into limbs so narrow that
a row of weights times a limb sums to less than 2^53, where doubles are exact; the limbs are put together modulo the
prime. Sparse rows cost what they hold, so a convolution needs no rule of its own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
from numba import njit
from numpy.typing import NDArray

from fedinfer.encrypted.kernels import Residues, centred, times_constant
from fedinfer.encrypted.params import MAX_PRIME_BITS
from fedinfer.errors import CompileError

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
EXACT_BITS = 53
# Coefficients that are worked on together, so that the sources of a map stay in the cache.
CHUNK = 128


def limb_bits(weights: sp.csr_matrix) -> int:
    """How wide a limb may be.

    Raises: CompileError if the weights are so large that nothing is left.
    """
    largest = max(1.0, float(abs(weights).sum(axis=1).max()))
    bits = EXACT_BITS - int(np.ceil(np.log2(largest))) - 1
    if bits < 8:
        raise CompileError(f"weights: got rows that sum to {largest:.3g}, expected less than 2^{EXACT_BITS - 9}")
    return min(bits, MAX_PRIME_BITS)


def weigh(sources: Sequence[Residues], weights: sp.csr_matrix, primes: Floats, each: Callable[..., Any]) -> Residues:
    """weights (m, n), whole numbers, times ciphertexts n x (2, level, N): (m, 2, level, N), centred."""
    bits = limb_bits(weights)
    limbs = -(-MAX_PRIME_BITS // bits)
    _, level, degree = sources[0].shape
    out = np.empty((weights.shape[0], 2, level, degree))
    columns, values = weights.indices.astype(np.int64), weights.data.astype(np.float64)
    starts = weights.indptr.astype(np.int64)
    span = min(degree, 16 * CHUNK)

    def part(task: tuple[int, int, int]) -> None:
        half, k, start = task
        x = np.stack([source[half, k, start : start + span] for source in sources])
        _weigh(x, starts, columns, values, bits, limbs, primes[k], out[:, half, k, start : start + span])

    tasks = [(half, k, start) for half in range(2) for k in range(level) for start in range(0, degree, span)]
    for _ in each(part, tasks):
        pass
    return out


@njit(cache=True, nogil=True)
def _weigh(x, starts, columns, values, bits, limbs, p, out):  # type: ignore[no-untyped-def]
    n, m, width = x.shape[0], out.shape[0], CHUNK
    u, unit = 1.0 / p, 2.0**bits
    shift = centred(unit, p, u)
    v = shift / p
    cut = np.empty((limbs, n, width))
    sums, total = np.empty(width), np.empty(width)
    for c in range(0, x.shape[1], width):
        for j in range(n):
            row = x[j, c : c + width]
            for s in range(width):
                rest = row[s]
                for limb in range(limbs - 1):
                    high = np.rint(rest / unit)
                    cut[limb, j, s] = rest - high * unit
                    rest = high
                cut[limbs - 1, j, s] = rest
        for r in range(m):
            for limb in range(limbs - 1, -1, -1):
                sums[:] = 0.0
                for at in range(starts[r], starts[r + 1]):
                    w, source = values[at], cut[limb, columns[at]]
                    for s in range(width):
                        sums[s] += w * source[s]
                if limb == limbs - 1:
                    for s in range(width):
                        total[s] = centred(sums[s], p, u)
                else:
                    for s in range(width):
                        total[s] = centred(times_constant(total[s], shift, v, p) + centred(sums[s], p, u), p, u)
            out[r, c : c + width] = total
