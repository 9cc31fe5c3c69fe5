"""The server of an encrypted query: weights in the clear, queries and answers as ciphertexts.

Adversary: a client that wants the weights. An answer holds its outputs and nothing of any other slot, and it is
re-randomised with an encryption of zero, so that a ciphertext tells no more than its outputs do. Outputs themselves
give a logistic regression away after about as many queries as it has weights; SECURITY.md says so.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fedinfer.encrypted.circuit import execute
from fedinfer.encrypted.compiled import Compiled
from fedinfer.encrypted.frames import join, split, split_rows
from fedinfer.encrypted.scheme import Each, Scheme, ServerSide, TenSeal
from fedinfer.errors import EncryptedError
from fedinfer.wire import Kind


class EncryptedEngine:
    """A served model: its plan with every weight encoded once for all clients.

    Its arithmetic leaves Python's lock, so `workers` threads (one a core, unless said) share the ciphertexts of a
    query; sessions may run in threads of their own too, and all share one copy of keys and weights.
    """

    def __init__(self, compiled: Compiled, scheme: Scheme | None = None, *, workers: int | None = None) -> None:
        self._private = compiled.private
        self._scheme = scheme or TenSeal()
        self.circuit = compiled.public
        self._encoded = compiled.encode(self._scheme) if compiled.encoded is None else compiled.encoded
        self.workers = workers or os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(self.workers, "fedinfer-engine") if self.workers > 1 else None

    def open(self, keys: bytes) -> "EncryptedSession":
        """Check a client's public keys and open a session under them.

        Raises: WireError or EncryptedError if they are not a whole key set for this circuit.
        """
        circuit = self.circuit
        parts = split(
            keys, Kind.EVALUATION_KEYS, circuit.digest, max_bytes=circuit.max_key_bytes, max_parts=circuit.keys.parts()
        )
        return EncryptedSession(self, self._scheme.server_side(circuit.parameters, circuit.keys, parts))

    def each(self, work: Callable[[Any], Any], items: Iterable[Any]) -> Iterable[Any]:
        """`work` on every item, in order, by all workers; not from inside another `each`."""
        every = list(items)
        return map(work, every) if self._pool is None or len(every) == 1 else self._pool.map(work, every)

    def answer(self, server: ServerSide, parts: list[bytes], each: Each) -> list[bytes]:
        """The ciphertexts of the answer to those of one row, or of as many as have a slot each."""
        inputs = self.circuit.split(list(each(server.read, parts)))
        answers = execute(self._private, self._encoded, server, inputs, each)

        def written(answer: Any) -> bytes:
            return server.write(answer, outputs=self.circuit.classes, flood=self._private.flood)

        return list(each(written, answers))


class EncryptedSession:
    """One client's keys and the model."""

    def __init__(self, engine: EncryptedEngine, server: ServerSide) -> None:
        self._engine = engine
        self._server = server

    def run(self, query: bytes) -> bytes:
        """Answer a query.

        Raises: WireError or EncryptedError if it is not a query for this circuit.
        """
        engine, circuit = self._engine, self._engine.circuit
        parts, rows = split_rows(
            query, Kind.QUERY, circuit.digest, max_bytes=circuit.max_query_bytes,
            max_parts=circuit.groups(circuit.max_rows) * circuit.ciphertexts,
        )  # fmt: skip
        expected = circuit.groups(rows) * circuit.ciphertexts
        if len(parts) != expected:
            raise EncryptedError(f"query: got {len(parts)} ciphertexts for {rows} rows, expected {expected}")
        groups = [parts[at : at + circuit.ciphertexts] for at in range(0, len(parts), circuit.ciphertexts)]
        if len(groups) == 1:
            answers = [engine.answer(self._server, groups[0], engine.each)]
        else:
            answers = list(engine.each(lambda group: engine.answer(self._server, group, map), groups))
        return join(Kind.ANSWER, circuit.digest, [part for answer in answers for part in answer], rows=rows)
