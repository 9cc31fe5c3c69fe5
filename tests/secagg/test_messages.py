"""Messages as bytes: they come back, and what is no message raises one kind of error."""

import struct
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedinfer.errors import MessageTooLarge, ProtocolViolation, UnsupportedVersion, WireError
from fedinfer.secagg.codec import Message, from_bytes, to_bytes
from fedinfer.secagg.round_messages import (
    BOX_BYTES,
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
    survivors_said,
)
from fedinfer.secagg.setup_messages import (
    Commit,
    Opening,
    Openings,
    Roster,
    commit_said,
    commitment_of,
    opening_said,
)
from fedinfer.secagg.shamir import SHARE_BYTES

D, S = bytes(range(32)), bytes(64)
COMMIT = Commit(run=b"r", member=3, policy=D, channel_key=D, commitment=D, signature=S)
OPENING = Opening(roster=D, member=3, nonce=D, signature=S)
MESSAGES: list[Message] = [
    COMMIT,
    Roster(commits=(COMMIT, replace(COMMIT, member=9))),
    OPENING,
    Openings(openings=(OPENING,)),
    Offer(
        session=D,
        round=1,
        member=2,
        mask_key=D,
        seed_digest=D,
        boxes={0: bytes(BOX_BYTES), 5: S[:1] * BOX_BYTES},
        signature=S,
    ),
    Inbox(
        session=D,
        round=7,
        active=(0, 1, 2**32 - 1),
        deliveries=(Delivery(sender=1, mask_key=D, seed_digest=D, box=bytes(BOX_BYTES)),),
    ),
    Masked(session=D, round=1, member=0, context=D, vector=b"12345", signature=S),
    Survivors(session=D, round=1, survivors=(1, 2), receipts=(Receipt(member=2, vector=D, signature=S),)),
    Endorsement(session=D, round=2**32 - 1, member=4, signature=S),
    Quorum(session=D, round=1, signatures={1: S, 2: S}),
    Reveal(session=D, round=1, member=1, seeds={2: bytes(SHARE_BYTES)}, keys={}, signature=S),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_messages_come_back(message: Message) -> None:
    data = to_bytes(message)
    assert from_bytes(type(message), data, max_bytes=len(data)) == message
    with pytest.raises(MessageTooLarge):
        from_bytes(type(message), data, max_bytes=len(data) - 1)
    with pytest.raises(UnsupportedVersion):
        from_bytes(type(message), data[:4] + b"\xff" + data[5:], max_bytes=len(data))
    other = MESSAGES[0] if message is not MESSAGES[0] else MESSAGES[2]
    with pytest.raises(WireError, match="kind"):
        from_bytes(type(other), data, max_bytes=len(data))


@given(st.sampled_from(MESSAGES), st.data())
def test_damaged_messages_raise_or_say_what_their_bytes_say(message: Message, data: st.DataObject) -> None:
    good = to_bytes(message)
    place = data.draw(st.integers(18, len(good) - 1))
    damage = data.draw(
        st.sampled_from(
            [
                good[:place],
                good + b"\0",
                good[:place] + bytes([good[place] ^ 255]) + good[place + 1 :],
                good[:place] + S,
            ]
        )
    )
    # The frame's own size is set right, so that the fields are reached.
    damage = good[:10] + struct.pack(">Q", max(0, len(damage) - 20)) + damage[18:]
    try:
        found = from_bytes(type(message), damage, max_bytes=10_000)
    except WireError:
        return
    assert to_bytes(found) == damage


def test_a_large_count_takes_no_memory() -> None:
    data = bytearray(to_bytes(MESSAGES[9]))
    place = data.index(struct.pack(">I", 2), 20 + 32)
    data[place : place + 4] = b"\xff\xff\xff\xff"
    with pytest.raises(WireError, match="count"):
        from_bytes(Quorum, bytes(data), max_bytes=10_000)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (COMMIT, {"run": b""}),
        (COMMIT, {"channel_key": D[:31]}),
        (COMMIT, {"member": 2**32}),
        (MESSAGES[1], {"commits": (COMMIT, COMMIT)}),
        (MESSAGES[3], {"openings": (replace(OPENING, member=4), OPENING)}),
        (MESSAGES[4], {"round": 0}),
        (MESSAGES[4], {"boxes": {1: b""}}),
        (MESSAGES[5], {"active": (1, 1)}),
        (MESSAGES[5], {"active": (2, 1)}),
        (MESSAGES[6], {"context": b""}),
        (MESSAGES[7], {"survivors": (5, 5)}),
        (MESSAGES[8], {"round": 2**32}),
        (MESSAGES[9], {"signatures": {1: b""}}),
        (MESSAGES[10], {"seeds": {1: b""}}),
        (MESSAGES[10], {"keys": {2: bytes(SHARE_BYTES), 1: bytes(SHARE_BYTES)}}),
    ],
)
def test_sizes_and_orders_are_checked_when_a_message_is_made(message: Message, change: dict[str, object]) -> None:
    with pytest.raises(ProtocolViolation):
        replace(message, **change)


@pytest.mark.parametrize(
    ("said", "values"),
    [
        (commit_said, {"pki": D, "run": b"r", "member": 1, "policy": D, "channel_key": D, "commitment": D}),
        (commitment_of, {"run": b"r", "member": 1, "nonce": D}),
        (opening_said, {"roster": D, "member": 1, "nonce": D}),
        (offer_header, {"session": D, "round": 1, "sender": 1, "mask_key": D, "seed_digest": D}),
        (offer_said, {"header": D, "boxes": {1: b"x"}}),
        (context_of, {"session": D, "round": 1, "model": D, "spec": D, "active": (1, 2)}),
        (masked_said, {"context": D, "member": 1, "vector": D}),
        (survivors_said, {"context": D, "survivors": (1, 2)}),
        (reveal_said, {"context": D, "member": 1, "seeds": {1: b"x"}, "keys": {2: b"x"}}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_whatever_is_said_counts(said: Callable[..., bytes], values: dict[str, object]) -> None:
    others: dict[type, object] = {int: 77, bytes: b"other", tuple: (1, 3), dict: {3: b"x"}}
    changed = [said(**values | {name: others[type(value)]}) for name, value in values.items()]
    assert len({said(**values), *changed}) == len(values) + 1


def test_nobody_is_said_to_be_both() -> None:
    left = reveal_said(context=D, member=1, seeds={1: b"x", 2: b"y"}, keys={})
    assert left != reveal_said(context=D, member=1, seeds={1: b"x"}, keys={2: b"y"})
