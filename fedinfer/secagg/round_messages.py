"""What members and server say to each other in a round: the offers before it, and its three waves.

Signed and checked as the messages of the set-up are.
"""

import hashlib
from dataclasses import dataclass
from typing import ClassVar

from fedinfer.secagg.channels import KEY_BYTES, TAG_BYTES
from fedinfer.secagg.checks import check_bytes, check_members, check_round
from fedinfer.secagg.codec import FRAME_BYTES, Boxes, Members, Message
from fedinfer.secagg.identities import SIGNATURE_BYTES
from fedinfer.secagg.setup_messages import Openings, Roster
from fedinfer.secagg.shamir import SHARE_BYTES
from fedinfer.secagg.transcripts import DIGEST_BYTES, members_bytes, transcript
from fedinfer.wire import Kind

# A share of the mask key and one of the own seed, sealed.
BOX_BYTES = 2 * SHARE_BYTES + TAG_BYTES


# --- A round's secrets, shared before it: with the last round's messages, or alone. ---


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A member's key and own seed for one round: the key in public, the seed's digest, and a box for each neighbour.

    A box holds the neighbour's shares of the private key and of the seed, sealed under the key of the two.
    """

    KIND: ClassVar = Kind.SUM_OFFER
    session: bytes
    round: int
    member: int
    mask_key: bytes
    seed_digest: bytes
    boxes: Boxes
    signature: bytes

    def __post_init__(self) -> None:
        check_bytes("session", self.session, DIGEST_BYTES)
        check_round(self.round)
        check_members("offer", (self.member,))
        check_bytes("mask key", self.mask_key, KEY_BYTES)
        check_bytes("seed digest", self.seed_digest, DIGEST_BYTES)
        check_members("boxes", self.boxes)
        for box in self.boxes.values():
            check_bytes("box", box, BOX_BYTES)
        check_bytes("signature", self.signature, SIGNATURE_BYTES)


def offer_header(*, session: bytes, round: int, sender: int, mask_key: bytes, seed_digest: bytes) -> bytes:
    """What each box of an `Offer` is bound to."""
    return transcript("offer", session, round, sender, mask_key, seed_digest)


def offer_said(*, header: bytes, boxes: Boxes) -> bytes:
    """What the member of an `Offer` signs."""
    parts: list[bytes | int] = []
    for member, box in boxes.items():
        parts += (member, box)
    return transcript("offer boxes", header, *parts)


def seed_digest(seed: bytes) -> bytes:
    """By which a seed put together from shares is known to be the right one."""
    return transcript("own seed", seed)


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """What one neighbour offered to one member."""

    sender: int
    mask_key: bytes
    seed_digest: bytes
    box: bytes

    def __post_init__(self) -> None:
        check_bytes("mask key", self.mask_key, KEY_BYTES)
        check_bytes("seed digest", self.seed_digest, DIGEST_BYTES)
        check_bytes("box", self.box, BOX_BYTES)


@dataclass(frozen=True, kw_only=True)
class Inbox:
    """Begins a round: everybody who takes part in it, and what this member's neighbours among them offered."""

    KIND: ClassVar = Kind.SUM_INBOX
    session: bytes
    round: int
    active: Members
    deliveries: tuple[Delivery, ...]

    def __post_init__(self) -> None:
        check_bytes("session", self.session, DIGEST_BYTES)
        check_round(self.round)
        check_members("active", self.active)
        check_members("deliveries", (delivery.sender for delivery in self.deliveries))


# --- A round: three waves. ---


@dataclass(frozen=True, kw_only=True)
class Masked:
    """A member's masked vector, packed, and under which view of the round it was masked."""

    KIND: ClassVar = Kind.SUM_MASKED
    session: bytes
    round: int
    member: int
    context: bytes
    vector: bytes
    signature: bytes

    def __post_init__(self) -> None:
        check_bytes("session", self.session, DIGEST_BYTES)
        check_round(self.round)
        check_members("masked", (self.member,))
        check_bytes("context", self.context, DIGEST_BYTES)
        check_bytes("signature", self.signature, SIGNATURE_BYTES)


def context_of(*, session: bytes, round: int, model: bytes, spec: bytes, active: Members) -> bytes:
    """A view of a round: its masks cancel only between members who have the same."""
    return transcript("context", session, round, model, spec, members_bytes(active))


def vector_digest(vector: bytes) -> bytes:
    """SHA-256 of a packed vector."""
    return hashlib.sha256(vector).digest()


def masked_said(*, context: bytes, member: int, vector: bytes) -> bytes:
    """What the member of a `Masked` signs; `vector` is its digest."""
    return transcript("masked", context, member, vector)


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """That a neighbour masked under the same view: its signature, without its vector."""

    member: int
    vector: bytes
    signature: bytes

    def __post_init__(self) -> None:
        check_bytes("vector digest", self.vector, DIGEST_BYTES)
        check_bytes("signature", self.signature, SIGNATURE_BYTES)


@dataclass(frozen=True, kw_only=True)
class Survivors:
    """Whose vectors are in the sum, and the receipts of this member's neighbours among them."""

    KIND: ClassVar = Kind.SUM_SURVIVORS
    session: bytes
    round: int
    survivors: Members
    receipts: tuple[Receipt, ...]

    def __post_init__(self) -> None:
        check_bytes("session", self.session, DIGEST_BYTES)
        check_round(self.round)
        check_members("survivors", self.survivors)
        check_members("receipts", (receipt.member for receipt in self.receipts))


def survivors_said(*, context: bytes, survivors: Members) -> bytes:
    """What every survivor signs: the same bytes for all of one view."""
    return transcript("survivors", context, members_bytes(survivors))


@dataclass(frozen=True, kw_only=True)
class Endorsement:
    """A member's signature under the survivor list that it was shown."""

    KIND: ClassVar = Kind.SUM_ENDORSEMENT
    session: bytes
    round: int
    member: int
    signature: bytes

    def __post_init__(self) -> None:
        check_bytes("session", self.session, DIGEST_BYTES)
        check_round(self.round)
        check_members("endorsement", (self.member,))
        check_bytes("signature", self.signature, SIGNATURE_BYTES)


@dataclass(frozen=True, kw_only=True)
class Quorum:
    """Signatures of many survivors under one list."""

    KIND: ClassVar = Kind.SUM_QUORUM
    session: bytes
    round: int
    signatures: Boxes

    def __post_init__(self) -> None:
        check_bytes("session", self.session, DIGEST_BYTES)
        check_round(self.round)
        check_members("quorum", self.signatures)
        for signature in self.signatures.values():
            check_bytes("signature", signature, SIGNATURE_BYTES)


@dataclass(frozen=True, kw_only=True)
class Reveal:
    """A member's shares: of the own seed of each neighbour in the sum, of the mask key of each that dropped out."""

    KIND: ClassVar = Kind.SUM_REVEAL
    session: bytes
    round: int
    member: int
    seeds: Boxes
    keys: Boxes
    signature: bytes

    def __post_init__(self) -> None:
        check_bytes("session", self.session, DIGEST_BYTES)
        check_round(self.round)
        check_members("reveal", (self.member,))
        check_members("seed shares", self.seeds)
        check_members("key shares", self.keys)
        for share in (*self.seeds.values(), *self.keys.values()):
            check_bytes("share", share, SHARE_BYTES)
        check_bytes("signature", self.signature, SIGNATURE_BYTES)


def reveal_said(*, context: bytes, member: int, seeds: Boxes, keys: Boxes) -> bytes:
    """What the member of a `Reveal` signs."""
    parts: list[bytes | int] = []
    for boxes in (seeds, keys):
        parts.append(len(boxes))
        for neighbour, share in boxes.items():
            parts += (neighbour, share)
    return transcript("reveal", context, member, *parts)


def max_bytes(kind: type[Message], *, clients: int, neighbours: int, vector_bytes: int) -> int:
    """The largest honest message of `kind`, with a little room: what a reader allows.

    `neighbours` is the most that a member has, `vector_bytes` the packed vector's size.
    """
    fixed = FRAME_BYTES + 512
    sizes: dict[type[Message], int] = {
        Roster: 512 * clients,
        Openings: 256 * clients,
        Offer: (16 + BOX_BYTES) * neighbours,
        Inbox: 4 * clients + (128 + BOX_BYTES) * neighbours,
        Masked: vector_bytes,
        Survivors: 4 * clients + 128 * neighbours,
        Quorum: (16 + SIGNATURE_BYTES) * clients,
        Reveal: (16 + SHARE_BYTES) * neighbours,
    }
    return fixed + sizes.get(kind, 0)
