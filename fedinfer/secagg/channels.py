"""Keys that two members agree on, and sealed boxes between them: X25519, HKDF-SHA256, AES-256-GCM."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedinfer.errors import ProtocolViolation
from fedinfer.secagg.transcripts import transcript

KEY_BYTES = 32
TAG_BYTES = 16
# Rounds that a member may miss in a row.
MAX_SKIP = 1000
NEXT, BOX = transcript("next round"), transcript("box")


@dataclass(frozen=True, kw_only=True, eq=False)
class KeyPair:
    """An X25519 key and its public half."""

    private: X25519PrivateKey = field(repr=False)
    public: bytes

    @classmethod
    def of(cls, secret: bytes) -> Self:
        """The pair whose private key is these 32 bytes."""
        private = X25519PrivateKey.from_private_bytes(secret)
        return cls(private=private, public=private.public_key().public_bytes_raw())

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a key pair holds a secret and is not copied")


def agree(own: KeyPair, public: bytes) -> bytes:
    """The secret that both ends of an X25519 agreement have.

    Raises: ProtocolViolation for a public key of another size or of small order (RFC 7748, section 6.1).
    """
    try:
        return own.private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise ProtocolViolation("public key: got one that gives no secret, expected an X25519 key") from None


def derive(secret: bytes, info: bytes) -> bytes:
    """32 bytes of HKDF-SHA256 (RFC 5869) for one purpose: `info` is the transcript that names it."""
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=info).derive(secret)


def mask_seed(own: KeyPair, public: bytes, *, context: bytes, pair: tuple[int, int]) -> bytes:
    """The seed of the mask between the two members of `pair` in the round of `context`; the same at both ends."""
    return derive(agree(own, public), transcript("pair mask", context, *sorted(pair), *sorted((own.public, public))))


def own_seed(seed: bytes, *, context: bytes, member: int) -> bytes:
    """The seed of a member's own mask in the round of `context`."""
    return derive(seed, transcript("own mask", context, member))


@dataclass(frozen=True, kw_only=True, eq=False)
class Chains:
    """Keys shared with each neighbour for one direction, that move on from round to round and not back.

    Whoever takes them off a device later does not open the boxes of earlier rounds.
    """

    round: int
    keys: Mapping[int, bytes] = field(repr=False)

    @classmethod
    def agree(cls, own: KeyPair, others: Mapping[int, bytes], *, session: bytes, member: int) -> tuple[Self, Self]:
        """To and from each of `others` by their channel keys, for round 1; each direction has its own.

        Raises: ProtocolViolation for a key that gives no secret.
        """
        to, back = {}, {}
        for other, public in others.items():
            shared = agree(own, public)
            to[other] = derive(shared, transcript("chain", session, member, other))
            back[other] = derive(shared, transcript("chain", session, other, member))
        return cls(round=1, keys=to), cls(round=1, keys=back)

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("chains of keys are secret and are not copied")

    def at(self, round: int) -> Self:
        """The chains as they are in `round`.

        Raises: ProtocolViolation for a round that is past, or more than `MAX_SKIP` ahead.
        """
        if not 0 <= round - self.round <= MAX_SKIP:
            raise ProtocolViolation(
                f"round: got {round}, expected {self.round} to {self.round + MAX_SKIP}; set up again"
            )
        keys = dict(self.keys)
        for _ in range(self.round, round):
            keys = {other: derive(key, NEXT) for other, key in keys.items()}
        return type(self)(round=round, keys=keys)

    def box_key(self, other: int) -> bytes:
        """The key of this round's box to or from `other`."""
        return derive(self.keys[other], BOX)


def seal(key: bytes, *, round: int, header: bytes, text: bytes) -> bytes:
    """Encrypt `text` and bind it to `header`. A key seals one text, and the round is its nonce."""
    return AESGCM(key).encrypt(round.to_bytes(12, "big"), text, header)


def unseal(key: bytes, *, round: int, header: bytes, box: bytes) -> bytes:
    """The text of `seal`.

    Raises: ProtocolViolation if anything of it was changed, or it was sealed for another member, round or session.
    """
    try:
        return AESGCM(key).decrypt(round.to_bytes(12, "big"), box, header)
    except (InvalidTag, ValueError):
        raise ProtocolViolation("box: got one that does not open, expected its sender's for this round") from None
