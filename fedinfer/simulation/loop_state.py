"""The state of our server loop on disk: whole or not there, and only for the run that it came from."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictBytes
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from fedinfer.errors import BadUsage, CheckpointError
from fedinfer.files import replace_file
from fedinfer.rules import RuleState

KEY = "fedinfer-simulation"
FORMAT = 1
WEIGHTS, RULE, CONTROL = "weights.", "rule.", "control."


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where the loop keeps its state, every `every` rounds and at the end; with `resume` it goes on from there.

    Raises: BadUsage if `every` is not a whole number of at least 1.
    """

    path: Path
    every: int = 1
    resume: bool = False

    def __post_init__(self) -> None:
        if type(self.every) is not int or self.every < 1:
            raise BadUsage(f"checkpoint: got every={self.every}, expected a whole number of at least 1")


@dataclass(frozen=True, kw_only=True)
class LoopState:
    """All that is needed to go on after `round`.

    `weights` is a `state_dict`, `control` SCAFFOLD's c, empty for other algorithms. `nodes` holds what the nodes keep
    between rounds, by node id. `releases` counts those that a plan of clients has made or may have made. `begun` are
    the nodes of a round that was begun and, as long as they are here, not finished: what they released is spent,
    whether or not anybody saw it.
    """

    round: int
    weights: Mapping[str, Tensor] = field(repr=False)
    rule_state: RuleState = field(repr=False)
    nodes: dict[int, RecordDict] = field(repr=False)
    control: Mapping[str, NDArray[Any]] = field(default_factory=dict, repr=False)
    releases: int = 0
    begun: tuple[int, ...] | None = field(default=None, repr=False)


def save_state(state: LoopState, path: Path, *, digest: str) -> None:
    """Write `state` to `path` atomically and durably."""
    header = {
        "format": FORMAT,
        "run": digest,
        "round": state.round,
        "releases": state.releases,
        "begun": state.begun is not None,
    }
    kept = [recorddict_to_proto(record).SerializeToString() for record in state.nodes.values()]
    tensors = {WEIGHTS + name: tensor.detach().cpu().contiguous() for name, tensor in state.weights.items()}
    for prefix, values in ((RULE, state.rule_state), (CONTROL, state.control)):
        tensors |= {prefix + name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in values.items()}
    tensors |= {
        "begun": _whole(state.begun or ()),
        "node_ids": _whole(tuple(state.nodes)),
        "node_bytes": _whole([len(data) for data in kept]),
        "nodes": torch.from_numpy(np.frombuffer(b"".join(kept), np.uint8).copy()),
    }
    replace_file(path, to_bytes(_apart(tensors), metadata={KEY: json.dumps(header)}))


def load_state(path: Path, *, digest: str) -> LoopState:
    """Read a state.

    Guarantees: `load_state` of what `save_state` wrote is equal to it, bit for bit.
    Raises: CheckpointError if there is none, it is not whole, or it belongs to a run with other settings.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path}: got no such file; run once without resuming")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if header["format"] != FORMAT:
            raise CheckpointError(f"checkpoint {path}: got format {header['format']}, expected {FORMAT}")
        if header["run"] != digest:
            raise CheckpointError(
                f"checkpoint {path}: got one of a run with other settings; repeat them, or start without resuming"
            )
        return LoopState(
            round=header["round"],
            weights=_under(WEIGHTS, tensors),
            rule_state={name: tensor.numpy() for name, tensor in _under(RULE, tensors).items()},
            control={name: tensor.numpy() for name, tensor in _under(CONTROL, tensors).items()},
            nodes=_nodes(tensors),
            releases=header["releases"],
            begun=tuple(tensors["begun"].tolist()) if header["begun"] else None,
        )
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, DecodeError) as error:
        raise CheckpointError(f"checkpoint {path}: got a file that is not a checkpoint ({error})") from None


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _nodes(tensors: Mapping[str, Tensor]) -> dict[int, RecordDict]:
    data, nodes, start = tensors["nodes"].numpy().tobytes(), {}, 0
    for node_id, size in zip(tensors["node_ids"].tolist(), tensors["node_bytes"].tolist(), strict=True):
        nodes[node_id] = recorddict_from_proto(RecordDictBytes.FromString(data[start : start + size]))
        start += size
    return nodes


def _whole(numbers: Sequence[int]) -> Tensor:
    values: NDArray[np.int64] = np.asarray(numbers, np.int64)
    return torch.from_numpy(values)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, each in memory of its own: a weight that stands in two places is written twice."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return found
