"""The client of an encrypted query: makes the keys, encrypts features, decrypts logits.

Adversary: a server that follows the protocol and tries to read the query or the answer. Decrypted CKKS values carry
noise that depends on the secret key (Li and Micciancio 2021, eprint 2020/1533): they are for the key holder's eyes,
and nothing here sends them on.
"""

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedinfer.encrypted.circuit import MAX_CIPHERTEXTS, Floats, PublicCircuit
from fedinfer.encrypted.frames import MAX_ANSWER_BYTES, join, split
from fedinfer.encrypted.scheme import Scheme, SecretSide, TenSeal
from fedinfer.errors import EncryptedError, NonFinite, ShapeMismatch
from fedinfer.wire import Kind


class EncryptedClient:
    """Holds a secret key for one public circuit. The key has no serialiser."""

    def __init__(self, circuit: PublicCircuit, secret: SecretSide) -> None:
        self._circuit = circuit
        self._secret = secret

    @classmethod
    def generate(cls, circuit: PublicCircuit, scheme: Scheme | None = None) -> Self:
        """Make fresh keys for `circuit` from the operating system's randomness."""
        return cls(circuit, (scheme or TenSeal()).secret_side(circuit.parameters, circuit.steps))

    @property
    def max_rows(self) -> int:
        """Rows that one query may hold."""
        return self._circuit.rows_per_ciphertext * MAX_CIPHERTEXTS

    def evaluation_keys(self) -> bytes:
        """The public keys that the server needs; not the secret key."""
        return join(Kind.EVALUATION_KEYS, self._circuit.digest, self._secret.public_keys())

    def encrypt(self, features: NDArray[np.floating[Any]]) -> bytes:
        """A query for features (n, d).

        Guarantees: its size depends on n and the circuit only.
        Raises: ShapeMismatch, NonFinite; EncryptedError for more than `max_rows` rows.
        """
        if features.ndim != 2 or features.shape[1] != self._circuit.spec.inputs:
            raise ShapeMismatch(got=features.shape, expected=f"(n, {self._circuit.spec.inputs})", what="features")
        if not np.isfinite(features).all():
            raise NonFinite("features: got NaN or infinity, expected finite numbers")
        if not 1 <= len(features) <= self.max_rows:
            raise EncryptedError(f"query: got {len(features)} rows, expected 1 to {self.max_rows}")
        size = self._circuit.rows_per_ciphertext
        parts = [
            self._secret.encrypt(self._circuit.pack(features[i : i + size])) for i in range(0, len(features), size)
        ]
        return join(Kind.QUERY, self._circuit.digest, parts)

    def decrypt(self, answer: bytes, *, rows: int) -> Floats:
        """Logits (rows, 1) of an answer to a query of that many rows.

        Raises: WireError or EncryptedError if it is not such an answer.
        """
        size = self._circuit.rows_per_ciphertext
        parts = split(answer, Kind.ANSWER, self._circuit.digest, max_bytes=MAX_ANSWER_BYTES, max_parts=MAX_CIPHERTEXTS)
        if len(parts) != -(-rows // size):
            raise EncryptedError(f"answer: got {len(parts)} ciphertexts, expected {-(-rows // size)}")
        logits = [
            self._circuit.unpack(self._secret.decrypt(part), min(size, rows - i * size)) for i, part in enumerate(parts)
        ]
        return np.concatenate(logits)
