"""Labels by a vote of teachers, released only where the vote is clear: Confident-GNMax.

Of each question the largest count of votes, with noise, is compared with a threshold; where it is enough, the label
with the largest noisy count is released. A label that nobody agrees on is the one that a single teacher may decide.

Only the account that holds for all votes is given. The paper's smaller one depends on the votes, and is private itself.

References: Papernot, Song, Mironov, Raghunathan, Talwar and Erlingsson 2018, arXiv:1802.08908, algorithm 1. That the
number of labels is not fixed before, but bounded: Koskela, Tobaben and Honkela 2022, arXiv:2209.15596, and Smith and
Thakurta 2022, arXiv:2210.17520 (composition of Gaussian mechanisms that are chosen by the answers before).
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedinfer.errors import BadUsage, ShapeMismatch
from fedinfer.privacy.integer_noise import (
    CELLS,
    MOST_SIGMA,
    add_on_grid,
    check_releases,
    check_sigma,
    digest_of,
    fine_epsilon,
    gaussian_rdp,
    least_sigma,
)
from fedinfer.privacy.noise import NoiseStream

MAX_QUERIES = 100_000


@dataclass(frozen=True, kw_only=True)
class ConfidentVotes:
    """`steps` batches of at most `queries` questions, at most `answers` of which in a batch get a label.

    Unit: one teacher (a client), all of whose votes may change. Relation: replace one. Adversary: whoever sees all
    labels and refusals, and knows all other teachers. Trusted: whoever counts the votes. One vote changes the largest
    count by one at most, and two counts by one each.

    Guarantees: `steps` calls of `label` are (epsilon(), delta)-differentially private, for any votes.

    >>> from fedinfer.privacy.noise import insecure_seeded_noise
    >>> plan = ConfidentVotes.calibrate(epsilon=2.0, delta=1e-6, classes=3, threshold=60.0, queries=2, answers=2)
    >>> votes = np.array([[1] * 95 + [2] * 5, [0] * 34 + [1] * 33 + [2] * 33])
    >>> plan.label(votes, insecure_seeded_noise("example"))
    [1, None]
    """

    classes: int
    threshold: float
    check_sigma: float
    label_sigma: float
    queries: int
    answers: int
    delta: float
    steps: int = 1

    def __post_init__(self) -> None:
        if type(self.classes) is not int or self.classes < 2:
            raise BadUsage(f"classes: got {self.classes}, expected a whole number of at least 2")
        if not math.isfinite(self.threshold):
            raise BadUsage(f"threshold: got {self.threshold}, expected a finite number of votes")
        for name, value, most in (
            ("queries", self.queries, MAX_QUERIES),
            ("answers", self.answers, self.queries),
        ):
            if type(value) is not int or not 1 <= value <= most:
                raise BadUsage(f"{name}: got {value}, expected a whole number from 1 to {most}")
        check_sigma(self.check_sigma)
        check_sigma(self.label_sigma)
        check_releases(steps=self.steps, delta=self.delta)

    @classmethod
    def calibrate(
        cls,
        *,
        epsilon: float,
        delta: float,
        classes: int,
        threshold: float,
        queries: int,
        answers: int,
        steps: int = 1,
    ) -> Self:
        """The least noise whose ε is at most `epsilon`, met from below to 1e-4; checks and labels cost the same.

        Raises: BadUsage for an argument that cannot be.
        """
        ratio = math.sqrt(queries / (2 * answers))
        draft = cls(
            classes=classes,
            threshold=threshold,
            check_sigma=MOST_SIGMA,
            label_sigma=MOST_SIGMA,
            queries=queries,
            answers=answers,
            delta=delta,
            steps=steps,
        )

        def with_noise(least: float, plan: Self) -> Self:
            check, label = least * max(1.0, ratio), least * max(1.0, 1.0 / ratio)
            return replace(plan, check_sigma=min(check, MOST_SIGMA), label_sigma=min(label, MOST_SIGMA))

        return with_noise(least_sigma(lambda least: with_noise(least, draft).epsilon(), epsilon), draft)

    def label(self, votes: NDArray[np.integer[Any]], stream: NoiseStream) -> list[int | None]:
        """Votes (questions, teachers), each the number of a class, to a label or None for each question.

        A vote for no class is counted nowhere. After `answers` labels all further questions get None.
        Raises: ShapeMismatch for no such array; BadUsage for more questions than `queries`.
        """
        if votes.ndim != 2:
            raise ShapeMismatch(got=votes.shape, expected="(questions, teachers)", what="votes")
        if len(votes) > self.queries:
            raise BadUsage(f"questions: got {len(votes)}, expected at most {self.queries}")
        counts = (votes[:, :, None] == np.arange(self.classes)).sum(1) * CELLS
        checks = add_on_grid(counts.max(1), sigma=self.check_sigma, stream=stream)
        labels: list[int | None] = [None] * len(votes)
        for question in np.flatnonzero(checks >= self.threshold * CELLS)[: self.answers]:
            noisy = add_on_grid(counts[question], sigma=self.label_sigma, stream=stream)
            labels[question] = int(noisy.argmax())
        return labels

    def epsilon(self) -> float:
        """ε at `delta` of all batches."""
        return fine_epsilon(
            mu=self._mu(),
            sigma=min(self.check_sigma, self.label_sigma) * CELLS,
            delta=self.delta,
            coordinates=self.steps * (self.queries + 2 * self.answers),
        )

    def rdp(self, order: float) -> float:
        """Rényi divergence at `order` of all batches."""
        return gaussian_rdp(mu=self._mu(), order=order)

    def gdp(self) -> float | None:
        """μ of all batches: on a fine grid these are Gaussian mechanisms, up to what `fine_epsilon` pays."""
        return self._mu()

    def to_json(self) -> dict[str, Any]:
        """The public fields, with the names of mechanism, unit and relation."""
        return {"mechanism": "Confident-GNMax", "unit": "client", "relation": "replace one", **asdict(self)}

    def digest(self) -> str:
        """SHA-256 of the fields."""
        return digest_of(self.to_json())

    def _mu(self) -> float:
        once = self.queries / self.check_sigma**2 + 2.0 * self.answers / self.label_sigma**2
        return math.sqrt(self.steps * once)
