"""What a simulation is, read once from a TOML file: names and numbers here, objects in `simulation_parts.py`.

A section is a dataclass, its keys are the fields. Where a section chooses one of several things, a table here says
which dataclass each name stands for; adding one is a row.
"""

import math
import tomllib
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from fedinfer.data.partitions import Iid, LabelDirichlet, Partition, Shards, SizeDirichlet
from fedinfer.errors import BadInput, BadUsage
from fedinfer.optimisers import Adam, Optimiser, Sgd
from fedinfer.privacy.checks import check_delta, check_epsilon
from fedinfer.privacy.samplers import SAMPLERS, Poisson, Sampler
from fedinfer.rules import FedSgd, ServerRule, rule_named

T = TypeVar("T")
OPTIMISERS: Mapping[str, type[Optimiser]] = {"sgd": Sgd, "adam": Adam}
PARTITIONS: Mapping[str, type[Partition]] = {
    "iid": Iid,
    "dirichlet": LabelDirichlet,
    "sizes": SizeDirichlet,
    "shards": Shards,
}
OWN_OF_TASK: tuple[str, ...] = ("steps", "epochs", "batch_size")
BACKENDS = ("vectorised", "process", "ray")
MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Data:
    """`source` is digits, heart-disease, a FILE.npz with x and y, or module:function that returns (x, y).

    `held_out` is the share of the rows that measures the model; `seed` says which.
    """

    source: str
    held_out: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.held_out < 1.0:
            raise BadUsage(f"held_out: got {self.held_out}, expected 0 to less than 1")


@dataclass(frozen=True, kw_only=True)
class Model:
    """`family` is logistic, mlp (of layers `hidden`), or module:attribute: a torch module or what makes one."""

    family: str = "logistic"
    hidden: tuple[int, ...] = (64,)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.family not in ("logistic", "mlp") and ":" not in self.family:
            raise BadUsage(f"family: got {self.family!r}, expected logistic, mlp or module:attribute")
        if not self.hidden or min(self.hidden) < 1:
            raise BadUsage(f"hidden: got {list(self.hidden)}, expected sizes of at least 1")


@dataclass(frozen=True, kw_only=True)
class Local:
    """What a client does in a round: `steps` or `epochs` of its optimiser, on batches of `batch_size` rows."""

    optimiser: Optimiser
    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 16


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """What is protected, and how well.

    `unit` "client": each client clips its update, the server, which is trusted, adds the noise. ε is against
    `adversary`: an outsider who does not know the cohorts, or the server's view of them ("server"). `unit` "example":
    each step of a client is a release over a sample of its rows, of rate `sampling_rate`. `divisor` is the public
    number that a sum is divided by; it defaults to the expected cohort, and to the mean number of rows sampled.
    `spare_rounds` are paid for besides, for rounds that an interruption lost.
    """

    epsilon: float
    delta: float
    clip_norm: float
    unit: str = "client"
    adversary: str = "outsider"
    sampling_rate: float = 0.5
    divisor: float | None = None
    spare_rounds: int = 2

    def __post_init__(self) -> None:
        check_epsilon(self.epsilon)
        check_delta(self.delta)
        if self.unit not in ("client", "example"):
            raise BadUsage(f"unit: got {self.unit!r}, expected 'client' or 'example'")
        if self.adversary not in ("outsider", "server"):
            raise BadUsage(f"adversary: got {self.adversary!r}, expected 'outsider' or 'server'")
        if self.spare_rounds < 0:
            raise BadUsage(f"spare_rounds: got {self.spare_rounds}, expected at least 0")


@dataclass(frozen=True, kw_only=True)
class Output:
    """Files, from the working directory: the weights, logs, a plot of the log, and a folder for TensorBoard."""

    weights: Path = Path("simulation.safetensors")
    csv: Path | None = None
    json_lines: Path | None = None
    tensorboard: Path | None = None
    plot: Path | None = None
    checkpoint_every: int = 10

    def __post_init__(self) -> None:
        if self.plot is not None and self.json_lines is None:
            raise BadUsage("plot: got no log to draw, expected json_lines beside it")
        files = [path for path in (self.weights, self.csv, self.json_lines, self.plot) if path is not None]
        if len(set(files)) < len(files):
            raise BadUsage("got one file for two things, expected a file for each")
        if self.plot is not None and self.plot.suffix not in (".png", ".svg", ".pdf"):
            raise BadUsage(f"plot: got {self.plot}, expected a file that ends in .png, .svg or .pdf")
        if self.checkpoint_every < 1:
            raise BadUsage(f"checkpoint_every: got {self.checkpoint_every}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """A whole run.

    `seed` makes it repeatable to the bit and voids every ε; without one, randomness is the operating system's. What
    is held out, how rows are divided and how weights start come from the seeds of their own sections, which are public.
    """

    clients: int
    rounds: int
    data: Data
    partition: Partition
    model: Model
    task: Local
    cohort: Sampler
    rule: ServerRule
    output: Output
    privacy: Privacy | None = None
    seed: int | None = None
    backend: str = "vectorised"
    device: str = "cpu"
    workers: int | None = None
    evaluate_every: int = 1

    def __post_init__(self) -> None:
        for name in ("clients", "rounds", "evaluate_every"):
            if getattr(self, name) < 1:
                raise BadUsage(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.backend not in BACKENDS:
            raise BadUsage(f"backend: got {self.backend!r}, expected one of {', '.join(BACKENDS)}")


def read_simulation(path: Path) -> Simulation:
    """Read a simulation.

    Raises: BadInput for a file that cannot be read or is not TOML; BadUsage for an unknown key, a wrong type or a
    value that cannot be. Each names the file.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise BadInput(f"{path}: got over {MAX_FILE_BYTES} bytes, expected a TOML file")
        top: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: got no readable file ({error.strerror}), expected TOML") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: got a file that is not TOML ({error})") from None
    try:
        return _simulation(top)
    except BadUsage as error:
        raise BadUsage(f"{path}, {error}") from None


def _simulation(top: Mapping[str, Any]) -> Simulation:
    known = sorted(item.name for item in fields(Simulation))
    for name in top:
        if name not in known:
            raise BadUsage(f"got unknown key {name!r}, expected {', '.join(known)}")
    clients = top.get("clients", 0)
    sections = {
        "data": _section(top, "data", Data),
        "partition": _choice(top, "partition", "scheme", PARTITIONS) or PARTITIONS["iid"](),
        "model": _section(top, "model", Model),
        "task": _task(top),
        "cohort": _choice(top, "cohort", "sampler", SAMPLERS, given={"population": clients}) or Poisson(rate=1.0),
        "rule": _rule(top),
        "output": _section(top, "output", Output),
        "privacy": _section(top, "privacy", Privacy) if "privacy" in top else None,
    }
    plain = {name: value for name, value in top.items() if name not in sections}
    return read_fields(Simulation, plain, where="", given=sections)


def _section(top: Mapping[str, Any], name: str, kind: type[T]) -> T:
    return read_fields(kind, _table(top, name), where=f"[{name}] ")


def _choice(
    top: Mapping[str, Any],
    name: str,
    key: str,
    table: Mapping[str, type[T]],
    *,
    given: Mapping[str, Any] | None = None,
    also: tuple[str, ...] = (),
) -> T | None:
    """What the section's `key` names, of the other keys; None without the section."""
    values = dict(_table(top, name))
    if not values:
        return None
    chosen = values.pop(key, None)
    if chosen not in table:
        raise BadUsage(f"[{name}] {key}: got {chosen!r}, expected one of {', '.join(table)}")
    kind = table[chosen]
    names = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    known = {item: value for item, value in (given or {}).items() if item in names}
    return read_fields(kind, values, where=f"[{name}] ", given=known, also=(key, *also))


def _task(top: Mapping[str, Any]) -> Local:
    values = dict(_table(top, "task"))
    own = {name: values.pop(name) for name in OWN_OF_TASK if name in values}
    optimiser = _choice({"task": {"optimiser": "sgd", **values}}, "task", "optimiser", OPTIMISERS, also=OWN_OF_TASK)
    return read_fields(Local, own, where="[task] ", given={"optimiser": optimiser})


def _rule(top: Mapping[str, Any]) -> ServerRule:
    values = dict(_table(top, "rule"))
    name = values.pop("name", "fedsgd")
    numbers = read_fields(FedSgd, {"learning_rate": 1.0, **values}, where="[rule] ", also=("name",))
    try:
        return rule_named(name, learning_rate=numbers.learning_rate, momentum=numbers.momentum)
    except (BadUsage, TypeError) as error:
        raise BadUsage(f"[rule] {error}") from None


def _table(top: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    values = top.get(name, {})
    if not isinstance(values, dict):
        raise BadUsage(f"{name}: got {values!r}, expected a section [{name}]")
    return values


def read_fields(
    kind: type[T],
    values: Mapping[str, Any],
    *,
    where: str,
    given: Mapping[str, Any] | None = None,
    also: tuple[str, ...] = (),
) -> T:
    """An object of the dataclass `kind`: `given` fields as they are, the others from `values`, checked by their types.

    Raises: BadUsage for a key that is unknown, missing or of another type, or a value that cannot be.
    """
    own = {} if given is None else dict(given)
    hints = get_type_hints(kind)
    needed = {item.name: item for item in fields(kind) if item.name not in own}  # type: ignore[arg-type]
    for name in values:
        if name not in needed:
            raise BadUsage(f"{where}got unknown key {name!r}, expected {', '.join(sorted([*also, *needed]))}")
    for name, item in needed.items():
        if name in values:
            own[name] = _typed(values[name], hints[name], f"{where}{name}")
        elif item.default is MISSING and item.default_factory is MISSING:
            raise BadUsage(f"{where}{name}: got none, expected one")
    try:
        return kind(**own)
    except BadUsage as error:
        raise BadUsage(f"{where}{error}") from None


def _typed(value: Any, hint: Any, name: str) -> Any:
    """The value as the type `hint` wants it; a whole number may stand for a float, a text for a path."""
    if isinstance(hint, types.UnionType):
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise BadUsage(f"{name}: got {value!r}, expected a list")
        return tuple(_typed(item, get_args(hint)[0], name) for item in value)
    if hint is float and type(value) is int:
        return float(value)
    if hint is Path and type(value) is str and value:
        return Path(value)
    if type(value) is not hint:
        raise BadUsage(f"{name}: got {value!r}, expected {KINDS.get(hint, hint.__name__)}")
    if hint is float and not math.isfinite(value):
        raise BadUsage(f"{name}: got {value}, expected a finite number")
    return value


KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", Path: "a path"}
