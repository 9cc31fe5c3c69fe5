"""Secure sums: the client's and the server's work, beside Flower's SecAgg+ primitives and flow in the same run.

What bounds it is AES: a mask of d words takes the cipher's time for 4·d bytes and one addition of as many, both
measured here on pieces that fit the cache; the table says how many times that floor it takes. The rest of a client's
work (key agreements, shares, signatures) does not grow with d.

What comes before the masks is told apart: clipping, rotating and rounding beside Flower's quantisation, which does not
rotate, and exact noise beside NumPy's floats, which Flower would add and which are no secret noise.

CPU seconds of one thread, medians of interleaved runs; matrix products have one too, or a second core's waiting counts.

    python -m experiments.benchmarks.secagg [--quick] [--json FILE] [--sweep PLOT.png]
"""

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from threadpoolctl import threadpool_limits

from experiments.benchmarks.flower_secagg import MODULUS, FlowerNode, agreed, new_keys
from fedinfer.privacy import DistributedPlan, Poisson, discrete_gaussian, os_noise
from fedinfer.secagg import identities, shamir
from fedinfer.secagg.channels import KeyPair, mask_seed
from fedinfer.secagg.masks import PIECE_BYTES, SumSpec, Words, add_mask
from fedinfer.secagg.parameters import Policy
from fedinfer.secagg.rehearsal import make_pki, set_up

MODEL = bytes(32)
BOUND = 1 << 20


def cpu_ms(*steps: Callable[[], object], runs: int) -> list[float]:
    """The median CPU milliseconds of each step, run in turns."""
    seen: list[list[float]] = [[] for _ in steps]
    for _ in range(runs):
        for step, times in zip(steps, seen, strict=True):
            started = time.process_time()
            step()
            times.append(1e3 * (time.process_time() - started))
    return [statistics.median(times) for times in seen]


def primitives(length: int, runs: int) -> dict[str, Any]:
    """Client work a neighbour, beside Flower's and the floor, at the neighbours computed for 1,000 clients."""
    parameters = Policy().parameters(clients=1000, members=1000)
    count, threshold = parameters.most_neighbours, parameters.threshold
    words, theirs = np.zeros(length, np.uint32), np.zeros(length, np.int64)
    piece = np.zeros(PIECE_BYTES // 4, np.uint32)
    zeros, buffer = bytes(PIECE_BYTES), bytearray(PIECE_BYTES + 15)
    cipher = Cipher(algorithms.AES128(bytes(16)), modes.CTR(bytes(16))).encryptor()
    stream = np.frombuffer(buffer, np.uint32, count=len(piece))
    pieces = length / len(piece)

    def floor() -> None:
        for _ in range(int(pieces)):
            cipher.update_into(zeros, buffer)
            np.add(piece, stream, out=piece)

    def flowers_mask() -> None:
        np.add(theirs, pseudo_rand_gen(bytes(32), MODULUS, [(length,)])[0], out=theirs)

    mask, floor_ms, flower = cpu_ms(lambda: add_mask(words, bytes(32), sign=1), floor, flowers_mask, runs=runs)
    floor_ms *= pieces / int(pieces)
    ann, bob = KeyPair.of(os.urandom(32)), KeyPair.of(os.urandom(32))
    (flowers_secret, _), (_, flowers_public) = new_keys()
    key, flowers_key = cpu_ms(
        lambda: mask_seed(ann, bob.public, context=MODEL, pair=(1, 2)),
        lambda: agreed(flowers_secret, flowers_public),
        runs=5 * runs,
    )
    secret = os.urandom(32)
    split, flowers_split = cpu_ms(
        lambda: shamir.split(secret, threshold=threshold, count=count, entropy=os.urandom),
        lambda: create_shares(secret, threshold, count),
        runs=max(3, runs // 3),
    )
    shares = shamir.split(secret, threshold=threshold, count=count, entropy=os.urandom)
    some, flowers_some = dict(enumerate(shares[:threshold], 1)), create_shares(secret, threshold, count)[:threshold]

    def combine_anew() -> None:
        shamir.at_zero.cache_clear()
        shamir.combine(some)

    combine, again, flowers_combine = cpu_ms(
        combine_anew, lambda: shamir.combine(some), lambda: combine_shares(flowers_some), runs=max(3, runs // 3)
    )
    return {
        "neighbours": count,
        "threshold": threshold,
        "length": length,
        "mask_ms": {"fedinfer": mask, "flower": flower, "floor": floor_ms},
        "key_ms": {"fedinfer": key, "flower": flowers_key},
        "split_ms": {"fedinfer": split, "flower": flowers_split},
        "combine_ms": {"fedinfer": combine, "flower": flowers_combine, "fedinfer, points seen before": again},
        "aes_bytes_per_s": 4e3 * length / mask,
    }


def encoding(length: int, runs: int) -> dict[str, dict[str, float]]:
    """What comes before the masks: clip, rotate and round beside Flower's quantisation, and noise beside its floats."""
    plan = DistributedPlan.calibrate(
        epsilon=8.0,
        delta=1e-5,
        steps=10,
        unit="client",
        clip_norm=1.0,
        sampler=Poisson(rate=1.0),
        divisor=1000.0,
        dimension=length,
        clients=1000,
        min_honest=795,
        colluders=100,
    )
    stream = os_noise()
    update = np.random.default_rng(0).normal(size=length) / np.sqrt(length)
    generator = np.random.default_rng(0)

    def noise() -> None:
        discrete_gaussian(stream, variance=plan.share_variance, count=plan.padded)

    ours, exact, theirs, floats = cpu_ms(
        lambda: plan.encode(update, stream, rotation="round 1"),
        noise,
        lambda: quantize([update], clipping_range=8.0, target_range=1 << 22),
        lambda: generator.normal(size=length),
        runs=runs,
    )
    return {
        "quantise_ms": {"fedinfer": ours - exact, "flower": theirs},
        "noise_ms": {"fedinfer": exact, "flower": floats},
    }


def flow_of_ours(clients: int, length: int, dropouts: int) -> dict[str, float]:
    """CPU milliseconds of one client for a round, and CPU seconds of the server, signatures checked by each anew."""
    pki, own = make_pki(clients)
    here = set_up(pki=pki, identities=own, policy=Policy(dropout=0.3), run=b"benchmark")
    members, server = here.participants, here.coordinator
    spec, vector = SumSpec(length=length, bits=32, bound=BOUND), np.ones(length, np.uint32)
    one, client, spent = members[clients - 1], 0.0, 0.0

    def timed(step: Callable[..., Any], *values: object) -> tuple[Any, float]:
        identities.check_signature.cache_clear()
        started = time.process_time()
        found = step(*values)
        return found, time.process_time() - started

    for member in members.values():
        offer, took = timed(member.offer, 1)
        client += took * (member is one)
        spent += timed(server.add_offer, offer)[1]
    inboxes, took = timed(partial(server.begin, 1, spec=spec, model=MODEL))
    spent += took
    for number in range(dropouts, clients):
        masked, took = timed(partial(members[number].masked, spec=spec, model=MODEL), inboxes[number], vector)
        client += took * (members[number] is one)
        spent += timed(server.add_masked, masked)[1]
    lists, took = timed(server.survivors)
    spent += took
    for number, shown in lists.items():
        signed, took = timed(members[number].endorse, shown)
        client += took * (members[number] is one)
        spent += timed(server.add_endorsement, signed)[1]
    quorum = server.quorum()
    for number in lists:
        reveal, took = timed(members[number].reveal, quorum)
        client += took * (members[number] is one)
        spent += timed(server.add_reveal, reveal)[1]
    total, took = timed(server.total)
    check_total(total, clients - dropouts)
    return {"client_ms": 1e3 * client, "server_s": spent + took}


def flow_of_flower(clients: int, length: int, dropouts: int, threshold: int) -> dict[str, float]:
    """The same of SecAgg+: its client's four stages; for the server what its workflow does with its own primitives."""
    started = time.process_time()
    one = FlowerNode(clients - 1, threshold=threshold, shares=clients)
    client = time.process_time() - started
    nodes = {number: FlowerNode(number, threshold=threshold, shares=clients) for number in range(clients - 1)}
    nodes[clients - 1] = one
    keys = {number: node.keys for number, node in nodes.items()}
    sent = {}
    for number, node in nodes.items():
        started = time.process_time()
        sent[number] = node.share(keys)
        client += (time.process_time() - started) * (node is one)
    alive, dead = list(range(dropouts, clients)), list(range(dropouts))
    vector, server, total = np.zeros(length), 0.0, np.zeros(length, np.int64)
    for number in alive:
        boxes = {other: sent[other][number] for other in nodes if other != number}
        started = time.process_time()
        masked = nodes[number].masked(boxes, vector)[1]
        client += (time.process_time() - started) * (number == clients - 1)
        started = time.process_time()
        total += masked
        server += time.process_time() - started
    shares: dict[int, list[bytes]] = {number: [] for number in nodes}
    for number in alive:
        started = time.process_time()
        given = nodes[number].unmask(alive, dead)
        client += (time.process_time() - started) * (number == clients - 1)
        for other, share in given:
            shares[other].append(share)
    started = time.process_time()
    shapes = [(), (length,)]
    for number in alive:
        total -= pseudo_rand_gen(combine_shares(shares[number][:threshold]), MODULUS, shapes)[1]
    for number in dead:
        key = combine_shares(shares[number][:threshold])
        for other in alive:
            mask = pseudo_rand_gen(agreed(key, nodes[other].keys[0]), MODULUS, shapes)[1]
            total += mask if number > other else -mask
    total %= MODULUS
    server += time.process_time() - started
    return {"client_ms": 1e3 * client, "server_s": server}


def check_total(total: Words, count: int) -> None:
    """Raises: RuntimeError unless this is the sum of `count` vectors of ones."""
    if not (total == count).all():
        raise RuntimeError("secure sum: got a wrong sum")


def server_at_scale(clients: int, length: int) -> dict[str, Any]:
    """CPU seconds of the server for a round without dropouts and with a tenth, and its memory for one vector more."""
    pki, own = make_pki(clients)
    here = set_up(pki=pki, identities=own, policy=Policy(), run=b"benchmark")
    members, server = here.participants, here.coordinator
    spec, vector = SumSpec(length=length, bits=32, bound=BOUND), np.ones(length, np.uint32)
    found: dict[str, Any] = {"clients": clients, "length": length, "neighbours": server.session.parameters.cycles * 2}
    for round, share in ((1, 0.0), (2, 0.1)):
        spent, wave = 0.0, [member.offer(round) for member in members.values()]
        # What members checked in this process must not be remembered by the server.
        identities.check_signature.cache_clear()
        shamir.at_zero.cache_clear()
        started = time.process_time()
        for offer in wave:
            server.add_offer(offer)
        inboxes = server.begin(round, spec=spec, model=MODEL)
        spent += time.process_time() - started
        for number in range(int(share * clients), clients):
            masked = members[number].masked(inboxes[number], vector, spec=spec, model=MODEL)
            started = time.process_time()
            server.add_masked(masked)
            spent += time.process_time() - started
        started = time.process_time()
        lists = server.survivors()
        spent += time.process_time() - started
        signed = [members[number].endorse(shown) for number, shown in lists.items()]
        identities.check_signature.cache_clear()
        started = time.process_time()
        for endorsement in signed:
            server.add_endorsement(endorsement)
        quorum = server.quorum()
        spent += time.process_time() - started
        reveals = [members[number].reveal(quorum) for number in lists]
        started = time.process_time()
        for reveal in reveals:
            server.add_reveal(reveal)
        total = server.total()
        spent += time.process_time() - started
        check_total(total, len(lists))
        found[f"server_s at {share:.0%} dropouts"] = spent
    found["process_peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found["all_vectors_mb"] = clients * length * 4 / 2**20
    return found


def sweep(path: Path, figures: dict[str, Any]) -> list[dict[str, float]]:
    """A client's milliseconds and a server's seconds for n and d, from the parts measured above, drawn to `path`.

    From parts, because 10,000 clients of 10^7 do not fit here: a client makes a key and a mask a neighbour; a server,
    at a tenth of dropouts, takes off a mask a survivor, and a key and a mask for each pair of a dropped member.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths, rows = [10**4, 10**5, 10**6, 10**7], []
    masks = {}
    for length in lengths:
        words = np.zeros(length, np.uint32)
        (masks[length],) = cpu_ms(partial(add_mask, words, bytes(32), sign=1), runs=5)
    key, combine = figures["key_ms"]["fedinfer"], figures["combine_ms"]["fedinfer"]
    check_ms = 4 * cpu_check_ms()
    for clients in (10, 30, 100, 300, 1000, 3000, 10000):
        near = Policy().parameters(clients=clients, members=clients).most_neighbours
        for length in lengths:
            pair = key + masks[length]
            server = clients * (check_ms + combine + masks[length]) + 0.1 * clients * (combine + 0.9 * near * pair)
            rows.append({"clients": clients, "length": length, "client_ms": near * pair, "server_s": server / 1e3})
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for axis, name, label in ((axes[0], "client_ms", "client, ms"), (axes[1], "server_s", "server at 10 %, s")):
        for length in lengths:
            line = [row for row in rows if row["length"] == length]
            axis.loglog([row["clients"] for row in line], [row[name] for row in line], "o-", label=f"d = {length:.0e}")
        axis.set_xlabel("clients")
        axis.set_ylabel(f"{label} of CPU")
        axis.grid(True, alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return rows


def cpu_check_ms() -> float:
    """CPU milliseconds of checking one signature."""
    signer = identities.Identity.generate(os.urandom)
    signatures = [(bytes([n]), signer.sign(bytes([n]))) for n in range(50)]
    started = time.process_time()
    for statement, signature in signatures:
        identities.check_signature(signer.public, statement, signature)
    return 1e3 * (time.process_time() - started) / len(signatures)


def show(name: str, times: dict[str, float], unit: str = "ms") -> None:
    """One line: ours, Flower's, and their ratio."""
    mine, peer = times["fedinfer"], times["flower"]
    print(f"{name:34}{mine:10.3f} {unit}{peer:12.3f} {unit}{peer / mine:9.3g}×")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="200 clients at the server instead of 1,000")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--sweep", type=Path, help="draw clients × length to this file")
    options = parser.parse_args(argv)
    parts = primitives(10**6, runs=9 if options.quick else 31)
    print(f"{'1M words, CPU of one thread':34}{'fedinfer':>13}{'Flower SecAgg+':>15}{'ratio':>10}")
    show("mask, a neighbour", parts["mask_ms"])
    show("key agreement, a neighbour", parts["key_ms"])
    show(f"split 32 bytes, {parts['threshold']} of {parts['neighbours']}", parts["split_ms"])
    show(f"combine {parts['threshold']} shares", parts["combine_ms"])
    mask = parts["mask_ms"]
    client = parts["neighbours"] * (mask["fedinfer"] + parts["key_ms"]["fedinfer"]) + mask["fedinfer"]
    print(
        f"all masks of a client, {parts['neighbours']} neighbours: {client:.0f} ms; a mask takes "
        f"{mask['fedinfer'] / mask['floor']:.2f} × its floor, {parts['aes_bytes_per_s'] / 1e9:.1f} GB/s"
    )
    with threadpool_limits(limits=1):
        coded = encoding(10**6, runs=3 if options.quick else 9)
    print()
    show("clip, rotate, round", coded["quantise_ms"])
    show("share of the noise, padded to 2^20", coded["noise_ms"])
    shape = (16, 100_000, 2)
    clients, length, dropouts = shape
    threshold = Policy(dropout=0.3).parameters(clients=clients, members=clients).threshold
    flows: dict[str, list[dict[str, float]]] = {"fedinfer": [], "flower": []}
    for _ in range(1 if options.quick else 3):
        flows["fedinfer"].append(flow_of_ours(clients, length, dropouts))
        flows["flower"].append(flow_of_flower(clients, length, dropouts, threshold))
    flow = {
        name: {what: statistics.median(run[what] for run in runs) for what in runs[0]} for name, runs in flows.items()
    }
    print(f"\na round of {clients} clients, {length} words, {dropouts} dropouts")
    show("client", {name: found["client_ms"] for name, found in flow.items()})
    show("server", {name: found["server_s"] for name, found in flow.items()}, unit=" s")
    scale = server_at_scale(200 if options.quick else 1000, 100_000)
    print(f"\nserver, {scale['clients']} clients of {scale['neighbours']} neighbours, {scale['length']} words")
    for name, value in scale.items():
        if name.startswith("server_s"):
            print(f"{name.removeprefix('server_s at '):34}{value:10.2f}  s")
    print(f"whole process at its peak {scale['process_peak_mb']:.0f} MB; vectors {scale['all_vectors_mb']:.0f} MB")
    figures = {"parts": parts, "encoding": coded, "client_masks_ms": client, "flow": flow, "scale": scale}
    if options.sweep:
        figures["sweep"] = sweep(options.sweep, parts)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
