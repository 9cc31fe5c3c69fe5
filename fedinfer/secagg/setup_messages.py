"""What members and server say to each other before the first round, once for many rounds.

Every message of a member is signed over all that it says: the functions `..._said` make what is signed. A message's
sizes are checked when it is made; what it *means* is checked by whoever receives it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

from fedinfer.errors import ProtocolViolation
from fedinfer.secagg.channels import KEY_BYTES
from fedinfer.secagg.checks import check_bytes, check_members
from fedinfer.secagg.identities import SIGNATURE_BYTES
from fedinfer.secagg.transcripts import DIGEST_BYTES, transcript
from fedinfer.wire import Kind

NONCE_BYTES = 32
MAX_RUN_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class Commit:
    """A member's first word: the key of its boxes, and a commitment to its part of the session's randomness."""

    KIND: ClassVar = Kind.SUM_COMMIT
    run: bytes
    member: int
    policy: bytes
    channel_key: bytes
    commitment: bytes
    signature: bytes

    def __post_init__(self) -> None:
        check_members("commit", (self.member,))
        if not 1 <= len(self.run) <= MAX_RUN_BYTES:
            raise ProtocolViolation(f"run: got {len(self.run)} bytes, expected 1 to {MAX_RUN_BYTES}")
        check_bytes("policy", self.policy, DIGEST_BYTES)
        check_bytes("channel key", self.channel_key, KEY_BYTES)
        check_bytes("commitment", self.commitment, DIGEST_BYTES)
        check_bytes("signature", self.signature, SIGNATURE_BYTES)


def commit_said(*, pki: bytes, run: bytes, member: int, policy: bytes, channel_key: bytes, commitment: bytes) -> bytes:
    """What the member of a `Commit` signs."""
    return transcript("commit", pki, run, member, policy, channel_key, commitment)


def commitment_of(*, run: bytes, member: int, nonce: bytes) -> bytes:
    """Hides and binds `nonce`, for this member and run alone."""
    return transcript("commitment", run, member, nonce)


@dataclass(frozen=True, kw_only=True)
class Roster:
    """Everybody's commit: who takes part in this session."""

    KIND: ClassVar = Kind.SUM_ROSTER
    commits: tuple[Commit, ...]

    def __post_init__(self) -> None:
        check_members("roster", (commit.member for commit in self.commits))

    @classmethod
    def of(cls, commits: Mapping[int, Commit]) -> Self:
        """The roster of these, by member."""
        return cls(commits=tuple(commits[member] for member in sorted(commits)))

    @cached_property
    def digest(self) -> bytes:
        """Two rosters are the same, or not: of all that the commits say, and of their signatures."""
        parts: list[bytes | int] = []
        for c in self.commits:
            parts += (c.run, c.member, c.policy, c.channel_key, c.commitment, c.signature)
        return transcript("roster", *parts)


@dataclass(frozen=True, kw_only=True)
class Opening:
    """A member's part of the randomness, shown once it saw the roster, and for this roster alone."""

    KIND: ClassVar = Kind.SUM_OPENING
    roster: bytes
    member: int
    nonce: bytes
    signature: bytes

    def __post_init__(self) -> None:
        check_members("opening", (self.member,))
        check_bytes("roster", self.roster, DIGEST_BYTES)
        check_bytes("nonce", self.nonce, NONCE_BYTES)
        check_bytes("signature", self.signature, SIGNATURE_BYTES)


def opening_said(*, roster: bytes, member: int, nonce: bytes) -> bytes:
    """What the member of an `Opening` signs."""
    return transcript("opening", roster, member, nonce)


@dataclass(frozen=True, kw_only=True)
class Openings:
    """Everybody's opening."""

    KIND: ClassVar = Kind.SUM_OPENINGS
    openings: tuple[Opening, ...]

    def __post_init__(self) -> None:
        check_members("openings", (opening.member for opening in self.openings))

    @classmethod
    def of(cls, openings: Mapping[int, Opening]) -> Self:
        """These, by member."""
        return cls(openings=tuple(openings[member] for member in sorted(openings)))
