"""What everybody knows after the set-up: who takes part, their keys, and the neighbour graph that nobody chose."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from fedinfer.errors import BadUsage, ProtocolViolation
from fedinfer.secagg.codec import Members
from fedinfer.secagg.identities import PkiFile, check_signature
from fedinfer.secagg.parameters import Parameters, Policy
from fedinfer.secagg.setup_messages import (
    Commit,
    Opening,
    Openings,
    Roster,
    commit_said,
    commitment_of,
    opening_said,
)
from fedinfer.secagg.transcripts import transcript


@dataclass(frozen=True, kw_only=True)
class Session:
    """Public, and the same at every honest member. `id` stands for all of it, in every key and signature."""

    id: bytes
    members: Members
    parameters: Parameters
    identity_keys: Mapping[int, bytes]
    channel_keys: Mapping[int, bytes]
    neighbours: Mapping[int, Members]

    def check_enough(self, what: str, members: Members) -> None:
        """Raises: ProtocolViolation unless `members` (in order, each once) are of this session and enough for a sum."""
        strangers = sum(member not in self.identity_keys for member in members)
        if strangers:
            raise ProtocolViolation(f"{what}: got {strangers} members who are not in the session, expected none")
        if len(members) < self.parameters.min_survivors:
            raise ProtocolViolation(
                f"{what}: got {len(members)} members, expected at least {self.parameters.min_survivors} of "
                f"{len(self.members)}"
            )


@lru_cache(maxsize=4)
def check_roster(roster: Roster, *, pki: PkiFile, policy: Policy, run: bytes) -> Parameters:
    """The numbers of a roster whose every commit is signed by a member of the PKI file, for this run and policy.

    Raises: ProtocolViolation otherwise, or if no sum over this roster is safe.
    """
    try:
        parameters = policy.parameters(clients=len(roster.commits), members=len(pki))
    except BadUsage as error:
        raise ProtocolViolation(str(error)) from None
    for commit in roster.commits:
        check_commit(commit, pki=pki, policy=policy, run=run)
    return parameters


def check_commit(commit: Commit, *, pki: PkiFile, policy: Policy, run: bytes) -> None:
    """Raises: ProtocolViolation unless `commit` is signed by a member of the PKI file, for this run and policy."""
    if commit.run != run:
        raise ProtocolViolation(f"commit of member {commit.member}: got another run")
    if commit.policy != policy.digest():
        raise ProtocolViolation(
            f"commit of member {commit.member}: got another policy, expected the same corrupt and dropout everywhere"
        )
    said = commit_said(
        pki=pki.digest,
        run=run,
        member=commit.member,
        policy=commit.policy,
        channel_key=commit.channel_key,
        commitment=commit.commitment,
    )
    check_signature(pki.key(commit.member), said, commit.signature)


def check_opening(opening: Opening, *, commit: Commit, roster: Roster, pki: PkiFile, run: bytes) -> None:
    """Raises: ProtocolViolation unless `opening` is the member's, for this roster, of what it committed to."""
    if opening.member != commit.member or opening.roster != roster.digest:
        raise ProtocolViolation(f"opening of member {opening.member}: got one for another roster or member")
    said = opening_said(roster=roster.digest, member=opening.member, nonce=opening.nonce)
    check_signature(pki.key(opening.member), said, opening.signature)
    if commitment_of(run=run, member=opening.member, nonce=opening.nonce) != commit.commitment:
        raise ProtocolViolation(f"opening of member {opening.member}: got another nonce than it committed to")


@lru_cache(maxsize=4)
def agree(roster: Roster, openings: Openings, *, pki: PkiFile, policy: Policy, run: bytes) -> Session:
    """The session of a roster that all of its members opened.

    All of them: if a silent member were left out, a coalition could choose among many graphs by who keeps silent. So
    it can only begin again, with new randomness of everybody.

    Raises: ProtocolViolation if anybody's opening is missing, forged, or for another roster.
    """
    parameters = check_roster(roster, pki=pki, policy=policy, run=run)
    if [opening.member for opening in openings.openings] != [commit.member for commit in roster.commits]:
        raise ProtocolViolation(
            f"openings: got {len(openings.openings)}, expected one of each of the {len(roster.commits)} members; "
            "set up again without those who are silent"
        )
    for commit, opening in zip(roster.commits, openings.openings, strict=True):
        check_opening(opening, commit=commit, roster=roster, pki=pki, run=run)
    members = tuple(commit.member for commit in roster.commits)
    identifier = transcript("session", pki.digest, roster.digest, *(opening.nonce for opening in openings.openings))
    graph = parameters.graph(transcript("graph", identifier))
    return Session(
        id=identifier,
        members=members,
        parameters=parameters,
        identity_keys={member: pki.key(member) for member in members},
        channel_keys={commit.member: commit.channel_key for commit in roster.commits},
        neighbours={
            member: tuple(members[place] for place in places) for member, places in zip(members, graph, strict=True)
        },
    )
