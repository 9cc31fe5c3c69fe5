"""Federated algorithms on clients that have unlike rows: digits, divided by Dirichlet draws over the labels.

Each class is dealt to 40 clients by shares from a Dirichlet distribution; the smaller its parameter, the fewer classes
a client has. A quarter of a client's rows is held out. "all" is the accuracy of the shared model on everybody's rows
held out; "own" is that of the model that a client uses itself, on its own rows held out, counted by rows. Clients
that share less than the whole model have no accuracy under "all". Eight of 40 clients take part in a round, as
Flower's stock strategies draw them; "own" is of all 40. Every algorithm has the same model, local rate and epochs, of
which none was tuned; mu of three values, and FedAdam's rate and τ of six pairs, were chosen on seed 100, Dirichlet 0.1.

    python -m experiments.heterogeneity [--quick] [--json FILE] [--plot FILE]
"""

import argparse
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAdam, Strategy
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from fedinfer.algorithms import Algorithm
from fedinfer.local_app import LocalApp, memory_in, weights_in
from fedinfer.simulation import ScaffoldStrategy, simulate
from fedinfer.training import Ditto, FedAvg, FedProx, LocalParameters, LocalTask, Scaffold, Sgd

CLIENTS, SHARE, ROUNDS = 40, 0.2, 60
RATE, EPOCHS, BATCH = 0.1, 5, 16
CONCENTRATIONS = (10.0, 0.3, 0.1)
EVERY = 5
Rows = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A client's algorithm, and the server's strategy for it."""

    algorithm: Algorithm
    server: Callable[[LocalTask], Strategy]


def averaging(task: LocalTask) -> Strategy:
    """Flower's own FedAvg."""
    return FlowerFedAvg(fraction_train=SHARE, fraction_evaluate=0.0)


CONTENDERS: Mapping[str, Contender] = {
    "FedAvg": Contender(algorithm=FedAvg(), server=averaging),
    "FedProx": Contender(algorithm=FedProx(mu=0.1), server=averaging),
    "SCAFFOLD": Contender(algorithm=Scaffold(), server=lambda task: ScaffoldStrategy(averaging(task), task)),
    "FedAdam": Contender(
        algorithm=FedAvg(), server=lambda _: FedAdam(fraction_train=SHARE, fraction_evaluate=0.0, eta=0.1)
    ),
    "Ditto": Contender(algorithm=Ditto(mu=1.0), server=averaging),
    "local head": Contender(algorithm=LocalParameters(names=("2.*",)), server=averaging),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run: accuracies of the shared model, by round, and of what clients use themselves, at the end."""

    concentration: float
    contender: str
    seed: int
    rounds: tuple[int, ...]
    shared: tuple[float, ...]
    own: float


def losses(output: Tensor, y: Tensor) -> Tensor:
    """Per-example losses (B,)."""
    return functional.cross_entropy(output, y, reduction="none")


def network(seed: int) -> nn.Module:
    """The model of all."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


@lru_cache(maxsize=4)
def divided(concentration: float, seed: int) -> tuple[tuple[Rows, Rows], ...]:
    """Each client's rows, and its rows held out."""
    digits, rng = load_digits(), np.random.default_rng(seed)
    owner = np.zeros(len(digits.target), np.int64)
    for label in range(10):
        own = rng.permutation(np.flatnonzero(digits.target == label))
        owner[own] = rng.choice(CLIENTS, size=len(own), p=rng.dirichlet(np.full(CLIENTS, concentration)))
    found = []
    for client in range(CLIENTS):
        rows = rng.permutation(np.flatnonzero(owner == client))
        held = len(rows) // 4
        x, y = torch.tensor(digits.data[rows] / 16.0, dtype=torch.float32), torch.tensor(digits.target[rows])
        found.append(((x[held:], y[held:]), (x[:held], y[:held])))
    return tuple(found)


def right(net: nn.Module, state: Mapping[str, Tensor], rows: Rows) -> int:
    """How many of the rows the model knows."""
    net.load_state_dict(dict(state))
    with torch.no_grad():
        return int((net(rows[0]).argmax(1) == rows[1]).sum())


def client_app(task: LocalTask, clients: Sequence[tuple[Rows, Rows]]) -> LocalApp:
    """The task's ClientApp, which also answers how many of its own rows held out a client knows."""
    app = task.client_app(lambda partition, _: clients[partition][0])

    @app.query("own")
    def own(message: Message, context: Context) -> Message:
        state = task.personal(weights_in(message.content), memory_in(context))
        known = right(network(0), state, clients[int(context.node_config["partition-id"])][1])
        return Message(RecordDict({"metrics": MetricRecord({"right": known})}), reply_to=message)

    return app


def run(concentration: float, name: str, seed: int, rounds: int) -> Row:
    """One run of one contender."""
    contender, clients = CONTENDERS[name], divided(concentration, seed)
    net = network(seed)
    task = LocalTask(
        model=net,
        loss=losses,
        optimiser=Sgd(lr=RATE),
        epochs=EPOCHS,
        batch_size=BATCH,
        algorithm=contender.algorithm,
    )
    held = torch.cat([x for _, (x, _) in clients]), torch.cat([y for _, (_, y) in clients])
    tried = network(seed)
    curve: dict[int, float] = {}
    known: list[int] = []
    server = ServerApp()

    def measure(number: int, arrays: ArrayRecord) -> MetricRecord:
        if number % EVERY == 0:
            curve[number] = right(tried, arrays.to_torch_state_dict(), held) / len(held[0])
        return MetricRecord({})

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        start = ArrayRecord(net.state_dict())
        result = contender.server(task).start(grid, start, num_rounds=rounds, evaluate_fn=measure)
        content = RecordDict({"arrays": result.arrays})
        replies = grid.send_and_receive([Message(content, node, "query.own") for node in grid.get_node_ids()])
        for reply in replies:
            count = reply.content.metric_records["metrics"]["right"]
            assert isinstance(count, int), "a count"
            known.append(count)

    simulate(server, client_app(task, clients), num_clients=CLIENTS, seed=seed)
    return Row(
        concentration=concentration,
        contender=name,
        seed=seed,
        rounds=tuple(curve),
        shared=tuple(curve.values()),
        own=sum(known) / len(held[0]),
    )


def report(rows: Sequence[Row]) -> None:
    """The table: means over seeds, with the standard error of the mean."""
    concentrations = list(dict.fromkeys(row.concentration for row in rows))
    print(f"{'':12}" + "".join(f"{f'Dirichlet {each:g}':>28}" for each in concentrations))
    print(f"{'':12}" + f"{'all':>14}{'own':>14}" * len(concentrations))
    for name in CONTENDERS:
        cells = ""
        for concentration in concentrations:
            own = [row for row in rows if (row.concentration, row.contender) == (concentration, name)]
            shared = spread([row.shared[-1] for row in own]) if shares_all(name) else "–"
            cells += f"{shared:>14}{spread([row.own for row in own]):>14}"
        print(f"{name:12}{cells}")
    print(
        f"accuracy after {rows[0].rounds[-1]} rounds; ± is the standard error over {len({r.seed for r in rows})} seeds"
    )


def shares_all(name: str) -> bool:
    """Whether the server has the whole model."""
    return not isinstance(CONTENDERS[name].algorithm, LocalParameters)


def spread(values: Sequence[float]) -> str:
    """A mean with its standard error, if there is one."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f} ±{np.std(values, ddof=1) / len(values) ** 0.5:.3f}"


def draw(rows: Sequence[Row], path: Path) -> None:
    """The shared model's accuracy by round, one picture for each division."""
    import matplotlib.pyplot as plt

    concentrations = list(dict.fromkeys(row.concentration for row in rows))
    figure, axes = plt.subplots(
        1,
        len(concentrations),
        figsize=(3.6 * len(concentrations), 3.4),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axis, concentration in zip(axes[0], concentrations, strict=True):
        for name in filter(shares_all, CONTENDERS):
            if isinstance(CONTENDERS[name].algorithm, Ditto):
                # Its shared model is FedAvg's, to the last bit.
                continue
            own = [row for row in rows if (row.concentration, row.contender) == (concentration, name)]
            axis.plot(own[0].rounds, np.mean([row.shared for row in own], axis=0), label=name)
        axis.set(title=f"Dirichlet {concentration:g}", xlabel="round")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("accuracy of the shared model")
    axes[0][-1].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Print accuracies of each algorithm on each division."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, one division, fewer rounds")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw them here, as PNG")
    options = parser.parse_args(argv)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    concentrations, seeds, rounds = ((0.1,), (0,), 10) if options.quick else (CONCENTRATIONS, (0, 1, 2), ROUNDS)
    rows = [run(each, name, seed, rounds) for each in concentrations for name in CONTENDERS for seed in seeds]
    report(rows)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    if options.plot:
        draw(rows, options.plot)


if __name__ == "__main__":
    main()
