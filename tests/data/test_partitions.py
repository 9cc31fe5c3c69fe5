"""Divisions of examples over clients: each example once, by seed, and as skewed as the scheme says."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedinfer.data import partitions
from fedinfer.data.partitions import ByColumn, Division, Iid, LabelDirichlet, Partition, Shards, SizeDirichlet
from fedinfer.errors import BadUsage, ShapeMismatch

SEEDS = st.integers(0, 2**32)
ALPHAS = st.floats(1e-8, 1e6)
SCHEMES = st.one_of(
    st.builds(Iid, seed=SEEDS),
    st.builds(LabelDirichlet, alpha=ALPHAS, seed=SEEDS),
    st.builds(SizeDirichlet, alpha=ALPHAS, seed=SEEDS),
    st.builds(Shards, per_client=st.integers(1, 4), seed=SEEDS),
)


def labels_of(division: Division, labels: np.ndarray) -> list[int]:
    """How many labels each client has."""
    return [len(set(labels[division.indices(client)].tolist())) for client in range(division.clients)]


@given(SCHEMES, st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 25))
def test_each_example_belongs_to_exactly_one_client(scheme: Partition, labels: list[int], clients: int) -> None:
    division = scheme.divide(np.array(labels), clients)
    every = [division.indices(client) for client in range(clients)]
    assert sorted(np.concatenate(every).tolist()) == list(range(len(labels)))
    assert all(np.array_equal(own, np.sort(own)) and own.dtype == np.int64 for own in every)
    assert [len(own) for own in every] == division.sizes.tolist()
    again = scheme.divide(np.array(labels), clients)
    assert np.array_equal(division.order, again.order), "a seed repeats a division"
    if isinstance(scheme, Iid | LabelDirichlet):
        assert np.ptp(division.sizes) <= 1


def test_clients_drawn_in_pieces_still_share_each_example_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partitions, "AT_ONCE", 7)
    labels = np.random.default_rng(0).integers(0, 5, 503)
    division = LabelDirichlet(alpha=0.1).divide(labels, 40)
    assert np.array_equal(np.sort(division.order), np.arange(503))
    assert np.mean(labels_of(division, labels)) < 3.0


@pytest.mark.parametrize("scheme", [Iid, Shards])
def test_another_seed_is_another_division(scheme: type[Iid | Shards]) -> None:
    labels = np.arange(200) % 10
    one, other = (scheme(seed=seed).divide(labels, 10) for seed in (0, 1))
    assert not np.array_equal(one.indices(0), other.indices(0))


def test_label_shares_have_the_moments_of_the_dirichlet_distribution() -> None:
    # The share of a label among a client's n examples has mean p and variance
    # p (1 - p) (1 / (1 + alpha) + (1 - 1 / (1 + alpha)) / n), up to what labels that give out change.
    labels, clients, size = np.arange(200_000) % 4 // 3, 2000, 100
    for alpha in (0.5, 5.0):
        division = LabelDirichlet(alpha=alpha, seed=3).divide(labels, clients)
        shares = labels[division.order].reshape(clients, size).mean(1)
        spread = 1.0 / (1.0 + alpha)
        assert shares[:1800].mean() == pytest.approx(0.25, abs=0.04)
        assert shares[:1800].var() == pytest.approx(0.1875 * (spread + (1 - spread) / size), rel=0.15)


def test_a_small_alpha_gives_clients_of_one_label_and_a_large_one_clients_alike() -> None:
    labels = np.arange(5000) % 10
    one, alike = (labels_of(LabelDirichlet(alpha=alpha).divide(labels, 50), labels) for alpha in (1e-3, 1e4))
    assert np.median(one) == 1
    # The last client gets what is left.
    assert np.median(alike) == 10


def test_a_small_alpha_gives_clients_of_very_different_sizes() -> None:
    labels = np.zeros(10_000)
    skewed, even = (SizeDirichlet(alpha=alpha).divide(labels, 100).sizes for alpha in (0.1, 1e4))
    assert skewed.max() > 500
    assert (skewed == 0).any()
    assert 80 < even.min() <= even.max() < 120


@pytest.mark.parametrize("per_client", [1, 2, 3])
def test_a_client_has_few_labels(per_client: int) -> None:
    """No shard is larger than the smallest label here, so that it holds two labels at most."""
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(10), 60))
    found = labels_of(Shards(per_client=per_client).divide(labels, 20), labels)
    assert max(found) <= 2 * per_client
    assert np.mean(found) < per_client + 1


def test_a_column_says_whose_an_example_is() -> None:
    writers = np.array(["c", "a", "b", "a", "c", "c"])
    division = ByColumn(values=writers).divide(np.zeros(6), 3)
    assert [division.indices(client).tolist() for client in range(3)] == [[1, 3], [2], [0, 4, 5]]
    with pytest.raises(BadUsage, match="expected 3, one for each value"):
        ByColumn(values=writers).divide(np.zeros(6), 4)
    with pytest.raises(ShapeMismatch):
        ByColumn(values=writers).divide(np.zeros(7), 3)


def test_a_division_loads_rows_for_a_local_task() -> None:
    x, y = torch.arange(24.0).reshape(12, 2), torch.arange(12) % 3
    division = Shards(per_client=1).divide(y.numpy(), 3)
    load = division.load(x, y)
    for client in range(3):
        for own in (load, pickle.loads(pickle.dumps(load))):
            rows, labels = own(client, 3)
            assert torch.equal(rows, x[division.indices(client)])
            assert len(set(labels.tolist())) == 1
    with pytest.raises(BadUsage, match="expected the 3"):
        load(0, 4)
    with pytest.raises(ShapeMismatch):
        division.load(x[:5], y)


@pytest.mark.parametrize(
    ("scheme", "fields"),
    [
        (LabelDirichlet, {"alpha": 0.0}),
        (LabelDirichlet, {"alpha": float("inf")}),
        (SizeDirichlet, {"alpha": -1.0}),
        (Shards, {"per_client": 0}),
    ],
)
def test_a_scheme_that_cannot_be_is_refused(scheme: type, fields: dict[str, float]) -> None:
    with pytest.raises(BadUsage, match="expected"):
        scheme(**fields)


def test_a_division_that_cannot_be_is_refused() -> None:
    with pytest.raises(BadUsage, match="clients: got 0"):
        Iid().divide(np.zeros(3), 0)
    with pytest.raises(ShapeMismatch):
        Iid().divide(np.zeros((0,)), 1)
    division = Iid().divide(np.zeros(3), 2)
    for client in (-1, 2):
        with pytest.raises(BadUsage, match="client: got"):
            division.indices(client)
    with pytest.raises(BadUsage, match="each example once"):
        Division(order=np.array([0, 0]), starts=np.array([0, 2]))
    with pytest.raises(BadUsage, match="rise from 0"):
        Division(order=np.array([0, 1]), starts=np.array([0, 3]))
