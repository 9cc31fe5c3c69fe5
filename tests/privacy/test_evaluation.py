"""An evaluation is one release: metrics come from the released vector alone, and their errors are right."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from fedinfer.errors import BadUsage, ShapeMismatch
from fedinfer.privacy.evaluation import LOSS_WEIGHT, EvaluationRelease
from fedinfer.privacy.integer_noise import CELLS
from fedinfer.privacy.noise import insecure_seeded_noise

RELEASE = EvaluationRelease(bins=20, loss_bound=4.0, sigma=4.0, delta=1e-6)
QUIET = EvaluationRelease(bins=20, loss_bound=4.0, sigma=0.1, delta=1e-6)


def rows(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = (rng.random(count) < 0.4).astype(np.float64)
    scores = np.clip(0.5 * rng.random(count) + 0.4 * labels * rng.random(count) + 0.1, 0.0, 1.0)
    return scores, labels, -np.log(np.where(labels > 0.5, scores, 1.0 - scores))


def test_metrics_are_those_of_the_rows() -> None:
    scores, labels, losses = rows(20_000)
    found = QUIET.summarise(QUIET.counts(scores, labels, losses, insecure_seeded_noise("quiet")))
    binned = np.floor(scores * 20)
    assert found.examples.value == pytest.approx(20_000, abs=5)
    assert found.accuracy is not None
    assert found.accuracy.value == pytest.approx(((scores >= 0.5) == (labels > 0.5)).mean(), abs=1e-3)
    assert found.auc is not None
    assert found.auc.value == pytest.approx(roc_auc_score(labels, binned), abs=1e-3)
    # Rounding scores to twenty bins changes AUC by little.
    assert found.auc.value == pytest.approx(roc_auc_score(labels, scores), abs=5e-3)
    assert found.loss is not None
    assert found.loss.value == pytest.approx(np.clip(losses, 0.0, 4.0).mean(), abs=1e-3)
    for column, share in enumerate(found.positive_share):
        inside = binned == column
        if inside.sum() < 20:
            continue
        assert share is not None
        assert share.value == pytest.approx(labels[inside].mean(), abs=0.02)


@pytest.mark.parametrize("devices", [1, 4])
def test_standard_errors_are_right(devices: int) -> None:
    data = [rows(1200, seed) for seed in range(devices)]
    scores, labels, losses = (np.concatenate(part) for part in zip(*data, strict=True))
    truths = {
        "examples": float(len(labels)),
        "accuracy": ((scores >= 0.5) == (labels > 0.5)).mean(),
        "auc": roc_auc_score(labels, np.floor(scores * 20)),
        "loss": np.clip(losses, 0.0, 4.0).mean(),
    }
    found: dict[str, list[float]] = {name: [] for name in truths}
    for trial in range(400):
        total = sum(
            RELEASE.counts(*part, insecure_seeded_noise(f"error {devices} {trial} {index}"))
            for index, part in enumerate(data)
        )
        answer = RELEASE.summarise(np.asarray(total), releases=devices)
        for name, truth in truths.items():
            estimate = getattr(answer, name)
            found[name].append((estimate.value - truth) / estimate.standard_error)
    for scores_of in found.values():
        # Standard scores have mean 0 (a ratio of noisy numbers is biased a little) and variance 1.
        assert abs(np.mean(scores_of)) < 0.35
        assert 0.7 < np.var(scores_of) < 1.4


number = st.one_of(st.floats(), st.sampled_from([0.0, 0.5, 1.0, math.nan, math.inf, -math.inf, 1e300]))


@settings(deadline=None, max_examples=200)
@given(count=st.integers(0, 5), score=number, label=number, loss=number)
def test_one_row_moves_the_vector_by_no_more_than_is_accounted(
    count: int, score: float, label: float, loss: float
) -> None:
    scores, labels, losses = rows(count)
    without = RELEASE.counts(scores, labels, losses, insecure_seeded_noise("same"))
    with_row = RELEASE.counts(
        np.append(scores, score), np.append(labels, label), np.append(losses, loss), insecure_seeded_noise("same")
    )
    moved = with_row - without
    assert sorted(moved[:-1])[-2:] == [0, CELLS]
    assert 0 <= moved[-1] <= LOSS_WEIGHT * CELLS
    assert RELEASE.gdp() == pytest.approx(math.sqrt(1.0 + LOSS_WEIGHT**2) / RELEASE.sigma)


def test_too_few_examples_say_nothing() -> None:
    empty = np.zeros(0)
    found = RELEASE.summarise(RELEASE.counts(empty, empty, empty, insecure_seeded_noise("empty")))
    assert found.accuracy is found.auc is found.loss is None
    assert set(found.positive_share) == {None}
    assert found.examples.standard_error == pytest.approx(4.0 * math.sqrt(40))
    # One class alone has no AUC.
    ones = np.ones(500)
    only = RELEASE.summarise(RELEASE.counts(ones, ones, ones, insecure_seeded_noise("one class")))
    assert only.auc is None
    assert only.accuracy is not None


@pytest.mark.parametrize("epsilon", [0.2, 1.0, 8.0])
@pytest.mark.parametrize("steps", [1, 20])
def test_calibrate_meets_epsilon_from_below(epsilon: float, steps: int) -> None:
    release = EvaluationRelease.calibrate(epsilon=epsilon, delta=1e-6, loss_bound=4.0, steps=steps)
    assert epsilon - 1e-4 <= release.epsilon() <= epsilon
    assert release.rdp(2.0) > 0.0
    assert release.to_json()["relation"] == "add or remove one"
    assert EvaluationRelease(bins=20, loss_bound=3.0, sigma=4.0, delta=1e-6).digest() != RELEASE.digest()


def test_what_cannot_be_is_refused() -> None:
    for wrong in ({"bins": 3}, {"bins": 0}, {"loss_bound": 0.0}, {"sigma": math.inf}, {"delta": 0.0}, {"steps": 0}):
        with pytest.raises(BadUsage, match="got"):
            EvaluationRelease(**{**vars(RELEASE), **wrong})
    with pytest.raises(ShapeMismatch):
        RELEASE.counts(np.zeros(2), np.zeros(3), np.zeros(2), insecure_seeded_noise("shape"))
    with pytest.raises(ShapeMismatch):
        RELEASE.summarise(np.zeros(40, np.int64))
