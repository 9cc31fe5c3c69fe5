"""Noise in floating point can be seen through, bit by bit (Mironov 2012); noise on integers cannot. Nor can a fork.

The game: one of two neighbouring inputs is released under ε of about 0.1, once, and the attacker says which it was.
"""

import os

import numpy as np
from scipy import stats

from fedinfer.errors import PrivacyError
from fedinfer.privacy.integer_noise import CELLS
from fedinfer.privacy.noise import NoiseStream, insecure_seeded_noise, os_noise
from fedinfer.privacy.releases import ScalarRelease

TRIALS = 2000
ROWS = (np.array([0.25, 0.5]), np.array([0.25, 0.5, 0.1]))
PLAN = ScalarRelease.calibrate(epsilon=0.1, delta=1e-6, low=0.0, high=1.0, default=0.0)


def success(guesses_of_first: np.ndarray, guesses_of_second: np.ndarray) -> float:
    """The share of right guesses: each array says of releases of one input whether they were taken for the second."""
    return float((~guesses_of_first).mean() + guesses_of_second.mean()) / 2


def test_a_float_release_is_seen_through_and_an_integer_release_is_not() -> None:
    first, second = (float(rows.sum()) for rows in ROWS)
    # The multiples of one cell of the noise, moved by a sum: a release on them can come from that sum only.
    cell = PLAN.sigma * 2.0**-40

    def off_the_grid(released: np.ndarray) -> np.ndarray:
        return np.abs(np.rint((released - first) / cell) * cell + first - released) > 1e-15

    naive = [value + insecure_seeded_noise("naive").gaussian_float(PLAN.sigma, TRIALS) for value in (first, second)]
    assert success(*(off_the_grid(released) for released in naive)) > 0.9

    # Ours: whatever digits one looks at, both inputs give the same ones.
    ours = [
        np.stack([PLAN.release(rows, insecure_seeded_noise(f"ours {len(rows)} {trial}")) for trial in range(TRIALS)])
        for rows in ROWS
    ]
    for bits in (1, 4, 8):
        digits = [released % (1 << bits) for released in ours]
        for column in range(2):
            table = np.stack([np.bincount(part[:, column], minlength=1 << bits) for part in digits])
            assert stats.chi2_contingency(table).pvalue > 1e-9
    # The best attack there is compares the likelihoods of the whole release: it wins hardly more than half.
    moved = np.array([(0.1 - 0.5) / 0.5, 1.0])
    middle = np.array([(0.25 - 0.5) / 0.5 + 0.0, 2.0]) + moved / 2
    likelier = [(released / CELLS - middle) @ moved > 0 for released in ours]
    assert success(*likelier) < 0.5 + PLAN.epsilon() / 4 + 6 * 0.5 / np.sqrt(2 * TRIALS)


def test_float_laplace_noise_has_values_that_no_neighbour_has() -> None:
    """The example of the paper: the inversion of a uniform number reaches few floats, and they depend on the sum."""
    uniform = (np.arange(2**16) + 0.5) * 2.0**-16
    noise = 10.0 * np.sign(uniform - 0.5) * np.log(1.0 - 2.0 * np.abs(uniform - 0.5))
    reachable = [np.unique(value + noise) for value in (0.75, 0.85)]
    drawn = np.random.default_rng(0).integers(0, 2**16, TRIALS)
    guesses = [~np.isin(value + noise[drawn], reachable[0]) for value in (0.75, 0.85)]
    assert success(*guesses) > 0.95


class Copied(NoiseStream):
    """A stream without the check of the process: the naive version."""

    def take(self, size_bytes: int) -> bytes:
        return self._cipher.update(bytes(size_bytes))


def difference_after_a_fork(stream: NoiseStream) -> int | None:
    """A parent releases a secret of 41 and its forked child one of 0, with noise; what their difference shows."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, (0 + int.from_bytes(stream.take(7), "big")).to_bytes(8, "big"))
        except PrivacyError:
            pass
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        sent = pipe.read()
    mine = 41 + int.from_bytes(stream.take(7), "big")
    return mine - int.from_bytes(sent, "big") if sent else None


def test_two_releases_of_a_forked_process_show_the_rows_only_to_the_naive() -> None:
    assert difference_after_a_fork(Copied(os.urandom(32), void=False)) == 41
    assert difference_after_a_fork(os_noise()) is None
