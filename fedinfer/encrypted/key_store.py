"""The only way a secret key reaches a disk: encrypted under a passphrase, and bound to its circuit.

scrypt (RFC 7914) makes an AES-256-GCM key of the passphrase; its cost is fixed here, so a file cannot ask for another.
"""

import os
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from fedinfer.encrypted.circuit import PublicCircuit
from fedinfer.encrypted.client import EncryptedClient
from fedinfer.encrypted.seal import SealSecretSide
from fedinfer.errors import BadUsage, EncryptedError, WireError
from fedinfer.files import replace_file
from fedinfer.wire import Frame, Kind, decode, encode

MAX_FILE_BYTES = 1 << 24
MIN_PASSPHRASE_BYTES = 8
SALT_BYTES, NONCE_BYTES = 16, 12
COST, BLOCK, LANES = 1 << 15, 8, 1


def save_keys(client: EncryptedClient, path: Path, passphrase: bytes) -> None:
    """Write the client's secret key to `path`, encrypted, readable by the owner alone.

    Raises: BadUsage for a passphrase under 8 bytes, or a client of the clear scheme.
    """
    secret = client._secret
    if not isinstance(secret, SealSecretSide):
        raise BadUsage("key store: got a client without a secret key, expected one of CKKS")
    salt, nonce = os.urandom(SALT_BYTES), os.urandom(NONCE_BYTES)
    digest = client._circuit.digest
    body = AESGCM(_key(passphrase, salt)).encrypt(nonce, secret.stored_for_key_store(), digest.encode())
    frame = Frame(kind=Kind.KEY_STORE, header={"circuit": digest}, body=salt + nonce + body)
    replace_file(path, encode(frame), mode=0o600)


def load_keys(circuit: PublicCircuit, path: Path, passphrase: bytes) -> EncryptedClient:
    """The client whose secret key `save_keys` wrote.

    Raises: EncryptedError for a missing or changed file, a wrong passphrase, or keys of another circuit.
    """
    if not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
        raise EncryptedError(f"key store {path}: got no such file, expected one of at most {MAX_FILE_BYTES} bytes")
    try:
        frame = decode(path.read_bytes(), Kind.KEY_STORE, max_bytes=MAX_FILE_BYTES)
    except WireError as error:
        raise EncryptedError(f"key store {path}: {error}") from None
    if frame.header.get("circuit") != circuit.digest:
        raise EncryptedError(f"key store {path}: made for another circuit; make new keys")
    salt, nonce = frame.body[:SALT_BYTES], frame.body[SALT_BYTES : SALT_BYTES + NONCE_BYTES]
    try:
        stored = AESGCM(_key(passphrase, salt)).decrypt(
            nonce, frame.body[SALT_BYTES + NONCE_BYTES :], circuit.digest.encode()
        )
    except (InvalidTag, ValueError):
        raise EncryptedError(f"key store {path}: got a wrong passphrase or a changed file") from None
    return EncryptedClient(circuit, SealSecretSide(circuit.parameters, circuit.keys, stored))


def _key(passphrase: bytes, salt: bytes) -> bytes:
    if len(passphrase) < MIN_PASSPHRASE_BYTES:
        raise BadUsage(f"passphrase: got {len(passphrase)} bytes, expected {MIN_PASSPHRASE_BYTES} or more")
    return Scrypt(salt=salt, length=32, n=COST, r=BLOCK, p=LANES).derive(passphrase)
