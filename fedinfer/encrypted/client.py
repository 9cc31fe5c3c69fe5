"""The client of an encrypted query: makes the keys, encrypts features, decrypts answers.

Adversary: a server that follows the protocol and tries to read the query or the answer. Decrypted CKKS values carry
noise that depends on the secret key, and whoever sees enough of them finds the key (Li and Micciancio 2021, eprint
2020/1533): what `decrypt` returns is for the key holder's eyes, and only what `release` returns may be shared.
"""

import math
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedinfer.encrypted import noise
from fedinfer.encrypted.chain import TAIL
from fedinfer.encrypted.circuit import Floats, PublicCircuit
from fedinfer.encrypted.frames import join, split_rows
from fedinfer.encrypted.sampling import gaussian
from fedinfer.encrypted.scheme import Scheme, SecretSide, TenSeal
from fedinfer.errors import BadUsage, EncryptedError
from fedinfer.wire import Kind


class EncryptedClient:
    """Holds a secret key for one public circuit. The key has no serialiser."""

    def __init__(self, circuit: PublicCircuit, secret: SecretSide) -> None:
        self._circuit = circuit
        self._secret = secret
        self._released = 0

    @classmethod
    def generate(cls, circuit: PublicCircuit, scheme: Scheme | None = None) -> Self:
        """Make fresh keys for `circuit` from the operating system's randomness."""
        return cls(circuit, (scheme or TenSeal()).secret_side(circuit.parameters, circuit.keys))

    @property
    def max_rows(self) -> int:
        """Rows that one query may hold."""
        return self._circuit.max_rows

    def evaluation_keys(self) -> bytes:
        """The public keys that the server needs; not the secret key."""
        return join(Kind.EVALUATION_KEYS, self._circuit.digest, self._secret.public_keys())

    def encrypt(self, features: NDArray[np.floating[Any]] | tuple[NDArray[np.floating[Any]], ...]) -> bytes:
        """A query for features (n, ...), or a tuple of them for several inputs.

        Guarantees: its size depends on n and the circuit only.
        Raises: ShapeMismatch, NonFinite; EncryptedError for too many rows or a value out of the circuit's range.
        """
        arguments = self._circuit.arguments(features)
        parts = [self._secret.encrypt(slots) for slots in self._circuit.pack(arguments)]
        return join(Kind.QUERY, self._circuit.digest, parts, rows=len(arguments[0]))

    def decrypt(self, answer: bytes) -> Floats:
        """The outputs (n, outputs) of an answer to a query of n rows.

        Raises: WireError or EncryptedError if it is not an answer.
        """
        circuit = self._circuit
        parts, rows = split_rows(
            answer, Kind.ANSWER, circuit.digest, max_bytes=circuit.max_answer_bytes,
            max_parts=circuit.groups(circuit.max_rows) * circuit.answers,
        )  # fmt: skip
        expected = circuit.groups(rows) * circuit.answers
        if len(parts) != expected or rows > circuit.max_rows:
            raise EncryptedError(f"answer: got {len(parts)} ciphertexts for {rows} rows, expected {expected}")
        numbers = [self._secret.decrypt(part, outputs=circuit.classes, scale=circuit.scale) for part in parts]
        return circuit.unpack(numbers, rows)

    def release(self, answer: bytes, *, releases: int, bits: int = 30, round_to: float | None = None) -> Floats:
        """The outputs (n, outputs) with noise that hides the key, rounded: what may be shown to others.

        The bound on the noise of a circuit is that for rows like those it was calibrated on.

        Guarantees: `releases` numbers released under one key, by calls that all state that many, tell them apart from
        ones made without the key with an advantage of at most 2^(-bits / 2); the noise is Gaussian with deviation
        error * sqrt(12 * releases) * 2^(bits / 2), and the result a multiple of a quarter of it, or of `round_to` if
        that is larger.
        Raises: as `decrypt`; BadUsage for bits or releases below one, or fewer releases than numbers that this
        client has released, with those of this answer.
        Reference: Li, Micciancio, Schultz and Sorrell 2022, eprint 2022/816, theorem 3.
        """
        outputs = self.decrypt(answer)
        needed = self._released + outputs.size
        if bits < 1 or releases < needed:
            raise BadUsage(f"release: got {releases} releases and {bits} bits, expected {needed} and 1 or more")
        self._released = needed
        # What the encryption of zero adds is known here, whatever the server says of its circuit.
        circuit = self._circuit
        least = TAIL * noise.answered(circuit.parameters.degree, circuit.classes) / circuit.scale
        deviation = max(circuit.error, least) * math.sqrt(12.0 * releases) * 2.0 ** (bits / 2)
        grid = max(deviation / 4, round_to or 0.0)
        noisy: Floats = np.rint((outputs + deviation * gaussian(outputs.size).reshape(outputs.shape)) / grid) * grid
        return noisy

    def labels(self, answer: bytes, *, releases: int, bits: int = 30) -> NDArray[np.int64]:
        """The decision for each row of `release`, (n,): the largest output, or 1 if a single one is not negative."""
        released = self.release(answer, releases=releases, bits=bits)
        decided = released.argmax(axis=1) if released.shape[1] > 1 else released[:, 0] >= 0
        return np.asarray(decided, np.int64)
