"""What the integers of a secure sum cost in accuracy: 16 to 20 bits a coordinate beside central Gaussian noise.

A softmax regression on digits and on MNIST-5k, trained by noised sums at the same total standard deviation of the
noise, with all devices honest. The rest is what a secure sum adds: projection, rotation, rounding, the modulus. (The
vectors are added up in the clear here, modulo 2^bits: a secure sum gives the same, number by number.)

* example: ten devices; Poisson samples, clipped gradients, every device in every step. ε of one image.
* client: hundreds of devices of two or four images each, the update of two local steps clipped whole. ε of one device.

Add or remove one; δ = 1e-5 and 1e-4; adversary: the server. ε at equal noise is printed: rounding makes a sum's
sensitivity larger, so that a device has to add a little more noise for the same ε; "noise at equal ε" says how much.
Accuracy is on public rows held out; the standard error is paired over five divisions, each a mean of some draws of
the noise. Settings of the client rows are those of `client_level.py`, in 10 rounds of everybody; the step size of the
example rows was chosen by hand on division 100, which serves for nothing else.

    python -m experiments.secure_sums [--quick] [--json FILE]
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from experiments.client_level import (
    CLASSES,
    CLIP,
    MOMENTUM,
    SERVER_RATE,
    clients_of,
    local_updates,
    percent,
    rows_of,
)
from fedinfer.cli.console import note
from fedinfer.privacy import DistributedPlan, NoiseStream, Poisson, PrivacyPlan, clip_update, os_noise
from fedinfer.privacy.plan import Unit

Floats = NDArray[np.float64]
BITS = (16, 18, 20)
# By unit: ε of the central plan, δ, steps.
EXAMPLE, CLIENT = (3.0, 1e-5, 60), (8.0, 1e-4, 10)
DEVICES, SAMPLING_RATE, EXAMPLE_CLIP, EXAMPLE_RATE = 10, 0.2, 0.3, 40.0
UNITS: tuple[Unit, ...] = ("example", "client")
DRAWS = {("digits", "example"): 8, ("digits", "client"): 4, ("mnist", "example"): 3, ("mnist", "client"): 1}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; `bits` is None for central noise."""

    data: str
    unit: Unit
    bits: int | None
    epsilon: float
    more_noise: float
    accuracies: tuple[float, ...] = field(repr=False)


Plan = PrivacyPlan | DistributedPlan
Vectors = Sequence[Floats]


def released(plan: Plan, parts: Vectors, step: int, stream: NoiseStream) -> Floats:
    """The noised sum of the devices' vectors over the divisor: by one who sees them, or as a sum modulo 2^bits."""
    if isinstance(plan, PrivacyPlan):
        return plan.release(np.sum(parts, axis=0), stream).astype(np.float64)
    total = np.zeros(plan.padded, np.uint64)
    for part in parts:
        total += plan.encode(part, stream, rotation=f"{step}")
    plan.check_total(total, survivors=len(parts))
    return plan.decode(total, rotation=f"{step}").astype(np.float64)


# %% The two units
def examples_accuracy(data: str, seed: int, plan: Plan, steps: int) -> float:
    """DP-SGD on the devices' Poisson samples, and its accuracy."""
    x, y = rows_of(data)
    x, test_x, y, test_y = train_test_split(
        x, y, test_size=0.25 if data == "digits" else 0.2, random_state=seed, stratify=y
    )
    cuts, stream = np.array_split(np.random.default_rng(seed).permutation(len(y)), DEVICES), os_noise()
    x, onehot, lengths = x.astype(np.float64), np.eye(CLASSES)[y], np.linalg.norm(x, axis=1)
    weights = np.zeros((x.shape[1], CLASSES))
    velocity = np.zeros_like(weights)
    for step in range(steps):
        parts = []
        for cut in cuts:
            rows = cut[plan.sample(len(cut), stream)]
            error = softmax(x[rows] @ weights) - onehot[rows]
            norms = np.linalg.norm(error, axis=1) * lengths[rows]
            error *= np.minimum(1.0, plan.clip_norm / np.maximum(norms, 1e-12))[:, None]
            parts.append((x[rows].T @ error).ravel())
        velocity = MOMENTUM * velocity + released(plan, parts, step, stream).reshape(weights.shape)
        weights -= EXAMPLE_RATE * (1.0 - MOMENTUM) * velocity
    return float(((test_x @ weights).argmax(1) == test_y).mean())


def softmax(logits: Floats) -> Floats:
    """Probabilities (n, classes)."""
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))


def clients_accuracy(data: str, seed: int, plan: Plan, steps: int) -> float:
    """Federated averaging of clipped updates of all clients, and its accuracy."""
    clients, stream = clients_of(data, seed), os_noise()
    weights = np.zeros(clients.x.shape[2] * CLASSES)
    velocity = np.zeros_like(weights)
    for step in range(steps):
        updates = local_updates(torch.from_numpy(weights).float(), clients.x, clients.y).numpy()
        parts = [clip_update(update, clip_norm=plan.clip_norm).astype(np.float64) for update in updates]
        velocity = MOMENTUM * velocity + released(plan, parts, step, stream)
        weights += SERVER_RATE * velocity
    guesses = (clients.test_x.numpy() @ weights.reshape(-1, CLASSES)).argmax(1)
    return float((guesses == clients.test_y.numpy()).mean())


def central_plan(data: str, unit: Unit) -> PrivacyPlan:
    """The plan of one who sees the sums."""
    epsilon, delta, steps = EXAMPLE if unit == "example" else CLIENT
    if unit == "example":
        examples = 1350 if data == "digits" else 4000
        sampler, clip, divisor = Poisson(rate=SAMPLING_RATE), EXAMPLE_CLIP, SAMPLING_RATE * examples
    else:
        sampler, clip, divisor = Poisson(rate=1.0), CLIP, float(len(clients_of(data, 0).y))
    return PrivacyPlan.calibrate(
        epsilon=epsilon, delta=delta, steps=steps, unit=unit, clip_norm=clip, sampler=sampler, divisor=divisor
    )


def distributed_plan(central: PrivacyPlan, *, bits: int, dimension: int, clients: int) -> DistributedPlan:
    """The same noise in shares."""
    assert isinstance(central.sampler, Poisson)
    return DistributedPlan(
        unit=central.unit,
        clip_norm=central.clip_norm,
        noise_multiplier=central.noise_multiplier,
        sampler=central.sampler,
        delta=central.delta,
        steps=central.steps,
        divisor=central.divisor,
        dimension=dimension,
        clients=clients,
        min_honest=clients,
        colluders=0,
        bits=bits,
    )


def more_noise(plan: DistributedPlan, epsilon: float) -> float:
    """The noise that this grid needs for `epsilon`, over that of `plan`."""
    fields = {name: value for name, value in plan.to_json().items() if name not in ("mechanism", "relation")}
    del fields["noise_multiplier"]
    equal = DistributedPlan.calibrate(**{**fields, "sampler": plan.sampler}, epsilon=epsilon)
    return equal.noise_multiplier / plan.noise_multiplier - 1.0


def table(data: str, unit: Unit, seeds: Sequence[int], bits: Sequence[int], draws: int) -> list[Row]:
    """Central noise, and sums of each number of bits."""
    central = central_plan(data, unit)
    dimension = rows_of(data)[0].shape[1] * CLASSES
    clients = DEVICES if unit == "example" else int(central.divisor)
    plans: dict[int | None, Plan] = {None: central}
    plans |= {b: distributed_plan(central, bits=b, dimension=dimension, clients=clients) for b in bits}
    run: Callable[[str, int, Plan, int], float] = examples_accuracy if unit == "example" else clients_accuracy
    found = []
    for number, plan in plans.items():
        accuracies = tuple(
            float(np.mean([run(data, seed, plan, central.steps) for _ in range(draws)])) for seed in seeds
        )
        more = more_noise(plan, central.epsilon()) if isinstance(plan, DistributedPlan) else 0.0
        found.append(
            Row(data=data, unit=unit, bits=number, epsilon=plan.epsilon(), more_noise=more, accuracies=accuracies)
        )
        note(f"{data}, {unit}, {'central' if number is None else f'{number} bits'}: done")
    return found


def print_table(rows: Sequence[Row]) -> None:
    """Accuracy, what it is less than under central noise, and what the grid costs in ε or in noise."""
    print(f"{'':8}{'unit':9}{'bits':>8}{'accuracy':>16}{'minus central':>17}{'ε':>8}{'noise at equal ε':>18}")
    central = rows[0]
    for row in rows:
        bits, change, more = "central", "", ""
        if row.bits is None:
            central = row
        else:
            gain = np.subtract(row.accuracies, central.accuracies)
            bits, change = str(row.bits), percent(gain.tolist(), math.sqrt(len(gain)))
            more = f"+{100 * row.more_noise:.2f} %"
        print(
            f"{row.data:8}{row.unit:9}{bits:>8}{percent(row.accuracies):>16}{change:>17}{row.epsilon:>8.3f}{more:>18}"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Train with each number of bits and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="digits, examples, 16 bits, one division")
    parser.add_argument("--json", type=Path, help="write the table here")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.quick:
        rows = table("digits", "example", [0], (16,), 1)
        print_table(rows)
    else:
        rows = []
        for data, unit in product(("digits", "mnist"), UNITS):
            rows += table(data, unit, range(5), BITS, DRAWS[data, unit])
            print_table(rows[-1 - len(BITS) :])
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
