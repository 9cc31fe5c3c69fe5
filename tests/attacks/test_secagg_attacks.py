"""Attacks on the secure sum: each succeeds against Flower's SecAgg+ or a naive version, and fails on ours.

    python -m tests.attacks.test_secagg_attacks [FILE]      prints the table, or writes it as JSON

`Cheat` is the server's seat: it has every message, and the secrets of its corrupt members.
"""

import json
import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from fedinfer.errors import BadUsage, ProtocolViolation, RoundFailed
from fedinfer.secagg.channels import KeyPair, mask_seed, own_seed, seal, unseal
from fedinfer.secagg.graph import Neighbours, random_cycles, sparsest
from fedinfer.secagg.identities import Identity, PkiFile
from fedinfer.secagg.masks import SumSpec, Words, add_mask
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
    masked_said,
    offer_header,
    survivors_said,
    vector_digest,
)
from fedinfer.secagg.setup_messages import Commit, Openings, Roster, commit_said, opening_said
from fedinfer.secagg.shamir import SHARE_BYTES, combine
from tests.attacks import secagg_peers as peers

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


def alive_and_dead() -> bool:
    """Half of the members see the victim among the survivors, half do not; corrupt members sign both."""
    cheat, round = Cheat(), 1
    _, masked = cheat.masked(round)
    lists = {n: set(cheat.members) - ({VICTIM} if n in (4, 5, 6) else set()) for n in cheat.honest}
    signatures: dict[bool, dict[int, bytes]] = {True: {}, False: {}}
    for n, survivors in lists.items():
        signed = cheat.members[n].endorse(cheat.shown(n, masked, survivors, round)).signature
        signatures[VICTIM in survivors][n] = signed
    for alive, found in signatures.items():
        survivors = tuple(n for n in sorted(cheat.members) if alive or n != VICTIM)
        for n in cheat.corrupt:
            said = survivors_said(context=masked[VICTIM].context, survivors=survivors)
            found[n] = cheat.identities[n].sign(said)
    reveals = {}
    for n in cheat.honest:
        quorum = cheat.quorum(round, signatures[VICTIM in lists[n]])
        if accepted(lambda n=n, quorum=quorum: reveals.update({n: cheat.members[n].reveal(quorum)})):
            assert VICTIM in lists[n]
    both = [cheat.victims_shares(kind, reveals) for kind in ("seed", "key")]
    won = all(len(shares) >= cheat.parameters.threshold for shares in both)
    # Named twice, not named itself, and a stranger to the round named a survivor.
    twice = accepted(lambda: cheat.shown(1, masked, [0, 0, 1, 2, 3, 4, 5, 6], round))
    return won | twice | strangers_among_the_survivors()


def strangers_among_the_survivors() -> bool:
    """A list without the member that is asked to sign it; one with a member who was not in the round."""
    cheat = Cheat()
    offers, active = cheat.offers(1), range(7)
    masked = {
        n: cheat.members[n].masked(cheat.inbox(n, offers, active, 1), cheat.vector(n), spec=SPEC, model=MODEL)
        for n in active
    }
    said = masked_said(context=masked[0].context, member=7, vector=vector_digest(masked[0].vector))
    masked[7] = replace(masked[0], member=7, signature=cheat.identities[7].sign(said))
    won = accepted(lambda: cheat.members[1].endorse(cheat.shown(1, masked, [0, 2, 3, 4, 5, 6], 1)))
    return won | accepted(lambda: cheat.members[1].endorse(cheat.shown(1, masked, list(cheat.members), 1)))


def replayed_round() -> bool:
    """An inbox, boxes, a survivor list and signatures of one round are shown again, or in the next."""
    cheat = Cheat()
    offers, masked = cheat.masked(1)
    old = cheat.inbox(VICTIM, offers, cheat.members, 1)
    victim, vector = cheat.members[VICTIM], np.ones(4, np.uint32)
    signatures = cheat.endorsed(1, masked, list(cheat.members))
    victim.reveal(cheat.quorum(1, signatures))
    won = accepted(lambda: victim.masked(old, vector, spec=SPEC, model=MODEL))
    won |= accepted(lambda: victim.reveal(cheat.quorum(1, signatures)))
    fresh = cheat.offers(2)
    for deliveries in (old.deliveries, cheat.inbox(VICTIM, {**fresh, 3: offers[3]}, cheat.members, 2).deliveries):
        inbox = replace(old, round=2, deliveries=deliveries)
        won |= accepted(lambda inbox=inbox: victim.masked(inbox, vector, spec=SPEC, model=MODEL))
    victim.masked(cheat.inbox(VICTIM, fresh, cheat.members, 2), vector, spec=SPEC, model=MODEL)
    again = replace(cheat.shown(VICTIM, masked, list(cheat.members), 1), round=2)
    return won | accepted(lambda: victim.endorse(again)) | accepted(lambda: victim.reveal(cheat.quorum(2, signatures)))


def forged_commits(pki_clients: int = 4) -> list[tuple[str, Callable[[dict[int, Commit]], Mapping[int, Commit]]]]:
    """What a server may do to commits: by name, from the honest ones by member."""
    stranger, made = Identity.of(b"e" * 32), KeyPair.of(b"k" * 32)

    def signed_by_the_server(commits: dict[int, Commit]) -> dict[int, Commit]:
        one = replace(commits[1], channel_key=made.public)
        said = commit_said(
            pki=bytes(32),
            run=one.run,
            member=1,
            policy=one.policy,
            channel_key=one.channel_key,
            commitment=one.commitment,
        )
        return {**commits, 1: replace(one, signature=stranger.sign(said))}

    return [
        ("a key replaced", lambda c: {**c, 1: replace(c[1], channel_key=made.public)}),
        ("a key of the server's, signed by it", signed_by_the_server),
        ("two members swapped", lambda c: {**c, 1: replace(c[2], member=1), 2: replace(c[1], member=2)}),
        (
            "two members' keys swapped",
            lambda c: {
                **c,
                1: replace(c[1], channel_key=c[2].channel_key),
                2: replace(c[2], channel_key=c[1].channel_key),
            },
        ),
        ("a member who is not in the file", lambda c: {**c, pki_clients: replace(c[1], member=pki_clients)}),
        ("the victim left out", lambda c: {n: one for n, one in c.items() if n != VICTIM}),
        ("the victim's own key replaced", lambda c: {**c, VICTIM: replace(c[VICTIM], channel_key=made.public)}),
        ("another commitment", lambda c: {**c, 1: replace(c[1], commitment=bytes(32))}),
        ("another run", lambda c: {**c, 1: replace(c[1], run=b"other")}),
        ("too few", lambda c: {n: c[n] for n in (0, 1)}),
    ]


def newcomers_of(pki: PkiFile, identities: list[Identity], policy: Policy) -> dict[int, Newcomer]:
    return {n: Newcomer(identity=one, pki=pki, policy=policy, run=b"r") for n, one in enumerate(identities)}


def newcomers(clients: int = 4, policy: Policy | None = None) -> dict[int, Newcomer]:
    return newcomers_of(*make_pki(clients), policy or Policy(dropout=0.25))


def opened_elsewhere() -> bool:
    """Two rosters: member 1 opens for the one without the victim, and the server shows that to the victim."""
    here = newcomers(clients=5, policy=Policy(dropout=0.2))
    commits = {n: one.commit() for n, one in here.items()}
    ours = Roster.of({n: commits[n] for n in (0, 1, 2, 3)})
    others = Roster.of({n: commits[n] for n in (1, 2, 3, 4)})
    openings = {n: here[n].open(ours if n == VICTIM else others) for n in (0, 1, 2, 3)}
    moved = {n: replace(opening, roster=ours.digest) for n, opening in openings.items()}
    return accepted(lambda: here[VICTIM].enter(Openings.of(moved)))


def forged_keys() -> bool:
    """Commits are changed on the way, openings forged or withheld, mask keys replaced in a round."""
    won = False
    for _, forge in forged_commits():
        here = newcomers()
        commits = {n: one.commit() for n, one in here.items()}
        won |= accepted(lambda here=here, forge=forge, commits=commits: here[VICTIM].open(Roster.of(forge(commits))))
    pki, identities = make_pki(4)
    here = newcomers_of(pki, identities, Policy(dropout=0.25))
    roster = Roster.of({n: one.commit() for n, one in here.items()})
    openings = {n: one.open(roster) for n, one in here.items()}
    for changed in (
        {**openings, 1: replace(openings[1], nonce=bytes(32))},
        {**openings, 1: replace(openings[2], member=1)},
        {**openings, 1: replace(openings[1], roster=bytes(32))},
        {n: opening for n, opening in openings.items() if n != 3},
    ):
        won |= accepted(lambda changed=changed: here[VICTIM].enter(Openings.of(changed)))
    # A corrupt member that would choose its nonce after it saw the others', and signs what it says.
    late = opening_said(roster=roster.digest, member=3, nonce=bytes(32))
    chosen = replace(openings[3], nonce=bytes(32), signature=identities[3].sign(late))
    won |= accepted(lambda: here[VICTIM].enter(Openings.of({**openings, 3: chosen})))
    # An opening for one roster, in another.
    won |= opened_elsewhere()
    here[VICTIM].enter(Openings.of(openings))
    won |= accepted(lambda: here[VICTIM].enter(Openings.of(openings)))
    cheat, made = Cheat(), KeyPair.of(b"k" * 32)
    offers = cheat.offers(1)
    inbox = cheat.inbox(VICTIM, offers, cheat.members, 1)
    first, second, *rest = inbox.deliveries
    for deliveries in (
        (replace(first, mask_key=made.public), second, *rest),
        (replace(first, seed_digest=bytes(32)), second, *rest),
        (replace(first, box=second.box), replace(second, box=first.box), *rest),
        (replace(first, mask_key=second.mask_key), replace(second, mask_key=first.mask_key), *rest),
    ):
        bad = replace(inbox, deliveries=tuple(deliveries))
        won |= accepted(lambda bad=bad: cheat.members[VICTIM].masked(bad, cheat.vector(0), spec=SPEC, model=MODEL))
    return won


def tampered_share() -> bool:
    """A sealed share is changed on the way; a revealed one by the way, or by its member: is a wrong sum taken?"""
    cheat, won = Cheat(clients=4), False
    coordinator = cheat.coordinator
    for offer in cheat.offers(1).values():
        coordinator.add_offer(offer)
    inboxes = coordinator.begin(1, spec=SPEC, model=MODEL)
    first, *rest = inboxes[VICTIM].deliveries
    box = bytes([first.box[0] ^ 1]) + first.box[1:]
    changed = replace(inboxes[VICTIM], deliveries=(replace(first, box=box), *rest))
    won |= accepted(lambda: cheat.members[VICTIM].masked(changed, cheat.vector(0), spec=SPEC, model=MODEL))
    won |= no_share_in_a_box()
    for n, one in cheat.members.items():
        coordinator.add_masked(one.masked(inboxes[n], cheat.vector(n), spec=SPEC, model=MODEL))
    for n, shown in coordinator.survivors().items():
        coordinator.add_endorsement(cheat.members[n].endorse(shown))
    quorum = coordinator.quorum()
    for n, one in cheat.members.items():
        reveal = one.reveal(quorum)
        share = bytes([0, reveal.seeds[VICTIM][1] ^ 1, *reveal.seeds[VICTIM][2:]]) if n == 3 else b""
        if n == 3:
            lie = replace(reveal, seeds={**reveal.seeds, VICTIM: share})
            won |= accepted(lambda lie=lie: coordinator.add_reveal(lie))
            coordinator._round.reveals[3] = lie
        elif n != 2:
            # The third share is missing, so that the lie is needed.
            coordinator.add_reveal(reveal)
    try:
        coordinator.total()
    except RoundFailed:
        return won
    return True


def no_share_in_a_box() -> bool:
    """A corrupt member seals what is no element of the field."""
    cheat, won = Cheat(), False
    chains = cheat.members[7]._to
    offers = cheat.offers(1)
    offer = offers[7]
    header = offer_header(
        session=cheat.session.id, round=1, sender=7, mask_key=offer.mask_key, seed_digest=offer.seed_digest
    )
    share, none = bytes(SHARE_BYTES), b"\xff" * SHARE_BYTES
    for text in (share + none, none + share):
        box = seal(chains.box_key(VICTIM), round=1, header=header, text=text)
        inbox = cheat.inbox(VICTIM, {**offers, 7: replace(offer, boxes={VICTIM: box})}, cheat.members, 1)
        won |= accepted(lambda i=inbox: cheat.members[VICTIM].masked(i, cheat.vector(0), spec=SPEC, model=MODEL))
    return won


def lowered_threshold() -> bool:
    """The server asks for less than the policy: other policies, fewer members, survivors, neighbours, signatures."""
    here, lax = newcomers(policy=Policy(dropout=0.25)), Policy(corrupt=0.0, dropout=0.5)
    commits = {n: one.commit() for n, one in here.items()}
    commits[1] = replace(commits[1], policy=lax.digest())
    won = accepted(lambda: here[VICTIM].open(Roster.of(commits)))
    # A corrupt member that really brought the other policy.
    pki, identities = make_pki(4)
    mixed = newcomers_of(pki, identities, Policy(dropout=0.25)) | {3: newcomers_of(pki, identities, lax)[3]}
    won |= accepted(lambda: mixed[VICTIM].open(Roster.of({n: one.commit() for n, one in mixed.items()})))
    cheat = Cheat()
    offers = cheat.offers(1)
    for few in ([0, 1, 2, 3, 4], [0, 7], [1, 2, 3, 4, 5, 6, 7]):
        inbox = cheat.inbox(VICTIM, offers, few, 1)
        won |= accepted(
            lambda inbox=inbox: cheat.members[VICTIM].masked(inbox, cheat.vector(0), spec=SPEC, model=MODEL)
        )
    full = cheat.inbox(VICTIM, offers, cheat.members, 1)
    missing = replace(full, deliveries=full.deliveries[2:])
    won |= accepted(lambda: cheat.members[VICTIM].masked(missing, cheat.vector(0), spec=SPEC, model=MODEL))
    masked = {
        n: one.masked(cheat.inbox(n, offers, cheat.members, 1), cheat.vector(n), spec=SPEC, model=MODEL)
        for n, one in cheat.members.items()
    }
    won |= accepted(lambda: cheat.members[VICTIM].endorse(cheat.shown(VICTIM, masked, [0, 1, 2, 3, 7], 1)))
    signatures = cheat.endorsed(1, masked, list(cheat.members))
    for names in ([0, 1, 2, 7], []):
        quorum = cheat.quorum(1, {n: signatures[n] for n in names})
        won |= accepted(lambda quorum=quorum: cheat.members[VICTIM].reveal(quorum))
    padded = cheat.quorum(1, dict.fromkeys(range(5), signatures[0]))
    won |= accepted(lambda: cheat.members[VICTIM].reveal(padded))
    said = survivors_said(context=masked[VICTIM].context, survivors=tuple(cheat.members))
    stranger = cheat.quorum(1, {**{n: signatures[n] for n in (0, 1, 2, 3)}, 8: cheat.identities[7].sign(said)})
    won |= accepted(lambda: cheat.members[VICTIM].reveal(stranger))
    return won | few_others_in_a_sparse_graph()


def few_others_in_a_sparse_graph() -> bool:
    """All of the victim's neighbours are there, but too few others."""
    cheat = Cheat(clients=100, corrupt=0.02, dropout=0.05)
    offers, victim = cheat.offers(1), cheat.members[VICTIM]
    near = set(cheat.session.neighbours[VICTIM])
    few = set(cheat.members) - set([n for n in cheat.members if n not in near | {VICTIM}][:6])
    inbox = cheat.inbox(VICTIM, offers, few, 1)
    won = accepted(lambda: victim.masked(inbox, cheat.vector(0), spec=SPEC, model=MODEL))
    masked = {
        n: cheat.members[n].masked(cheat.inbox(n, offers, cheat.members, 1), cheat.vector(n), spec=SPEC, model=MODEL)
        for n in sorted(near | {VICTIM})
    }
    won |= accepted(lambda: victim.endorse(cheat.shown(VICTIM, masked, few, 1)))
    # And the other way round: enough members, but fewer neighbours than the threshold, here all but one of them.
    victim.session = replace(cheat.session, parameters=replace(cheat.parameters, threshold=len(near)))
    lonely = set(cheat.members) - {min(near)}
    return won | accepted(lambda: victim.endorse(cheat.shown(VICTIM, masked, lonely, 1)))


def two_models() -> bool:
    """The victim works on another model than all others, whose updates there are zero (arXiv:2111.07380)."""
    cheat = Cheat()
    _, masked = cheat.masked(1, victims_model=OTHER_MODEL)
    everybody = list(cheat.members)
    endorsed = [
        n for n in cheat.honest if accepted(lambda n=n: cheat.members[n].endorse(cheat.shown(n, masked, everybody, 1)))
    ]
    # Even with every seed the masks of the pairs with the victim do not cancel.
    total = np.sum([SPEC.unpack(one.vector) for one in masked.values()], axis=0, dtype=np.uint32)
    for n, one in cheat.members.items():
        near = cheat.session.neighbours[n]
        held = {near.index(m) + 1: cheat.members[m]._round.seeds[n] for m in near}
        seed = combine(dict(list(held.items())[: cheat.parameters.threshold]))
        add_mask(total, own_seed(seed, context=masked[n].context, member=n), sign=-1)
        assert one.member == n
    return bool(endorsed) or bool((total == cheat.vector(VICTIM)).all())


def oversized_roster() -> bool:
    """More members than the modulus or the policy holds, and a roster of colluders around the victim."""
    cheat = Cheat()
    offers = cheat.offers(1)
    small = SumSpec(length=4, bits=22, bound=2**20)

    def wrap() -> None:
        inbox = cheat.inbox(VICTIM, offers, cheat.members, 1)
        cheat.members[VICTIM].masked(inbox, cheat.vector(0), spec=small, model=MODEL)

    with pytest.raises(BadUsage, match="modulus"):
        wrap()
    here = newcomers(clients=6, policy=Policy(max_clients=5))
    won = accepted(lambda: here[VICTIM].open(Roster.of({n: one.commit() for n, one in here.items()})))
    # Three of ten may be corrupt: all of them and the victim make a roster.
    here = newcomers(clients=10, policy=Policy(corrupt=0.3, dropout=0.0))
    return won | accepted(lambda: here[VICTIM].open(Roster.of({n: here[n].commit() for n in (0, 7, 8, 9)})))


def out_of_range() -> bool:
    """A member's vector is beyond what the sum can hold."""
    cheat = Cheat()
    inbox = cheat.inbox(VICTIM, cheat.offers(1), cheat.members, 1)
    try:
        cheat.members[VICTIM].masked(inbox, np.full(4, 2**20 + 1, np.uint32), spec=SPEC, model=MODEL)
    except BadUsage:
        return False
    return True


def duplicate_reveal() -> bool:
    """A second survivor list, and a second reveal with other signatures, or the same."""
    cheat = Cheat()
    _, masked = cheat.masked(1)
    signatures = cheat.endorsed(1, masked, list(cheat.members))
    other = cheat.shown(1, masked, [1, 2, 3, 4, 5, 6, 7], 1)
    won = accepted(lambda: cheat.members[1].endorse(other))
    cheat.members[1].reveal(cheat.quorum(1, signatures))
    won |= accepted(lambda: cheat.members[1].reveal(cheat.quorum(1, signatures)))
    return won | accepted(lambda: cheat.members[1].endorse(other))


def two_masked_vectors() -> bool:
    """A second vector is asked for in the round, before its end and after it, by the same and by another inbox."""
    cheat = Cheat()
    offers, masked = cheat.masked(1)
    inboxes = [cheat.inbox(VICTIM, offers, active, 1) for active in (cheat.members, range(7))]

    def ask(inbox: Inbox) -> bool:
        return accepted(lambda: cheat.members[VICTIM].masked(inbox, np.ones(4, np.uint32), spec=SPEC, model=MODEL))

    won = any(ask(inbox) for inbox in inboxes)
    signatures = cheat.endorsed(1, masked, list(cheat.members))
    cheat.members[VICTIM].reveal(cheat.quorum(1, signatures))
    won |= any(ask(inbox) for inbox in inboxes)
    # And shared secrets of one round are not made anew.
    return won | accepted(lambda: cheat.members[VICTIM].offer(1))


def withheld_offers() -> bool:
    """The victim sees other active members than the rest: its neighbours do not take it for a survivor of theirs."""
    cheat = Cheat()
    offers = cheat.offers(1)
    masked = {
        n: one.masked(
            cheat.inbox(n, offers, [0, 3, 4, 5, 6, 7] if n == VICTIM else list(cheat.members), 1),
            cheat.vector(n),
            spec=SPEC,
            model=MODEL,
        )
        for n, one in cheat.members.items()
    }
    everybody, won = list(cheat.members), False
    for n in cheat.honest:
        shown = cheat.shown(n, masked, everybody, 1)
        silent = replace(shown, receipts=tuple(receipt for receipt in shown.receipts if receipt.member != VICTIM))
        won |= accepted(lambda n=n, shown=shown: cheat.members[n].endorse(shown))
        won |= n != VICTIM and accepted(lambda n=n, silent=silent: cheat.members[n].endorse(silent))
    return won | accepted(lambda: cheat.members[1].endorse(relabelled(cheat, masked)))


def relabelled(cheat: Cheat, masked: Mapping[int, Masked]) -> Survivors:
    """The victim's receipt replaced by one that a corrupt member signed."""
    shown = cheat.shown(1, masked, list(cheat.members), 1)
    said = masked_said(context=masked[1].context, member=VICTIM, vector=shown.receipts[0].vector)
    forged = replace(shown.receipts[0], signature=cheat.identities[cheat.corrupt[0]].sign(said))
    return replace(shown, receipts=(forged, *shown.receipts[1:]))


def surrounded_victim() -> bool:
    """The server names its own members as the victim's neighbours, in a sparse graph."""
    cheat = Cheat(clients=100, corrupt=0.02, dropout=0.05)
    offers, everybody = cheat.offers(1), cheat.members
    near = cheat.session.neighbours[VICTIM]
    wanted = (*(n for n in cheat.corrupt if n not in near), *near)[: len(near)]
    if set(wanted) == set(near):
        wanted = (*near[1:], next(n for n in range(1, 100) if n not in near))
    inbox = cheat.inbox(VICTIM, offers, everybody, 1)
    deliveries = {delivery.sender: delivery for delivery in inbox.deliveries}
    changed = tuple(deliveries.get(n, replace(inbox.deliveries[0], sender=n)) for n in sorted(wanted))
    bad = replace(inbox, deliveries=changed)
    return accepted(lambda: cheat.members[VICTIM].masked(bad, cheat.vector(0), spec=SPEC, model=MODEL))


def early_dropout() -> bool:
    """A member drops out before its shares came: does the round fail?"""
    cheat = Cheat()
    coordinator = cheat.coordinator
    for n, offer in cheat.offers(1).items():
        if n != 4:
            coordinator.add_offer(offer)
    inboxes = coordinator.begin(1, spec=SPEC, model=MODEL)
    for n, inbox in inboxes.items():
        coordinator.add_masked(cheat.members[n].masked(inbox, cheat.vector(n), spec=SPEC, model=MODEL))
    for n, shown in coordinator.survivors().items():
        coordinator.add_endorsement(cheat.members[n].endorse(shown))
    quorum = coordinator.quorum()
    for n in inboxes:
        coordinator.add_reveal(cheat.members[n].reveal(quorum))
    return coordinator.total().tolist() != cheat.vector(VICTIM).tolist()


def seed_of_32_bits() -> bool:
    """Seeds that differ anywhere give another mask."""
    masks = []
    for place in (None, *range(32)):
        seed = bytearray(range(32))
        if place is not None:
            seed[place] ^= 1
        words = np.zeros(100, np.uint32)
        add_mask(words, bytes(seed), sign=1)
        masks.append(words.tobytes())
    return len(set(masks)) < len(masks)


def seized(chains_of_the_round: bool) -> bool:
    """The victim's state after a round, and all that was sent in it: does it show the victim's input?"""
    cheat = Cheat()
    kept = cheat.members[VICTIM]._to
    offers, masked = cheat.masked(1)
    signatures = cheat.endorsed(1, masked, list(cheat.members))
    victim = cheat.members[VICTIM]
    victim.reveal(cheat.quorum(1, signatures))
    assert victim._own == {}
    assert victim._round is None
    offer, near, opened = offers[VICTIM], cheat.session.neighbours[VICTIM], {}
    header = offer_header(
        session=cheat.session.id, round=1, sender=VICTIM, mask_key=offer.mask_key, seed_digest=offer.seed_digest
    )
    for chains in (kept,) if chains_of_the_round else (victim._to, victim._back):
        assert chains.round == (1 if chains_of_the_round else 2)
        for place, n in enumerate(near, start=1):
            for key in (chains.box_key(n), chains.keys[n]):
                with suppress(ProtocolViolation):
                    opened[place] = unseal(key, round=1, header=header, box=offer.boxes[n])
    if len(opened) < cheat.parameters.threshold:
        return False
    some = dict(list(opened.items())[: cheat.parameters.threshold])
    key = KeyPair.of(combine({place: text[:SHARE_BYTES] for place, text in some.items()}))
    seed = combine({place: text[SHARE_BYTES:] for place, text in some.items()})
    context, words = masked[VICTIM].context, SPEC.unpack(masked[VICTIM].vector).copy()
    add_mask(words, own_seed(seed, context=context, member=VICTIM), sign=-1)
    for n in near:
        pair_seed = mask_seed(key, offers[n].mask_key, context=context, pair=(VICTIM, n))
        add_mask(words, pair_seed, sign=-1 if n > VICTIM else 1)
    return bool((words == cheat.vector(VICTIM)).all())


def seized_device() -> bool:
    """The device moved its keys on."""
    return seized(chains_of_the_round=False)


def naive_seized_device() -> bool:
    """A device whose box keys last as long as the session."""
    return seized(chains_of_the_round=True)


# --- Who drops out is the server's choice, and it knows the graph. ---


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


def test_the_bound_holds_for_the_best_choice_of_dropouts() -> None:
    small = sparsest(clients=16, corrupt=1, dropouts=1, bits=2)
    assert small is not None
    # At most a quarter of 400, and 6 standard deviations.
    assert unsafe_graphs(small.cycles, small.threshold, small.cut_off, 400) <= 100 + 6 * 8.7
    # A single cycle falls apart nearly always.
    assert unsafe_graphs(1, 1, 1, 100) > 50


# --- The coalition's game. ---


@dataclass
class Game:
    """A round in one of two worlds with the same honest sum: who has the large input, member 0 or member 1?"""

    cheat: Cheat

    def play(self, world: int, held: Collection[int]) -> tuple[int, Words, Words]:
        """The coalition's guess; and what it takes the honest sum for, and what that was.

        `held`: the members whose shares it sees, beside what is revealed. It takes off each mask that it can.
        """
        cheat, round = self.cheat, next(self.cheat.rounds)
        vectors = {n: np.full(4, 2**19 if n == world else 7 * n, np.uint32) for n in cheat.honest}
        vectors[1 - world] = np.zeros(4, np.uint32)
        vectors |= {n: np.zeros(4, np.uint32) for n in cheat.corrupt}
        offers = cheat.offers(round)
        boxes = {n: cheat.inbox(n, offers, cheat.members, round) for n in cheat.members}
        corrupt_keys = {n: cheat.members[n]._own[round].key for n in cheat.corrupt}
        dropped = cheat.honest[-1]
        survivors = [n for n in cheat.members if n != dropped]
        masked = {n: cheat.members[n].masked(boxes[n], vectors[n], spec=SPEC, model=MODEL) for n in cheat.members}
        seen = {n: cheat.members[n]._round for n in held}
        signatures = cheat.endorsed(round, masked, survivors)
        reveals = {n: cheat.members[n].reveal(cheat.quorum(round, signatures)) for n in survivors}

        def secret(member: int, kind: str) -> KeyPair | bytes | None:
            shares = {}
            for place, n in enumerate(cheat.session.neighbours[member], start=1):
                known = [getattr(source[n], kind) for source in (reveals, seen) if n in source]
                for given in known:
                    if member in given:
                        shares[place] = given[member]
            if len(shares) < cheat.parameters.threshold:
                return None
            found = combine(dict(list(shares.items())[: cheat.parameters.threshold]))
            return KeyPair.of(found) if kind == "keys" else found

        keys = {n: found for n in cheat.members if (found := secret(n, "keys")) is not None} | corrupt_keys
        residues = {}
        for n in survivors:
            if n in cheat.corrupt:
                continue
            context, words = masked[n].context, SPEC.unpack(masked[n].vector).copy()
            add_mask(words, own_seed(secret(n, "seeds"), context=context, member=n), sign=-1)
            for other in cheat.session.neighbours[n]:
                pair = (n, other)
                if other in keys:
                    seed = mask_seed(keys[other], offers[n].mask_key, context=context, pair=pair)
                elif n in keys:
                    seed = mask_seed(keys[n], offers[other].mask_key, context=context, pair=pair)
                else:
                    continue
                add_mask(words, seed, sign=-1 if n < other else 1)
            residues[n] = words
        # The larger of two inputs, if there is nothing left on them; else any order.
        guess = int(int(residues[1][0]) > int(residues[0][0]))
        known = np.sum(list(residues.values()), axis=0, dtype=np.uint32)
        truth = np.sum([vectors[n] for n in residues], axis=0, dtype=np.uint32)
        return guess, known, truth


def test_a_coalition_below_the_threshold_learns_only_the_honest_survivors_sum() -> None:
    game, random = Game(Cheat(clients=5, corrupt=0.2, dropout=0.2)), np.random.default_rng(11)
    right = 0
    for _ in range(1000):
        world = int(random.integers(2))
        guess, known, truth = game.play(world, held=game.cheat.corrupt)
        right += guess == world
        assert (known == truth).all()
    p_value = binomtest(right, 1000).pvalue
    print(f"coalition below the threshold: {right} of 1000 guesses right, p = {p_value:.3f}")
    assert p_value > 1e-9


def test_a_coalition_at_the_threshold_wins_the_same_game() -> None:
    # The naive threshold: as many shares as the coalition has.
    game, random = Game(Cheat(clients=5, corrupt=0.2, dropout=0.2)), np.random.default_rng(12)
    for _ in range(20):
        world = int(random.integers(2))
        assert game.play(world, held=game.cheat.members)[0] == world


# --- The table. ---


@dataclass(frozen=True)
class Row:
    attack: str
    ours: Callable[[], bool]
    flower: Callable[[], bool] | None
    naive: Callable[[], bool] | None = None


ATTACKS = (
    Row("member named alive and dead", alive_and_dead, peers.alive_and_dead),
    Row("replayed round", replayed_round, peers.replayed_round, peers.naive_replayed_round),
    Row("forged and swapped keys", forged_keys, peers.forged_keys),
    Row("tampered share gives a wrong sum", tampered_share, peers.tampered_share),
    Row("lowered threshold", lowered_threshold, peers.lowered_threshold),
    Row("another model for the victim", two_models, peers.two_models),
    Row("oversized roster wraps", oversized_roster, peers.oversized_roster),
    Row("input out of range", out_of_range, peers.out_of_range),
    Row("second reveal", duplicate_reveal, peers.duplicate_reveal, peers.naive_duplicate_reveal),
    Row("second masked vector", two_masked_vectors, peers.two_masked_vectors, peers.naive_two_masked_vectors),
    Row("offers withheld from the victim", withheld_offers, peers.withheld_offers),
    Row("neighbours chosen by the server", surrounded_victim, peers.surrounded_victim),
    Row("dropouts chosen around a group", chosen_dropouts_ours, None, chosen_dropouts_ring),
    Row("dropout before the shares stops the round", early_dropout, peers.early_dropout),
    Row("device seized after the round", seized_device, peers.seized_device, naive_seized_device),
    Row("mask seeds of 32 bits", seed_of_32_bits, peers.seed_of_32_bits),
)


@pytest.mark.parametrize("row", ATTACKS, ids=lambda row: row.attack)
def test_an_attack_succeeds_elsewhere_and_fails_here(row: Row) -> None:
    assert any(attack() for attack in (row.flower, row.naive) if attack is not None)
    assert not row.ours()


@pytest.mark.parametrize("name", [name for name, _ in forged_commits()])
def test_a_roster_with_a_forged_commit_is_refused(name: str) -> None:
    here = newcomers()
    commits = {n: one.commit() for n, one in here.items()}
    with pytest.raises(ProtocolViolation):
        here[VICTIM].open(Roster.of(dict(forged_commits())[name](commits)))
    here[VICTIM].open(Roster.of(commits))
    with pytest.raises(ProtocolViolation, match="second"):
        here[VICTIM].open(Roster.of(commits))


def table() -> dict[str, dict[str, str]]:
    """Each attack with who survives it."""

    def fate(attack: Callable[[], bool] | None) -> str:
        return "not tried" if attack is None else "broken" if attack() else "survives"

    return {
        row.attack: {"fedinfer": fate(row.ours), "Flower SecAgg+": fate(row.flower), "naive": fate(row.naive)}
        for row in ATTACKS
    }


def main() -> None:
    """Print the table, or write it as JSON."""
    found = table()
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"{'attack':44}{'fedinfer':>12}{'Flower SecAgg+':>18}{'naive':>12}")
    for attack, fates in found.items():
        print(f"{attack:44}{fates['fedinfer']:>12}{fates['Flower SecAgg+']:>18}{fates['naive']:>12}")


if __name__ == "__main__":
    main()
