"""A member's side of the set-up: three steps, then it is a participant."""

import os

from fedinfer.errors import ProtocolViolation
from fedinfer.secagg.alone import Alone
from fedinfer.secagg.channels import Chains, KeyPair
from fedinfer.secagg.identities import Identity, PkiFile
from fedinfer.secagg.parameters import Policy
from fedinfer.secagg.participant import Participant
from fedinfer.secagg.session import agree, check_roster
from fedinfer.secagg.setup_messages import (
    NONCE_BYTES,
    Commit,
    Opening,
    Openings,
    Roster,
    commit_said,
    commitment_of,
    opening_said,
)
from fedinfer.secagg.shamir import SECRET_BYTES, Entropy
from fedinfer.secagg.suspended import HeldNewcomer


class Newcomer:
    """One device before one session: commit → open → enter.

    Guarantees: it opens its randomness for one roster, after it saw that roster; it takes no policy from the server.

    A device bounds how often it sets up: a coalition that does not like a graph can keep silent and get another, and
    each has its own chance of 2^-40 to be a bad one.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        pki: PkiFile,
        policy: Policy,
        run: bytes,
        entropy: Entropy = os.urandom,
        held: HeldNewcomer | None = None,
        roster: Roster | None = None,
    ) -> None:
        self.member = pki.number(identity.public)
        self._identity, self._pki, self._policy, self._run, self._entropy = identity, pki, policy, run, entropy
        self._channel = KeyPair.of(held.channel if held else entropy(SECRET_BYTES))
        self._nonce = held.nonce if held else entropy(NONCE_BYTES)
        self._commit = self._new_commit()
        self._roster = roster
        self._entered = False
        self._alone = Alone()

    def __repr__(self) -> str:
        return f"Newcomer(member={self.member})"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a newcomer holds secrets and is not copied")

    def commit(self) -> Commit:
        """The first word; the same whenever asked."""
        return self._commit

    def open(self, roster: Roster) -> Opening:
        """This member's part of the session's randomness, for `roster` and no other.

        Raises: ProtocolViolation for a second roster, one without this very commit, or one that does not stand up to
            `check_roster`.
        """
        with self._alone():
            if self._roster is not None:
                raise ProtocolViolation("roster: got a second one, expected one; set up again")
            check_roster(roster, pki=self._pki, policy=self._policy, run=self._run)
            if self._commit not in roster.commits:
                raise ProtocolViolation("roster: got one without this member's own commit")
            self._roster = roster
            said = opening_said(roster=roster.digest, member=self.member, nonce=self._nonce)
            return Opening(
                roster=roster.digest, member=self.member, nonce=self._nonce, signature=self._identity.sign(said)
            )

    def enter(self, openings: Openings) -> Participant:
        """The participant of the session: derive the graph, and agree on keys with each neighbour. Once.

        Raises: ProtocolViolation unless everybody of the roster opened.
        """
        with self._alone():
            if self._roster is None or self._entered:
                raise ProtocolViolation("openings: got them out of turn, expected them once, after the roster")
            session = agree(self._roster, openings, pki=self._pki, policy=self._policy, run=self._run)
            neighbours = session.neighbours[self.member]
            to, back = Chains.agree(
                self._channel,
                {other: session.channel_keys[other] for other in neighbours},
                session=session.id,
                member=self.member,
            )
            self._entered = True
            del self._channel, self._nonce
        return Participant(
            session=session, member=self.member, identity=self._identity, to=to, back=back, entropy=self._entropy
        )

    def suspend(self) -> HeldNewcomer:
        """This newcomer's secrets, to go on elsewhere with `held`, and with the roster it opened for if it did.

        This one is over. Used twice, they would open for two rosters: see `fedinfer.secagg.suspended`.
        """
        with self._alone():
            self._alone.end()
            return HeldNewcomer(channel=self._channel.private.private_bytes_raw(), nonce=self._nonce)

    def _new_commit(self) -> Commit:
        policy = self._policy.digest()
        commitment = commitment_of(run=self._run, member=self.member, nonce=self._nonce)
        said = commit_said(
            pki=self._pki.digest,
            run=self._run,
            member=self.member,
            policy=policy,
            channel_key=self._channel.public,
            commitment=commitment,
        )
        return Commit(
            run=self._run,
            member=self.member,
            policy=policy,
            channel_key=self._channel.public,
            commitment=commitment,
            signature=self._identity.sign(said),
        )
