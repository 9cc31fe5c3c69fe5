"""One step of private training: forward, backward, clip and update, beside ordinary SGD and Opacus.

All sides train the same network on the same batch and take turns within one run; a figure is the median over turns,
and a ratio the median of a side over that of SGD. SGD is what torch does by itself. Opacus runs with its hooks, and
with ghost clipping where it has it; its noise is set to zero. Noise is a column of its own: what `gaussian_float`
takes for as many numbers as the network has parameters, and how often AES-256-CTR makes their bytes in that time.
Processor time, in brackets, tells what other work on the machine did to one thread's figures.

Memory is the most that torch's CPU allocator holds in one step above what it held before, as torch's profiler counts
it, with the network and the batch added on both sides. The libraries' own workspaces are not in it.

    python -m experiments.benchmarks.dp_step [--quick] [--threads 1,2] [--only NAME ...] [--json FILE]
"""

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.layers import DPGRU
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from experiments.benchmarks.encrypted import busy_s, processor
from fedinfer.cli.console import note, show_table
from fedinfer.privacy import NoiseStream, clipped_gradient, os_noise

RATE = 1e-3
CLIP_NORM = 1.0
MEMORY_GOAL = 1.3
WORDS = 10_000
Step = Callable[[], object]


class Gru(nn.Module):
    """Ten classes from the last state of a GRU, of torch or of Opacus."""

    def __init__(self, gru: type[nn.Module]) -> None:
        super().__init__()
        self.gru, self.head = gru(32, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.gru(x)[0][:, -1])
        return output


class Words(nn.Module):
    """Ten classes from the mean of a text's word vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(WORDS, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.embedding(x).mean(1))
        return output


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


def _cnn() -> nn.Module:
    """Papernot et al. 2021, arXiv:2007.14191, table 1 (MNIST)."""
    first = (nn.Conv2d(1, 16, 8, stride=2, padding=2), nn.Tanh(), nn.MaxPool2d(2, 1))
    second = (nn.Conv2d(16, 32, 4, stride=2), nn.Tanh(), nn.MaxPool2d(2, 1))
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(512, 32), nn.Tanh(), nn.Linear(32, 10))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network, a batch for it, and how many times SGD a private step may take."""

    title: str
    build: Callable[[], nn.Module]
    draw: Callable[[], Tensor]
    goal: float = 1.2
    for_opacus: Callable[[], nn.Module] | None = None


CASES = {
    "linear": Case(title="linear 784-10, B=256", build=lambda: nn.Linear(784, 10), draw=lambda: torch.randn(256, 784)),
    "mlp64": Case(title="MLP 784-128-10, B=64", build=_mlp, draw=lambda: torch.randn(64, 784), goal=1.6),
    "mlp256": Case(title="MLP 784-128-10, B=256", build=_mlp, draw=lambda: torch.randn(256, 784)),
    "mlp1024": Case(title="MLP 784-128-10, B=1024", build=_mlp, draw=lambda: torch.randn(1024, 784)),
    "cnn": Case(title="tanh CNN, B=256", build=_cnn, draw=lambda: torch.randn(256, 1, 28, 28)),
    "gru": Case(
        title="GRU 32-64, 50 steps, B=128",
        build=lambda: Gru(nn.GRU),
        draw=lambda: torch.randn(128, 50, 32),
        for_opacus=lambda: Gru(DPGRU),
    ),
    "words": Case(
        title="embedding 10,000×64, 50 words, B=256", build=Words, draw=lambda: torch.randint(0, WORDS, (256, 50))
    ),
}
NAMES = {"sgd": "SGD", "fedinfer": "fedinfer", "hooks": "Opacus", "ghost": "Opacus, ghost"}


def losses_of(output: Tensor, y: Tensor) -> Tensor:
    """The loss (B,) of each example."""
    return functional.cross_entropy(output, y, reduction="none")


def sgd_step(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Ordinary SGD."""
    parameters = list(model.parameters())

    def step() -> None:
        torch.autograd.backward(functional.cross_entropy(model(x), y))
        with torch.no_grad():
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.add_(parameter.grad, alpha=-RATE)
                parameter.grad = None

    return step


def our_step(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Ours: the clipped sum, and the same update."""
    parameters = dict(model.named_parameters())

    def step() -> None:
        sums = clipped_gradient(model, losses_of, x, y, clip_norm=CLIP_NORM)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.add_(sums[name], alpha=-RATE / len(y))

    return step


def hooks_step(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Opacus with gradients of examples from hooks."""
    whole = GradSampleModule(model)
    optimizer = DPOptimizer(
        torch.optim.SGD(whole.parameters(), lr=RATE),
        noise_multiplier=0.0,
        max_grad_norm=CLIP_NORM,
        expected_batch_size=len(y),
    )

    def step() -> None:
        torch.autograd.backward(functional.cross_entropy(whole(x), y))
        optimizer.step()
        optimizer.zero_grad()

    return step


def ghost_step(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Opacus with ghost clipping: norms from one backward pass, the sum from another."""
    whole = GradSampleModuleFastGradientClipping(model, max_grad_norm=CLIP_NORM, use_ghost_clipping=True)
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(whole.parameters(), lr=RATE),
        noise_multiplier=0.0,
        max_grad_norm=CLIP_NORM,
        expected_batch_size=len(y),
    )
    criterion = DPLossFastGradientClipping(whole, optimizer, nn.CrossEntropyLoss())

    def step() -> None:
        criterion(whole(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


SIDES: Mapping[str, Callable[[nn.Module, Tensor, Tensor], Step]] = {
    "sgd": sgd_step,
    "fedinfer": our_step,
    "hooks": hooks_step,
    "ghost": ghost_step,
}


def prepared(case: Case) -> tuple[dict[str, Step], dict[str, str], int]:
    """The step of every side, warmed up; the sides that refuse, with the reason; bytes of network and batch."""
    torch.manual_seed(0)
    x = case.draw()
    y = torch.randint(0, 10, (len(x),))
    steps, refused = {}, {}
    for name, make in SIDES.items():
        torch.manual_seed(1)
        model = (case.for_opacus or case.build)() if name in ("hooks", "ghost") else case.build()
        try:
            step = make(model, x, y)
            step()
        except Exception as error:
            refused[name] = f"{type(error).__name__}: {error}".split("\n")[0]
        else:
            steps[name] = step
    tensors = [*case.build().parameters(), x, y]
    return steps, refused, sum(each.numel() * each.element_size() for each in tensors)


def race(steps: Mapping[str, Step], budget_s: float) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each step by the clock and by the processor; sides take turns, and one that is slow has fewer."""
    clock: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    started = time.perf_counter()
    while time.perf_counter() - started < budget_s:
        for name, step in steps.items():
            if sum(clock[name]) < budget_s / len(steps):
                before, before_cpu = time.perf_counter(), time.process_time()
                step()
                cpu[name].append(time.process_time() - before_cpu)
                clock[name].append(time.perf_counter() - before)
    return clock, cpu


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing on standard error: the profiler writes there when it starts and ends."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)


def peak_bytes(step: Step) -> int:
    """The most that torch's CPU allocator holds during a step, above what it held before."""
    with quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held, most = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def noise_s(stream: NoiseStream, count: int, turns: int) -> tuple[float, float]:
    """Seconds of noise for so many parameters, and of the bytes that it takes from AES-256-CTR; medians."""
    noise, aes = [], []
    for _ in range(turns):
        before = time.perf_counter()
        stream.gaussian_float(1.0, count)
        between = time.perf_counter()
        stream.take(8 * count)
        noise.append(between - before)
        aes.append(time.perf_counter() - between)
    return statistics.median(noise), statistics.median(aes)


def run(case: Case, threads: int, budget_s: float) -> dict[str, Any]:
    """All figures of one network with so many threads."""
    torch.set_num_threads(threads)
    steps, refused, fixed = prepared(case)
    seconds, cpu_seconds = race(steps, budget_s)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    cpu = {name: statistics.median(each) for name, each in cpu_seconds.items()}
    peaks = {name: peak_bytes(step) for name, step in steps.items()}
    count = sum(p.numel() for p in case.build().parameters())
    noise, aes = noise_s(os_noise(), count, 9)
    return {
        "title": case.title,
        "threads": threads,
        "goal": case.goal,
        "step_ms": {name: 1e3 * each for name, each in medians.items()},
        "turns": {name: len(each) for name, each in seconds.items()},
        "ratio": {name: each / medians["sgd"] for name, each in medians.items()},
        "cpu_ratio": {name: each / cpu["sgd"] for name, each in cpu.items()},
        "peak_bytes": peaks,
        "fixed_bytes": fixed,
        "memory_ratio": {name: (fixed + each) / (fixed + peaks["sgd"]) for name, each in peaks.items()},
        "parameters": count,
        "noise_ms": 1e3 * noise,
        "noise_over_aes": noise / aes,
        "aes_bytes_per_s": 8 * count / aes,
        "refused": refused,
    }


def show(results: Sequence[Mapping[str, Any]]) -> None:
    """One line a network and number of threads, and the sides that refused."""
    rows, notes = [], []
    for result in results:
        ratio, memory = result["ratio"], result["memory_ratio"]
        ours, goal = ratio["fedinfer"], result["goal"]
        met = "met" if ours <= goal else "missed"
        within = "met" if memory["fedinfer"] <= MEMORY_GOAL else "missed"
        peers = [f"{ratio[name]:.2f}×" if name in ratio else "refused" for name in ("hooks", "ghost")]
        rows.append(
            [result["title"], str(result["threads"]), f"{result['step_ms']['sgd']:.2f}",
             f"{result['step_ms']['fedinfer']:.2f}", f"{ours:.2f}× ({result['cpu_ratio']['fedinfer']:.2f}×)",
             f"≤ {goal:g}× {met}", *peers, f"{memory['fedinfer']:.2f}× {within}",
             f"{memory['hooks']:.2f}×" if "hooks" in memory else "", f"{result['noise_ms']:.2f}",
             f"{result['noise_over_aes']:.1f}×"]
        )  # fmt: skip
        notes += [f"{result['title']}, {NAMES[name]}: {why}" for name, why in result["refused"].items()]
    columns = ["", "threads", "SGD ms", "ours ms", "ours (CPU time)", "goal", "Opacus", "ghost", "memory", "Opacus",
               "noise ms", "of AES"]  # fmt: skip
    show_table("A step without noise, over SGD: forward, backward, clip, update", columns, rows)
    rate = statistics.median(result["aes_bytes_per_s"] for result in results)
    print(f"AES-256-CTR: {rate / 1e9:.2f} GB/s, 8 bytes a parameter; noise is added to the step")
    for line in dict.fromkeys(notes):
        print(line)


def main(argv: Sequence[str] | None = None) -> None:
    """Print what a private step costs, beside the goals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="at most a minute in all")
    parser.add_argument("--threads", default="1,2", help="numbers of threads, 1,2 unless it says otherwise")
    parser.add_argument("--only", action="append", choices=list(CASES), help="this network; may be repeated")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    budget_s = 2.0 if options.quick else 20.0
    started, before = time.perf_counter(), busy_s()
    results = []
    for threads in map(int, options.threads.split(",")):
        for name in options.only or CASES:
            note(f"{name}, {threads} …")
            results.append(run(CASES[name], threads, budget_s))
    spent, own = (after - then for after, then in zip(busy_s(), before, strict=True))
    others = max(0.0, spent - own) / (time.perf_counter() - started)
    arguments = " ".join(sys.argv[1:] if argv is None else argv)
    command = f"python -m experiments.benchmarks.dp_step {arguments}".strip()
    print(f"{command}\n{processor()}, {os.cpu_count()} cores, of which other work took {others:.2f}")
    show(results)
    if options.json:
        machine = {"processor": processor(), "cores": os.cpu_count(), "cores_taken_by_others": others}
        whole = {"command": command, "machine": machine | {"torch": torch.__version__}, "results": results}
        options.json.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
