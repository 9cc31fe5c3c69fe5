"""Confident-GNMax: it answers where teachers agree, and one teacher costs what is accounted."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedinfer.errors import BadUsage, ShapeMismatch
from fedinfer.privacy import votes as votes_module
from fedinfer.privacy.accounting import gaussian_epsilon
from fedinfer.privacy.integer_noise import CELLS
from fedinfer.privacy.noise import NoiseStream, insecure_seeded_noise
from fedinfer.privacy.votes import ConfidentVotes

VOTES = ConfidentVotes(
    classes=3, threshold=60.0, check_sigma=10.0, label_sigma=5.0, queries=200, answers=120, delta=1e-6
)


def test_a_clear_vote_is_answered_and_an_unclear_one_is_not() -> None:
    clear, unclear = np.array([2] * 95 + [0] * 5), np.array([0] * 40 + [1] * 35 + [2] * 25)
    votes = np.stack([clear, unclear] * 50)
    labels = VOTES.label(votes, insecure_seeded_noise("votes"))
    assert labels[0::2] == [2] * 50
    # 40 votes against 60 with noise of 10: it passes with probability 0.023.
    assert sum(label is not None for label in labels[1::2]) < 12


def test_no_more_labels_than_planned() -> None:
    votes = np.full((200, 100), 1)
    labels = VOTES.label(votes, insecure_seeded_noise("cap"))
    assert sum(label is not None for label in labels) == 120
    assert labels[:120] == [1] * 120
    assert labels[120:] == [None] * 80
    with pytest.raises(BadUsage, match="questions: got 201"):
        VOTES.label(np.zeros((201, 4), np.int64), insecure_seeded_noise("cap"))
    with pytest.raises(ShapeMismatch):
        VOTES.label(np.zeros(3, np.int64), insecure_seeded_noise("cap"))


def counts_noised(question: np.ndarray) -> list[np.ndarray]:
    """What `label` adds noise to for one question that passes: the largest count, and all counts; in votes."""
    seen: list[np.ndarray] = []

    def record(cells: np.ndarray, *, sigma: float, stream: NoiseStream) -> np.ndarray:
        seen.append(cells / CELLS)
        return cells

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(votes_module, "add_on_grid", record)
        replace(VOTES, threshold=0.0).label(question[None], insecure_seeded_noise("recorded"))
    return seen


@settings(deadline=None, max_examples=100)
@given(data=st.data(), teachers=st.integers(1, 12))
def test_one_teacher_moves_counts_by_no_more_than_is_accounted(data: st.DataObject, teachers: int) -> None:
    vote = st.integers(-1, 3)
    votes = np.array(data.draw(st.lists(vote, min_size=teachers, max_size=teachers)))
    other = votes.copy()
    other[data.draw(st.integers(0, teachers - 1))] = data.draw(vote)
    (check, labels), (other_check, other_labels) = counts_noised(votes), counts_noised(other)
    assert abs(check[0] - other_check[0]) <= 1
    assert ((labels - other_labels) ** 2).sum() <= 2


def test_the_account_is_that_of_the_paper() -> None:
    # A check costs order / (2 check²), a label order / label².
    for order in (1.5, 2.0, 20.0):
        expected = 200 * order / (2 * 10.0**2) + 120 * order / 5.0**2
        assert VOTES.rdp(order) == pytest.approx(expected)
    mu = VOTES.gdp()
    assert mu is not None
    assert VOTES.rdp(7.0) == pytest.approx(7.0 * mu**2 / 2)
    assert VOTES.epsilon() == pytest.approx(gaussian_epsilon(mu=mu, delta=1e-6), abs=1e-5)
    assert VOTES.epsilon() > gaussian_epsilon(mu=mu, delta=1e-6)


@pytest.mark.parametrize(("queries", "answers"), [(1000, 10), (50, 50)])
@pytest.mark.parametrize("epsilon", [0.5, 4.0])
def test_calibrate_meets_epsilon_from_below(queries: int, answers: int, epsilon: float) -> None:
    plan = ConfidentVotes.calibrate(
        epsilon=epsilon, delta=1e-6, classes=10, threshold=50.0, queries=queries, answers=answers, steps=2
    )
    assert epsilon - 1e-4 <= plan.epsilon() <= epsilon
    # Checks and labels cost the same.
    assert queries / plan.check_sigma**2 == pytest.approx(2 * answers / plan.label_sigma**2)
    assert math.isfinite(plan.label_sigma)


def test_what_cannot_be_is_refused_and_the_charge_names_its_unit() -> None:
    for wrong in (
        {"classes": 1},
        {"threshold": math.nan},
        {"check_sigma": 0.0},
        {"label_sigma": 0.0},
        {"queries": 0},
        {"answers": 201},
        {"delta": 0.0},
        {"steps": 0},
    ):
        with pytest.raises(BadUsage, match="got"):
            ConfidentVotes(**{**vars(VOTES), **wrong})
    assert VOTES.to_json()["unit"] == "client"
    assert VOTES.to_json()["relation"] == "replace one"
    assert ConfidentVotes(**{**vars(VOTES), "threshold": 61.0}).digest() != VOTES.digest()
