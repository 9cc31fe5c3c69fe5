"""A run's state on the operator's disk after each round: whole or not there, and only for the run it came from."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from fedinfer.errors import CheckpointError
from fedinfer.files import replace_file

from .rounds import RoundRecord, RoundState

KEY = "fedinfer-checkpoint"
FORMAT = 1
RULE = "rule."


def save_checkpoint(state: RoundState, path: Path, *, config_digest: str) -> None:
    """Write `state` to `path` atomically and durably."""
    header = {
        "format": FORMAT,
        "config": config_digest,
        "run": state.run,
        "round": state.round,
        "history": [asdict(record) for record in state.history],
    }
    vectors = {"weights": state.weights} | {RULE + name: vector for name, vector in state.rule_state.items()}
    arrays = {name: np.ascontiguousarray(vector) for name, vector in vectors.items()}
    replace_file(path, to_bytes(arrays, metadata={KEY: json.dumps(header)}))


def load_checkpoint(path: Path, *, config_digest: str) -> RoundState:
    """Read a checkpoint.

    Guarantees: going on from it gives bit for bit the weights that the uninterrupted run would have, given the same
    noise.
    Raises: CheckpointError if there is none, it is not whole, or it belongs to a run with other settings.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path}: got no such file; run once without --resume")
    try:
        with safe_open(str(path), framework="np") as file:
            header = json.loads((file.metadata() or {})[KEY])
            vectors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if header["format"] != FORMAT:
            raise CheckpointError(f"checkpoint {path}: got format {header['format']}, expected {FORMAT}")
        if header["config"] != config_digest:
            raise CheckpointError(
                f"checkpoint {path}: got one of a run with other settings; repeat them, or start without --resume"
            )
        return RoundState(
            run=header["run"],
            round=header["round"],
            weights=vectors["weights"],
            rule_state={name.removeprefix(RULE): v for name, v in vectors.items() if name.startswith(RULE)},
            history=tuple(RoundRecord(**record) for record in header["history"]),
        )
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path}: got a file that is not a checkpoint ({error})") from None
