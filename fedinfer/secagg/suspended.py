"""A member between two messages, as bytes: for a device that starts a process for each.

The bytes are the member's secrets. They stay on the device, in memory or in a file of its owner's, and are used once:
whoever resumes from them a second time would answer a second time (`fedinfer/sums/sessions.py` sees to it).
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

from fedinfer.secagg.codec import Boxes, Members, from_bytes
from fedinfer.secagg.identities import PkiFile
from fedinfer.secagg.parameters import Policy
from fedinfer.secagg.round_messages import max_bytes
from fedinfer.secagg.session import Session, agree
from fedinfer.secagg.setup_messages import Openings, Roster
from fedinfer.wire import Kind

MOST_CLIENTS = 100_000


@dataclass(frozen=True, kw_only=True)
class HeldNewcomer:
    """Before the session: the secret of the channel key, and the nonce."""

    channel: bytes = field(repr=False)
    nonce: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class HeldOwn:
    """A round's own secrets, between the offer and the masked vector."""

    round: int
    secret: bytes = field(repr=False)
    seed: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class HeldRound:
    """A round after the masked vector; no survivors before the endorsement."""

    number: int
    context: bytes
    active: Members
    seeds: Boxes = field(repr=False)
    keys: Boxes = field(repr=False)
    survivors: Members


@dataclass(frozen=True, kw_only=True)
class HeldParticipant:
    """In the session: the chains to and from the neighbours, and what is open."""

    to_round: int
    to: Boxes = field(repr=False)
    back_round: int
    back: Boxes = field(repr=False)
    own: tuple[HeldOwn, ...] = field(repr=False)
    rounds: tuple[HeldRound, ...] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Held:
    """One member of one session: a newcomer or a participant, with the public messages that made its session."""

    KIND: ClassVar = Kind.SUM_HELD
    roster: bytes
    openings: bytes
    newcomers: tuple[HeldNewcomer, ...] = ()
    participants: tuple[HeldParticipant, ...] = ()


@lru_cache(maxsize=8)
def roster_of(data: bytes) -> Roster:
    """The roster of a frame; members of one process read the same one."""
    return from_bytes(Roster, data, max_bytes=max_bytes(Roster, clients=MOST_CLIENTS, neighbours=0, vector_bytes=0))


@lru_cache(maxsize=8)
def openings_of(data: bytes) -> Openings:
    """The openings of a frame."""
    return from_bytes(Openings, data, max_bytes=max_bytes(Openings, clients=MOST_CLIENTS, neighbours=0, vector_bytes=0))


@lru_cache(maxsize=8)
def session_of(roster: bytes, openings: bytes, *, pki: PkiFile, policy: Policy, run: bytes) -> Session:
    """The session that these frames make (`agree`).

    Raises: WireError or ProtocolViolation if they make none.
    """
    return agree(roster_of(roster), openings_of(openings), pki=pki, policy=policy, run=run)
