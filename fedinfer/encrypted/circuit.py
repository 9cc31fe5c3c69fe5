"""What is public of a compiled network, and the private plan that the server runs.

The public circuit says how to lay out features, which keys to make and how to read an answer. It depends on the shapes
of the network and on the sizes of its values; SECURITY.md lists what that gives away.
"""

import hashlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Self

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from fedinfer.encrypted.evaluator import Term
from fedinfer.encrypted.frames import packed_bytes
from fedinfer.encrypted.keys import KeyPlan
from fedinfer.encrypted.packing import Layout
from fedinfer.encrypted.params import Parameters
from fedinfer.encrypted.scheme import Each, Encoder, ServerSide
from fedinfer.encrypted.xof import SEED_BYTES
from fedinfer.errors import EncryptedError, NonFinite, ShapeMismatch, WireError
from fedinfer.wire import Frame, Kind, decode, encode

Floats = NDArray[np.float64]
MAX_CIRCUIT_BYTES = 1 << 24
MAX_LAYOUT_BYTES = 1 << 26
MAX_ROWS = 64
MAX_ROTATIONS = 4096
MAX_ANSWER_LEVEL = 2
# A header says the size of each part in digits.
HEADER_BYTES = 1 << 12
SIZE_DIGITS = 12
FORMAT = 3


@dataclass(frozen=True, kw_only=True)
class PublicInput:
    """One argument of the network: its shape for one example and where its elements lie."""

    shape: tuple[int, ...]
    layout: Layout = field(repr=False)
    bound: float

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))


@dataclass(frozen=True, kw_only=True)
class PublicCircuit:
    """All that a client needs to ask. It holds no weights.

    `rows` is one, and features fill the slots, or the number of slots, and every row has a slot of each ciphertext.
    An answer of a row, or of that many rows, is `answers` ciphertexts with `classes` numbers each (a power of two),
    multiplied by `scale`; the first `outputs` of a row are the network's. `error` bounds what noise changes an output
    by, twice the largest seen on the calibration data; `approximation` is what the polynomials for activations change
    it by there. `about` is whatever the server says of its model (its schema, its labels).
    """

    parameters: Parameters
    keys: KeyPlan
    inputs: tuple[PublicInput, ...]
    rows: int
    outputs: int
    classes: int
    answers: int
    scale: float
    error: float
    approximation: float = 0.0
    about: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        slots, levels = self.parameters.slots, self.parameters.levels
        fits = (
            1 <= self.classes <= slots
            and slots % self.classes == 0
            and self.rows in (1, slots)
            and 1 <= self.outputs <= (self.classes * self.answers if self.rows == 1 else self.answers)
            and (self.rows == 1 or (self.classes == slots and not self.keys.rotations))
            and 1 <= self.keys.answer <= min(levels, MAX_ANSWER_LEVEL)
            and 0 <= self.keys.relinearisation <= levels
            and len(self.keys.rotations) <= MAX_ROTATIONS
            and len({step for step, _ in self.keys.rotations}) == len(self.keys.rotations)
            and all(0 < step < slots and 1 <= level <= levels for step, level in self.keys.rotations)
            and (self.parameters.special or not (self.keys.rotations or self.keys.relinearisation))
            and len(self.inputs) >= 1
            and np.isfinite([self.scale, self.error, self.approximation]).all()
            and self.scale >= 1
            and self.error > 0
            and self.approximation >= 0
        )
        for part in self.inputs:
            held = part.layout.held
            fits = (
                fits
                and held.ndim == 2
                and held.shape[1] >= 1
                and slots % held.shape[1] == 0
                and (self.rows == 1 or held.shape == (part.size, 1))
                and bool((held < part.size).all())
                and np.isfinite(part.bound)
                and part.bound > 0
            )
        if not fits:
            raise EncryptedError("circuit: its keys, layouts and outputs do not fit its parameters")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything public: keys and queries are for one circuit."""
        header, layouts = self._fields()
        return hashlib.sha256(encode(Frame(kind=Kind.CIRCUIT, header=header, body=layouts))).hexdigest()

    @property
    def ciphertexts(self) -> int:
        """Ciphertexts in a query for one row, or for as many as have a slot each."""
        return sum(len(part.layout.held) for part in self.inputs)

    @property
    def max_rows(self) -> int:
        """Rows that one query may hold."""
        return MAX_ROWS if self.rows == 1 else self.rows

    def groups(self, rows: int) -> int:
        """Queries for this many rows: one each, or one for as many as have a slot."""
        return -(-rows // self.rows)

    @property
    def max_key_bytes(self) -> int:
        """Bytes of the evaluation keys, with room for their header."""
        return HEADER_BYTES + SIZE_DIGITS * self.keys.parts() + self.keys.size_bytes(self.parameters)

    @property
    def max_query_bytes(self) -> int:
        """Bytes of the largest query, with room for its header."""
        primes = self.parameters.primes[: self.parameters.levels]
        each = SEED_BYTES + packed_bytes(primes, self.parameters.degree)
        return HEADER_BYTES + (each + SIZE_DIGITS) * self.ciphertexts * self.groups(self.max_rows)

    @property
    def max_answer_bytes(self) -> int:
        """Bytes of the largest answer, with room for its header."""
        each = packed_bytes(self.parameters.primes[: self.keys.answer], self.parameters.degree + self.classes)
        return HEADER_BYTES + (each + SIZE_DIGITS) * self.answers * self.groups(self.max_rows)

    def to_bytes(self) -> bytes:
        """One CIRCUIT frame: the fields as JSON, the layouts compressed."""
        header, layouts = self._fields()
        return encode(Frame(kind=Kind.CIRCUIT, header=header, body=zlib.compress(layouts, 9)))

    def _fields(self) -> tuple[dict[str, Any], bytes]:
        layouts = [np.ascontiguousarray(part.layout.held, "<i4") for part in self.inputs]
        header = {
            "format": FORMAT,
            "parameters": {**asdict(self.parameters), "prime_bits": list(self.parameters.prime_bits)},
            "answer_level": self.keys.answer,
            "relinearisation": self.keys.relinearisation,
            "rotations": [list(pair) for pair in self.keys.rotations],
            "inputs": [
                {"shape": list(part.shape), "held": list(held.shape), "bound": part.bound}
                for part, held in zip(self.inputs, layouts, strict=True)
            ],
            "rows": self.rows,
            "outputs": self.outputs,
            "classes": self.classes,
            "answers": self.answers,
            "scale": self.scale,
            "error": self.error,
            "approximation": self.approximation,
            "about": dict(self.about),
        }
        return header, b"".join(held.tobytes() for held in layouts)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read a CIRCUIT frame.

        Guarantees: its parameters have 128-bit security, so that a server cannot talk a client into weak ones.
        Raises: WireError if it is not one; EncryptedError if its parts do not fit together.
        """
        frame = decode(data, Kind.CIRCUIT, max_bytes=MAX_CIRCUIT_BYTES)
        fields = frame.header
        try:
            if fields["format"] != FORMAT:
                raise WireError(f"circuit: got format {fields['format']}, expected {FORMAT}; update the older side")
            literal = fields["parameters"]
            parameters = Parameters(
                degree=int(literal["degree"]),
                prime_bits=tuple(int(bits) for bits in literal["prime_bits"]),
                special=bool(literal["special"]),
                scale_bits=float(literal["scale_bits"]),
            )
            circuit = cls(
                parameters=parameters,
                keys=KeyPlan(
                    answer=int(fields["answer_level"]),
                    relinearisation=int(fields["relinearisation"]),
                    rotations=tuple((int(step), int(level)) for step, level in fields["rotations"]),
                ),
                inputs=tuple(_inputs(fields["inputs"], frame.body)),
                rows=int(fields["rows"]),
                outputs=int(fields["outputs"]),
                classes=int(fields["classes"]),
                answers=int(fields["answers"]),
                scale=float(fields["scale"]),
                error=float(fields["error"]),
                approximation=float(fields["approximation"]),
                about=dict(fields["about"]),
            )
            # What cannot be written again has no digest.
            _ = circuit.digest
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError, zlib.error) as error:
            raise WireError(f"circuit: a field does not hold ({type(error).__name__})") from None
        return circuit

    def pack(self, arguments: Sequence[Floats]) -> Iterator[Floats]:
        """The slots of each ciphertext of a query for flat features, (n, size) for each input."""
        count = len(arguments[0])
        for start in range(0, count, self.rows):
            for part, rows in zip(self.inputs, arguments, strict=True):
                if self.rows == 1:
                    yield from part.layout.spread(rows[start], self.parameters.slots)
                else:
                    yield from np.pad(rows[start : start + self.rows].T, ((0, 0), (0, max(0, self.rows - count))))

    def split(self, ciphertexts: Sequence[Any]) -> list[Sequence[Any]]:
        """The ciphertexts of each input, out of those of one row or of as many as have a slot each."""
        ends = np.cumsum([len(part.layout.held) for part in self.inputs])
        return [ciphertexts[end - len(part.layout.held) : end] for end, part in zip(ends, self.inputs, strict=True)]

    def unpack(self, numbers: Sequence[Floats], rows: int) -> Floats:
        """The outputs (rows, outputs) from the numbers (classes,) of each ciphertext of an answer."""
        values = np.stack(numbers).reshape(-1, self.answers, self.classes)
        if self.rows == 1:
            return values.reshape(len(values), -1)[:, : self.outputs]
        return np.concatenate([part.T for part in values])[:rows, : self.outputs]

    def arguments(self, features: Any) -> list[Floats]:
        """Features of a query, one array (n, ...) for each input, as flat rows (n, size).

        Raises: as `flat`; EncryptedError if the rows are none or too many for one query.
        """
        flat = self.flat(features)
        if not 1 <= len(flat[0]) <= self.max_rows:
            raise EncryptedError(f"query: got {len(flat[0])} rows, expected 1 to {self.max_rows}")
        return flat

    def flat(self, features: Any) -> list[Floats]:
        """Features, one array (n, ...) for each input, as flat rows (n, size).

        Raises: ShapeMismatch, NonFinite; EncryptedError if a value is out of the circuit's range.
        """
        given = features if isinstance(features, tuple) else (features,)
        if len(given) != len(self.inputs):
            raise EncryptedError(f"features: got {len(given)} arrays, expected {len(self.inputs)}")
        flat: list[Floats] = []
        for array, part in zip(given, self.inputs, strict=True):
            values = np.asarray(array, np.float64)
            if values.ndim < 2 or values.shape[1:] != part.shape or (flat and len(values) != len(flat[0])):
                raise ShapeMismatch(got=values.shape, expected=("n", *part.shape), what="features")
            if not np.isfinite(values).all():
                raise NonFinite("features: got NaN or infinity, expected finite numbers")
            if len(values) and float(np.abs(values).max()) > part.bound:
                raise EncryptedError(
                    f"features: got a value outside the circuit's range, expected at most {part.bound:g} either way"
                )
            flat.append(values.reshape(len(values), part.size))
        return flat


def _inputs(fields: Sequence[Mapping[str, Any]], body: bytes) -> Iterator[PublicInput]:
    unpacker = zlib.decompressobj()
    data = unpacker.decompress(body, MAX_LAYOUT_BYTES)
    if not unpacker.eof or unpacker.unused_data:
        raise ValueError("layouts")
    at = 0
    for part in fields:
        rows, period = (int(number) for number in part["held"])
        if not (1 <= rows <= 4096 and 1 <= period <= 1 << 15):
            raise ValueError("layout")
        held = np.frombuffer(data, "<i4", rows * period, at).reshape(rows, period).astype(np.int64)
        at += 4 * rows * period
        shape = tuple(int(number) for number in part["shape"])
        if not all(1 <= number <= 1 << 24 for number in shape):
            raise ValueError("shape")
        yield PublicInput(shape=shape, layout=Layout(held=np.maximum(held, -1)), bound=float(part["bound"]))
    if at != len(data):
        raise ValueError("layouts")


@dataclass(frozen=True, kw_only=True)
class MapStep:
    """One affine map: for each output ciphertext its terms, then a rescale, folds and a constant.

    `factors` bring each source to `level`; `vectors` are weights in slots, `plain_scales` what each is multiplied by.
    """

    name: str
    target: int
    sources: tuple[int, ...]
    factors: tuple[int, ...]
    level: int
    lower: int
    scale: float
    terms: tuple[tuple[Term, ...], ...]
    vectors: tuple[Floats, ...] = field(repr=False)
    plain_scales: tuple[float, ...] = field(repr=False)
    folds: tuple[tuple[int, ...], ...]
    constants: tuple[Floats, ...] = field(repr=False)
    period: int

    @property
    def turns(self) -> bool:
        return any(term.baby or term.giant for terms in self.terms for term in terms)


@dataclass(frozen=True, kw_only=True)
class ProductStep:
    """Two values multiplied slot by slot, then a rescale."""

    name: str
    target: int
    left: int
    right: int
    factors: tuple[int, int]
    level: int
    lower: int


@dataclass(frozen=True, kw_only=True)
class WideStep:
    """One affine map with an element a ciphertext: whole weights times residues, for all rows at once.

    `weights` (size, all source sizes) hold whole numbers; `constants` (size,) are added at the scale after the rescale.
    """

    name: str
    target: int
    sources: tuple[int, ...]
    factors: tuple[int, ...]
    level: int
    lower: int
    scale: float
    weights: sp.csr_matrix = field(repr=False)
    constants: Floats = field(repr=False)


Step = MapStep | ProductStep | WideStep


@dataclass(frozen=True, kw_only=True)
class PrivateCircuit:
    """The steps of the server. The first values are the inputs; the last step makes the answer."""

    steps: tuple[Step, ...]
    flood: float

    def encode(self, encoder: Encoder, parameters: Parameters) -> dict[int, tuple[list[Any], list[Any]]]:
        """For each map its weights and constants as plaintexts, which are the same for every client."""
        encoded = {}
        for step in self.steps:
            if isinstance(step, MapStep):
                weights = [
                    encoder.encode(vector, scale, step.level, extended=step.turns)
                    for vector, scale in zip(step.vectors, step.plain_scales, strict=True)
                ]
                scale = step.scale
                for prime in parameters.primes[step.lower : step.level]:
                    scale /= prime
                constants = [encoder.encode(vector, scale, step.lower, extended=False) for vector in step.constants]
                encoded[step.target] = (weights, constants)
        return encoded


def execute(
    private: PrivateCircuit,
    encoded: Mapping[int, tuple[list[Any], list[Any]]],
    server: ServerSide,
    inputs: Sequence[Sequence[Any]],
    each: Each = map,
) -> list[Any]:
    """Run the steps: the ciphertexts of each input in, those of the answer out."""
    values: dict[int, Sequence[Any]] = dict(enumerate(inputs))
    for step in private.steps:
        values[step.target] = run_step(step, encoded.get(step.target), server, values, each)
    return list(values[private.steps[-1].target])


def run_step(
    step: Step, encoded: Any, server: ServerSide, values: Mapping[int, Sequence[Any]], each: Each
) -> list[Any]:
    """The ciphertexts of one step's value."""
    if isinstance(step, ProductStep):

        def multiplied(pair: tuple[Any, Any]) -> Any:
            left, right = pair
            a = server.align(left, step.level, step.factors[0])
            b = a if right is left else server.align(right, step.level, step.factors[1])
            return server.rescale(server.multiply(a, b), step.lower)

        return list(each(multiplied, zip(values[step.left], values[step.right], strict=True)))
    sources = [
        server.align(x, step.level, factor)
        for source, factor in zip(step.sources, step.factors, strict=True)
        for x in values[source]
    ]
    if isinstance(step, WideStep):
        return server.weigh(sources, step.weights, step.constants, step.scale, step.lower, each)
    weights, constants = encoded
    out = []
    for x, constant in zip(server.linear(sources, step.terms, weights, step.scale), constants, strict=True):
        y = server.rescale(x, step.lower)
        for steps in step.folds:
            y = server.rotate_and_sum(y, steps)
        out.append(server.add_plain(y, constant))
    return out
