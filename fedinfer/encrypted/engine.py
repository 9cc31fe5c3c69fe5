"""The server of an encrypted query: weights in the clear, queries and answers as ciphertexts.

Adversary: a client that wants the weights. An answer's slots that are not logits are empty, and it is re-randomised
with an encryption of zero, so that a ciphertext tells no more than its logits do. Logits themselves give a logistic
regression away after about as many queries as it has weights; SECURITY.md says so.
"""

from fedinfer.encrypted.circuit import MAX_CIPHERTEXTS, PrivateCircuit, PublicCircuit
from fedinfer.encrypted.frames import MAX_KEY_BYTES, MAX_QUERY_BYTES, join, split
from fedinfer.encrypted.scheme import Scheme, ServerSide, TenSeal
from fedinfer.errors import EncryptedError
from fedinfer.models import Model
from fedinfer.wire import Kind


class EncryptedEngine:
    """A served model."""

    def __init__(self, model: Model, scheme: Scheme | None = None) -> None:
        self._private = PrivateCircuit.of(model)
        self._scheme = scheme or TenSeal()

    @property
    def circuit(self) -> PublicCircuit:
        """What clients may know."""
        return self._private.circuit

    def open(self, keys: bytes) -> "EncryptedSession":
        """Check a client's public keys and open a session under them.

        Raises: WireError or EncryptedError if they are not a whole key set for this circuit.
        """
        parts = split(keys, Kind.EVALUATION_KEYS, self.circuit.digest, max_bytes=MAX_KEY_BYTES, max_parts=3)
        server = self._scheme.server_side(self.circuit.parameters, self.circuit.steps, parts)
        return EncryptedSession(self._private, server)


class EncryptedSession:
    """One client's keys and the model."""

    def __init__(self, private: PrivateCircuit, server: ServerSide) -> None:
        self._private = private
        self._server = server

    def run(self, query: bytes) -> bytes:
        """Answer a query.

        Raises: WireError or EncryptedError if it is not a query for this circuit.
        """
        digest = self._private.circuit.digest
        parts = split(query, Kind.QUERY, digest, max_bytes=MAX_QUERY_BYTES, max_parts=MAX_CIPHERTEXTS)
        return join(Kind.ANSWER, digest, [self._answer(part) for part in parts])

    def _answer(self, part: bytes) -> bytes:
        query = self._server.read(part)
        try:
            return self._server.write(self._private.run(self._server, query))
        # A ciphertext that loads may still be one that SEAL's arithmetic refuses.
        except (RuntimeError, ValueError) as error:
            raise EncryptedError(f"query: the circuit cannot run on it ({type(error).__name__})") from None
