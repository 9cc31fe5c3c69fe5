"""The methods of the demo's table: who holds the rows, and who adds the noise.

Each training goes through the server and device code of a deployment, with scratch ledgers and `public-data` devices.
The noise is real and not seeded. Settings are the defaults of `RunConfig`, the same for all.
"""

import csv
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedinfer.cli.federation import Node, enlist
from fedinfer.cli.parts import part
from fedinfer.data import Row, Table, encode, heart_rows, heart_schema, stratified_quarters
from fedinfer.privacy import DistributedPlan, PrivacyPlan
from fedinfer.settings import RunConfig
from fedinfer.simulation import run_in_process

Way = Literal["alone", "together", "apart", "pooled"]
NAMES: Mapping[Way, str] = {
    "alone": "alone",
    "together": "together",
    "apart": "noise by each hospital",
    "pooled": "pooled",
}
# Ways to an ε, in the order of the table.
PRIVATE: tuple[Way, ...] = ("together", "apart", "pooled")


@dataclass(frozen=True, kw_only=True)
class Split:
    """One division of every hospital: training files on disk, test rows in memory."""

    train: Mapping[str, Path]
    pooled: Path
    test: Mapping[str, Table] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table.

    Alone, each hospital trains a model of its own. Together, all train one: by secure sums with a share of one noise
    from each, or, where there is no ε, by a mean in the clear. Apart is together with noise that is enough for each.
    Pooled, one party holds all rows.
    """

    way: Way
    epsilon: float | None = None

    @property
    def key(self) -> str:
        return self.way if self.epsilon is None else f"{self.way}{self.epsilon:g}"

    @property
    def label(self) -> str:
        return f"{NAMES[self.way]}, " + ("no privacy" if self.epsilon is None else f"ε = {self.epsilon:g}")

    def federations(self, split: Split) -> list[list[Path]]:
        """The files of the devices that train together, for each model that comes out."""
        if self.way == "alone":
            return [[path] for path in split.train.values()]
        return [[split.pooled] if self.way == "pooled" else list(split.train.values())]


def methods(epsilons: Sequence[float]) -> list[Method]:
    """The rows of the table, in order."""
    private = [Method(way=way, epsilon=epsilon) for way in PRIVATE for epsilon in epsilons]
    return [Method(way="alone"), Method(way="together"), *private, Method(way="pooled")]


@dataclass(frozen=True, kw_only=True)
class Sums:
    """What holds of `count` secure sums of `members` hospitals, and how much more noise variance was in one, at most.

    `overshoot` is what the server counted, over the variance that is accounted for: that of `min_honest` shares.
    """

    members: int
    min_honest: int
    colluders: int
    bits: int
    overshoot: float
    count: int


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The weights (rounds + 1, d) from the first to the last, and the secure sums that they came from."""

    trajectory: NDArray[np.float32] = field(repr=False)
    sums: Sums | None


def train(method: Method, federations: Sequence[Sequence[Path]], rounds: int) -> list[Trained]:
    """The models of `method`, one for each federation of files."""
    return [_train(method, files, rounds) for files in federations]


def plan_of(method: Method, *, rounds: int) -> PrivacyPlan | DistributedPlan | None:
    """The plan of `method` for as many hospitals as there are; None without privacy."""
    devices = 1 if method.way == "pooled" else len(heart_rows())
    with tempfile.TemporaryDirectory(prefix="fedinfer-members-") as place:
        return _enlisted(method, [{}] * devices, rounds, Path(place))[0].plan


def _train(method: Method, files: Sequence[Path], rounds: int) -> Trained:
    with tempfile.TemporaryDirectory(prefix="fedinfer-members-") as place:
        rows: list[Node] = [{"data": str(path), "schema": RunConfig.schema, "public-data": True} for path in files]
        config, nodes = _enlisted(method, rows, rounds, Path(place))
        context = run_in_process(
            part("server.app").app, part("clients.app").app, nodes=nodes, run_config=config.to_flat()
        )
        plan = config.plan
    (trajectory,) = context.state.array_records["trajectory"].to_numpy_ndarrays()
    records = json.loads(str(context.state.config_records["result"]["json"]))["rounds"]
    sums = None
    if isinstance(plan, DistributedPlan):
        sums = Sums(
            members=len(files),
            min_honest=plan.min_honest,
            colluders=plan.colluders,
            bits=plan.bits,
            overshoot=max(record["overshoot"] for record in records),
            count=len(records),
        )
    return Trained(trajectory=np.asarray(trajectory, np.float32), sums=sums)


def _enlisted(method: Method, nodes: Sequence[Node], rounds: int, place: Path) -> tuple[RunConfig, Sequence[Node]]:
    """The settings of a training by `nodes`, and the nodes with their place in its secure sums, if there are any."""
    config = RunConfig(rounds=rounds, min_devices=len(nodes), keep_trajectory=True)
    if method.epsilon is None:
        return replace(config, unsafe_no_privacy=True), nodes
    config = replace(config, epsilon=method.epsilon)
    if method.way == "pooled":
        # The one party divides by what all hospitals together would.
        return replace(config, examples_per_client=config.examples_per_client * len(heart_rows())), nodes
    return enlist(config, nodes, place) if method.way == "together" else (config, nodes)


def splits(seeds: Sequence[int], folder: Path) -> Iterator[Split]:
    """Write the training rows of each split below `folder` and encode its test rows.

    Each seed cuts each hospital into four stratified quarters; each quarter is the test once.
    """
    schema = heart_schema()
    hospitals = heart_rows()
    for seed in seeds:
        quarters = {
            name: list(stratified_quarters([int(row["num"] != "0") for row in rows], seed=seed))
            for name, rows in hospitals.items()
        }
        for quarter in range(4):
            place = folder / f"{seed}-{quarter}"
            inside, test, pooled = {}, {}, []
            for name, rows in hospitals.items():
                chosen, held_out = quarters[name][quarter]
                inside[name] = write_rows(place / f"{name}.csv", [rows[i] for i in chosen])
                test[name] = encode([rows[i] for i in held_out], schema, with_target=True)
                pooled += [rows[i] for i in chosen]
            yield Split(train=inside, pooled=write_rows(place / "pooled.csv", pooled), test=test)


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    """Write rows as CSV with a header; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
