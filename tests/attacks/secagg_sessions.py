"""Attacks on the set-up of our secure sum. Each returns whether it succeeded."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest

from fedinfer.errors import BadUsage
from fedinfer.secagg.channels import KeyPair
from fedinfer.secagg.identities import Identity
from fedinfer.secagg.masks import SumSpec
from fedinfer.secagg.parameters import Policy
from fedinfer.secagg.rehearsal import make_pki
from fedinfer.secagg.setup_messages import Commit, Openings, Roster, commit_said, opening_said
from tests.attacks.secagg_cheat import MODEL, SPEC, VICTIM, Cheat, accepted, newcomers, newcomers_of


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
