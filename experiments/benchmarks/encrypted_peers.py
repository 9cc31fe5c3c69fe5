"""The peers of the encrypted benchmark, each in the Python of its own environment: stock TenSEAL, Orion, Concrete-ML.

It imports nothing of fedinfer. Without arguments it says which peers this Python has. With a peer and a folder that
`Network.save` wrote it makes keys, prints one line of facts, and then for each line with the number of a query answers
it and prints what that took: whoever holds the other end decides when, so that measurements of two sides alternate.

Server time is a query in, an answer out: bytes where the peer has them (TenSEAL, Concrete-ML), objects in one process
where it has not (Orion), which favours it.
"""

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Layers = tuple[tuple[Any, ...], ...]
PACKAGES = {"tenseal": "tenseal", "orion": "orion-fhe", "concrete": "concrete-ml"}
# Bits of modulus that ring degrees 2^12 and up bear at 128-bit security (HomomorphicEncryption.org's standard).
SECURE_BITS = {12: 109, 13: 218, 14: 438, 15: 881}
# Above so many table look-ups a query takes Concrete-ML minutes.
MAX_LOOKUPS = 1000
# A turn ends after so many queries, or with the query during which so many seconds are over.
TURN_QUERIES, TURN_S = 3, 1.0


@dataclass(frozen=True, kw_only=True)
class Network:
    """A trained chain of layers and rows to ask about, as arrays, for any library to build.

    A layer is ("linear", inputs, outputs), ("conv", inputs, outputs, kernel, stride), ("pool", kernel), ("square",) or
    ("flatten",); the weights of the third are `arrays["2.weight"]` and `arrays["2.bias"]`. `bound` is at least the
    largest output.
    """

    layers: Layers
    bound: float
    arrays: Mapping[str, Floats] = field(repr=False)
    queries: Floats = field(repr=False)
    calibration: Floats = field(repr=False)

    def save(self, folder: Path) -> None:
        """Write it for the process of a peer."""
        np.savez(folder / "rows.npz", queries=self.queries, calibration=self.calibration)
        arrays: dict[str, Any] = dict(self.arrays)
        np.savez(folder / "weights.npz", **arrays)
        facts = {"layers": self.layers, "bound": self.bound}
        (folder / "network.json").write_text(json.dumps(facts), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Network":
        """Read what `save` wrote."""
        facts = json.loads((folder / "network.json").read_text(encoding="utf-8"))
        rows = np.load(folder / "rows.npz")
        return cls(
            layers=tuple(tuple(layer) for layer in facts["layers"]),
            bound=facts["bound"],
            arrays=dict(np.load(folder / "weights.npz")),
            queries=rows["queries"],
            calibration=rows["calibration"],
        )

    @property
    def depth(self) -> int:
        """Multiplications in a row."""
        return sum(kind != "flatten" for kind, *_ in self.layers)

    def weights(self, index: int) -> tuple[Floats, Floats]:
        return self.arrays[f"{index}.weight"], self.arrays[f"{index}.bias"]


def built(layers: Layers, library: Any, square: type) -> list[Any]:
    """The layers as modules of `library`, torch.nn or one that is called like it."""
    makers = {
        "linear": library.Linear, "conv": library.Conv2d, "pool": library.AvgPool2d, "flatten": library.Flatten,
        "square": square,
    }  # fmt: skip
    return [makers[kind](*sizes) for kind, *sizes in layers]


class Side(Protocol):
    """A library under test: a client that encrypts and decrypts, and a server."""

    def facts(self) -> dict[str, Any]: ...
    def encrypt(self, features: Floats) -> Any: ...
    def serve(self, query: Any) -> Any: ...
    def decrypt(self, answer: Any) -> Floats: ...


def measure(side: Side, features: Floats) -> dict[str, Any]:
    """Ask once: milliseconds of each part, processor milliseconds of the server, bytes if there are any, the answer."""
    started = time.perf_counter()
    query = side.encrypt(features)
    encrypted, processor = time.perf_counter(), time.process_time()
    answer = side.serve(query)
    served, processor = time.perf_counter(), time.process_time() - processor
    outputs = side.decrypt(answer)
    ended = time.perf_counter()
    return {
        "encrypt_ms": 1e3 * (encrypted - started),
        "server_ms": 1e3 * (served - encrypted),
        "server_cpu_ms": 1e3 * processor,
        "decrypt_ms": 1e3 * (ended - served),
        "total_ms": 1e3 * (ended - started),
        "up_bytes": len(query) if isinstance(query, bytes) else None,
        "down_bytes": len(answer) if isinstance(answer, bytes) else None,
        "answer": np.asarray(outputs, np.float64).reshape(-1).tolist(),
    }


def turn(side: Side, queries: Floats, start: int) -> list[dict[str, Any]]:
    """A few queries one after another, from number `start` on; the same rule for every side."""
    began, measured = time.perf_counter(), []
    for index in range(start, start + TURN_QUERIES):
        number = index % len(queries)
        measured.append({"query": number} | measure(side, queries[number : number + 1]))
        if time.perf_counter() - began > TURN_S:
            break
    return measured


class StockTenSeal:
    """TenSEAL's own operations and nothing below them, with the tightest parameters that answer right.

    A logistic regression needs one level and a scale that SEAL's primes are close to: 30 bits at N = 4096, both faster
    and three orders more exact than 20. Other networks take 26 bits a multiplication at N = 8192, as TenSEAL's
    tutorial does. The weights of the last layer are divided by a power of two, so that outputs fit above the scale.

    `mm` expects its vector repeated over all slots and keeps it so; adding a list fills the first slots only, and the
    next `mm` is then wrong. A bias in the middle is therefore an encrypted vector, which TenSEAL repeats, made once
    with the client's public key: right, and as fast. The last bias may be a list.
    """

    def __init__(self, network: Network) -> None:
        import tenseal

        kinds = [kind for kind, *_ in network.layers]
        if "pool" in kinds or "conv" in kinds[1:]:
            raise NotImplementedError("it has one convolution, as the first layer, and no pooling")
        self._ts = tenseal
        degree, bits, scale = 8192, [31, *[26] * self._levels(network.layers), 31], 26
        if kinds == ["linear"] and network.layers[0][2] == 1:
            degree, bits, scale = 4096, [38, 30, 41], 30
        room = 2.0 ** (bits[0] - scale - 1)
        self._factor = max(1.0, 2.0 ** np.ceil(np.log2(1.25 * network.bound / room)))
        self._client = tenseal.context(tenseal.SCHEME_TYPE.CKKS, degree, coeff_mod_bit_sizes=bits)
        self._client.global_scale = 2.0**scale
        self._client.generate_galois_keys()
        keys = self._client.serialize(
            save_public_key=True, save_secret_key=False, save_galois_keys=True, save_relin_keys=True
        )
        self._server = tenseal.context_from(keys)
        self._facts = {"parameters": f"N={degree} {bits}, scale 2^{scale}", "keys_bytes": len(keys)}
        self._conv: tuple[int, int] | None = None
        self._windows = 0
        self._stages = [stage for index in range(len(network.layers)) for stage in self._stage(network, index)]
        if self._conv:
            side = network.queries.shape[-1]
            self._windows = ((side - self._conv[0]) // self._conv[1] + 1) ** 2

    @staticmethod
    def _levels(layers: Layers) -> int:
        """A convolution takes a second level, to pack its channels."""
        return sum({"flatten": 0, "conv": 2}.get(kind, 1) for kind, *_ in layers)

    def _stage(self, network: Network, index: int) -> list[tuple[Any, ...]]:
        kind, *sizes = network.layers[index]
        if kind == "flatten":
            return []
        if kind == "square":
            return [("square",)]
        weight, bias = network.weights(index)
        if kind == "conv":
            self._conv = (sizes[2], sizes[3])
            return [("conv", weight[:, 0].tolist(), bias.tolist())]
        if index < len(network.layers) - 1:
            return [("mm", weight.T.tolist(), self._ts.ckks_vector(self._server, bias.tolist()))]
        weight, bias = weight / self._factor, bias / self._factor
        if weight.shape[0] == 1:
            return [("dot", weight[0].tolist(), bias.tolist())]
        return [("mm", weight.T.tolist(), bias.tolist())]

    def facts(self) -> dict[str, Any]:
        return self._facts

    def encrypt(self, features: Floats) -> bytes:
        if self._conv:
            kernel, stride = self._conv
            image = features[0, 0].tolist()
            vector, _ = self._ts.im2col_encoding(self._client, image, kernel, kernel, stride)
        else:
            vector = self._ts.ckks_vector(self._client, features.reshape(-1).tolist())
        data: bytes = vector.serialize()
        return data

    def serve(self, query: bytes) -> bytes:
        x = self._ts.ckks_vector_from(self._server, query)
        for kind, *arguments in self._stages:
            if kind == "square":
                x.square_()
            elif kind == "conv":
                kernels, biases = arguments
                channels = [
                    x.conv2d_im2col(kernel, self._windows) + bias for kernel, bias in zip(kernels, biases, strict=True)
                ]
                x = self._ts.CKKSVector.pack_vectors(channels)
            else:
                weight, bias = arguments
                x = (x.dot(weight) if kind == "dot" else x.mm(weight)) + bias
        data: bytes = x.serialize()
        return data

    def decrypt(self, answer: bytes) -> Floats:
        vector = self._ts.ckks_vector_from(self._client, answer)
        numbers: Floats = np.array(vector.decrypt()) * self._factor
        return numbers


class Orion:
    """Orion on Lattigo: the smallest ring of real slots that has 26 bits a level; all in one process.

    Levels take the bits that 128-bit security leaves in that ring, 40 at most: answers grow more exact, not slower.
    """

    def __init__(self, network: Network) -> None:
        import orion
        import orion.nn as on
        import torch

        class Chain(on.Module):  # type: ignore[misc]
            def __init__(self, modules: Sequence[Any]) -> None:
                super().__init__()
                self.names = [f"layer{index}" for index in range(len(modules))]
                for name, module in zip(self.names, modules, strict=True):
                    setattr(self, name, module)

            def forward(self, x: Any) -> Any:
                for name in self.names:
                    x = getattr(self, name)(x)
                return x

        extra = min(2, network.depth)
        log_degree, bits = next(
            (log_degree, bits)
            for log_degree, secure in SECURE_BITS.items()
            if (bits := min(40, (secure - 3 * (1 + extra)) // (1 + network.depth + extra))) >= 26
        )
        moduli, special = [bits + 3, *[bits] * network.depth], [bits + 3] * extra
        ckks = {
            "LogN": log_degree, "LogQ": moduli, "LogP": special, "LogScale": bits, "H": 1 << log_degree,
            "RingType": "ConjugateInvariant",
        }  # fmt: skip
        own = {
            "margin": 2, "embedding_method": "hybrid", "backend": "lattigo", "fuse_modules": True, "debug": False,
            "diags_path": "", "keys_path": "", "io_mode": "none",
        }  # fmt: skip
        modules = built(network.layers, on, on.Quad)
        for index, module in enumerate(modules):
            if network.layers[index][0] in ("linear", "conv"):
                weight, bias = (torch.tensor(array, dtype=torch.float32) for array in network.weights(index))
                module.weight.data, module.bias.data = weight, bias
        self._orion, self._torch, self._net = orion, torch, Chain(modules)
        self._scheme = orion.init_scheme({"ckks_params": ckks, "orion": own})
        self._net.eval()
        self._outputs = len(network.weights(len(modules) - 1)[1])
        orion.fit(self._net, torch.tensor(network.calibration[:1], dtype=torch.float32))
        self._level = orion.compile(self._net)
        self._net.he()
        self._facts = {"parameters": f"N=2^{log_degree} {moduli} | {special}", "keys_bytes": None}

    def facts(self) -> dict[str, Any]:
        return self._facts

    def encrypt(self, features: Floats) -> Any:
        tensor = self._torch.tensor(features, dtype=self._torch.float32)
        return self._orion.encrypt(self._orion.encode(tensor, self._level))

    def serve(self, query: Any) -> Any:
        return self._net(query)

    def decrypt(self, answer: Any) -> Floats:
        return np.array(answer.decrypt().decode().reshape(-1)[: self._outputs].tolist())


class ConcreteMl:
    """Concrete-ML: six bits a value, table look-ups rounded to six; the evaluation keys stay deserialised."""

    def __init__(self, network: Network) -> None:
        import torch
        from concrete import fhe
        from concrete.ml.torch.compile import compile_torch_model

        class Square(torch.nn.Module):
            def forward(self, x: Any) -> Any:
                return x**2

        modules = built(network.layers, torch.nn, Square)
        lookups: list[int] = []
        for module in modules:
            if isinstance(module, Square):
                module.register_forward_hook(lambda *seen: lookups.append(seen[2].numel()))
        net = torch.nn.Sequential(*modules)
        net(torch.tensor(network.queries[:1], dtype=torch.float32))
        if sum(lookups) > MAX_LOOKUPS:
            raise NotImplementedError(f"{sum(lookups):,} table look-ups a query, which take minutes")
        net = torch.nn.Sequential(*built(network.layers, torch.nn, Square))
        net.load_state_dict({name: torch.tensor(array) for name, array in network.arrays.items()})
        self._module = compile_torch_model(
            net.float().eval(), network.calibration[:200].astype(np.float32), n_bits=6, rounding_threshold_bits=6
        )
        self._fhe, self._circuit = fhe, self._module.fhe_circuit
        self._circuit.client.keys.generate()
        keys = self._circuit.client.evaluation_keys.serialize()
        self._keys = fhe.EvaluationKeys.deserialize(keys)
        self._facts = {"parameters": "n_bits=6, rounding 6", "keys_bytes": len(keys)}

    def facts(self) -> dict[str, Any]:
        return self._facts

    def encrypt(self, features: Floats) -> bytes:
        data: bytes = self._circuit.client.encrypt(*self._quantised(features)).serialize()
        return data

    def _quantised(self, features: Floats) -> tuple[Any, ...]:
        quantised = self._module.quantize_input(features.astype(np.float32))
        return quantised if isinstance(quantised, tuple) else (quantised,)

    def serve(self, query: bytes) -> bytes:
        answer = self._circuit.server.run(self._fhe.Value.deserialize(query), evaluation_keys=self._keys)
        data: bytes = answer.serialize()
        return data

    def decrypt(self, answer: bytes) -> Floats:
        decrypted = self._circuit.client.decrypt(self._fhe.Value.deserialize(answer))
        return np.asarray(self._module.dequantize_output(decrypted), np.float64)


SIDES: Mapping[str, type[StockTenSeal] | type[Orion] | type[ConcreteMl]] = {
    "tenseal": StockTenSeal,
    "orion": Orion,
    "concrete": ConcreteMl,
}


def installed() -> dict[str, str]:
    """The peers that this Python has, with their versions."""
    found = {}
    for name, package in PACKAGES.items():
        try:
            found[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main(arguments: Sequence[str]) -> None:
    """Say which peers there are, or be one of them until standard input ends."""
    # Compilers write what they do to standard output; it is for our lines alone.
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if not arguments:
        print(json.dumps(installed()), file=lines, flush=True)
        return
    name, folder = arguments
    network = Network.load(Path(folder))
    started = time.perf_counter()
    try:
        side: Side = SIDES[name](network)
    except NotImplementedError as reason:
        print(json.dumps({"refused": str(reason)}), file=lines, flush=True)
        return
    facts = side.facts() | {"version": installed()[name], "ready_s": time.perf_counter() - started}
    print(json.dumps(facts), file=lines, flush=True)
    for line in sys.stdin:
        print(json.dumps(turn(side, network.queries, int(line))), file=lines, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
