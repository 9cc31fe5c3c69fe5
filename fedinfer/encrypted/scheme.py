"""The seam between circuits and cryptography: one circuit runs under CKKS for real and in the clear for tests.

A `SecretSide` belongs to the client and holds the secret key; it has no serialiser. A `ServerSide` holds the client's
public keys only. An `Encoder` makes plaintexts, once for all clients. Ciphertexts cross as bytes.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from fedinfer.encrypted.evaluator import Term
from fedinfer.encrypted.keys import KeyPlan
from fedinfer.encrypted.params import Parameters

Floats = NDArray[np.float64]
# Applies a function to every item, in order, on one thread or several.
Each = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


class SecretSide(Protocol):
    """The client's half: keys, encryption and decryption."""

    def public_keys(self) -> Sequence[bytes]: ...
    def encrypt(self, slots: Floats) -> bytes: ...
    def decrypt(self, answer: bytes, *, outputs: int, scale: float) -> Floats: ...


class Encoder(Protocol):
    """Plaintexts: vectors of slots at a scale and level, ready to multiply (`extended` for use between turns)."""

    def encode(self, slots: Floats, scale: float, level: int, *, extended: bool) -> Any: ...


class ServerSide(Protocol):
    """The server's half: arithmetic on vectors of slots that it cannot see. Ciphertexts have `level` and `scale`."""

    def read(self, query: bytes) -> Any: ...
    def write(self, answer: Any, *, outputs: int, flood: float) -> bytes: ...
    def linear(
        self, sources: Sequence[Any], outputs: Sequence[Sequence[Term]], plains: Sequence[Any], scale: float
    ) -> list[Any]: ...
    def rotate_and_sum(self, x: Any, steps: Sequence[int]) -> Any: ...
    def multiply(self, x: Any, y: Any) -> Any: ...
    def add_plain(self, x: Any, plain: Any) -> Any: ...
    def rescale(self, x: Any, level: int) -> Any: ...
    def align(self, x: Any, level: int, factor: int) -> Any: ...
    def weigh(
        self, sources: Sequence[Any], weights: sp.csr_matrix, constants: Floats, scale: float, level: int, each: Each
    ) -> list[Any]: ...


class Scheme(Protocol):
    """How to make the parts for given parameters and keys."""

    def secret_side(self, parameters: Parameters, plan: KeyPlan) -> SecretSide: ...
    def server_side(self, parameters: Parameters, plan: KeyPlan, keys: Sequence[bytes]) -> ServerSide: ...
    def encoder(self, parameters: Parameters) -> Encoder: ...


class TenSeal:
    """CKKS: SEAL, through TenSEAL's bindings, holds the secrets; the server computes with `evaluator`."""

    def secret_side(self, parameters: Parameters, plan: KeyPlan) -> SecretSide:
        from fedinfer.encrypted.seal import SealSecretSide

        return SealSecretSide(parameters, plan)

    def server_side(self, parameters: Parameters, plan: KeyPlan, keys: Sequence[bytes]) -> ServerSide:
        from fedinfer.encrypted.residues import ResidueServerSide

        return ResidueServerSide(parameters, plan, keys)

    def encoder(self, parameters: Parameters) -> Encoder:
        from fedinfer.encrypted.residues import ResidueEncoder

        return ResidueEncoder(parameters)
