"""The server's seat at a secure sum: it has every message, and the secrets of its corrupt members."""

from collections.abc import Callable, Collection, Mapping
from itertools import count

import numpy as np

from fedinfer.errors import ProtocolViolation
from fedinfer.secagg.identities import Identity, PkiFile
from fedinfer.secagg.masks import SumSpec, Words
from fedinfer.secagg.newcomer import Newcomer
from fedinfer.secagg.parameters import Policy
from fedinfer.secagg.rehearsal import make_pki, set_up
from fedinfer.secagg.round_messages import (
    Delivery,
    Inbox,
    Masked,
    Offer,
    Quorum,
    Receipt,
    Reveal,
    Survivors,
    vector_digest,
)

MODEL, OTHER_MODEL = bytes(32), b"\x01" * 32
SPEC = SumSpec(length=4, bits=32, bound=2**20)
VICTIM = 0


class Cheat:
    """Eight members, of whom the last is corrupt; two may drop out; five signatures are a quorum, five shares a key."""

    def __init__(self, clients: int = 8, corrupt: float = 0.1, dropout: float = 0.25) -> None:
        self.pki, self.identities = make_pki(clients)
        here = set_up(
            pki=self.pki, identities=self.identities, policy=Policy(corrupt=corrupt, dropout=dropout), run=b"attack"
        )
        self.members, self.coordinator, self.session = here.participants, here.coordinator, here.coordinator.session
        self.parameters, self.rounds = self.session.parameters, count(1)
        self.corrupt = tuple(range(clients - self.parameters.corrupt, clients))
        self.honest = tuple(range(clients - self.parameters.corrupt))

    def offers(self, round: int) -> dict[int, Offer]:
        return {n: one.offer(round) for n, one in self.members.items()}

    def inbox(self, member: int, offers: Mapping[int, Offer], active: Collection[int], round: int) -> Inbox:
        return Inbox(
            session=self.session.id,
            round=round,
            active=tuple(sorted(active)),
            deliveries=tuple(
                Delivery(
                    sender=n,
                    mask_key=offers[n].mask_key,
                    seed_digest=offers[n].seed_digest,
                    box=offers[n].boxes[member],
                )
                for n in self.session.neighbours[member]
                if n in active
            ),
        )

    def masked(self, round: int, victims_model: bytes = MODEL) -> tuple[dict[int, Offer], dict[int, Masked]]:
        """Everybody's masked vector; the victim's is secret, the others are zeros."""
        offers, found = self.offers(round), {}
        for n, one in self.members.items():
            inbox, model = self.inbox(n, offers, self.members, round), victims_model if n == VICTIM else MODEL
            found[n] = one.masked(inbox, self.vector(n), spec=SPEC, model=model)
        return offers, found

    @staticmethod
    def vector(member: int) -> Words:
        return np.array([3, 1, 4, 159], np.uint32) if member == VICTIM else np.zeros(4, np.uint32)

    def shown(self, member: int, masked: Mapping[int, Masked], survivors: Collection[int], round: int) -> Survivors:
        return Survivors(
            session=self.session.id,
            round=round,
            survivors=tuple(sorted(survivors)),
            receipts=tuple(
                Receipt(member=n, vector=vector_digest(masked[n].vector), signature=masked[n].signature)
                for n in self.session.neighbours[member]
                if n in survivors
            ),
        )

    def quorum(self, round: int, signatures: Mapping[int, bytes]) -> Quorum:
        return Quorum(session=self.session.id, round=round, signatures=dict(sorted(signatures.items())))

    def endorsed(self, round: int, masked: Mapping[int, Masked], survivors: Collection[int]) -> dict[int, bytes]:
        return {n: self.members[n].endorse(self.shown(n, masked, survivors, round)).signature for n in survivors}

    def victims_shares(self, kind: str, reveals: Mapping[int, Reveal]) -> dict[int, bytes]:
        """What the corrupt members hold of the victim's seed or key, and what was revealed of it."""
        near = self.session.neighbours[VICTIM]
        found = {}
        for n in self.corrupt:
            held = self.members[n]._round
            if held is not None:
                found[near.index(n) + 1] = (held.seeds if kind == "seed" else held.keys)[VICTIM]
        for n, reveal in reveals.items():
            shares = reveal.seeds if kind == "seed" else reveal.keys
            if VICTIM in shares:
                found[near.index(n) + 1] = shares[VICTIM]
        return found


def accepted(step: Callable[[], object]) -> bool:
    """Whether a member did what it was asked."""
    try:
        step()
    except ProtocolViolation:
        return False
    return True


def newcomers_of(pki: PkiFile, identities: list[Identity], policy: Policy) -> dict[int, Newcomer]:
    return {n: Newcomer(identity=one, pki=pki, policy=policy, run=b"r") for n, one in enumerate(identities)}


def newcomers(clients: int = 4, policy: Policy | None = None) -> dict[int, Newcomer]:
    return newcomers_of(*make_pki(clients), policy or Policy(dropout=0.25))
