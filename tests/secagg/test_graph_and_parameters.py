"""The neighbour graph against enumeration, and the numbers that a policy gives."""

import itertools
from collections import Counter
from fractions import Fraction
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedinfer.errors import BadUsage
from fedinfer.secagg import graph
from fedinfer.secagg.graph import Sparseness, complete, random_cycles, sparsest
from fedinfer.secagg.parameters import SPARSE_FROM, Parameters, Policy


def cycles_through(count: int) -> list[list[set[int]]]:
    """The neighbours of each place, for each cyclic order of `count` places."""
    found = []
    for order in itertools.permutations(range(1, count)):
        ring = (0, *order)
        near: list[set[int]] = [set() for _ in range(count)]
        for here, there in zip(ring, (*ring[1:], ring[0]), strict=True):
            near[here].add(there)
            near[there].add(here)
        found.append(near)
    return found


def test_tails_are_those_of_all_pairs_of_cycles() -> None:
    # Place 0 of 7; places 1 and 2 are corrupt, 5 and 6 drop out.
    every = set(map(frozenset, (near[0] for near in cycles_through(7))))
    assert len(every) == comb(6, 2)
    pairs = list(itertools.product(every, repeat=2))
    living = Counter(len((a | b) & {1, 2, 3, 4}) for a, b in pairs)
    corrupt = Counter(len(a & {1, 2}) + len(b & {1, 2}) for a, b in pairs)
    alive, slots = {0: 1}, [1]
    for _ in range(2):
        alive = graph._one_more_cycle(alive, living=4, others=6)
        slots = graph._product(slots, [comb(4, 2), 4 * 2, comb(2, 2)])
    ways = comb(6, 2) ** 2
    for count in range(5):
        assert Fraction(alive.get(count, 0), ways) == Fraction(living[count], len(pairs))
        assert Fraction(graph._tails(slots)[count], ways) == Fraction(
            sum(times for value, times in corrupt.items() if value >= count), len(pairs)
        )


def test_the_bound_on_a_group_apart_holds_for_all_cycles() -> None:
    # A group {0, 1} of 7, of which {2, 3, 4} are bad: it may reach no other. The followers alone give the bound.
    every = cycles_through(7)
    alone = sum(all(near[place] <= {0, 1, 2, 3, 4} for place in (0, 1)) for near in every)
    bound = Fraction(comb(2 + 3 - 1, 2), comb(7 - 1, 2))
    assert 0 < Fraction(alone, len(every)) <= bound
    # Two cycles, three members corrupt or dropped, and the union over groups of that size.
    assert graph._apart(7, 2, 1, 2)[1] == pytest.approx(min(1.0, comb(5, 2) * comb(3, 1) * float(bound) ** 2))


def test_every_cycle_is_as_likely() -> None:
    seen = Counter(random_cycles(seed.to_bytes(32, "big"), count=5, cycles=1) for seed in range(6000))
    # 12 cycles through 5 places, each 500 times: within 6.5 standard deviations, all of them (below 1e-9).
    assert len(seen) == 12
    assert max(abs(times - 500) for times in seen.values()) < 6.5 * (6000 * (1 / 12) * (11 / 12)) ** 0.5


@given(st.binary(min_size=32, max_size=32), st.integers(3, 60), st.integers(1, 12))
def test_a_graph_is_mutual_sorted_and_the_same_for_all(seed: bytes, count: int, cycles: int) -> None:
    near = random_cycles(seed, count=count, cycles=cycles)
    assert near == random_cycles(seed, count=count, cycles=cycles)
    for place, others in enumerate(near):
        assert list(others) == sorted(set(others) - {place})
        assert 2 <= len(others) <= 2 * cycles
        assert all(place in near[other] for other in others)


def test_the_complete_graph_and_what_is_no_graph() -> None:
    assert complete(3) == ((1, 2), (0, 2), (0, 1))
    for count, cycles in ((2, 1), (3, 0)):
        with pytest.raises(BadUsage):
            random_cycles(bytes(32), count=count, cycles=cycles)


def uniform_failure(clients: int, neighbours: int) -> float:
    """With one tenth corrupt and one tenth dropped out, and neighbours as in Bell et al.: a random set of that size."""
    bad = clients // 10

    def tail(kind: int, ones: range) -> Fraction:
        return Fraction(
            sum(comb(kind, x) * comb(clients - 1 - kind, neighbours - x) for x in ones), comb(clients - 1, neighbours)
        )

    return min(
        float(clients * (tail(bad, range(t, neighbours + 1)) + tail(clients - 1 - bad, range(t))))
        for t in range(1, neighbours + 1)
    )


def test_neighbours_are_computed_and_64_of_1000_are_not_enough_against_chosen_dropouts() -> None:
    # Chance alone asks for 64 at 2^-40. That a server chooses who drops out, knowing the graph, costs some more.
    assert 2.0**-18 < uniform_failure(1000, 32) < 2.0**-17
    assert 2.0**-47 < uniform_failure(1000, 64) < 2.0**-46
    found = sparsest(clients=1000, corrupt=100, dropouts=100, bits=40)
    assert found is not None
    assert 64 <= 2 * found.cycles <= 80
    weaker = sparsest(clients=1000, corrupt=100, dropouts=100, bits=17)
    assert weaker is not None
    assert weaker.cycles < found.cycles


def test_the_numbers_of_1000_clients() -> None:
    assert sparsest(clients=1000, corrupt=100, dropouts=100, bits=40) == Sparseness(cycles=40, threshold=41, cut_off=5)
    assert sparsest(clients=1000, corrupt=50, dropouts=50, bits=40) == Sparseness(cycles=24, threshold=25, cut_off=4)


def test_no_sparse_graph_is_safe_with_too_many_bad_members() -> None:
    assert sparsest(clients=60, corrupt=20, dropouts=15, bits=40) is None


@given(
    st.integers(3, 120),
    st.integers(0, 60),
    st.floats(0.0, 0.6),
    st.floats(0.0, 0.6),
)
def test_what_a_policy_gives_keeps_every_condition(clients: int, more: int, corrupt: float, dropout: float) -> None:
    policy = Policy(corrupt=corrupt, dropout=dropout)
    try:
        found = policy.parameters(clients=clients, members=clients + more)
    except BadUsage:
        return
    assert 2 * found.quorum > clients + found.corrupt
    assert found.quorum <= found.min_survivors <= clients
    assert found.corrupt >= corrupt * (clients + more) - 1e-3
    assert clients - found.min_survivors <= dropout * clients + 1e-3
    assert 2 <= found.min_honest <= found.min_survivors - found.corrupt
    assert found.corrupt < found.threshold or found.cycles
    assert found.cycles == 0 or clients >= SPARSE_FROM


def test_small_rosters_are_complete_and_tell_their_numbers() -> None:
    assert Policy(dropout=0.25).parameters(clients=4, members=4) == Parameters(
        clients=4, corrupt=1, cycles=0, threshold=2, quorum=3, min_survivors=3, min_honest=2
    )
    thirty_one = Policy().parameters(clients=31, members=31)
    assert (thirty_one.cycles, thirty_one.most_neighbours) == (0, 30)


def test_corrupt_members_are_counted_in_the_whole_file() -> None:
    # The server chooses the roster: all 10 corrupt ones of 100 may be among its 20.
    assert Policy().parameters(clients=20, members=100).corrupt == 10
    with pytest.raises(BadUsage, match="survivors"):
        Policy().parameters(clients=12, members=100)


@pytest.mark.parametrize(
    ("clients", "members", "policy"),
    [
        (2, 2, Policy()),
        (5, 4, Policy()),
        (9, 9, Policy(min_clients=10)),
        (11, 11, Policy(max_clients=10)),
        (3, 3, Policy(dropout=0.4)),
        (10, 10, Policy(dropout=0.5)),
        (10, 10, Policy(corrupt=0.9, dropout=0.0)),
    ],
)
def test_rosters_that_are_not_safe_are_refused(clients: int, members: int, policy: Policy) -> None:
    with pytest.raises(BadUsage):
        policy.parameters(clients=clients, members=members)


@pytest.mark.parametrize(
    "fields",
    [{"corrupt": -0.1}, {"corrupt": 1.0}, {"dropout": float("nan")}, {"min_clients": 2}, {"min_clients": 3.5}],
)
def test_policies_that_cannot_be_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(BadUsage):
        Policy(**fields)


def test_policies_differ_by_their_digest() -> None:
    policies = [Policy(), Policy(corrupt=0.2), Policy(dropout=0.2), Policy(min_clients=4), Policy(max_clients=99)]
    assert len({policy.digest() for policy in policies}) == len(policies)
    assert Policy().digest() == Policy().digest()
