"""Who shares masks with whom: a random graph that nobody chose, and how many neighbours it takes.

The graph is the union of `cycles` independent, uniformly random Hamiltonian cycles: each member has at most
2 · cycles neighbours. (In Bell et al. it is a ring of random order, against a server that follows the protocol. Ours
also says afterwards who dropped out, knowing the graph; a ring is cut by the 2k members around an arc.)

Reference: Bell et al. 2020, doi:10.1145/3372297.3417885 (ePrint 2020/704), section 3.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import comb, exp, lgamma

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedinfer.errors import BadUsage

Neighbours = tuple[tuple[int, ...], ...]


def complete(count: int) -> Neighbours:
    """Everybody is everybody's neighbour."""
    return tuple(tuple(j for j in range(count) if j != i) for i in range(count))


def random_cycles(seed: bytes, *, count: int, cycles: int) -> Neighbours:
    """The neighbours, in order, of each place 0..count - 1.

    Guarantees: the same at everybody who has the seed (32 bytes); each cycle is uniform among all, as the stream of
    AES-256-CTR under `seed` is.
    Raises: BadUsage for fewer than 3 places or no cycle.
    """
    if count < 3 or cycles < 1:
        raise BadUsage(f"graph: got {count} places and {cycles} cycles, expected at least 3 and 1")
    cipher = Cipher(algorithms.AES256(seed), modes.CTR(bytes(16))).encryptor()
    found: list[set[int]] = [set() for _ in range(count)]
    for _ in range(cycles):
        order = np.zeros(0, np.intp)
        while not len(order):
            # The order of distinct random numbers is uniform; equal ones, which 64 bits hardly give, are drawn again.
            drawn = np.frombuffer(cipher.update(bytes(8 * count)), "<u8")
            if len(np.unique(drawn)) == count:
                order = np.argsort(drawn)
        following = np.roll(order, -1)
        for here, there in zip(order.tolist(), following.tolist(), strict=True):
            found[here].add(there)
            found[there].add(here)
    return tuple(tuple(sorted(places)) for places in found)


@dataclass(frozen=True, kw_only=True)
class Sparseness:
    """How sparse the graph may be: its cycles, Shamir's threshold, and how many members may be cut off at most."""

    cycles: int
    threshold: int
    cut_off: int


@lru_cache(maxsize=64)
def sparsest(*, clients: int, corrupt: int, dropouts: int, bits: int) -> Sparseness | None:
    """The fewest cycles for which a set-up is unsafe, or a round fails by chance, below 2^-bits.

    By chance: with `dropouts` random ones, a member keeps fewer living neighbours than the threshold t.

    Unsafe: the sum of a group of honest survivors shows. An enemy who knows the graph chooses who drops out, so that
    the group's neighbours may all be corrupt or dropped out. A member is unmasked only by t of its neighbours, so in a
    group of s somebody has at least t - s + 1 corrupt ones. For any s₀,

        P[unsafe] ≤ P[somebody has ≥ min(t, t - s₀ + 2) corrupt neighbours] + Σ_{s ≥ s₀} P[a group of s is apart],

    where the second is a union over the groups of at most half and over who drops out (fewer dropouts are a part of
    more, since those may be taken from both sides). The first tail is exact, in integers. Groups smaller than s₀ are
    not unmasked, but may be cut off from the others' sum: at most s₀ - 1 members.

    None if no graph does, in which some are not neighbours.
    """
    alive, corrupted, ways = {0: 1}, [1], 1
    honest, all_pairs = clients - 1 - corrupt, comb(clients - 1, 2)
    for cycles in range(1, (clients - 2) // 2 + 1):
        alive = _one_more_cycle(alive, living=clients - 1 - dropouts, others=clients - 1)
        corrupted = _product(corrupted, [comb(honest, 2), honest * corrupt, comb(corrupt, 2)])
        ways *= all_pairs
        threshold = _threshold(alive, ways // (clients << (bits + 1)))
        if threshold:
            tail = [clients * count / ways for count in _tails(corrupted)]
            apart = _apart(clients, corrupt, dropouts, cycles)
            cut_off = _cut_off(tail, apart, threshold, 2.0 ** -(bits + 1))
            if cut_off is not None:
                return Sparseness(cycles=cycles, threshold=threshold, cut_off=cut_off)
    return None


def _one_more_cycle(alive: dict[int, int], *, living: int, others: int) -> dict[int, int]:
    """Ways to have u different living neighbours, when a cycle adds two distinct random ones of the others."""
    found: dict[int, int] = {}
    for known, ways in alive.items():
        fresh = living - known
        stale = others - fresh
        for new, more in ((0, comb(stale, 2)), (1, fresh * stale), (2, comb(fresh, 2))):
            if more:
                found[known + new] = found.get(known + new, 0) + ways * more
    return found


def _product(left: list[int], right: list[int]) -> list[int]:
    found = [0] * (len(left) + len(right) - 1)
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            found[i + j] += a * b
    return found


def _tails(ways: list[int]) -> list[int]:
    """Entry x: the ways to have x or more."""
    found = [0]
    for value in reversed(ways):
        found.append(found[-1] + value)
    return found[:0:-1]


def _threshold(alive: dict[int, int], allowed: int) -> int:
    """The largest t for which fewer than t living neighbours happen in at most `allowed` ways."""
    below = 0
    for count in range(max(alive) + 1):
        below += alive.get(count, 0)
        if below > allowed:
            return count
    return 0


def _apart(clients: int, corrupt: int, dropouts: int, cycles: int) -> list[float]:
    """Entry s - 1: a bound on P[some group of s honest members has only bad neighbours, for some choice of dropouts].

    In each cycle the followers of the group must lie in it or be bad; they are drawn one by one.
    """
    honest, bad = clients - corrupt, corrupt + dropouts
    return [
        exp(
            min(
                0.0,
                _log_choices(honest, size)
                + _log_choices(honest - size, dropouts)
                + cycles * (_log_choices(size + bad - 1, size) - _log_choices(clients - 1, size)),
            )
        )
        for size in range(1, (clients - bad) // 2 + 1)
    ]


def _cut_off(tail: list[float], apart: list[float], threshold: int, allowed: float) -> int | None:
    """The least s₀ - 1 for which the bound is at most `allowed`."""
    beyond, found = 0.0, None
    for size in range(len(apart), 0, -1):
        beyond += apart[size - 1]
        many = max(0, min(threshold, threshold - size + 2))
        if beyond + (tail[many] if many < len(tail) else 0.0) <= allowed:
            found = size - 1
    return found


def _log_choices(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1) if 0 <= k <= n else float("-inf")
