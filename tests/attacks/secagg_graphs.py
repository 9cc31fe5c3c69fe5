"""Who drops out is the choice of a server that knows the graph: does a small group's sum show?"""

import numpy as np

from fedinfer.secagg.graph import Neighbours, random_cycles, sparsest


def shown_groups(near: Neighbours, corrupt: set[int], dropped: set[int], threshold: int) -> list[int]:
    """The sizes of the groups of honest survivors whose sums a server learns, if it names `dropped`."""
    left, found = set(range(len(near))) - corrupt - dropped, []
    while left:
        group, todo = set(), [min(left)]
        while todo:
            place = todo.pop()
            if place not in group:
                group.add(place)
                todo += [other for other in near[place] if other in left]
        left -= group
        if all(len(set(near[place]) & (group | corrupt)) >= threshold for place in group):
            found.append(len(group))
    return found


def ring(count: int, neighbours: int, order: np.ndarray) -> Neighbours:
    """The graph of Bell et al. for a server that follows the protocol: a ring in random order."""
    near: list[set[int]] = [set() for _ in range(count)]
    for place, member in enumerate(order):
        for step in range(1, neighbours // 2 + 1):
            other = int(order[(place + step) % count])
            near[member].add(other)
            near[other].add(int(member))
    return tuple(tuple(sorted(members)) for members in near)


def cut(near: Neighbours, corrupt: set[int], group: set[int], dropouts: int) -> set[int] | None:
    """The honest neighbours of `group`, if they are few enough to be named as dropped out."""
    around = {other for place in group for other in near[place]} - group - corrupt
    return around if len(around) <= dropouts else None


def grown(near: Neighbours, corrupt: set[int], size: int) -> set[int]:
    """A group around the first honest member, at each step with the member that adds fewest neighbours."""
    group = {min(set(range(len(near))) - corrupt)}
    while len(group) < size:
        edge = {other for place in group for other in near[place]} - group - corrupt
        around = edge | group | corrupt
        group.add(min(edge, key=lambda place: len(set(near[place]) - around)))
    return group


def chosen_dropouts(near: Neighbours, threshold: int) -> bool:
    """Whether naming a tenth as dropped out shows the sum of a group of at most a tenth of 1,000 members."""
    corrupt = set(range(900, 1000))
    for size in (1, 2, 4, 8, 16, 24, 32, 41, 48, 64, 80, 100):
        dropped = cut(near, corrupt, grown(near, corrupt, size), 100)
        if dropped is not None and min(shown_groups(near, corrupt, dropped, threshold)) <= 100:
            return True
    return False


def chosen_dropouts_ours() -> bool:
    found = sparsest(clients=1000, corrupt=100, dropouts=100, bits=40)
    assert found is not None
    return chosen_dropouts(random_cycles(b"g" * 32, count=1000, cycles=found.cycles), found.threshold)


def chosen_dropouts_ring() -> bool:
    return chosen_dropouts(ring(1000, 64, np.random.default_rng(5).permutation(1000)), 32)


def unsafe_graphs(cycles: int, threshold: int, cut_off: int, graphs: int) -> int:
    """Of random graphs of 16, one corrupt: for how many the best choice of at most one dropout shows a group's sum."""
    found = 0
    for seed in range(graphs):
        near = random_cycles(seed.to_bytes(32, "big"), count=16, cycles=cycles)
        choices = [set(), *({place} for place in range(1, 16))]
        found += any(
            size < 15 - len(dropped) - cut_off
            for dropped in choices
            for size in shown_groups(near, {0}, dropped, threshold)
        )
    return found
