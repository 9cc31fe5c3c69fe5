"""Noise for a million coordinates, in seconds of one thread: exact integers beside floats and the published way.

Floor: a proposal takes 16 bytes of AES-256-CTR, and about 1.03 proposals make a number. The peer that is exact is the
published algorithm (Canonne, Kamath and Steinke 2020, algorithm 3), one number at a time as it is written; the peer
that is fast is NumPy's generator, which is neither cryptographic nor exact.

    python -m experiments.benchmarks.noise [--quick] [--json FILE]
"""

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy.special import ndtri

from fedinfer.privacy.discrete import PROPOSAL_BYTES, discrete_gaussian, discrete_laplace
from fedinfer.privacy.noise import os_noise

BLOCK = bytes(2**18)


def keystream(cipher: Callable[[], Cipher[modes.CTR] | Cipher[None]], size_bytes: int) -> None:
    """Make that many bytes of a cipher's stream, a block at a time."""
    encryptor = cipher().encryptor()
    for _ in range(size_bytes // len(BLOCK)):
        encryptor.update(BLOCK)


def aes() -> Cipher[modes.CTR]:
    return Cipher(algorithms.AES256(os.urandom(32)), modes.CTR(bytes(16)))


def chacha() -> Cipher[None]:
    return Cipher(algorithms.ChaCha20(os.urandom(32), bytes(16)), None)


def published(variance: int, count: int) -> list[int]:
    """Algorithm 3 with algorithms 1 and 2, in exact arithmetic, on Python's operating system randomness."""
    source = random.SystemRandom()

    def bernoulli(chance: Fraction) -> bool:
        return source.randrange(chance.denominator) < chance.numerator

    def bernoulli_exp(exponent: Fraction) -> bool:
        while exponent > 1:
            if not bernoulli_exp(Fraction(1)):
                return False
            exponent -= 1
        number = 1
        while bernoulli(exponent / number):
            number += 1
        return number % 2 == 1

    def laplace(scale: int) -> int:
        while True:
            rest = source.randrange(scale)
            if not bernoulli_exp(Fraction(rest, scale)):
                continue
            turns = 0
            while bernoulli_exp(Fraction(1)):
                turns += 1
            found, negative = rest + scale * turns, bernoulli(Fraction(1, 2))
            if not (negative and found == 0):
                return -found if negative else found

    def one() -> int:
        scale = int(variance**0.5) + 1
        while True:
            found = laplace(scale)
            if bernoulli_exp((abs(found) - Fraction(variance, scale)) ** 2 / (2 * variance)):
                return found

    return [one() for _ in range(count)]


def main(argv: Sequence[str] | None = None) -> None:
    """Print nanoseconds a number of each, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100,000 numbers instead of a million")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(argv)
    count = 100_000 if options.quick else 1_000_000
    stream, generator, few = os_noise(), np.random.default_rng(), count // 1000
    cases: dict[str, tuple[Callable[[], object], int]] = {
        "discrete Gaussian, sigma 1": (lambda: discrete_gaussian(stream, variance=1, count=count), count),
        "discrete Gaussian, sigma 1000": (lambda: discrete_gaussian(stream, variance=10**6, count=count), count),
        "discrete Gaussian, sigma 2^40": (lambda: discrete_gaussian(stream, variance=2**80, count=count), count),
        "discrete Laplace, scale 1000": (lambda: discrete_laplace(stream, scale=1000, count=count), count),
        "gaussian_float": (lambda: stream.gaussian_float(1.0, count), count),
        "inversion of 52 bits, float": (lambda: ndtri(stream.uniform(count)), count),
        "numpy standard_normal": (lambda: generator.standard_normal(count), count),
        "published algorithm, sigma 1000": (lambda: published(10**6, few), few),
        "AES-256-CTR, 16 bytes": (lambda: keystream(aes, PROPOSAL_BYTES * count), count),
        "ChaCha20, 16 bytes": (lambda: keystream(chacha, PROPOSAL_BYTES * count), count),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(8):
        for name, (run, _) in cases.items():
            started = time.thread_time()
            run()
            # The first turn warms up.
            if turn:
                seconds[name].append(time.thread_time() - started)
    each = {name: statistics.median(times) / cases[name][1] * 1e9 for name, times in seconds.items()}
    ours = each["discrete Gaussian, sigma 2^40"]
    figures: dict[str, Any] = {
        "nanoseconds": each,
        "of_a_million_s": ours / 1e3,
        "times_floor": ours / each["AES-256-CTR, 16 bytes"],
        "times_numpy": ours / each["numpy standard_normal"],
        "published_times_ours": each["published algorithm, sigma 1000"] / each["discrete Gaussian, sigma 1000"],
    }
    for name, nanoseconds in each.items():
        print(f"{name:34}{nanoseconds:12.1f} ns")
    floor, peer = f"{figures['times_floor']:.1f}× the AES floor", f"{figures['times_numpy']:.1f}× NumPy's floats"
    print(f"a million exact numbers: {figures['of_a_million_s']:.3f} s, {floor}, {peer}")
    print(f"the published algorithm takes {figures['published_times_ours']:.0f}× as long")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
