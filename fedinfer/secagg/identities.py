"""Who is who: Ed25519 keys of devices, and the PKI file that names them and that devices pin by its digest.

The file is what keeps a server from inventing devices: it is made by the people who run the federation, not by the
server, and reaches each device beside it. A line is only ever added, so that a member's number stays.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedinfer.errors import BadInput, BadUsage, ProtocolViolation
from fedinfer.files import replace_file
from fedinfer.secagg.shamir import Entropy
from fedinfer.secagg.transcripts import transcript

KEY_BYTES, SIGNATURE_BYTES = 32, 64
MAX_FILE_BYTES = 1 << 24
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
FORMAT = "fedinfer PKI 1"


@dataclass(frozen=True, kw_only=True, eq=False)
class Identity:
    """A device's own signing key."""

    private: Ed25519PrivateKey = field(repr=False)
    public: bytes

    @classmethod
    def of(cls, secret: bytes) -> Self:
        """The identity whose private key is these 32 bytes."""
        private = Ed25519PrivateKey.from_private_bytes(secret)
        return cls(private=private, public=private.public_key().public_bytes_raw())

    @classmethod
    def generate(cls, entropy: Entropy) -> Self:
        """A new identity; `entropy` is `os.urandom` but in tests."""
        return cls.of(entropy(KEY_BYTES))

    @classmethod
    def load(cls, path: Path) -> Self:
        """The identity that `save` wrote.

        Raises: BadInput if the file is no such key, or others than its owner may read it.
        """
        if not path.is_file():
            raise BadInput(f"identity {path}: got no such file; make one first")
        if path.stat().st_mode & 0o077:
            raise BadInput(f"identity {path}: got a file that others may read; chmod 600 it, or make a new identity")
        text = path.read_bytes()[: 2 * KEY_BYTES + 2].strip()
        if not re.fullmatch(rb"[0-9a-f]{64}", text):
            raise BadInput(f"identity {path}: got a file that is no identity")
        return cls.of(bytes.fromhex(text.decode()))

    def save(self, path: Path) -> None:
        """Write the key to `path`, readable by its owner alone.

        Raises: BadInput if there is a file already: an identity is not replaced by accident.
        """
        if path.exists():
            raise BadInput(f"identity {path}: got a file already; move it away first")
        replace_file(path, self.private.private_bytes_raw().hex().encode() + b"\n", mode=0o600)

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("an identity holds a secret key and is not copied")

    def sign(self, statement: bytes) -> bytes:
        """The signature of a transcript's digest."""
        return self.private.sign(statement)


@lru_cache(maxsize=1 << 15)
def check_signature(key: bytes, statement: bytes, signature: bytes) -> None:
    """Raises: ProtocolViolation unless `signature` is that of `statement` by `key`.

    Remembered: members of one simulation check the same signatures.
    """
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, statement)
    except (InvalidSignature, ValueError):
        raise ProtocolViolation(
            "signature: got one that is not the member's, expected it over this statement"
        ) from None


@dataclass(frozen=True, kw_only=True)
class PkiFile:
    """The names and public keys of a federation; a member is known by its place in the list."""

    names: tuple[str, ...]
    keys: tuple[bytes, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.keys):
            raise BadInput(f"PKI file: got {len(self.names)} names and {len(self.keys)} keys, expected as many")
        for name, key in zip(self.names, self.keys, strict=True):
            if not NAME.fullmatch(name):
                raise BadInput(f"PKI file: got the name {name[:80]!r}, expected up to 64 letters, digits, dot, - or _")
            if len(key) != KEY_BYTES:
                raise BadInput(f"PKI file: got a key of {len(key)} bytes for {name}, expected {KEY_BYTES}")
        for what, values in (("name", self.names), ("key", self.keys)):
            if len(set(values)) != len(values):
                raise BadInput(f"PKI file: got a {what} twice, expected each once")

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def digest(self) -> bytes:
        """What a device pins."""
        parts = [part for name, key in zip(self.names, self.keys, strict=True) for part in (name.encode(), key)]
        return transcript("pki", *parts)

    def number(self, key: bytes) -> int:
        """The member of this public key.

        Raises: BadUsage if there is none.
        """
        if key not in self.keys:
            raise BadUsage("identity: got a key that the PKI file does not name; add it, and pin the new file")
        return self.keys.index(key)

    def key(self, member: int) -> bytes:
        """The public key of `member`.

        Raises: ProtocolViolation if there is no such member.
        """
        if not 0 <= member < len(self.keys):
            raise ProtocolViolation(f"member: got {member}, expected one of the {len(self.keys)} in the PKI file")
        return self.keys[member]

    @classmethod
    def read(cls, path: Path, *, pinned: str) -> Self:
        """The file at `path`, if its digest is the one that this device pinned (64 hexadecimal digits).

        Raises: BadInput for anything else.
        """
        found = cls._parse(path)
        if found.digest.hex() != pinned:
            raise BadInput(
                f"PKI file {path}: got digest {found.digest.hex()}, expected {pinned}; ask who runs the federation "
                f"whether the file was meant to change"
            )
        return found

    @classmethod
    def _parse(cls, path: Path) -> Self:
        if not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
            raise BadInput(f"PKI file {path}: got no file of at most {MAX_FILE_BYTES} bytes")
        try:
            fields = json.loads(path.read_bytes())
            if fields["format"] != FORMAT:
                raise ValueError
            names = tuple(str(member["name"]) for member in fields["members"])
            keys = tuple(bytes.fromhex(member["key"]) for member in fields["members"])
        except (ValueError, TypeError, KeyError, RecursionError):
            raise BadInput(f"PKI file {path}: got a file of another kind, expected {FORMAT}") from None
        return cls(names=names, keys=keys)

    def save(self, path: Path) -> None:
        """Write the file to `path`, whole or not at all; what was there is replaced."""
        members = [{"name": name, "key": key.hex()} for name, key in zip(self.names, self.keys, strict=True)]
        text = json.dumps({"format": FORMAT, "members": members}, indent=1)
        replace_file(path, text.encode() + b"\n", mode=0o644)


def init(path: Path) -> PkiFile:
    """Begin a PKI file without members.

    Raises: BadInput if there is a file already.
    """
    if path.exists():
        raise BadInput(f"PKI file {path}: got a file already; move it away first")
    empty = PkiFile(names=(), keys=())
    empty.save(path)
    return empty


def add(path: Path, name: str, key: bytes) -> PkiFile:
    """Append a member; its digest changes, and devices must pin the new one.

    Raises: BadInput for a name or key that is there already, or cannot be.
    """
    old = PkiFile._parse(path)
    new = PkiFile(names=(*old.names, name), keys=(*old.keys, key))
    new.save(path)
    return new


def show(path: Path) -> tuple[str, Sequence[tuple[str, str]]]:
    """The digest to pin, and each member's name and key in hexadecimal. Nothing is trusted by showing it."""
    found = PkiFile._parse(path)
    return found.digest.hex(), [(name, key.hex()) for name, key in zip(found.names, found.keys, strict=True)]
