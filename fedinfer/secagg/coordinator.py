"""The server's side of the secure sum: it relays, folds masked vectors in as they come, and takes the masks off.

It is trusted with nothing but to do its work: what it could do wrong, the participants refuse. It checks what it is
sent so that one bad member spoils a message and not a round.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from fedinfer.errors import ProtocolViolation, RoundFailed
from fedinfer.secagg.channels import KeyPair, mask_seed, own_seed
from fedinfer.secagg.codec import Members
from fedinfer.secagg.identities import check_signature
from fedinfer.secagg.masks import SumSpec, Words, add_mask
from fedinfer.secagg.round_messages import (
    Delivery,
    Endorsement,
    Inbox,
    Masked,
    Offer,
    Quorum,
    Receipt,
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
from fedinfer.secagg.shamir import candidates


@dataclass(kw_only=True, eq=False)
class _Round:
    """What came in so far. `total` is the only vector."""

    number: int
    context: bytes
    spec: SumSpec
    offers: Mapping[int, Offer]
    total: Words = field(repr=False)
    receipts: dict[int, Receipt] = field(default_factory=dict)
    survivors: Members = ()
    signatures: dict[int, bytes] = field(default_factory=dict)
    reveals: dict[int, Reveal] = field(default_factory=dict)


class Coordinator:
    """One session at the server, after the set-up (`fedinfer.secagg.session.agree`).

    Guarantees: what `total` returns is the sum of the survivors' vectors modulo 2^bits, or it raises: each secret that
    is put together from shares is checked against the key or digest that was announced for it. A message that raises
    in `add_...` changes nothing. Memory is that of one vector and the shares.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._offers: dict[int, Offer] = {}
        self._round: _Round | None = None

    def add_offer(self, offer: Offer) -> None:
        """Keep a member's offer until its round begins: the one for the latest round.

        Raises: ProtocolViolation if it is not the member's, too late, a second one, or not for just its neighbours.
        """
        session = self.session
        self._check_member(offer.session, offer.member)
        kept = self._offers.get(offer.member)
        if (kept and offer.round <= kept.round) or (self._round and offer.round <= self._round.number):
            raise ProtocolViolation(
                f"offer of member {offer.member}: got one for round {offer.round} too late or twice"
            )
        if tuple(offer.boxes) != session.neighbours[offer.member]:
            raise ProtocolViolation(f"offer of member {offer.member}: got {len(offer.boxes)} boxes, expected one each")
        header = offer_header(
            session=session.id,
            round=offer.round,
            sender=offer.member,
            mask_key=offer.mask_key,
            seed_digest=offer.seed_digest,
        )
        check_signature(
            session.identity_keys[offer.member], offer_said(header=header, boxes=offer.boxes), offer.signature
        )
        self._offers[offer.member] = offer

    def begin(self, round: int, *, spec: SumSpec, model: bytes) -> dict[int, Inbox]:
        """Start a round with those who offered for it, and drop what is left of earlier ones: an inbox for each.

        Raises: RoundFailed if too few offered; BadUsage for a modulus too small.
        """
        session = self.session
        spec.check_clients(session.parameters.clients)
        if self._round and round <= self._round.number:
            raise ProtocolViolation(f"round: got {round}, expected one after {self._round.number}")
        offers = {
            member: self._offers[member] for member in sorted(self._offers) if self._offers[member].round == round
        }
        active = tuple(offers)
        self._check_enough("offers", len(active))
        self._offers = {member: offer for member, offer in self._offers.items() if offer.round > round}
        context = context_of(session=session.id, round=round, model=model, spec=spec.digest(), active=active)
        self._round = _Round(
            number=round, context=context, spec=spec, offers=offers, total=np.zeros(spec.length, spec.word)
        )
        return {
            member: Inbox(
                session=session.id,
                round=round,
                active=active,
                deliveries=tuple(
                    Delivery(
                        sender=other,
                        mask_key=offers[other].mask_key,
                        seed_digest=offers[other].seed_digest,
                        box=offers[other].boxes[member],
                    )
                    for other in session.neighbours[member]
                    if other in offers
                ),
            )
            for member in active
        }

    def add_masked(self, masked: Masked) -> None:
        """Fold a masked vector into the sum.

        Raises: ProtocolViolation if it is not the member's, a second one, too late, or masked under another view.
        """
        round = self._current(masked.session, masked.round, masked.member)
        if round.survivors or masked.member in round.receipts or masked.context != round.context:
            raise ProtocolViolation(
                f"masked vector of member {masked.member}: got it too late, twice, or for another model or members"
            )
        digest = vector_digest(masked.vector)
        said = masked_said(context=round.context, member=masked.member, vector=digest)
        check_signature(self.session.identity_keys[masked.member], said, masked.signature)
        words = round.spec.unpack(masked.vector)
        np.add(round.total, words, out=round.total)
        round.receipts[masked.member] = Receipt(member=masked.member, vector=digest, signature=masked.signature)

    def survivors(self) -> dict[int, Survivors]:
        """Close the sum: whose vectors are in it, with what each of them must see of its neighbours.

        Raises: RoundFailed if they are too few.
        """
        round, session = self._open_round(), self.session
        if not round.survivors:
            self._check_enough("masked vectors", len(round.receipts))
            round.survivors = tuple(sorted(round.receipts))
        return {
            member: Survivors(
                session=session.id,
                round=round.number,
                survivors=round.survivors,
                receipts=tuple(
                    round.receipts[other] for other in session.neighbours[member] if other in round.receipts
                ),
            )
            for member in round.survivors
        }

    def add_endorsement(self, endorsement: Endorsement) -> None:
        """Keep a survivor's signature.

        Raises: ProtocolViolation if it is not one under this round's survivors.
        """
        round = self._current(endorsement.session, endorsement.round, endorsement.member)
        if endorsement.member not in round.survivors:
            raise ProtocolViolation(f"endorsement of member {endorsement.member}: got one of no survivor")
        said = survivors_said(context=round.context, survivors=round.survivors)
        check_signature(self.session.identity_keys[endorsement.member], said, endorsement.signature)
        round.signatures[endorsement.member] = endorsement.signature

    def quorum(self) -> Quorum:
        """As many signatures as members ask for: the same message to every survivor.

        Raises: RoundFailed if there are fewer.
        """
        round, needed = self._open_round(), self.session.parameters.quorum
        if len(round.signatures) < needed:
            raise RoundFailed(f"endorsements: got {len(round.signatures)}, expected at least {needed}")
        return Quorum(
            session=self.session.id,
            round=round.number,
            signatures={member: round.signatures[member] for member in sorted(round.signatures)[:needed]},
        )

    def add_reveal(self, reveal: Reveal) -> None:
        """Keep a survivor's shares.

        Raises: ProtocolViolation if they are not signed by it, or not of just its neighbours.
        """
        round = self._current(reveal.session, reveal.round, reveal.member)
        around = [other for other in self.session.neighbours[reveal.member] if other in round.offers]
        seeds = [other for other in around if other in round.receipts]
        keys = [other for other in around if other not in round.receipts]
        if reveal.member not in round.survivors or list(reveal.seeds) != seeds or list(reveal.keys) != keys:
            raise ProtocolViolation(f"reveal of member {reveal.member}: got shares of others than its neighbours")
        said = reveal_said(context=round.context, member=reveal.member, seeds=reveal.seeds, keys=reveal.keys)
        check_signature(self.session.identity_keys[reveal.member], said, reveal.signature)
        round.reveals[reveal.member] = reveal

    def total(self) -> Words:
        """The sum (length,) of the survivors' vectors modulo 2^bits; the round is over.

        Raises: RoundFailed if there are too few shares of somebody, or they fit nothing it announced. More reveals
            may come then, and the call again. ProtocolViolation before `survivors`.
        """
        round, session = self._open_round(), self.session
        if not round.survivors:
            raise ProtocolViolation("total: got asked before the survivors, expected it after the reveals")
        masks = []
        for member in round.survivors:
            seed = self._recover(member, "seed", seed_digest, round.offers[member].seed_digest)
            masks.append((own_seed(seed, context=round.context, member=member), -1))
        for member in round.offers:
            left = [other for other in session.neighbours[member] if other in round.receipts]
            if member in round.receipts or not left:
                continue
            key = KeyPair.of(self._recover(member, "key", _public, round.offers[member].mask_key))
            for other in left:
                public = round.offers[other].mask_key
                seed = mask_seed(key, public, context=round.context, pair=(member, other))
                masks.append((seed, -1 if other < member else 1))
        # From here on nothing fails, so that a call that raised may come again when more shares are there.
        for seed, sign in masks:
            add_mask(round.total, seed, sign=sign)
        round.spec.reduce(round.total)
        total, round.total = round.total, np.zeros(0, round.spec.word)
        return total

    def _recover(self, member: int, what: str, announce: Callable[[bytes], bytes], announced: bytes) -> bytes:
        """A member's seed or key from the shares of its neighbours, as it announced it."""
        round = self._open_round()
        shares = {
            place: (round.reveals[other].seeds if what == "seed" else round.reveals[other].keys)[member]
            for place, other in enumerate(self.session.neighbours[member], start=1)
            if other in round.reveals
        }
        for secret in candidates(shares, threshold=self.session.parameters.threshold):
            if announce(secret) == announced:
                return secret
        raise RoundFailed(
            f"{what} of member {member}: got {len(shares)} shares that do not give what it announced, expected "
            f"{self.session.parameters.threshold} or more that do; leave it, or whoever failed, out of the next round"
        )

    def _check_member(self, session: bytes, member: int) -> None:
        if session != self.session.id or member not in self.session.identity_keys:
            raise ProtocolViolation(f"message of member {member}: got another session or a member who is not in it")

    def _check_enough(self, what: str, count: int) -> None:
        if count < self.session.parameters.min_survivors:
            raise RoundFailed(
                f"{what}: got {count}, expected at least {self.session.parameters.min_survivors} of "
                f"{self.session.parameters.clients}"
            )

    def _open_round(self) -> _Round:
        if self._round is None or not len(self._round.total):
            raise ProtocolViolation("round: got a step outside a round, expected it between `begin` and `total`")
        return self._round

    def _current(self, session: bytes, number: int, member: int) -> _Round:
        round = self._open_round()
        self._check_member(session, member)
        if number != round.number or member not in round.offers:
            raise ProtocolViolation(f"message of member {member}: got round {number}, expected {round.number} with it")
        return round


def _public(secret: bytes) -> bytes:
    return KeyPair.of(secret).public
