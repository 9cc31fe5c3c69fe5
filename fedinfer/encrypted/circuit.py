"""What is public of a served model, and the private circuit that the server runs.

Layout: a row takes `stride` slots, one block of `block` slots for each hidden unit (one block in all for logistic
regression); the client repeats the row's features in every block. A layer is then one product with the weights laid
out alike and a sum over rotations. The activation x/2 + x²/4 is ((x + 1)² - 1) / 4, so its constants fold into the
layers around it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedinfer.encrypted.params import PARAMETERS, Parameters
from fedinfer.encrypted.scheme import Ciphertext, ServerSide
from fedinfer.errors import BadUsage, EncryptedError, WireError
from fedinfer.models import Model, ModelSpec
from fedinfer.wire import Frame, Kind, decode, encode

Floats = NDArray[np.float64]
MAX_CIRCUIT_BYTES = 1 << 20
MAX_CIPHERTEXTS = 64


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _doublings(start: int, end: int) -> tuple[int, ...]:
    steps = []
    while start < end:
        steps.append(start)
        start *= 2
    return tuple(steps)


@dataclass(frozen=True, kw_only=True)
class PublicCircuit:
    """All that a client needs to ask, and nothing that depends on a weight: shapes, parameters, the public schema."""

    spec: ModelSpec
    schema: Mapping[str, Any] = field(repr=False)
    schema_digest: str
    labels: tuple[str, str]
    threshold: float

    def __post_init__(self) -> None:
        if self.spec.family not in PARAMETERS:
            raise EncryptedError(
                f"model family {self.spec.family!r}: it has no circuit; expected {', '.join(PARAMETERS)}"
            )
        if not 0.0 < self.threshold < 1.0:
            raise EncryptedError(f"threshold: got {self.threshold}, expected a probability between 0 and 1")
        if self.stride > self.parameters.slots:
            raise EncryptedError(
                f"model: got {self.spec.inputs} inputs and {self.spec.hidden} hidden units: {self.stride} slots, "
                f"expected at most {self.parameters.slots}"
            )

    @property
    def parameters(self) -> Parameters:
        return PARAMETERS[self.spec.family]

    @property
    def block(self) -> int:
        """Slots of one copy of the features."""
        return _power_of_two(self.spec.inputs)

    @property
    def stride(self) -> int:
        """Slots of one row."""
        return self.block * (_power_of_two(self.spec.hidden) if self.spec.family == "mlp" else 1)

    @property
    def rows_per_ciphertext(self) -> int:
        return self.parameters.slots // self.stride

    @property
    def inner_steps(self) -> tuple[int, ...]:
        """Rotations that sum a block."""
        return _doublings(1, self.block)

    @property
    def outer_steps(self) -> tuple[int, ...]:
        """Rotations that sum the blocks of a row."""
        return _doublings(self.block, self.stride)

    @property
    def steps(self) -> tuple[int, ...]:
        return self.inner_steps + self.outer_steps

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything public: keys and queries are for one circuit."""
        return hashlib.sha256(json.dumps(self._fields(), sort_keys=True).encode()).hexdigest()

    def _fields(self) -> dict[str, Any]:
        return {
            "spec": asdict(self.spec),
            "schema": dict(self.schema),
            "schema_digest": self.schema_digest,
            "labels": list(self.labels),
            "threshold": self.threshold,
            "parameters": asdict(self.parameters),
        }

    def to_bytes(self) -> bytes:
        """One CIRCUIT frame."""
        return encode(Frame(kind=Kind.CIRCUIT, header=self._fields()))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read a CIRCUIT frame.

        Raises: WireError if it is not one; EncryptedError if its parameters are not the ones this version uses,
        so that a server cannot talk a client into weak ones.
        """
        fields = decode(data, Kind.CIRCUIT, max_bytes=MAX_CIRCUIT_BYTES).header
        try:
            negative, positive = fields["labels"]
            circuit = cls(
                spec=ModelSpec(**fields["spec"]),
                schema=fields["schema"],
                schema_digest=str(fields["schema_digest"]),
                labels=(str(negative), str(positive)),
                threshold=float(fields["threshold"]),
            )
            named = Parameters(**{**fields["parameters"], "prime_bits": tuple(fields["parameters"]["prime_bits"])})
        except (KeyError, TypeError, ValueError, BadUsage) as error:
            raise WireError(f"circuit: a field does not hold ({error})") from None
        if named != circuit.parameters:
            raise EncryptedError(f"circuit: got parameters {named}, expected {circuit.parameters}")
        return circuit

    def pack(self, features: NDArray[np.floating[Any]]) -> Floats:
        """Lay out rows (n, d), n at most `rows_per_ciphertext`, in the slots of one ciphertext."""
        slots = np.zeros((self.rows_per_ciphertext, self.stride // self.block, self.block))
        slots[: len(features), :, : self.spec.inputs] = features[:, None, :]
        return slots.reshape(-1)

    def unpack(self, slots: Floats, rows: int) -> Floats:
        """The logits (rows, 1) of a decrypted answer."""
        return slots[:: self.stride][:rows, None].copy()


def public_circuit(model: Model) -> PublicCircuit:
    """The public part of a model."""
    return PublicCircuit(
        spec=model.spec,
        schema=model.schema,
        schema_digest=model.schema_digest,
        labels=model.labels,
        threshold=model.threshold,
    )


@dataclass(frozen=True, kw_only=True)
class PrivateCircuit:
    """The server's vectors of slots: the weights, laid out."""

    circuit: PublicCircuit
    first: Floats = field(repr=False)
    first_bias: Floats = field(repr=False)
    second: Floats | None = field(repr=False)
    bias: float = field(repr=False)

    @classmethod
    def of(cls, model: Model) -> Self:
        """Lay out the weights of `model` for its circuit."""
        circuit = public_circuit(model)
        tensors = [tensor.double().numpy() for tensor in model.state.values()]
        weight, bias = tensors[0], tensors[1]
        units = circuit.stride // circuit.block
        first = np.zeros((circuit.rows_per_ciphertext, units, circuit.block))
        first[:, : len(weight), : circuit.spec.inputs] = weight
        starts = np.zeros_like(first)
        second = None
        if len(tensors) == 4:
            starts[:, : len(weight), 0] = bias + 1.0
            outgoing = np.zeros_like(first)
            outgoing[:, : len(weight), 0] = tensors[2][0] / 4.0
            second, last = outgoing.reshape(-1), float(tensors[3][0] - tensors[2].sum() / 4.0)
        else:
            last = float(bias[0])
        return cls(circuit=circuit, first=first.reshape(-1), first_bias=starts.reshape(-1), second=second, bias=last)

    def run(self, server: ServerSide, query: Ciphertext) -> Ciphertext:
        """Logits in the first slot of each row, zero in every other slot, re-randomised.

        Rotate-and-sum leaves partial sums of weights in the slots between; one answer would give them all away.
        """
        mask = np.zeros(self.circuit.parameters.slots)
        mask[:: self.circuit.stride] = 1.0
        x = server.rotate_and_sum(server.times(query, self.first), self.circuit.inner_steps)
        if self.second is not None:
            x = server.square(server.plus(x, self.first_bias))
            x = server.rotate_and_sum(server.times(x, self.second), self.circuit.outer_steps)
        return server.rerandomise(server.plus(server.times(x, mask), mask * self.bias))
