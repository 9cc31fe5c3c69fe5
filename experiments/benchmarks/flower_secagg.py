"""Flower's own SecAgg+ client code, stage by stage: for timings, and for a server that cheats (tests/attacks).

It calls the four stages of `flwr.client.mod.secure_aggregation.secaggplus_mod` with their own checks, as the mod does.
"""

import importlib
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import numpy as np
from flwr.app import ConfigRecord
from flwr.common import bytes_to_ndarray, ndarrays_to_parameters
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.quantization import dequantize
from flwr.common.secure_aggregation.secaggplus_constants import Key, Stage
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)
from numpy.typing import NDArray

# The package has a function of the module's name.
flower = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
logging.getLogger("flwr").setLevel(logging.ERROR)
CLIP, TARGET, MODULUS = 3.0, 1 << 20, 1 << 32
Floats = NDArray[Any]
Keys = Mapping[int, tuple[bytes, bytes]]


class FlowerNode:
    """One client of SecAgg+, through the stages."""

    def __init__(self, number: int, *, threshold: int, shares: int) -> None:
        self.state = flower.SecAggPlusState()
        self.state.nid, self.number = number, number
        settings = {
            Key.STAGE: Stage.SETUP,
            Key.SAMPLE_NUMBER: shares,
            Key.SHARE_NUMBER: shares,
            Key.THRESHOLD: threshold,
            Key.CLIPPING_RANGE: CLIP,
            Key.TARGET_RANGE: TARGET,
            Key.MOD_RANGE: MODULUS,
            Key.MAX_WEIGHT: 1.0,
        }
        found = flower._setup(self.state, self._next(Stage.SETUP, settings))
        self.keys = (found[Key.PUBLIC_KEY_1], found[Key.PUBLIC_KEY_2])

    def _next(self, stage: str, configs: dict[str, Any]) -> ConfigRecord:
        record = ConfigRecord({**configs, Key.STAGE: stage})
        flower.check_stage(self.state.current_stage, record)
        self.state.current_stage = stage
        del record[Key.STAGE]
        flower.check_configs(stage, record)
        return record

    def share(self, keys: Keys) -> dict[int, bytes]:
        """The encrypted shares for each other node."""
        configs = {str(number): list(pair) for number, pair in keys.items()}
        found = flower._share_keys(self.state, self._next(Stage.SHARE_KEYS, configs))
        return dict(zip(found[Key.DESTINATION_LIST], found[Key.CIPHERTEXT_LIST], strict=True))

    def masked(self, boxes: Mapping[int, bytes], vector: Sequence[float] | Floats, examples: int = 1) -> list[Floats]:
        """The weight and the vector, masked."""
        configs = {Key.CIPHERTEXT_LIST: list(boxes.values()), Key.SOURCE_LIST: list(boxes)}
        parameters = ndarrays_to_parameters([np.asarray(vector, np.float64)])
        found = flower._collect_masked_vectors(
            self.state, self._next(Stage.COLLECT_MASKED_VECTORS, configs), examples, parameters
        )
        return [bytes_to_ndarray(data) for data in found[Key.MASKED_PARAMETERS]]

    def unmask(self, alive: list[int], dead: list[int]) -> list[tuple[int, bytes]]:
        """The shares of seeds of those alive, then of keys of those dead."""
        configs = {Key.ACTIVE_NODE_ID_LIST: alive, Key.DEAD_NODE_ID_LIST: dead}
        found = flower._unmask(self.state, self._next(Stage.UNMASK, configs))
        return list(zip(found[Key.NODE_ID_LIST], found[Key.SHARE_LIST], strict=True))


def shared(nodes: Mapping[int, FlowerNode]) -> dict[int, dict[int, bytes]]:
    """An honest first half: what each node received."""
    keys = {number: node.keys for number, node in nodes.items()}
    sent = {number: node.share(keys) for number, node in nodes.items()}
    return {to: {sender: boxes[to] for sender, boxes in sent.items() if sender != to} for to in nodes}


def new_keys() -> tuple[tuple[bytes, bytes], tuple[bytes, bytes]]:
    """Private and public keys of the server's own making."""
    pairs = [generate_key_pairs() for _ in range(2)]
    return (
        (private_key_to_bytes(pairs[0][0]), private_key_to_bytes(pairs[1][0])),
        (public_key_to_bytes(pairs[0][1]), public_key_to_bytes(pairs[1][1])),
    )


def secret_of(shares: Sequence[bytes]) -> bytes:
    """The secret of as many shares as the threshold."""
    return combine_shares(list(shares))


def agreed(private: bytes, public: bytes) -> bytes:
    """What both ends of a key agreement have."""
    return generate_shared_key(bytes_to_private_key(private), bytes_to_public_key(public))


def unmasked(masked: list[Floats], victim: int, seed: bytes, pair_seeds: Mapping[int, bytes]) -> Floats:
    """The victim's vector, with its own mask and those of all pairs taken off."""
    shapes = [part.shape for part in masked]
    found = [part - mask for part, mask in zip(masked, pseudo_rand_gen(seed, MODULUS, shapes), strict=True)]
    for other, pair_seed in pair_seeds.items():
        sign = 1 if victim > other else -1
        masks = pseudo_rand_gen(pair_seed, MODULUS, shapes)
        found = [part - sign * mask for part, mask in zip(found, masks, strict=True)]
    return dequantize([part % MODULUS for part in found[1:]], CLIP, TARGET)[0]
