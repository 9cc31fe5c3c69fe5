"""The signing key of a ledger: Ed25519, in a file of its own that only its owner may read.

Reference: RFC 8032 (Ed25519).
"""

import os
import secrets
import stat
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from fedinfer.errors import LedgerError
from fedinfer.files import sync_folder

# What is signed can be taken for nothing else that the same key may sign one day.
CONTEXT = b"fedinfer ledger entry\0"


class SigningKey:
    """A private key; `public` is the other half, in hex."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()

    def __repr__(self) -> str:
        return f"SigningKey(public={self.public!r})"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a signing key is not copied")

    @classmethod
    def generate(cls) -> Self:
        """A fresh key in memory, from the operating system's randomness."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read a key file.

        Raises: LedgerError if it is missing, no Ed25519 key, or open to other users.
        """
        try:
            with path.open("rb") as file:
                mode, data = os.fstat(file.fileno()).st_mode, file.read(4096)
        except OSError as error:
            raise LedgerError(
                f"ledger key {path}: cannot be read ({error.strerror}); without it the ledger can be shown and "
                "verified, but nothing can be released"
            ) from None
        if stat.S_IMODE(mode) & 0o077:
            raise LedgerError(f"ledger key {path}: got mode {stat.S_IMODE(mode):04o}, expected 0600; chmod 600 it")
        try:
            key = load_pem_private_key(data, password=None)
        except (ValueError, TypeError):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise LedgerError(f"ledger key {path}: got a file that is not an Ed25519 key in PEM")
        return cls(key)

    @classmethod
    def open_or_make(cls, path: Path) -> Self:
        """Read the key file, or make it: mode 0600, whole or not there, never in the place of another.

        Raises: LedgerError as `open` does.
        """
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
            try:
                with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                    file.write(pem)
                    file.flush()
                    os.fsync(file.fileno())
                # Unlike a rename, a link never replaces a key that somebody else made in the meantime.
                os.link(unfinished, path)
            except FileExistsError:
                pass
            except OSError as error:
                raise LedgerError(f"ledger key {path}: cannot be written ({error.strerror})") from None
            finally:
                unfinished.unlink(missing_ok=True)
            sync_folder(path.parent)
        return cls.open(path)

    def sign(self, digest: str) -> str:
        """The signature of an entry's hash, both in hex."""
        return self._key.sign(CONTEXT + bytes.fromhex(digest)).hex()


def check_signature(public: str, digest: str, signature: str) -> None:
    """Raises: LedgerError unless `signature` is that of `digest` under the public key (all in hex)."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(
            bytes.fromhex(signature), CONTEXT + bytes.fromhex(digest)
        )
    except (InvalidSignature, ValueError):
        raise LedgerError("got a signature that is not of the ledger's key") from None
