"""From the names in a simulation's file to rows, a model, a task and a plan."""

import importlib
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedinfer.cli.simulation_file import Data, Model, Simulation
from fedinfer.data import encode, heart_rows, heart_schema
from fedinfer.errors import BadInput, BadUsage
from fedinfer.privacy import Poisson, PrivacyPlan
from fedinfer.training import LocalTask

BUNDLED = ("digits", "heart-disease")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Features (n, ...) in single precision and class numbers (n,), to train on and to measure with."""

    x: Tensor = field(repr=False)
    y: Tensor = field(repr=False)
    test_x: Tensor = field(repr=False)
    test_y: Tensor = field(repr=False)
    classes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Measure:
    """Accuracy and mean loss on rows held out."""

    model: nn.Module = field(repr=False)
    x: Tensor = field(repr=False)
    y: Tensor = field(repr=False)

    def __call__(self, state: Mapping[str, Tensor]) -> Mapping[str, float]:
        with torch.no_grad():
            self.model.load_state_dict(dict(state))
            output = self.model.eval()(self.x)
            accuracy = float((output.argmax(1) == self.y).float().mean())
            return {"accuracy": accuracy, "test_loss": float(losses(output, self.y).mean())}


def losses(output: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each example (B,)."""
    return cross_entropy(output, y, reduction="none")


def rows_of(data: Data) -> Rows:
    """The rows that `data` names, some of them held out, the classes evenly.

    Raises: BadInput or BadUsage for what cannot be loaded, or does not hold rows and classes.
    """
    x, y = _checked(*_source(data.source), data.source)
    classes = int(y.max()) + 1
    if data.held_out == 0.0:
        train, test = np.arange(len(y)), np.zeros(0, np.int64)
    else:
        try:
            train, test = train_test_split(
                np.arange(len(y)), test_size=data.held_out, random_state=data.seed, stratify=y
            )
        except ValueError as error:
            raise BadInput(f"{data.source}: got rows of which {data.held_out:g} cannot be held out ({error})") from None
    tensor_x, tensor_y = torch.from_numpy(x), torch.from_numpy(y)
    return Rows(
        x=tensor_x[train], y=tensor_y[train], test_x=tensor_x[test], test_y=tensor_y[test], classes=classes
    )  # fmt: skip


def model_of(model: Model, rows: Rows) -> nn.Module:
    """The model with its starting weights; the global generator is left as it was.

    Raises: BadInput or BadUsage for a model that cannot be loaded, or does not take the rows.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(model.seed)
        if ":" in model.family:
            net = named_object(model.family)
            net = net if isinstance(net, nn.Module) or not callable(net) else net()
            if not isinstance(net, nn.Module):
                raise BadUsage(f"{model.family}: got a {type(net).__name__}, expected a torch module or what makes one")
        else:
            net = _layers(model, math.prod(rows.x.shape[1:]), rows.classes)
        try:
            with torch.no_grad():
                shape = tuple(net.eval()(rows.x[:2]).shape)
        except Exception as error:
            raise BadUsage(f"{model.family}: got rows of shape {tuple(rows.x.shape[1:])} ({error})") from None
    if len(shape) != 2 or shape[1] < rows.classes:
        raise BadUsage(f"{model.family}: got outputs of shape {shape}, expected (rows, {rows.classes} classes)")
    return net


def task_of(config: Simulation, net: nn.Module, rows: Rows) -> LocalTask:
    """The clients' task, with the plan that the file asks for."""
    steps, epochs = config.task.steps, config.task.epochs
    return LocalTask(
        model=net,
        loss=losses,
        optimiser=config.task.optimiser,
        steps=1 if steps is None and epochs is None else steps,
        epochs=epochs,
        batch_size=config.task.batch_size,
        plan=plan_of(config, len(rows.x)),
    )


def plan_of(config: Simulation, rows: int) -> PrivacyPlan | None:
    """The plan with the least noise for the file's ε, or None."""
    asked = config.privacy
    if asked is None:
        return None
    rounds = config.rounds + asked.spare_rounds
    if asked.unit == "client":
        expected = config.cohort.rate * config.clients
        return PrivacyPlan.calibrate(
            epsilon=asked.epsilon,
            delta=asked.delta,
            steps=rounds,
            unit="client",
            clip_norm=asked.clip_norm,
            sampler=config.cohort,
            divisor=expected if asked.divisor is None else asked.divisor,
            adversary="outsider" if asked.adversary == "outsider" else "server",
        )
    sampler = Poisson(rate=asked.sampling_rate)
    local = config.task.steps or (config.task.epochs or 1) * math.ceil(1.0 / asked.sampling_rate)
    expected = asked.sampling_rate * rows / config.clients
    return PrivacyPlan.calibrate(
        epsilon=asked.epsilon,
        delta=asked.delta,
        steps=config.cohort.participations(rounds) * local,
        clip_norm=asked.clip_norm,
        sampler=sampler,
        divisor=expected if asked.divisor is None else asked.divisor,
    )


def named_object(reference: str) -> Any:
    """What module:name stands for; modules are found from the working directory too.

    Raises: BadInput if there is no such thing, or importing it fails.
    """
    module, _, name = reference.partition(":")
    # It stays there for processes that are started later and import the same modules.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        raise BadInput(f"{reference}: got {type(error).__name__} ({error}), expected module:name") from None


def _source(source: str) -> tuple[Any, Any]:
    if source == "digits":
        loaded = load_digits()
        return loaded.data / 16.0, loaded.target
    if source == "heart-disease":
        table = encode([row for rows in heart_rows().values() for row in rows], heart_schema(), with_target=True)
        return table.features, table.labels
    if ":" in source:
        load = named_object(source)
        if not callable(load):
            raise BadUsage(f"{source}: got a {type(load).__name__}, expected a function that returns (x, y)")
        pair = load()
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise BadUsage(f"{source}: got a {type(pair).__name__}, expected the pair (x, y)")
        return pair
    if not source.endswith(".npz"):
        raise BadUsage(f"source: got {source!r}, expected {', '.join(BUNDLED)}, FILE.npz or module:function")
    return _from_npz(Path(source))


def _from_npz(path: Path) -> tuple[Any, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["x"], file["y"]
    except KeyError as missing:
        raise BadInput(f"{path}: got no array {missing}, expected x and y") from None
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, FileNotFoundError):
            raise BadInput(f"{path}: got no such file, expected an .npz with x and y") from None
        raise BadInput(f"{path}: got a file that is not an .npz with x and y ({error})") from None


def _checked(x: Any, y: Any, source: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Rows and class numbers in our types.

    Raises: BadInput if they are not.
    """
    features, labels = np.asarray(x), np.asarray(y)
    if features.ndim < 2 or labels.ndim != 1 or len(features) != len(labels) or not len(labels):
        raise BadInput(f"{source}: got x {features.shape} and y {labels.shape}, expected (rows, ...) and (rows,)")
    if features.dtype.kind not in "fiub" or labels.dtype.kind not in "fiub":
        raise BadInput(f"{source}: got x of {features.dtype} and y of {labels.dtype}, expected numbers")
    if not np.isfinite(features).all():
        raise BadInput(f"{source}: got NaN or infinity in x, expected numbers")
    whole = labels.astype(np.int64)
    if (whole != labels).any() or whole.min() < 0:
        raise BadInput(f"{source}: got a label that is not a whole number from 0, expected class numbers")
    return np.ascontiguousarray(features, np.float32), whole


def _layers(model: Model, inputs: int, classes: int) -> nn.Module:
    sizes = [inputs, *(model.hidden if model.family == "mlp" else ()), classes]
    layers: list[nn.Module] = [nn.Flatten()]
    for number, (before, after) in enumerate(pairwise(sizes)):
        layers += [nn.ReLU()] * (number > 0) + [nn.Linear(before, after)]
    return nn.Sequential(*layers)
