"""How good a model is on a device's rows, as one release: a histogram of scores by label, and a clipped loss.

A row adds one to one of 2 × bins cells and at most half a unit to the sum of losses, so that accuracy, AUC, calibration
and the number of rows cost hardly more than a single count: they are computed from what was released. The loss gets
half the weight of a count because the number of rows, which it is divided by, is the noisier of the two.

Unit: one example (a row). Relation: add or remove one. Adversary: whoever sees all releases and knows every other row.
Trusted: the device and its operating system's randomness. All fields are public constants.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedinfer.errors import BadUsage, ShapeMismatch
from fedinfer.privacy.checks import check_positive
from fedinfer.privacy.discrete import Integers
from fedinfer.privacy.integer_noise import (
    CELLS,
    MOST_SIGMA,
    SEEN,
    Estimate,
    add_on_grid,
    check_releases,
    check_sigma,
    digest_of,
    fine_epsilon,
    gaussian_rdp,
    least_sigma,
)
from fedinfer.privacy.noise import NoiseStream

Floats = NDArray[np.floating[Any]]
LOSS_WEIGHT = 0.5
MAX_BINS = 1024
# Shares of a millionth of the noise still have a thousand cells.
MAX_HONEST = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What released vectors say of a model; None where the noise may be all there is.

    Standard errors are those of the noise alone: that the rows are a sample is not in them. AUC is that of the scores
    rounded to bins. `positive_share` has, for each bin of scores, the share of positive labels.
    """

    examples: Estimate
    accuracy: Estimate | None
    auc: Estimate | None
    loss: Estimate | None
    positive_share: tuple[Estimate | None, ...]


@dataclass(frozen=True, kw_only=True)
class EvaluationRelease:
    """`steps` noised vectors (2 bins + 1,) of a model's scores on rows: by label and bin, and the sum of losses.

    With `min_honest` above 1 a device adds a share of the noise only, and the sum of at least as many is what is
    private: such counts need a secure sum. `sigma` is the noise of `min_honest` shares. (A sum of m discrete Gaussians
    of s cells is one of s sqrt(m) but for a factor of 10 m exp(-pi^2 s^2) of 1: nothing at these s. Kairouz et al.
    2021, arXiv:2102.06387, theorem 9.)

    A score of 0.5 or more counts as a positive answer; `bins` is even, so that 0.5 is an edge.

    Guarantees: `steps` calls of `counts` are (epsilon(), delta)-differentially private.

    >>> from fedinfer.privacy.noise import insecure_seeded_noise
    >>> release = EvaluationRelease.calibrate(epsilon=1.0, delta=1e-6, loss_bound=4.0)
    >>> scores, labels, losses = np.full(500, 0.9), np.ones(500), np.full(500, 0.1)
    >>> found = release.summarise(release.counts(scores, labels, losses, insecure_seeded_noise("example")))
    >>> round(found.accuracy.value, 2), round(found.accuracy.standard_error, 2)
    (1.0, 0.05)
    """

    bins: int = 20
    loss_bound: float
    sigma: float
    delta: float
    steps: int = 1
    min_honest: int = 1

    def __post_init__(self) -> None:
        if type(self.min_honest) is not int or not 1 <= self.min_honest <= MAX_HONEST:
            raise BadUsage(f"honest devices: got {self.min_honest}, expected a whole number from 1 to {MAX_HONEST}")
        if type(self.bins) is not int or not 2 <= self.bins <= MAX_BINS or self.bins % 2:
            raise BadUsage(f"bins: got {self.bins}, expected an even number from 2 to {MAX_BINS}")
        check_positive("loss bound", self.loss_bound)
        check_sigma(self.sigma)
        check_releases(steps=self.steps, delta=self.delta)

    @classmethod
    def calibrate(
        cls,
        *,
        epsilon: float,
        delta: float,
        bins: int = 20,
        loss_bound: float,
        steps: int = 1,
        min_honest: int = 1,
    ) -> Self:
        """The least noise whose ε is at most `epsilon`, met from below to 1e-4.

        Raises: BadUsage for an argument that cannot be.
        """
        draft = cls(bins=bins, loss_bound=loss_bound, sigma=MOST_SIGMA, delta=delta, steps=steps, min_honest=min_honest)
        return replace(draft, sigma=least_sigma(lambda sigma: replace(draft, sigma=sigma).epsilon(), epsilon))

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Read `to_json` back.

        Raises: BadUsage for a missing or unknown field, or one that cannot be.
        """
        own = {name: value for name, value in fields.items() if name not in ("mechanism", "unit", "relation")}
        try:
            release = cls(**own)
        except TypeError as error:
            raise BadUsage(f"evaluation: {error}") from None
        if release.to_json() != dict(fields):
            raise BadUsage("evaluation: got another mechanism, unit or relation than these fields describe")
        return release

    @property
    def size(self) -> int:
        """How many numbers a release has."""
        return 2 * self.bins + 1

    def counts(self, scores: Floats, labels: Floats, losses: Floats, stream: NoiseStream) -> Integers:
        """The vector (2 bins + 1,) that leaves the device, in cells: negative rows by bin, positive rows, losses.

        Scores (n,) are probabilities of the positive label, labels (n,) 0 or 1, losses (n,) are cut to [0, loss_bound].
        A score that is no number counts as 0, such a label as 0, such a loss as the bound. Vectors of several devices
        add up.
        Raises: ShapeMismatch for arrays of different lengths.
        """
        if not scores.shape == labels.shape == losses.shape == (len(scores),):
            raise ShapeMismatch(got=(scores.shape, labels.shape, losses.shape), expected="three of (n,)", what="scores")
        known = np.clip(np.nan_to_num(scores.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0), 0.0, 1.0)
        column = np.minimum((known * self.bins).astype(np.int64), self.bins - 1)
        cells = np.bincount(column + self.bins * (labels > 0.5), minlength=2 * self.bins) * CELLS
        finite = np.where(np.isfinite(losses), losses, self.loss_bound).astype(np.float64)
        shares = np.clip(finite / self.loss_bound, 0.0, 1.0) * (LOSS_WEIGHT * CELLS)
        vector = np.append(cells, np.rint(shares).astype(np.int64).sum())
        return add_on_grid(vector, sigma=self.sigma, shares=self.min_honest, stream=stream)

    def summarise(self, total: Integers, *, releases: int = 1) -> Evaluation:
        """What the sum (2 bins + 1,) of `releases` vectors says, each with its own noise or share of it.

        Raises: ShapeMismatch if it is no such vector.
        """
        if total.shape != (2 * self.bins + 1,):
            raise ShapeMismatch(got=total.shape, expected=f"({2 * self.bins + 1},)", what="sum of evaluations")
        error = self.sigma * math.sqrt(releases / self.min_honest)
        values = total.astype(np.float64) / CELLS
        negative, positive, losses = values[: self.bins], values[self.bins : -1], float(values[-1]) / LOSS_WEIGHT
        half = self.bins // 2
        examples = Estimate(value=float(values[:-1].sum()), standard_error=error * math.sqrt(2 * self.bins))
        right = negative[:half].sum() + positive[half:].sum()
        return Evaluation(
            examples=examples,
            accuracy=_share(right, examples.value - right, error=error, cells=self.bins),
            auc=_auc(negative, positive, error),
            loss=self._loss(losses, examples, error),
            positive_share=tuple(_share(p, n, error=error, cells=1) for p, n in zip(positive, negative, strict=True)),
        )

    def epsilon(self) -> float:
        """ε at `delta` of all releases."""
        cells = self.sigma * CELLS
        return fine_epsilon(mu=self._mu(), sigma=cells, delta=self.delta, coordinates=2 * self.steps)

    def rdp(self, order: float) -> float:
        """Rényi divergence at `order` of all releases."""
        return gaussian_rdp(mu=self._mu(), order=order)

    def gdp(self) -> float | None:
        """μ of all releases: on a fine grid this is a Gaussian mechanism, up to what `fine_epsilon` pays."""
        return self._mu()

    def to_json(self) -> dict[str, Any]:
        """The public fields, with the names of mechanism, unit and relation."""
        mechanism = "discrete Gaussian of a histogram of scores and a sum of losses"
        return {"mechanism": mechanism, "unit": "example", "relation": "add or remove one", **asdict(self)}

    def digest(self) -> str:
        """SHA-256 of the fields."""
        return digest_of(self.to_json())

    def _mu(self) -> float:
        return math.sqrt((1.0 + LOSS_WEIGHT**2) * self.steps) / self.sigma

    def _loss(self, losses: float, examples: Estimate, error: float) -> Estimate | None:
        if examples.value <= SEEN * examples.standard_error:
            return None
        mean = losses / examples.value
        noise = math.hypot(error / LOSS_WEIGHT, mean * examples.standard_error)
        return Estimate(
            value=self.loss_bound * min(max(mean, 0.0), 1.0),
            standard_error=self.loss_bound * noise / examples.value,
        )


def _share(yes: float, no: float, *, error: float, cells: int) -> Estimate | None:
    """yes / (yes + no), each a sum of `cells` counts with noise of `error`."""
    count = yes + no
    if count <= SEEN * error * math.sqrt(2 * cells):
        return None
    share = yes / count
    return Estimate(
        value=float(min(max(share, 0.0), 1.0)),
        standard_error=float(error * math.sqrt(cells) * math.hypot(share, 1.0 - share) / count),
    )


def _auc(negative: NDArray[np.float64], positive: NDArray[np.float64], error: float) -> Estimate | None:
    """The share of pairs in which the positive row has the higher bin, ties counting half.

    The standard error is that of the first and second order of the noise, which is independent in each count.
    """
    bins = len(negative)
    pairs = np.array([negative.sum(), positive.sum()])
    if (pairs <= SEEN * error * math.sqrt(bins)).any():
        return None
    below = (np.cumsum(negative) - negative / 2.0) / pairs[0]
    above = (np.cumsum(positive[::-1])[::-1] - positive / 2.0) / pairs[1]
    auc = float(positive @ below / pairs[1])
    first = ((below - auc) ** 2).sum() / pairs[1] ** 2 + ((above - auc) ** 2).sum() / pairs[0] ** 2
    second = error**2 * (bins * (bins - 1) / 2 + bins / 4) / (pairs[0] * pairs[1]) ** 2
    return Estimate(value=min(max(auc, 0.0), 1.0), standard_error=error * math.sqrt(first + second))
