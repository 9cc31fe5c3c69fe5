"""FLUTE's logistic regression and pfl-research's CNN on the vectorised grid, beside a plain loop over clients.

The tasks are those of `experiments/simulation_tasks.py`. The loop is what anybody writes: one model, loaded anew for
each client, `torch.optim.SGD`, one thread. Both have the same clients in the same rounds, and their rows at hand; they
take turns, so that whatever else the machine does, it does to both. The CNN's floor is its arithmetic, forward and
backward without the gradient at the image, at the machine's rate for large matrix products on all cores.
"""

import copy
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from experiments.simulation_tasks import CIFAR_IMAGES, Published, Rows, cifar, cifar_flop_per_image, cohorts, mnist, run
from fedinfer.training import Sgd


def compare(*, quick: bool) -> dict[str, Any]:
    """Print and return seconds of both tasks, on the loop and on the grid."""
    parts = 2 if quick else 3
    flute, pfl = mnist(), cifar()
    loops, ours, _ = alternate(flute, rounds=flute.rounds, cohort=flute.cohort, parts=parts)
    loop_s, ours_s = (statistics.median(sum(part) for part in each) for each in (loops, ours))
    print(f"FLUTE's logistic regression, {flute.rounds} rounds of {flute.cohort} clients ({flute.published}):")
    print(f"  plain loop, one thread {loop_s:6.2f} s\n  fedinfer, sum          {ours_s:6.2f} s: {loop_s / ours_s:.1f}×")

    cohort = 16 if quick else pfl.cohort
    slow, fast, measured = alternate(pfl, rounds=3, cohort=cohort, parts=parts)
    # The first round of each is left out: there it is decided how clients run.
    slow_s, fast_s = (statistics.median(wall for part in each for wall in part[1:]) for each in (slow, fast))
    rates = {threads: statistics.median(part[threads] for part in measured) for threads in measured[0]}
    flop, cores = cohort * CIFAR_IMAGES * cifar_flop_per_image(), max(rates)
    print(f"pfl's CNN, a round of {cohort} clients: {flop / 1e9:.0f} GFLOP, of which a core does")
    print(
        f"  {rates[1] / 1e9:.0f} a second in matrix products and {cores} do {rates[cores] / 1e9:.0f}: no less than",
        end=" ",
    )
    print(f"{flop / rates[cores]:.2f} s")
    for name, seconds in (("plain loop, one thread", slow_s), ("fedinfer, sum", fast_s)):
        share = flop / seconds / rates[cores]
        print(f"  {name:22} {seconds:6.2f} s: {slow_s / seconds:.2f}×, {share:.0%} of the machine's matrix products")
    whole_min = fast_s * pfl.cohort / cohort * pfl.rounds / 60.0
    print(f"  {pfl.rounds:,} rounds of {pfl.cohort} would take {whole_min:.0f} min")
    return {
        "flute_seconds": {"loop": loop_s, "fedinfer": ours_s},
        "cifar_round_seconds": {"loop": slow_s, "fedinfer": fast_s, "cohort": cohort},
        "cifar_flop_per_round": flop,
        "gemm_flop_per_s": {str(threads): rate for threads, rate in rates.items()},
        "cifar_share_of_gemm": flop / fast_s / rates[cores],
    }


def alternate(
    task: Published, *, rounds: int, cohort: int, parts: int
) -> tuple[list[Sequence[float]], list[Sequence[float]], list[dict[int, float]]]:
    """By part: seconds of each round of the loop and of the grid, and rates of matrix products in between."""
    chosen = cohorts(task, rounds, cohort, seed=0)
    held = {client: task.load(client, task.clients) for clients in chosen for client in clients}
    # No tests of the model: they cost both the same.
    at_hand = replace(task, load=lambda partition, partitions: held[partition], score=None)
    loops: list[Sequence[float]] = []
    ours: list[Sequence[float]] = []
    rates = []
    for _ in range(parts):
        loops.append(loop(task, chosen, held)[0])
        rates.append({threads: gemm_rate(threads) for threads in {1, os.cpu_count() or 1}})
        ours.append(run(at_hand, cohort=cohort, rounds=rounds, seed=0).round_s)
    return loops, ours, rates


def loop(
    task: Published, chosen: Sequence[Sequence[int]], held: Mapping[int, Rows]
) -> tuple[list[float], dict[str, Tensor]]:
    """One client after another in one thread, weighted by rows, without messages: seconds, and the last model."""
    torch.set_num_threads(1)
    local, net = task.task, copy.deepcopy(task.task.model)
    assert isinstance(local.optimiser, Sgd), "plain gradient descent"
    assert local.batch_size is not None, "batches of one size"
    assert local.epochs == 1, "one pass"
    start = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    round_s = []
    for clients in chosen:
        started = time.perf_counter()
        sums = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
        total = 0
        for client in clients:
            x, y = held[client]
            net.load_state_dict(start)
            optimiser = torch.optim.SGD(net.parameters(), lr=local.optimiser.lr)
            for batch in torch.split(torch.randperm(len(x)), local.batch_size):
                optimiser.zero_grad()
                local.loss(net(x[batch]), y[batch]).mean().backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            for name, tensor in net.state_dict().items():
                sums[name].add_(tensor, alpha=len(x))
            total += len(x)
        start = {name: tensor / total for name, tensor in sums.items()}
        round_s.append(time.perf_counter() - started)
    return round_s, start


def gemm_rate(threads: int) -> float:
    """FLOP a second of large single-precision matrix products."""
    torch.set_num_threads(threads)
    size = 1024
    one, other = torch.randn(size, size), torch.randn(size, size)
    seconds = []
    for _ in range(15):
        started = time.perf_counter()
        torch.mm(one, other)
        seconds.append(time.perf_counter() - started)
    torch.set_num_threads(1)
    return 2.0 * size**3 / statistics.median(seconds)
