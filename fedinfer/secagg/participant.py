"""A member's side of the secure sum, after the set-up: local steps, values in, values out.

    offer → masked → endorse → reveal        each round; the offer goes ahead of it, with the last round's messages

A step that is refused raises, releases nothing and changes nothing. A step that is done is never done again: the state
only advances. Nothing here is taken from the server that could be checked, and no number of the policy is.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Self

from fedinfer.errors import BadUsage, ProtocolViolation
from fedinfer.secagg.alone import Alone
from fedinfer.secagg.channels import Chains, KeyPair, mask_seed, own_seed, seal, unseal
from fedinfer.secagg.codec import Members
from fedinfer.secagg.identities import Identity, check_signature
from fedinfer.secagg.masks import SumSpec, Words, add_mask
from fedinfer.secagg.round_messages import (
    Endorsement,
    Inbox,
    Masked,
    Offer,
    Quorum,
    Reveal,
    Survivors,
    context_of,
    masked_said,
    offer_header,
    offer_said,
    reveal_said,
    seed_digest,
    survivors_said,
    vector_digest,
)
from fedinfer.secagg.session import Session
from fedinfer.secagg.shamir import SECRET_BYTES, SHARE_BYTES, Entropy, check_share, split
from fedinfer.secagg.suspended import HeldOwn, HeldParticipant, HeldRound
from fedinfer.secagg.transcripts import DIGEST_BYTES


@dataclass(frozen=True, kw_only=True, eq=False)
class _Own:
    """A round's own secrets, between the offer and the masked vector."""

    key: KeyPair = field(repr=False)
    seed: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Round:
    """A round after the masked vector: its view, and the neighbours' shares of seeds and of keys."""

    number: int
    context: bytes
    active: Members
    seeds: Mapping[int, bytes] = field(repr=False)
    keys: Mapping[int, bytes] = field(repr=False)
    survivors: Members = ()


class Participant:
    """One device in one session.

    Guarantees: of one round at most one masked vector, one endorsement and one reveal leave it, and of one neighbour
    the share of the seed or of the key, never both. Nothing but the masked vector depends on the input. No secret is
    in a repr, an error or a pickle; a forked copy refuses to work.

    Secrets are dropped as soon as they are not needed, and keys of boxes move on: what a device holds after a round
    opens nothing of it. Python does not promise that the memory is overwritten.
    """

    def __init__(
        self,
        *,
        session: Session,
        member: int,
        identity: Identity,
        to: Chains,
        back: Chains,
        entropy: Entropy = os.urandom,
    ) -> None:
        self.session, self.member = session, member
        self._identity, self._to, self._back, self._entropy = identity, to, back, entropy
        self._own: dict[int, _Own] = {}
        self._round: _Round | None = None
        self._alone = Alone()

    def __repr__(self) -> str:
        return f"Participant(member={self.member})"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a participant holds secrets and is not copied")

    @classmethod
    def resume(
        cls,
        held: HeldParticipant,
        *,
        session: Session,
        member: int,
        identity: Identity,
        entropy: Entropy = os.urandom,
    ) -> Self:
        """The participant that `suspend` left, in the session it was in."""
        to, back = Chains(round=held.to_round, keys=held.to), Chains(round=held.back_round, keys=held.back)
        found = cls(session=session, member=member, identity=identity, to=to, back=back, entropy=entropy)
        found._own = {own.round: _Own(key=KeyPair.of(own.secret), seed=own.seed) for own in held.own}
        for round in held.rounds:
            found._round = _Round(**{field.name: getattr(round, field.name) for field in fields(_Round)})
        return found

    def suspend(self) -> HeldParticipant:
        """This participant's secrets, to go on elsewhere by `resume`. This one is over.

        Used twice, they would answer twice: see `fedinfer.secagg.suspended`.
        """
        with self._alone():
            self._alone.end()
            own = tuple(
                HeldOwn(round=round, secret=secrets.key.private.private_bytes_raw(), seed=secrets.seed)
                for round, secrets in self._own.items()
            )
            open_now = [] if self._round is None else [self._round]
            return HeldParticipant(
                to_round=self._to.round,
                to=self._to.keys,
                back_round=self._back.round,
                back=self._back.keys,
                own=own,
                rounds=tuple(
                    HeldRound(**{field.name: getattr(round, field.name) for field in fields(_Round)})
                    for round in open_now
                ),
            )

    def offer(self, round: int) -> Offer:
        """Fresh secrets for `round`, shared among the neighbours.

        Raises: ProtocolViolation for a round that is not later than all that were offered for, or far beyond them.
        """
        with self._alone():
            session, neighbours, to = self.session, self.session.neighbours[self.member], self._to.at(round)
            secret, seed = self._entropy(SECRET_BYTES), self._entropy(SECRET_BYTES)
            own = _Own(key=KeyPair.of(secret), seed=seed)
            digest = seed_digest(seed)
            header = offer_header(
                session=session.id, round=round, sender=self.member, mask_key=own.key.public, seed_digest=digest
            )
            shares = [
                split(part, threshold=session.parameters.threshold, count=len(neighbours), entropy=self._entropy)
                for part in (secret, seed)
            ]
            boxes = {
                other: seal(to.box_key(other), round=round, header=header, text=key_share + seed_share)
                for other, key_share, seed_share in zip(neighbours, *shares, strict=True)
            }
            self._to = to.at(round + 1)
            self._own[round] = own
            return Offer(
                session=session.id,
                round=round,
                member=self.member,
                mask_key=own.key.public,
                seed_digest=digest,
                boxes=boxes,
                signature=self._identity.sign(offer_said(header=header, boxes=boxes)),
            )

    def check(self, inbox: Inbox, *, spec: SumSpec, model: bytes) -> None:
        """Raises: what `masked` would raise, whatever the vector: to be asked before a vector is made or paid for."""
        with self._alone():
            self._checked(inbox, spec=spec, model=model)

    def masked(self, inbox: Inbox, vector: Words, *, spec: SumSpec, model: bytes) -> Masked:
        """`vector` (length,) under the masks of this round; `model` is the digest of what it was computed from.

        Memory is that of one more vector. Another vector is never masked in this round.

        Raises: ProtocolViolation for a round out of turn, too few members or neighbours, or a box that does not open;
            BadUsage or ShapeMismatch for a vector outside `spec`, or a modulus too small for the session.
        """
        with self._alone():
            session, number = self.session, inbox.round
            own, back, round = self._checked(inbox, spec=spec, model=model)
            words = vector.copy()
            spec.check_vector(words)
            for delivery in inbox.deliveries:
                pair = (self.member, delivery.sender)
                seed = mask_seed(own.key, delivery.mask_key, context=round.context, pair=pair)
                add_mask(words, seed, sign=1 if self.member < delivery.sender else -1)
            add_mask(words, own_seed(own.seed, context=round.context, member=self.member), sign=1)
            spec.reduce(words)
            packed = spec.pack(words)
            self._round, self._back = round, back.at(number + 1)
            self._own = {later: secrets for later, secrets in self._own.items() if later > number}
            said = masked_said(context=round.context, member=self.member, vector=vector_digest(packed))
            return Masked(
                session=session.id,
                round=number,
                member=self.member,
                context=round.context,
                vector=packed,
                signature=self._identity.sign(said),
            )

    def endorse(self, shown: Survivors) -> Endorsement:
        """A signature under the survivors of the round: once, and only if this member is among enough of them.

        Raises: ProtocolViolation for a second list, members who were not in the round, too few members or neighbours,
            or a neighbour who did not mask under the same view.
        """
        with self._alone():
            session = self.session
            round = self._current(shown.session, shown.round)
            if round.survivors:
                raise ProtocolViolation(f"survivors of round {round.number}: got a second list, expected one")
            session.check_enough("survivors", shown.survivors)
            if self.member not in shown.survivors or not set(shown.survivors) <= set(round.active):
                raise ProtocolViolation("survivors: got a list without this member, or with some not in the round")
            self._check_neighbours("receipts", shown.survivors, tuple(r.member for r in shown.receipts))
            for receipt in shown.receipts:
                said = masked_said(context=round.context, member=receipt.member, vector=receipt.vector)
                check_signature(session.identity_keys[receipt.member], said, receipt.signature)
            self._round = replace(round, survivors=shown.survivors)
            said = survivors_said(context=round.context, survivors=shown.survivors)
            return Endorsement(
                session=session.id, round=round.number, member=self.member, signature=self._identity.sign(said)
            )

    def reveal(self, quorum: Quorum) -> Reveal:
        """Shares of the seeds of surviving neighbours and of the keys of those who dropped out; then forget them.

        Raises: ProtocolViolation unless a quorum of survivors signed the list that this member signed.
        """
        with self._alone():
            session = self.session
            round = self._current(quorum.session, quorum.round)
            if not round.survivors:
                raise ProtocolViolation(f"quorum of round {round.number}: got it before a survivor list")
            survivors = set(round.survivors)
            if len(quorum.signatures) < session.parameters.quorum or not set(quorum.signatures) <= survivors:
                raise ProtocolViolation(
                    f"quorum of round {round.number}: got {len(quorum.signatures)} signatures, expected at least "
                    f"{session.parameters.quorum}, of survivors alone"
                )
            said = survivors_said(context=round.context, survivors=round.survivors)
            for member, signature in quorum.signatures.items():
                check_signature(session.identity_keys[member], said, signature)
            seeds = {member: share for member, share in round.seeds.items() if member in survivors}
            keys = {member: share for member, share in round.keys.items() if member not in survivors}
            self._round = None
            said = reveal_said(context=round.context, member=self.member, seeds=seeds, keys=keys)
            return Reveal(
                session=session.id,
                round=round.number,
                member=self.member,
                seeds=seeds,
                keys=keys,
                signature=self._identity.sign(said),
            )

    def _checked(self, inbox: Inbox, *, spec: SumSpec, model: bytes) -> tuple[_Own, Chains, _Round]:
        session, number = self.session, inbox.round
        own = self._own.get(number)
        if inbox.session != session.id or own is None:
            raise ProtocolViolation(f"round {number}: got it out of turn, expected one that was offered, once")
        if len(model) != DIGEST_BYTES:
            raise BadUsage(f"model digest: got {len(model)} bytes, expected {DIGEST_BYTES}")
        spec.check_clients(session.parameters.clients)
        back = self._back.at(number)
        context = context_of(session=session.id, round=number, model=model, spec=spec.digest(), active=inbox.active)
        return own, back, self._read_inbox(inbox, back, context=context)

    def _read_inbox(self, inbox: Inbox, back: Chains, *, context: bytes) -> _Round:
        """The round, with the shares of each neighbour in it."""
        session = self.session
        session.check_enough("active members", inbox.active)
        if self.member not in inbox.active:
            raise ProtocolViolation("active members: got a list without this member")
        self._check_neighbours("deliveries", inbox.active, tuple(delivery.sender for delivery in inbox.deliveries))
        seeds, keys = {}, {}
        for delivery in inbox.deliveries:
            header = offer_header(
                session=session.id,
                round=inbox.round,
                sender=delivery.sender,
                mask_key=delivery.mask_key,
                seed_digest=delivery.seed_digest,
            )
            try:
                text = unseal(back.box_key(delivery.sender), round=inbox.round, header=header, box=delivery.box)
                key, seed = text[:SHARE_BYTES], text[SHARE_BYTES:]
                for share in (key, seed):
                    check_share(share)
            except ProtocolViolation as error:
                raise ProtocolViolation(f"offer of member {delivery.sender}: {error}") from None
            keys[delivery.sender], seeds[delivery.sender] = key, seed
        return _Round(number=inbox.round, context=context, active=inbox.active, seeds=seeds, keys=keys)

    def _check_neighbours(self, what: str, present: Members, named: Members) -> None:
        """Raises: ProtocolViolation unless `named` are just the neighbours among `present`, and enough."""
        session = self.session
        there = set(present)
        expected = tuple(member for member in session.neighbours[self.member] if member in there)
        if named != expected or len(expected) < session.parameters.threshold:
            raise ProtocolViolation(
                f"{what}: got {len(named)} neighbours, expected all {len(expected)} who take part, and at least "
                f"{session.parameters.threshold}"
            )

    def _current(self, session: bytes, number: int) -> _Round:
        if self._round is None or session != self.session.id or number != self._round.number:
            raise ProtocolViolation(f"round {number}: got it out of turn, expected the round of the masked vector")
        return self._round
