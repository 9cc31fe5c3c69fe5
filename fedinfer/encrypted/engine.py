"""The server of an encrypted query: weights in the clear, queries and answers as ciphertexts.

Adversary: a client that wants the weights. An answer holds its outputs and nothing of any other slot, and it is
re-randomised with an encryption of zero, so that a ciphertext tells no more than its outputs do. Outputs themselves
give a logistic regression away after about as many queries as it has weights; SECURITY.md says so.
"""

from fedinfer.encrypted.circuit import MAX_ROWS, PublicCircuit, execute
from fedinfer.encrypted.compiler import Compiled
from fedinfer.encrypted.frames import MAX_KEY_BYTES, MAX_QUERY_BYTES, join, split
from fedinfer.encrypted.scheme import Scheme, ServerSide, TenSeal
from fedinfer.errors import EncryptedError
from fedinfer.wire import Kind


class EncryptedEngine:
    """A served model: its plan with every weight encoded once for all clients."""

    def __init__(self, compiled: Compiled, scheme: Scheme | None = None) -> None:
        self._private = compiled.private
        self._scheme = scheme or TenSeal()
        self.circuit = compiled.public
        encoder = self._scheme.encoder(compiled.public.parameters)
        self._encoded = compiled.private.encode(encoder, compiled.public.parameters)

    def open(self, keys: bytes) -> "EncryptedSession":
        """Check a client's public keys and open a session under them.

        Raises: WireError or EncryptedError if they are not a whole key set for this circuit.
        """
        circuit = self.circuit
        parts = split(
            keys, Kind.EVALUATION_KEYS, circuit.digest, max_bytes=MAX_KEY_BYTES, max_parts=circuit.keys.parts()
        )
        return EncryptedSession(self, self._scheme.server_side(circuit.parameters, circuit.keys, parts))


class EncryptedSession:
    """One client's keys and the model."""

    def __init__(self, engine: EncryptedEngine, server: ServerSide) -> None:
        self._engine = engine
        self._server = server

    def run(self, query: bytes) -> bytes:
        """Answer a query.

        Raises: WireError or EncryptedError if it is not a query for this circuit.
        """
        circuit = self._engine.circuit
        parts = split(
            query, Kind.QUERY, circuit.digest, max_bytes=MAX_QUERY_BYTES, max_parts=MAX_ROWS * circuit.ciphertexts
        )
        if len(parts) % circuit.ciphertexts:
            raise EncryptedError(f"query: got {len(parts)} ciphertexts, expected a multiple of {circuit.ciphertexts}")
        answers: list[bytes] = []
        for start in range(0, len(parts), circuit.ciphertexts):
            answers += self._row(circuit, parts[start : start + circuit.ciphertexts])
        return join(Kind.ANSWER, circuit.digest, answers)

    def _row(self, circuit: PublicCircuit, parts: list[bytes]) -> list[bytes]:
        inputs, at = [], 0
        for part in circuit.inputs:
            count = len(part.layout.held)
            inputs.append([self._server.read(data) for data in parts[at : at + count]])
            at += count
        answers = execute(self._engine._private, self._engine._encoded, self._server, inputs)
        return [
            self._server.write(answer, outputs=circuit.classes, flood=self._engine._private.flood) for answer in answers
        ]
