"""Attacks on the rounds of our secure sum. Each returns whether it succeeded."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

import numpy as np

from fedinfer.errors import BadUsage, ProtocolViolation, RoundFailed
from fedinfer.secagg.channels import KeyPair, mask_seed, own_seed, seal, unseal
from fedinfer.secagg.masks import add_mask
from fedinfer.secagg.parameters import Policy
from fedinfer.secagg.rehearsal import make_pki
from fedinfer.secagg.round_messages import (
    Inbox,
    Masked,
    Survivors,
    masked_said,
    offer_header,
    survivors_said,
    vector_digest,
)
from fedinfer.secagg.setup_messages import Roster
from fedinfer.secagg.shamir import SHARE_BYTES, combine
from tests.attacks.secagg_cheat import MODEL, OTHER_MODEL, SPEC, VICTIM, Cheat, accepted, newcomers, newcomers_of


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
