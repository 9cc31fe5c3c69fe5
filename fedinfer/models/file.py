"""A model on disk: one safetensors file whose header says in JSON what the model is. No pickle."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import nn

from fedinfer.errors import BadUsage, ModelFileError
from fedinfer.files import replace_file
from fedinfer.models.families import ModelSpec, build

FORMAT = 1
KEY = "fedinfer"
MAX_FILE_BYTES = 1 << 28


@dataclass(frozen=True, kw_only=True)
class Model:
    """Weights and all that is needed to use them.

    `schema` is the public schema as JSON, `schema_digest` its digest; `threshold` is the probability from
    which a row is called positive (a public choice, never tuned on private rows); `labels` are the names of
    the negative and the positive answer; `privacy` is the report card of the training.
    """

    spec: ModelSpec
    state: Mapping[str, torch.Tensor] = field(repr=False)
    schema: Mapping[str, Any] = field(repr=False)
    schema_digest: str
    labels: tuple[str, str] = ("negative", "positive")
    threshold: float = 0.5
    privacy: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold < 1.0:
            raise BadUsage(f"threshold: got {self.threshold}, expected a probability between 0 and 1")

    def module(self) -> nn.Module:
        """The torch module in evaluation mode, with these weights."""
        net = build(self.spec)
        net.load_state_dict(dict(self.state))
        return net.eval()


def save(model: Model, path: Path) -> None:
    """Write `model` to `path` at once: a reader sees the old file or the new one, never a part."""
    header = {
        "format": FORMAT,
        "spec": asdict(model.spec),
        "schema": dict(model.schema),
        "schema_digest": model.schema_digest,
        "labels": list(model.labels),
        "threshold": model.threshold,
        "privacy": dict(model.privacy),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state.items()}
    data = to_bytes(tensors, metadata={KEY: json.dumps(header, sort_keys=True)})
    replace_file(path, data)


def load(path: Path) -> Model:
    """Read a model.

    Raises: ModelFileError if there is no such file, or it is not a whole model of this format.
    """
    advice = "make one with `fedinfer train ... --out MODEL`"
    if not path.is_file():
        raise ModelFileError(f"model {path}: got no such file, expected a model; {advice}")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ModelFileError(f"model {path}: got more than {MAX_FILE_BYTES} bytes")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelFileError(f"model {path}: got a file that is not safetensors ({error}); {advice}") from None
    if KEY not in metadata:
        raise ModelFileError(f"model {path}: got safetensors without a fedinfer header; {advice}")
    try:
        return _parse(json.loads(metadata[KEY]), state)
    except (KeyError, TypeError, ValueError, BadUsage) as error:
        raise ModelFileError(f"model {path}: the header does not hold ({error}); {advice}") from None


def _parse(header: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> Model:
    if header["format"] != FORMAT:
        raise ValueError(f"got format {header['format']}, expected {FORMAT}")
    spec = ModelSpec(**header["spec"])
    expected = {name: tuple(tensor.shape) for name, tensor in build(spec).state_dict().items()}
    got = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if got != expected:
        raise ValueError(f"got tensors {got}, expected {expected}")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in state.values()):
        raise ValueError("got weights that are not finite")
    negative, positive = header["labels"]
    return Model(
        spec=spec,
        # Another order of names would be another flat vector.
        state={name: state[name].to(torch.float32) for name in expected},
        schema=header["schema"],
        schema_digest=header["schema_digest"],
        labels=(str(negative), str(positive)),
        threshold=float(header["threshold"]),
        privacy=header["privacy"],
    )
