"""Opacus under audit: `PrivacyEngine.make_private` with Poisson sampling, as its documentation says to use it.

The batch size is the public constant here, as it is for whoever writes `DataLoader(batch_size=...)`; the sampling rate
and the divisor are what Opacus makes of it. The model stays at zero weights: its optimizer has learning rate zero.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from opacus import PrivacyEngine
from opacus.accountants import create_accountant
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from fedinfer.auditing.subjects import Floats, Subject, Trace, Units
from fedinfer.privacy import NoiseStream, PrivacyPlan
from fedinfer.privacy.audit_clipping import ClipRule
from fedinfer.privacy.plan import Unit

ACCOUNTANT = "prv"
History = tuple[tuple[float, float, int], ...]


def opacus() -> tuple[Subject, ...]:
    """Both ways to use it."""
    return Opacus(), Opacus(name="opacus, new engine each round", new_engine_each_round=True)


@dataclass(frozen=True, kw_only=True)
class Opacus:
    """One engine for the whole run, or, as in Flower's example of Opacus, a new one in each round of one epoch."""

    name: str = "opacus"
    unit: Unit = "example"
    fixed_units: bool = False
    sampled: bool = True
    slow: bool = False
    new_engine_each_round: bool = False

    def run(self, units: Units, plan: PrivacyPlan, stream: NoiseStream) -> Trace:
        features = torch.from_numpy(2.0 * units.rows)
        data = TensorDataset(features, torch.zeros(len(units)))
        before: list[Floats] = []
        released: list[Floats] = []
        history: History = ()
        with _quiet(), _randomness(stream):
            while len(released) < plan.steps:
                left = plan.steps - len(released)
                history = _train(data, plan, before, released, left, epochs=1 if self.new_engine_each_round else None)
        return Trace(
            before=np.stack(before),
            released=np.stack(released),
            sigma=plan.noise_multiplier * plan.clip_norm,
            claim=partial(_epsilon, history),
        )

    def clip_rule(self, units: int, stream: NoiseStream) -> ClipRule | None:
        return None


def _train(
    data: TensorDataset, plan: PrivacyPlan, before: list[Floats], released: list[Floats], steps: int, epochs: int | None
) -> History:
    """At most `steps` steps with an engine of its own; returns what its accountant has seen."""
    net = nn.Linear(data.tensors[0].shape[1], 1)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    engine = PrivacyEngine(accountant=ACCOUNTANT)
    model, optimizer, loader = engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.0),
        data_loader=DataLoader(data, batch_size=max(1, round(plan.divisor))),
        noise_multiplier=plan.noise_multiplier,
        max_grad_norm=plan.clip_norm,
    )
    add_noise = optimizer.add_noise

    def record_and_add_noise() -> None:
        before.append(_flat(parameter.summed_grad for parameter in optimizer.params))
        add_noise()

    optimizer.add_noise = record_and_add_noise
    done = epoch = 0
    while done < steps and epoch != epochs:
        for x, y in loader:
            optimizer.zero_grad()
            loss: torch.Tensor = functional.binary_cross_entropy_with_logits(model(x)[:, 0], y)
            torch.autograd.backward(loss)
            optimizer.step()
            released.append(_flat(parameter.grad for parameter in optimizer.params) * plan.divisor)
            done += 1
            if done == steps:
                break
        epoch += 1
    return tuple(engine.accountant.history)


def _flat(tensors: Iterator[torch.Tensor]) -> Floats:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).double().numpy()


@lru_cache(maxsize=256)
def _epsilon(history: History, delta: float) -> float:
    accountant = create_accountant(ACCOUNTANT)
    accountant.history = list(history)
    with _quiet(), np.errstate(divide="ignore"):
        return float(accountant.get_epsilon(delta))


@contextmanager
def _randomness(stream: NoiseStream) -> Iterator[None]:
    """Torch's own generator as it is, unless the audit itself is to be repeated."""
    if not stream.void:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(stream.take(7), "big"))
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Opacus warns in each run: that its generator is not secure, of hooks, and of its accountant's orders."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
