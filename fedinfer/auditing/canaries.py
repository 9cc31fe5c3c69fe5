"""What an audit feeds its subjects: the plan, canaries that point in directions of their own, and neighbours.

A blank unit stands in for a canary that is absent where the number of units is to stay the same: it points, a little,
in a spare direction that no canary has.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedinfer.auditing.subjects import Subject, Units
from fedinfer.privacy import Poisson, PrivacyPlan

Floats = NDArray[np.float64]

EPSILON, DELTA, CLIP_NORM = 1.0, 1e-5, 1.0
RATE = 0.5
# Far beyond the clip norm, so that a canary is clipped to it and its model's bias does not count.
LOUD = 1e3
FAINT = 1e-3
# Of a client that says so; refusing it is as good as weighing it as one.
MANY_EXAMPLES = "1,000 examples"


def plan_for(
    subject: Subject, *, steps: int, divisor: float, rate: float = RATE, epsilon: float = EPSILON
) -> PrivacyPlan:
    """The plan that a subject is given, with `epsilon` for all steps; everybody takes part where it does not sample."""
    return PrivacyPlan.calibrate(
        epsilon=epsilon,
        delta=DELTA,
        steps=steps,
        unit=subject.unit,
        sampler=Poisson(rate=rate if subject.sampled else 1.0),
        clip_norm=CLIP_NORM,
        divisor=divisor,
    )


def axes(count: int) -> Floats:
    """A direction for each of `count` canaries, (count, count + 1): the axes, and a spare one."""
    return np.eye(count, count + 1)


def random_directions(count: int, seed: int) -> Floats:
    """Random directions (count, 4 count + 1) of length 1; which ones is no secret. The last axis is spare."""
    drawn = np.random.default_rng(seed).normal(size=(count, 4 * count + 1))
    drawn[:, -1] = 0.0
    directions: Floats = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    return directions


def some_present(directions: Floats, present: NDArray[np.bool_]) -> Units:
    """A canary for each direction that is `present`, and a blank unit for each that is not."""
    rows = np.where(present[:, None], LOUD * directions, 0.0)
    rows[~present, -1] = FAINT
    return Units.of(rows)


def neighbours(subject: Subject, *, width: int) -> Iterator[tuple[str, Units, Units]]:
    """Pairs without and with one unit, by what is odd about it; rows (n, width)."""
    half = width // 2
    loud, mixed = np.zeros(width), np.zeros(width)
    loud[0] = -LOUD * LOUD
    mixed[0], mixed[half:] = np.nan, 1e6
    odd = {
        "ordinary": np.linspace(-1.0, 1.0, width),
        "zero": np.zeros(width),
        "opposite": loud,
        "NaN": np.full(width, np.nan),
        "NaN and large": mixed,
        "infinite": np.full(width, np.inf),
        "huge": np.full(width, 1e30),
        "no longer than the clip": np.eye(1, width)[0] * CLIP_NORM,
    }
    base = np.zeros((3, width))
    base[:, 0] = LOUD
    for size in (1, 3) if subject.fixed_units else (0, 1, 3):
        for name, row in odd.items():
            yield name, *_pair(subject, base[:size], row)
    yield "a copy", *_pair(subject, base, base[0])
    if subject.fixed_units:
        without, present = _pair(subject, base, loud)
        said = np.array([1, 1, 1, 1000])
        yield MANY_EXAMPLES, without, Units(rows=present.rows, examples=said)


def _pair(subject: Subject, base: Floats, row: Floats) -> tuple[Units, Units]:
    blank = np.zeros((1, base.shape[1]))
    blank[0, -1] = FAINT
    without = np.concatenate([base, blank]) if subject.fixed_units else base
    return Units.of(without), Units.of(np.concatenate([base, row[None]]))
