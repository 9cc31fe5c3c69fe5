"""The device's side of an encrypted query: fetch the circuit, make keys, ask, decrypt. Nothing decrypted is sent on."""

import hashlib
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from fedinfer.data import Schema, from_json
from fedinfer.encrypted import EncryptedClient, PublicCircuit
from fedinfer.errors import EncryptedError

from .transport import Transport

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a server says of its model; all of it public."""

    circuit: PublicCircuit
    schema: Schema

    labels: tuple[str, str]
    threshold: float


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Answers (n,) and what they cost. `latency_ms` is each round trip: encrypt, send, compute, receive, decrypt."""

    logits: Floats = field(repr=False)
    probabilities: Floats = field(repr=False)
    keygen_ms: float
    latency_ms: tuple[float, ...]
    key_bytes: int
    bytes_up: int
    bytes_down: int


def describe(url: str) -> Served:
    """Fetch and check the public circuit of the server at `url`.

    Raises: RemoteError, WireError or EncryptedError; SchemaError if its schema does not hold.
    """
    with Transport(url) as transport:
        circuit = PublicCircuit.from_bytes(transport.send("GET", "/v1/circuit"))
    about = circuit.about
    try:
        schema, digest = from_json(about["schema"]), about["schema_digest"]
        negative, positive = (str(label) for label in about["labels"])
        threshold = float(about["threshold"])
    except (KeyError, TypeError, ValueError) as error:
        raise EncryptedError(f"{url}: the circuit does not say what it answers ({type(error).__name__})") from None
    if schema.digest() != digest or [part.shape for part in circuit.inputs] != [(schema.width,)]:
        raise EncryptedError(f"{url}: the server's schema is not the one its model was trained with")
    if circuit.outputs != 1 or not 0.0 < threshold < 1.0:
        raise EncryptedError(f"{url}: got {circuit.outputs} outputs and threshold {threshold}, expected a logit")
    return Served(circuit=circuit, schema=schema, labels=(negative, positive), threshold=threshold)


def ask(url: str, served: Served, features: NDArray[np.floating[Any]], *, rows_per_query: int | None = None) -> Asked:
    """Ask about features (n, d) under fresh keys, `rows_per_query` at a time (default: as many as fit).

    Guarantees: the server gets public keys and ciphertexts only; their sizes depend on n and the circuit alone.
    Raises: RemoteError, WireError or EncryptedError; ShapeMismatch or NonFinite for the features.
    """
    began = time.perf_counter()
    client = EncryptedClient.generate(served.circuit)
    keys = client.evaluation_keys()
    keygen_ms = (time.perf_counter() - began) * 1e3
    digest = hashlib.sha256(keys).hexdigest()
    size = min(rows_per_query or client.max_rows, client.max_rows)
    logits: list[Floats] = []
    latency_ms: list[float] = []
    bytes_up = bytes_down = 0
    with Transport(url) as transport:
        transport.send("PUT", f"/v1/keys/{digest}", keys)
        for start in range(0, len(features), size):
            began = time.perf_counter()
            rows = features[start : start + size]
            query = client.encrypt(rows)
            answer = transport.send("POST", f"/v1/query/{digest}", query)
            logits.append(client.decrypt(answer)[:, 0])
            latency_ms.append((time.perf_counter() - began) * 1e3)
            bytes_up, bytes_down = bytes_up + len(query), bytes_down + len(answer)
    every = np.concatenate(logits) if logits else np.zeros(0)
    return Asked(
        logits=every,
        probabilities=np.asarray(expit(every), np.float64),
        keygen_ms=keygen_ms,
        latency_ms=tuple(latency_ms),
        key_bytes=len(keys),
        bytes_up=bytes_up,
        bytes_down=bytes_down,
    )
