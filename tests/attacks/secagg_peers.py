"""The attacks on secure sums against Flower's SecAgg+ and naive versions. Each returns whether it succeeded."""

import numpy as np
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt
from flwr.common.secure_aggregation.ndarrays_arithmetic import parameters_addition, parameters_mod
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_utils import (
    pseudo_rand_gen,
    share_keys_plaintext_concat,
    share_keys_plaintext_separate,
)

from experiments.benchmarks.flower_secagg import (
    CLIP,
    MODULUS,
    TARGET,
    FlowerNode,
    agreed,
    new_keys,
    secret_of,
    shared,
    unmasked,
)
from fedinfer.secagg.masks import add_mask
from fedinfer.secagg.shamir import combine, split

SECRET = [1.25, -0.5, 2.0]
VICTIM = 0


def found_out(guess: np.ndarray) -> bool:
    """Whether the victim's input is known, up to quantising."""
    return bool(np.allclose(guess, SECRET, atol=1e-4))


def inputs(nodes: dict[int, FlowerNode]) -> dict[int, list[float]]:
    return {number: SECRET if number == VICTIM else [0.1 * number, 0.0, -1.0] for number in nodes}


# --- Flower's SecAgg+. ---


def alive_and_dead() -> bool:
    """The server names the victim in both lists: three nodes give shares of its seed and of its key."""
    nodes = {n: FlowerNode(n, threshold=3, shares=5) for n in range(5)}
    received = shared(nodes)
    masked = {n: nodes[n].masked(received[n], x) for n, x in inputs(nodes).items()}
    shares = [nodes[n].unmask(list(nodes), [VICTIM]) for n in (1, 2, 3)]
    seed = secret_of([dict(given[:5])[VICTIM] for given in shares])
    key = secret_of([given[5][1] for given in shares])
    return found_out(unmasked(masked[VICTIM], VICTIM, seed, {n: agreed(key, nodes[n].keys[0]) for n in (1, 2, 3, 4)}))


def surrounded(victim: FlowerNode, others: list[int]) -> bool:
    """The victim alone, among keys that the server made itself."""
    made = {n: new_keys() for n in others}
    keys = {n: public for n, (_, public) in made.items()}
    boxes = victim.share({VICTIM: victim.keys, **keys})
    seeds, pairs, sent = [], {}, {}
    for n, ((mask_key, box_key), _) in made.items():
        channel = agreed(box_key, victim.keys[1])
        seeds.append(share_keys_plaintext_separate(decrypt(channel, boxes[n]))[2])
        pairs[n] = agreed(mask_key, victim.keys[0])
        sent[n] = encrypt(channel, share_keys_plaintext_concat(n, VICTIM, b"", b""))
    masked = victim.masked(sent, SECRET)
    return found_out(unmasked(masked, VICTIM, secret_of(seeds[: victim.state.threshold]), pairs))


def forged_keys() -> bool:
    """The server hands the victim keys of its own as those of everybody else."""
    return surrounded(FlowerNode(VICTIM, threshold=3, shares=5), [1, 2, 3, 4])


def surrounded_victim() -> bool:
    """The server chooses the victim's neighbours: three of its own, of many."""
    return surrounded(FlowerNode(VICTIM, threshold=3, shares=4), [101, 102, 103])


def lowered_threshold() -> bool:
    """The server sets the threshold to 2 of 5, and has two nodes."""
    nodes = {n: FlowerNode(n, threshold=2, shares=5) for n in range(5)}
    received = shared(nodes)
    masked = {n: nodes[n].masked(received[n], x) for n, x in inputs(nodes).items()}
    corrupt = [nodes[n].state for n in (3, 4)]
    seed = secret_of([state.rd_seed_share_dict[VICTIM] for state in corrupt])
    key = secret_of([state.sk1_share_dict[VICTIM] for state in corrupt])
    return found_out(unmasked(masked[VICTIM], VICTIM, seed, {n: agreed(key, nodes[n].keys[0]) for n in (1, 2, 3, 4)}))


def two_models() -> bool:
    """The others get a model on which every update is zero: the sum is the victim's (arXiv:2111.07380)."""
    nodes = {n: FlowerNode(n, threshold=3, shares=5) for n in range(5)}
    received = shared(nodes)
    vectors = {n: nodes[n].masked(received[n], SECRET if n == VICTIM else [0.0] * 3) for n in nodes}
    shares = [dict(nodes[n].unmask(list(nodes), [])) for n in (1, 2, 3)]
    total = [sum(parts) for parts in zip(*vectors.values(), strict=True)]
    for n in nodes:
        seed = secret_of([given[n] for given in shares])
        masks = pseudo_rand_gen(seed, MODULUS, [part.shape for part in total])
        total = [part - mask for part, mask in zip(total, masks, strict=True)]
    zero = int(quantize([np.zeros(1)], CLIP, TARGET)[0][0])
    return found_out((total[1] % MODULUS - 4 * zero) * 2 * CLIP / TARGET - CLIP)


def withheld_offers() -> bool:
    """The server tells the victim only of the nodes that it has: masks with the others are missing."""
    nodes = {n: FlowerNode(n, threshold=3, shares=6) for n in range(6)}
    received = shared(nodes)
    masked = nodes[VICTIM].masked({n: received[VICTIM][n] for n in (4, 5)}, SECRET)
    for n in (1, 2, 3, 4, 5):
        nodes[n].masked(received[n], [0.0] * 3)
    shares = [dict(nodes[n].unmask(list(nodes), [])) for n in (1, 2, 3)]
    seed = secret_of([given[VICTIM] for given in shares])
    pairs = {n: agreed(nodes[n].state.sk1, nodes[VICTIM].keys[0]) for n in (4, 5)}
    return found_out(unmasked(masked, VICTIM, seed, pairs))


def tampered_share() -> bool:
    """A node changes its share: the server sums up with a wrong seed and notices nothing."""
    seed = bytes(range(32))
    shares = create_shares(seed, 3, 5)
    changed = shares[0][:10] + bytes([shares[0][10] ^ 1]) + shares[0][11:]
    return combine_shares([changed, *shares[1:3]]) != seed


def oversized_roster() -> bool:
    """1,100 nodes with the default ranges: the sum of the largest values wraps, and nobody says so."""
    clip, target = 8.0, 1 << 22
    total = [np.zeros(1, np.int64)]
    for _ in range(1100):
        total = parameters_mod(parameters_addition(total, quantize([np.full(1, clip)], clip, target)), MODULUS)
    return int(total[0][0]) != 1100 * target


def out_of_range() -> bool:
    """A node says that it has a thousand times the examples that the server allows: its weight goes in as it is."""
    nodes = {n: FlowerNode(n, threshold=3, shares=5) for n in range(5)}
    received = shared(nodes)
    weights = {n: nodes[n].masked(received[n], [0.0], 1000 if n == VICTIM else 1)[0] for n in nodes}
    shares = [dict(nodes[n].unmask(list(nodes), [])) for n in (1, 2, 3)]
    total = sum(int(weight[0]) for weight in weights.values())
    for n in nodes:
        total -= int(pseudo_rand_gen(secret_of([given[n] for given in shares]), MODULUS, [(1,)])[0][0])
    return total % MODULUS > 5 * TARGET


def early_dropout() -> bool:
    """A node drops out before its shares: the others cannot unmask any more."""
    nodes = {n: FlowerNode(n, threshold=3, shares=5) for n in range(5)}
    received = shared(nodes)
    for n in (0, 1, 2, 3):
        nodes[n].masked({sender: box for sender, box in received[n].items() if sender != 4}, [0.0])
    try:
        nodes[1].unmask([0, 1, 2, 3], [4])
    except KeyError:
        return True
    return False


def seed_of_32_bits() -> bool:
    """Seeds that differ in two places give the same mask: only the XOR of their words counts."""
    seed = bytes(range(32))
    other = bytes([seed[0] ^ 1, *seed[1:4], seed[4] ^ 1, *seed[5:]])
    masks = [pseudo_rand_gen(one, MODULUS, [(100,)])[0] for one in (seed, other)]
    return bool((masks[0] == masks[1]).all())


def seized_device() -> bool:
    """The victim's state is read after the round: seed and key are there until the next begins."""
    nodes = {n: FlowerNode(n, threshold=3, shares=5) for n in range(5)}
    received = shared(nodes)
    masked = nodes[VICTIM].masked(received[VICTIM], SECRET)
    nodes[VICTIM].unmask(list(nodes), [])
    state = nodes[VICTIM].state
    pairs = {n: agreed(state.sk1, nodes[n].keys[0]) for n in (1, 2, 3, 4)}
    return found_out(unmasked(masked, VICTIM, state.rd_seed, pairs))


def replayed_round() -> bool:
    """Boxes of the last round are shown in the next: keys are new, so that they do not open."""
    nodes = {n: FlowerNode(n, threshold=3, shares=5) for n in range(5)}
    old = shared(nodes)
    again = {n: FlowerNode(n, threshold=3, shares=5) for n in range(5)}
    shared(again)
    return accepted(lambda: again[VICTIM].masked(old[VICTIM], SECRET))


def duplicate_reveal() -> bool:
    """The server asks for shares a second time, with another list."""
    nodes = {n: FlowerNode(n, threshold=3, shares=5) for n in range(5)}
    received = shared(nodes)
    nodes[1].masked(received[1], SECRET)
    nodes[1].unmask(list(nodes), [])
    return accepted(lambda: nodes[1].unmask([1, 2, 3, 4], [VICTIM]))


def two_masked_vectors() -> bool:
    """The server asks for a second vector in the round."""
    nodes = {n: FlowerNode(n, threshold=3, shares=5) for n in range(5)}
    received = shared(nodes)
    nodes[VICTIM].masked(received[VICTIM], SECRET)
    return accepted(lambda: nodes[VICTIM].masked(received[VICTIM], [0.0] * 3))


def accepted(step) -> bool:
    try:
        step()
    except Exception:
        return False
    return True


# --- Naive versions, where Flower does better, or has no such part. ---


def naive_replayed_round() -> bool:
    """Masks of a key that lasts, without the round: two rounds' vectors differ as the inputs do."""
    first, second = np.array([5, 9], np.uint32), np.array([7, 1], np.uint32)
    seen = [first.copy(), second.copy()]
    for words in seen:
        add_mask(words, bytes(range(32)), sign=1)
    return bool((seen[1] - seen[0] == second - first).all())


def naive_two_masked_vectors() -> bool:
    """A member that answers whenever it is asked: the server's own choice of a vector takes the mask off."""
    return naive_replayed_round()


def naive_duplicate_reveal() -> bool:
    """A member that keeps no state gives the seed's share now and the key's share later: threshold 2 of 3."""
    seed, key = b"s" * 32, b"k" * 32
    held = [
        dict(zip(("seed", "key"), pair, strict=True))
        for pair in zip(
            split(seed, threshold=2, count=3, entropy=lambda n: bytes(n - 1) + b"\x05"),
            split(key, threshold=2, count=3, entropy=lambda n: bytes(n - 1) + b"\x07"),
            strict=True,
        )
    ]
    asked = {kind: {place: held[place - 1][kind] for place in (1, 2)} for kind in ("seed", "key")}
    return combine(asked["seed"]) == seed and combine(asked["key"]) == key
