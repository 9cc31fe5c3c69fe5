"""What a device insists on, and the numbers that follow from it for a roster.

Reference: Bonawitz et al. 2017, doi:10.1145/3133956.3133982 (threshold, consistency round); Bell et al. 2020.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

from fedinfer.errors import BadUsage
from fedinfer.secagg.graph import Neighbours, complete, random_cycles, sparsest
from fedinfer.secagg.transcripts import transcript

# A set-up or a round fails with a probability below 2^-40.
FAILURE_BITS = 40
# Fewer clients than these are all neighbours.
SPARSE_FROM = 32


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a device brings along and no server changes.

    corrupt: the share of the PKI file's members who may work with the server. All of them may be in one roster: the
        server chooses it. Hence their number follows from the file, not from the roster.
    dropout: the share of the roster that may be missing from a sum.
    """

    corrupt: float = 0.1
    dropout: float = 0.1
    min_clients: int = 3
    max_clients: int = 10_000

    def __post_init__(self) -> None:
        for name, value in (("corrupt", self.corrupt), ("dropout", self.dropout)):
            if not (math.isfinite(value) and 0.0 <= value < 1.0):
                raise BadUsage(f"{name}: got {value}, expected 0 or more and less than 1")
        if not (type(self.min_clients) is int and type(self.max_clients) is int):
            raise BadUsage("clients: got a number that is not whole")
        if not 3 <= self.min_clients <= self.max_clients <= 100_000:
            raise BadUsage(
                f"clients: got {self.min_clients} to {self.max_clients}, expected at least 3 and at most 100000"
            )

    def digest(self) -> bytes:
        """Members of one sum have one policy: its digest is in what they sign first."""
        fractions = [Fraction(value) for value in (self.corrupt, self.dropout)]
        return transcript("policy", *(str(f).encode() for f in fractions), self.min_clients, self.max_clients)

    def parameters(self, *, clients: int, members: int) -> "Parameters":
        """The numbers of a roster of `clients` out of a PKI file of `members`.

        Raises: BadUsage if no such sum is safe: too small or large a roster, or too many corrupt or missing.
        """
        if not self.min_clients <= clients <= min(self.max_clients, members):
            raise BadUsage(
                f"roster: got {clients} clients, expected {self.min_clients} to {min(self.max_clients, members)}"
            )
        corrupt = math.ceil(Fraction(self.corrupt).limit_denominator(10**6) * members)
        dropouts = math.floor(Fraction(self.dropout).limit_denominator(10**6) * clients)
        quorum = (clients + corrupt) // 2 + 1
        if clients - dropouts < quorum:
            raise BadUsage(
                f"roster: got {clients} clients with {corrupt} corrupt and {dropouts} dropouts, expected at least "
                f"{quorum} survivors, so that two survivor lists never both find a quorum; allow fewer dropouts"
            )
        sparse = None
        if clients >= SPARSE_FROM:
            sparse = sparsest(clients=clients, corrupt=corrupt, dropouts=dropouts, bits=FAILURE_BITS)
        found = Parameters(
            clients=clients,
            corrupt=corrupt,
            cycles=sparse.cycles if sparse else 0,
            threshold=sparse.threshold if sparse else clients - 1 - dropouts,
            quorum=quorum,
            min_survivors=clients - dropouts,
            min_honest=clients - dropouts - corrupt - (sparse.cut_off if sparse else 0),
        )
        if found.min_honest < 2 or (not sparse and found.threshold <= corrupt):
            raise BadUsage(
                f"roster: got {clients} clients with {corrupt} corrupt and {dropouts} dropouts, expected two honest "
                "survivors at least and more neighbours than corrupt ones; ask for more clients"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """The numbers of one roster.

    cycles: of the neighbour graph; 0 for the complete one.
    threshold: shares of a member's neighbours that unmask it.
    quorum: signatures under one survivor list; 2 · quorum > clients + corrupt.
    min_survivors: members in a sum, at least.
    min_honest: honest members in any sum that shows, at least: what noise for privacy may count on.
    """

    clients: int
    corrupt: int
    cycles: int
    threshold: int
    quorum: int
    min_survivors: int
    min_honest: int

    @property
    def most_neighbours(self) -> int:
        """Neighbours of a member, at most."""
        return min(2 * self.cycles, self.clients - 1) if self.cycles else self.clients - 1

    def graph(self, seed: bytes) -> Neighbours:
        """The neighbours of each place in the roster."""
        if not self.cycles:
            return complete(self.clients)
        return random_cycles(seed, count=self.clients, cycles=self.cycles)
