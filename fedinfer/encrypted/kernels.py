"""Arithmetic modulo primes below 2^48 on vectors of float64, compiled by numba.

A residue is an integer in a double, centred around zero. The product of two is taken as a rounded double and its exact
error (a fused multiply-add), so four or eight lanes of any CPU with FMA work at once; nothing here sees a secret, so
nothing here needs constant time. The transform is the negacyclic NTT of Cooley-Tukey butterflies in two halves with a
transposition between, so that every inner loop runs over contiguous numbers. With primes below 2^48 a half grows values
to less than 2^53 without a reduction, which a property test holds.

Shapes: N coefficients; R rows and C columns with R * C = N; an NTT-form vector is ordered (C, R), the transpose of
SEAL's bit-reversed order. `w` are twiddle factors and `v` the same divided by the prime.
Reference: Harvey 2014, arXiv:1205.2926 (lazy butterflies); Bos et al. 2017 (floating-point NTT).
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

Residues = NDArray[np.float64]


@intrinsic
def _fma(context: Any, a: Any, b: Any, c: Any) -> Any:
    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        double = ir.DoubleType()
        function = ir.FunctionType(double, [double] * 3)
        return builder.call(builder.module.declare_intrinsic("llvm.fma", [double], function), arguments)

    return types.float64(types.float64, types.float64, types.float64), generate


@intrinsic
def _rint(context: Any, a: Any) -> Any:
    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        double = ir.DoubleType()
        function = ir.FunctionType(double, [double])
        return builder.call(builder.module.declare_intrinsic("llvm.rint", [double], function), arguments)

    return types.float64(types.float64), generate


@njit(inline="always")
def times_constant(x, w, v, p):  # type: ignore[no-untyped-def]
    """x * w modulo p, nearly centred; v is w / p."""
    h = x * w
    q = _rint(x * v)  # type: ignore[call-arg, var-annotated]
    return _fma(-q, p, h) + _fma(x, w, -h)


@njit(inline="always")
def _times(x, y, p, u):  # type: ignore[no-untyped-def]
    h = x * y
    q = _rint(h * u)  # type: ignore[call-arg, var-annotated]
    return _fma(-q, p, h) + _fma(x, y, -h)


@njit(inline="always")
def centred(x, p, u):  # type: ignore[no-untyped-def]
    """x modulo p around zero, for a whole number of at most 2^53; u is 1 / p."""
    return x - p * _rint(x * u)  # type: ignore[call-arg]


@njit(cache=True, nogil=True)
def forward(a, scratch, w1, v1, w2, v2, p):  # type: ignore[no-untyped-def]
    """Transform coefficients `a` (N,) in place; |a| <= 2^52 on entry, centred on return."""
    rows, columns = w1.shape[0], w2.shape[0]
    u = 1.0 / p
    t, m = a.shape[0] >> 1, 1
    while m < rows:
        for i in range(m):
            x, y = a[2 * i * t : 2 * i * t + t], a[2 * i * t + t : 2 * i * t + 2 * t]
            w, v = w1[m + i], v1[m + i]
            for j in range(t):
                b, c = times_constant(y[j], w, v, p), x[j]
                x[j], y[j] = c + b, c - b
        m, t = m << 1, t >> 1
    for r in range(0, rows, 8):
        for c in range(columns):
            part = scratch[c * rows + r : c * rows + r + 8]
            for k in range(8):
                part[k] = centred(a[(r + k) * columns + c], p, u)
    t, m = columns >> 1, 1
    while m < columns:
        for i in range(m):
            w_row, v_row = w2[m + i], v2[m + i]
            for j in range(t):
                o = (2 * i * t + j) * rows
                x, y = scratch[o : o + rows], scratch[o + t * rows : o + (t + 1) * rows]
                for k in range(rows):
                    b, c = times_constant(y[k], w_row[k], v_row[k], p), x[k]
                    x[k], y[k] = c + b, c - b
        m, t = m << 1, t >> 1
    for j in range(a.shape[0]):
        a[j] = centred(scratch[j], p, u)


@njit(cache=True, nogil=True)
def inverse(a, scratch, w1, v1, w2, v2, p, n_inverse):  # type: ignore[no-untyped-def]
    """Transform back in place; `w` are the inverse factors. Centred in and out.

    Sums double at every step, so every third one reduces.
    """
    rows, columns = w1.shape[0], w2.shape[0]
    u = 1.0 / p
    t, m, step = 1, columns >> 1, 0
    while m >= 1:
        step += 1
        for i in range(m):
            w_row, v_row = w2[m + i], v2[m + i]
            for j in range(t):
                o = (2 * i * t + j) * rows
                x, y = a[o : o + rows], a[o + t * rows : o + (t + 1) * rows]
                if step % 3:
                    for k in range(rows):
                        b, c = y[k], x[k]
                        x[k], y[k] = c + b, times_constant(c - b, w_row[k], v_row[k], p)
                else:
                    for k in range(rows):
                        b, c = y[k], x[k]
                        x[k], y[k] = centred(c + b, p, u), times_constant(c - b, w_row[k], v_row[k], p)
        m, t = m >> 1, t << 1
    for r in range(0, rows, 8):
        for c in range(columns):
            part = a[c * rows + r : c * rows + r + 8]
            for k in range(8):
                scratch[(r + k) * columns + c] = centred(part[k], p, u)
    t, m, step = columns, rows >> 1, 0
    while m >= 1:
        step += 1
        for i in range(m):
            x, y = scratch[2 * i * t : 2 * i * t + t], scratch[2 * i * t + t : 2 * i * t + 2 * t]
            w, v = w1[m + i], v1[m + i]
            if step % 3:
                for j in range(t):
                    b, c = y[j], x[j]
                    x[j], y[j] = c + b, times_constant(c - b, w, v, p)
            else:
                for j in range(t):
                    b, c = y[j], x[j]
                    x[j], y[j] = centred(c + b, p, u), times_constant(c - b, w, v, p)
        m, t = m >> 1, t << 1
    for j in range(a.shape[0]):
        a[j] = centred(_times(centred(scratch[j], p, u), n_inverse, p, u), p, u)


@njit(cache=True, nogil=True)
def reduce(a, p):  # type: ignore[no-untyped-def]
    """Centre every number of `a`, which holds integers of at most 2^52, in place."""
    u = 1.0 / p
    for j in range(a.shape[0]):
        a[j] = centred(a[j], p, u)


@njit(cache=True, nogil=True)
def multiply_add(acc, x, y, p):  # type: ignore[no-untyped-def]
    """acc += x * y mod p, centred; all (N,)."""
    u = 1.0 / p
    for j in range(acc.shape[0]):
        acc[j] = centred(acc[j] + _times(x[j], y[j], p, u), p, u)


@njit(cache=True, nogil=True)
def transform_all(a, chosen, w1, v1, w2, v2, p):  # type: ignore[no-untyped-def]
    """Transform row i of `a` (n, N) modulo prime `chosen[i]`, in place."""
    scratch = np.empty(a.shape[1])
    for i in range(a.shape[0]):
        k = chosen[i]
        forward(a[i], scratch, w1[k], v1[k], w2[k], v2[k], p[k])


@njit(cache=True, nogil=True)
def inverse_all(a, chosen, w1, v1, w2, v2, p, n_inverse):  # type: ignore[no-untyped-def]
    """Transform row i of `a` (n, N) back modulo prime `chosen[i]`, in place."""
    scratch = np.empty(a.shape[1])
    for i in range(a.shape[0]):
        k = chosen[i]
        inverse(a[i], scratch, w1[k], v1[k], w2[k], v2[k], p[k], n_inverse[k])


@njit(cache=True, nogil=True)
def decompose(c, chosen, out, w1, v1, w2, v2, p, i1, j1, i2, j2, n_inverse):  # type: ignore[no-untyped-def]
    """The digits of `c` (L, N) modulo every prime of `chosen` (L + 1,), whose last is the special one: (L, L + 1, N).

    Digit i is the residue modulo prime i, centred, lifted to every other prime: what key switching multiplies.
    """
    levels, n = c.shape
    scratch, lifted = np.empty(n), np.empty(n)
    for i in range(levels):
        k = chosen[i]
        lifted[:] = c[i]
        inverse(lifted, scratch, i1[k], j1[k], i2[k], j2[k], p[k], n_inverse[k])
        for j in range(levels + 1):
            target = out[i, j]
            if i == j:
                target[:] = c[i]
                continue
            g = chosen[j]
            if p[k] > p[g]:
                u = 1.0 / p[g]
                for s in range(n):
                    target[s] = centred(lifted[s], p[g], u)
            else:
                target[:] = lifted
            forward(target, scratch, w1[g], v1[g], w2[g], v2[g], p[g])


@njit(cache=True, nogil=True)
def switch(digits, key, columns, order, chosen, p, acc):  # type: ignore[no-untyped-def]
    """acc (2, L + 1, N) += sum over digits of the permuted digit times its key.

    `key` is (digits, 2, primes, N), `columns` its indices of the primes `chosen`; `order` (N,) is the automorphism.
    """
    levels = digits.shape[0]
    for j in range(levels + 1):
        prime = p[chosen[j]]
        u = 1.0 / prime
        low, high = acc[0, j], acc[1, j]
        for i in range(levels):
            d = digits[i, j]
            a, b = key[i, 0, columns[j]], key[i, 1, columns[j]]
            for s in range(d.shape[0]):
                x = d[order[s]]
                low[s] += _times(x, a[s], prime, u)
                high[s] += _times(x, b[s], prime, u)
        for s in range(low.shape[0]):
            low[s], high[s] = centred(low[s], prime, u), centred(high[s], prime, u)


@njit(cache=True, nogil=True)
def weigh(acc, x, weights, chosen, p):  # type: ignore[no-untyped-def]
    """acc (k, n, N) += x (k, n, N) times the plaintext `weights` (n, N), centred."""
    for c in range(x.shape[0]):
        for j in range(x.shape[1]):
            multiply_add(acc[c, j], x[c, j], weights[j], p[chosen[j]])


@njit(cache=True, nogil=True)
def divide(c, chosen, factor, out, w1, v1, w2, v2, p, i1, j1, i2, j2, n_inverse):  # type: ignore[no-untyped-def]
    """Divide `c` (k, n + 1, N) by its last prime and round: `out` (k, n, N); `factor[j]` is its inverse modulo prime j.

    With the special prime this ends a key switch, with another it is a rescale.
    """
    last = chosen[c.shape[1] - 1]
    n = c.shape[2]
    scratch, remainder, lifted = np.empty(n), np.empty(n), np.empty(n)
    for k in range(c.shape[0]):
        remainder[:] = c[k, c.shape[1] - 1]
        inverse(remainder, scratch, i1[last], j1[last], i2[last], j2[last], p[last], n_inverse[last])
        for j in range(c.shape[1] - 1):
            g = chosen[j]
            u = 1.0 / p[g]
            if p[last] > p[g]:
                for s in range(n):
                    lifted[s] = centred(remainder[s], p[g], u)
            else:
                lifted[:] = remainder
            forward(lifted, scratch, w1[g], v1[g], w2[g], v2[g], p[g])
            source, target, f = c[k, j], out[k, j], factor[j]
            for s in range(n):
                target[s] = centred(_times(source[s] - lifted[s], f, p[g], u), p[g], u)


@njit(cache=True, nogil=True)
def tensor(x, y, chosen, p, out):  # type: ignore[no-untyped-def]
    """The product of two ciphertexts (2, L, N) before relinearisation: `out` (3, L, N)."""
    for j in range(x.shape[1]):
        prime = p[chosen[j]]
        u = 1.0 / prime
        x0, x1, y0, y1 = x[0, j], x[1, j], y[0, j], y[1, j]
        o0, o1, o2 = out[0, j], out[1, j], out[2, j]
        for s in range(x0.shape[0]):
            o0[s] = centred(_times(x0[s], y0[s], prime, u), prime, u)
            o1[s] = centred(_times(x0[s], y1[s], prime, u) + _times(x1[s], y0[s], prime, u), prime, u)
            o2[s] = centred(_times(x1[s], y1[s], prime, u), prime, u)


@njit(cache=True, nogil=True)
def add(x, y, chosen, p):  # type: ignore[no-untyped-def]
    """x (k, n, N) += y, centred."""
    for c in range(x.shape[0]):
        for j in range(x.shape[1]):
            prime = p[chosen[j]]
            u = 1.0 / prime
            a, b = x[c, j], y[c, j]
            for s in range(a.shape[0]):
                a[s] = centred(a[s] + b[s], prime, u)


@njit(cache=True, nogil=True)
def permute(x, order, out):  # type: ignore[no-untyped-def]
    """out[j] = x[j] in another order, for every row of x (n, N)."""
    for j in range(x.shape[0]):
        a, b = x[j], out[j]
        for s in range(a.shape[0]):
            b[s] = a[order[s]]


@njit(cache=True, nogil=True)
def scale_add(acc, x, constants, chosen, p):  # type: ignore[no-untyped-def]
    """acc (k, >= n, N) += x (k, n, N) times a constant for each prime, centred."""
    for c in range(x.shape[0]):
        for j in range(x.shape[1]):
            prime, w = p[chosen[j]], constants[chosen[j]]
            u, v = 1.0 / prime, w / prime
            a, b = acc[c, j], x[c, j]
            for s in range(a.shape[0]):
                a[s] = centred(a[s] + times_constant(b[s], w, v, prime), prime, u)


@njit(cache=True, nogil=True)
def from_words(words, p, rows, columns, out):  # type: ignore[no-untyped-def]
    """Residues (N,) below `p` in SEAL's order as ours: centred, transposed."""
    half = p / 2.0
    for r in range(0, rows, 8):
        for c in range(columns):
            part = out[c * rows + r : c * rows + r + 8]
            for k in range(8):
                x = np.float64(words[(r + k) * columns + c])
                part[k] = x - p if x > half else x


@njit(cache=True, nogil=True)
def from_octets(octets, width, prime, out):  # type: ignore[no-untyped-def]
    """Little-endian numbers of `width` bytes as words (N,); whether all are below `prime`."""
    largest = np.uint64(0)
    for s in range(out.shape[0]):
        word = np.uint64(0)
        for k in range(width):
            word |= np.uint64(octets[s * width + k]) << np.uint64(8 * k)
        out[s] = word
        largest = max(largest, word)
    return largest < prime
