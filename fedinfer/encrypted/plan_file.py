"""A server's plan on disk: one safetensors file with every weight encoded, and a JSON header. No pickle.

It holds the weights. A server reads it in milliseconds instead of compiling; a client never sees it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from fedinfer.encrypted.circuit import MapStep, PrivateCircuit, ProductStep, PublicCircuit, Step, WideStep
from fedinfer.encrypted.evaluator import Term
from fedinfer.encrypted.scheme import TenSeal
from fedinfer.errors import EncryptedError, ModelFileError, WireError
from fedinfer.files import replace_file

FORMAT = 1
KEY = "fedinfer-plan"
MAX_FILE_BYTES = 1 << 32
KINDS: Mapping[str, type[MapStep] | type[ProductStep] | type[WideStep]] = {
    "map": MapStep,
    "product": ProductStep,
    "wide": WideStep,
}
# Fields of a step that are arrays; the others go into the header.
ARRAYS = ("vectors", "constants", "plain_scales", "weights", "terms")
Tensors = dict[str, NDArray[Any]]
Encoded = dict[int, tuple[list[Any], list[Any]]]


def save(compiled: Any, path: Path) -> None:
    """Write a `Compiled` at once: a reader sees the old file or the new one, never a part."""
    public, private = compiled.public, compiled.private
    encoded = compiled.encode(TenSeal()) if compiled.encoded is None else compiled.encoded
    tensors: Tensors = {"public": np.frombuffer(public.to_bytes(), np.uint8)}
    steps = []
    for number, step in enumerate(private.steps):
        kind = next(name for name, made in KINDS.items() if isinstance(step, made))
        if isinstance(step, MapStep):
            weights, constants = encoded[step.target]
            tensors |= {
                f"{number}.vectors": np.stack(step.vectors),
                f"{number}.constants": np.stack(step.constants),
                f"{number}.plain_scales": np.array(step.plain_scales),
                f"{number}.terms": np.array([[k, *asdict(t).values()] for k, ts in enumerate(step.terms) for t in ts]),
                f"{number}.encoded_weights": np.stack(weights),
                f"{number}.encoded_constants": np.stack(constants),
            }
        elif isinstance(step, WideStep):
            tensors |= {
                f"{number}.data": step.weights.data,
                f"{number}.columns": step.weights.indices.astype(np.int64),
                f"{number}.starts": step.weights.indptr.astype(np.int64),
                f"{number}.constants": step.constants,
            }
        fields = {name: value for name, value in vars(step).items() if name not in ARRAYS}
        steps.append({"kind": kind, **fields})
    header = {"format": FORMAT, "flood": private.flood, "steps": steps}
    replace_file(path, to_bytes(tensors, metadata={KEY: json.dumps(header)}))


def is_plan(path: Path) -> bool:
    """Whether a file says that it is a plan."""
    try:
        with safe_open(str(path), framework="np") as file:
            return KEY in (file.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        return False


def load(path: Path) -> tuple[PublicCircuit, PrivateCircuit, Encoded]:
    """Read a plan.

    Raises: ModelFileError if there is no such file, or it is not a whole plan of this format.
    """
    advice = "make one with `fedinfer compile MODEL --out PLAN`"
    if not path.is_file():
        raise ModelFileError(f"plan {path}: got no such file, expected a plan; {advice}")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ModelFileError(f"plan {path}: got more than {MAX_FILE_BYTES} bytes")
    try:
        with safe_open(str(path), framework="np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelFileError(f"plan {path}: got a file that is not safetensors ({error}); {advice}") from None
    if KEY not in metadata:
        raise ModelFileError(f"plan {path}: got safetensors without the header of a plan; {advice}")
    try:
        return _parse(json.loads(metadata[KEY]), tensors)
    except (KeyError, TypeError, ValueError, IndexError, EncryptedError, WireError) as error:
        raise ModelFileError(f"plan {path}: it does not hold ({type(error).__name__}: {error}); {advice}") from None


def _parse(header: Mapping[str, Any], tensors: Tensors) -> tuple[PublicCircuit, PrivateCircuit, Encoded]:
    if header["format"] != FORMAT:
        raise ValueError(f"got format {header['format']}, expected {FORMAT}")
    public = PublicCircuit.from_bytes(tensors["public"].tobytes())
    steps: list[Step] = []
    encoded: Encoded = {}
    for number, fields in enumerate(header["steps"]):
        own = {name.split(".", 1)[1]: tensors[name] for name in tensors if name.startswith(f"{number}.")}
        values = {name: _tuples(value) for name, value in fields.items() if name != "kind"}
        kind = KINDS[fields["kind"]]
        if kind is MapStep:
            values["vectors"], values["constants"] = tuple(own["vectors"]), tuple(own["constants"])
            values["plain_scales"] = tuple(float(scale) for scale in own["plain_scales"])
            values["terms"] = _terms(own["terms"], len(own["constants"]))
            encoded[values["target"]] = (list(own["encoded_weights"]), list(own["encoded_constants"]))
        elif kind is WideStep:
            shape = (len(own["constants"]), sum(_sizes(public, steps)[source] for source in values["sources"]))
            values["weights"] = sp.csr_matrix((own["data"], own["columns"], own["starts"]), shape=shape)
            values["constants"] = own["constants"]
            encoded[values["target"]] = ([], [])
        steps.append(kind(**values))
    return public, PrivateCircuit(steps=tuple(steps), flood=float(header["flood"])), encoded


def _sizes(public: PublicCircuit, steps: Sequence[Step]) -> dict[int, int]:
    sizes = {index: part.size for index, part in enumerate(public.inputs)}
    for step in steps:
        if isinstance(step, WideStep):
            sizes[step.target] = len(step.constants)
        elif isinstance(step, ProductStep):
            sizes[step.target] = sizes[step.left]
    return sizes


def _terms(rows: NDArray[Any], outputs: int) -> tuple[tuple[Term, ...], ...]:
    found: list[list[Term]] = [[] for _ in range(outputs)]
    for output, source, baby, giant, plain in rows.tolist():
        found[output].append(Term(source=source, baby=baby, giant=giant, plain=plain))
    return tuple(tuple(terms) for terms in found)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(inner) for inner in value) if isinstance(value, list) else value
