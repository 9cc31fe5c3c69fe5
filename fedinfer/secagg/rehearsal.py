"""All members and the server of a secure sum in one process: for simulation, tests and timing.

It is the protocol itself, without a network: who drops out and when is an argument.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from fedinfer.secagg.coordinator import Coordinator
from fedinfer.secagg.identities import Identity, PkiFile
from fedinfer.secagg.masks import SumSpec, Words
from fedinfer.secagg.newcomer import Newcomer
from fedinfer.secagg.parameters import Policy
from fedinfer.secagg.participant import Participant
from fedinfer.secagg.session import agree, check_roster
from fedinfer.secagg.setup_messages import Openings, Roster
from fedinfer.secagg.shamir import Entropy


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """A session that was set up: the members by their number, and the server."""

    participants: Mapping[int, Participant]
    coordinator: Coordinator


def make_pki(count: int, entropy: Entropy = os.urandom) -> tuple[PkiFile, list[Identity]]:
    """As many new identities, and the PKI file that names them."""
    identities = [Identity.generate(entropy) for _ in range(count)]
    names = tuple(f"device-{number}" for number in range(count))
    return PkiFile(names=names, keys=tuple(identity.public for identity in identities)), identities


def set_up(
    *, pki: PkiFile, identities: Sequence[Identity], policy: Policy, run: bytes, entropy: Entropy = os.urandom
) -> Rehearsal:
    """The three waves before the first round: commit, open, enter."""
    newcomers = [
        Newcomer(identity=identity, pki=pki, policy=policy, run=run, entropy=entropy) for identity in identities
    ]
    roster = Roster.of({one.member: one.commit() for one in newcomers})
    check_roster(roster, pki=pki, policy=policy, run=run)
    openings = Openings.of({one.member: one.open(roster) for one in newcomers})
    coordinator = Coordinator(agree(roster, openings, pki=pki, policy=policy, run=run))
    return Rehearsal(participants={one.member: one.enter(openings) for one in newcomers}, coordinator=coordinator)


def run_round(
    rehearsal: Rehearsal,
    vectors: Mapping[int, Words],
    *,
    round: int,
    spec: SumSpec,
    model: bytes,
    no_offer: Collection[int] = (),
    no_masked: Collection[int] = (),
    no_endorsement: Collection[int] = (),
    no_reveal: Collection[int] = (),
) -> Words:
    """The sum of the vectors of those who offered and sent them; who drops out at a step is gone from then on.

    Raises: RoundFailed if too few are left at a step.

    >>> import numpy as np
    >>> pki, identities = make_pki(3)
    >>> three = set_up(pki=pki, identities=identities, policy=Policy(), run=b"example")
    >>> spec = SumSpec(length=2, bits=16, bound=1000)
    >>> vectors = {n: np.array([n, 10 * n], np.uint32) for n in range(3)}
    >>> run_round(three, vectors, round=1, spec=spec, model=bytes(32)).tolist()
    [3, 30]
    """
    participants, coordinator = rehearsal.participants, rehearsal.coordinator
    here = [number for number in participants if number not in no_offer]
    for number in here:
        coordinator.add_offer(participants[number].offer(round))
    inboxes = coordinator.begin(round, spec=spec, model=model)
    here = [number for number in here if number not in no_masked]
    for number in here:
        coordinator.add_masked(participants[number].masked(inboxes[number], vectors[number], spec=spec, model=model))
    lists = coordinator.survivors()
    here = [number for number in here if number not in no_endorsement]
    for number in here:
        coordinator.add_endorsement(participants[number].endorse(lists[number]))
    quorum = coordinator.quorum()
    here = [number for number in here if number not in no_reveal]
    for number in here:
        coordinator.add_reveal(participants[number].reveal(quorum))
    return coordinator.total()
