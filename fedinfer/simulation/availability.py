"""When the devices of a federation are there, looked up by client and time: nothing is kept for a client.

Times are seconds on the virtual clock of `fedinfer/simulation/clock.py`, which begins at 0.
"""

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from fedinfer.errors import BadInput, BadUsage
from fedinfer.privacy.checks import check_positive
from fedinfer.simulation.draws import uniform

Clients = NDArray[np.int64]
Floats = NDArray[np.float64]
# The number of events in a slot that holds one on average: beyond the last entry once in 10**17.
POISSON = np.cumsum([math.exp(-1.0) / math.factorial(events) for events in range(18)])

# Clients that are looked up together: their numbers stay near the processor.
AT_ONCE = 1 << 14


class Availability(Protocol):
    """When clients are there."""

    def stays_s(self, clients: Clients, at_s: Floats, *, seed: int) -> Floats:
        """For how many more seconds each client is there; 0 for one that is not. `at_s` broadcasts to `clients`."""


@dataclass(frozen=True, kw_only=True)
class Always:
    """Everybody is there all the time."""

    def stays_s(self, clients: Clients, at_s: Floats, *, seed: int) -> Floats:
        return np.full(len(clients), math.inf)


@dataclass(frozen=True, kw_only=True)
class Periodic:
    """Each client is there once a period, for the same `share` of it: a telephone that charges at night.

    Clients begin at random within the first `spread` of the period: 1.0 means at any hour, so that about as many are
    there at any time; 0.0 means that all come and go together.
    """

    period_s: float = 86400.0
    share: float = 0.3
    spread: float = 0.5

    def __post_init__(self) -> None:
        check_positive("period", self.period_s)
        if not (0.0 < self.share <= 1.0 and 0.0 <= self.spread <= 1.0):
            raise BadUsage(f"periodic: got a share of {self.share} and a spread of {self.spread}, expected 0 to 1")

    def stays_s(self, clients: Clients, at_s: Floats, *, seed: int) -> Floats:
        begins = self.spread * uniform(seed, "period", clients)
        since = np.mod(np.asarray(at_s) / self.period_s - begins, 1.0) * self.period_s
        return np.maximum(self.share * self.period_s - since, 0.0)


@dataclass(frozen=True, kw_only=True)
class OnOff:
    """Each client comes and goes as a Markov chain in continuous time, from its stationary state on.

    Such a chain forgets: at the events of a Poisson process of rate 1 / mean_on_s + 1 / mean_off_s it is on or off
    anew, with the probability that it is on at all. Events can be looked up by slot of time, whatever came before.
    """

    mean_on_s: float
    mean_off_s: float

    def __post_init__(self) -> None:
        check_positive("mean time on", self.mean_on_s)
        check_positive("mean time off", self.mean_off_s)

    def stays_s(self, clients: Clients, at_s: Floats, *, seed: int) -> Floats:
        at = np.broadcast_to(np.asarray(at_s, np.float64) / self._slot_s, clients.shape)
        pieces = [slice(start, start + AT_ONCE) for start in range(0, len(clients), AT_ONCE)]
        stays = [self._stays(clients[piece], at[piece], seed) for piece in pieces]
        return self._slot_s * np.concatenate([np.zeros(0), *stays])

    @property
    def _slot_s(self) -> float:
        """The mean time between events."""
        return 1.0 / (1.0 / self.mean_on_s + 1.0 / self.mean_off_s)

    def _stays(self, clients: Clients, at: Floats, seed: int) -> Floats:
        """`stays_s` in slots: from the last event before `at` to the first one after it that turns the client off."""
        share = self.mean_on_s / (self.mean_on_s + self.mean_off_s)
        last, on = np.full(len(clients), -math.inf), np.zeros(len(clients), np.bool_)
        for rows, times, marks in _events(clients, at, -1, last, seed):
            before = times <= at[rows]
            np.maximum.at(last, rows[before], times[before])
            newest = times == last[rows]
            on[rows[newest]] = marks[newest] < share
        there = np.flatnonzero(on)
        left = np.full(len(there), math.inf)
        for rows, times, marks in _events(clients[there], at[there], 1, left, seed):
            off = (times > at[there[rows]]) & (marks >= share)
            np.minimum.at(left, rows[off], times[off])
        stays = np.zeros(len(clients))
        stays[there] = left - at[there]
        return stays


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordedTrace:
    """A trace of a real federation: client `client[i]` was there from `start_s[i]` to `end_s[i]`.

    A client without an interval is never there.
    """

    client: Clients = field(repr=False)
    start_s: Floats = field(repr=False)
    end_s: Floats = field(repr=False)
    _starts: Floats = field(init=False, repr=False)
    _keys: Clients = field(init=False, repr=False)

    def __post_init__(self) -> None:
        order = np.lexsort((self.start_s, self.client))
        for name in ("client", "start_s", "end_s"):
            object.__setattr__(self, name, getattr(self, name)[order])
        if not (np.isfinite(self.start_s).all() and (self.end_s > self.start_s).all() and (self.client >= 0).all()):
            raise BadInput("trace: got an interval that does not end after its start, expected clients from 0 on")
        same = self.client[1:] == self.client[:-1]
        if (same & (self.start_s[1:] <= self.end_s[:-1])).any():
            raise BadInput("trace: got a client with intervals that overlap or touch; join them")
        object.__setattr__(self, "_starts", np.unique(self.start_s))
        object.__setattr__(self, "_keys", self._key(self.client, self.start_s))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a CSV file with the columns client, start_s and end_s.

        Raises: BadInput for another header, a line that is not three numbers, or intervals that overlap or touch.
        """
        with path.open(encoding="utf-8", newline="") as file:
            lines = csv.reader(file)
            if next(lines, None) != ["client", "start_s", "end_s"]:
                raise BadInput(f"{path}: got another first line, expected client,start_s,end_s")
            try:
                rows = [(int(client), float(start), float(end)) for client, start, end in lines]
            except ValueError:
                raise BadInput(f"{path}: got line {lines.line_num} without a client and two times") from None
        client, start, end = zip(*rows, strict=True) if rows else ((), (), ())
        return cls(
            client=np.array(client, np.int64), start_s=np.array(start, np.float64), end_s=np.array(end, np.float64)
        )

    def stays_s(self, clients: Clients, at_s: Floats, *, seed: int) -> Floats:
        if not len(self.client):
            return np.zeros(len(clients))
        found = np.searchsorted(self._keys, self._key(clients, at_s), side="right") - 1
        own = (found >= 0) & (self.client[found] == clients)
        return np.where(own, np.maximum(self.end_s[found] - at_s, 0.0), 0.0)

    def _key(self, clients: Clients, at_s: Floats) -> Clients:
        """One number that orders by client first, and second by how many starts are not later."""
        return clients * (len(self._starts) + 1) + np.searchsorted(self._starts, at_s, side="right")


def _events(
    clients: Clients, at: Floats, step: int, found: Floats, seed: int
) -> Iterator[tuple[NDArray[np.intp], Floats, Floats]]:
    """Events: whose they are, their times and their marks; slot after slot from that of `at` on.

    A slot has length 1 and holds a Poisson number of events of mean 1. A client has no more of them once its entry of
    `found` is finite.
    """
    slots = np.floor(at).astype(np.int64)
    open_rows = np.arange(len(clients))
    while len(open_rows := open_rows[~np.isfinite(found[open_rows])]):
        counts = np.searchsorted(POISSON, uniform(seed, "events", clients[open_rows], slots[open_rows]))
        rows = np.repeat(open_rows, counts)
        numbers = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        draws = uniform(seed, "event", clients[rows], slots[rows], numbers, [[0], [1]])
        yield rows, slots[rows] + draws[0], draws[1]
        slots += step
