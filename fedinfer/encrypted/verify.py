"""Does a circuit keep its promise: many inputs with noise in the clear, some under CKKS, against exact arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedinfer.encrypted.compiled import Compiled
from fedinfer.encrypted.scheme import TenSeal

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Largest errors of an output against exact arithmetic, and the share of rows whose decision noise changed."""

    rows: int
    clear_error: float
    clear_changed: float
    encrypted_rows: int
    encrypted_error: float
    encrypted_changed: float
    stated_error: float

    @property
    def holds(self) -> bool:
        """Whether no error was larger than the circuit states."""
        return max(self.clear_error, self.encrypted_error) <= self.stated_error


def verify(compiled: Compiled, arguments: Sequence[Floats], *, encrypted_rows: int) -> Verification:
    """Flat features (n, size) for each input, all of them with noise and the first few under CKKS."""
    few = [argument[:encrypted_rows] for argument in arguments]
    exact = compiled.simulate(arguments, noise=None)
    noisy = compiled.simulate(arguments, noise=0)
    real = compiled.answered(few, TenSeal(), flood=compiled.private.flood)
    return Verification(
        rows=len(exact),
        clear_error=float(np.abs(noisy - exact).max()),
        clear_changed=_changed(noisy, exact),
        encrypted_rows=len(real),
        encrypted_error=float(np.abs(real - exact[: len(real)]).max(initial=0.0)),
        encrypted_changed=_changed(real, exact[: len(real)]),
        stated_error=compiled.public.error,
    )


def _changed(got: Floats, expected: Floats) -> float:
    if not len(got):
        return 0.0
    if got.shape[1] == 1:
        return float(((got >= 0) != (expected >= 0)).mean())
    return float((got.argmax(axis=1) != expected.argmax(axis=1)).mean())
