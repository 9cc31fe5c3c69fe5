"""Federated algorithms: what each adds to a device's own steps, said as data.

An algorithm may pull on every gradient, keep something on the device from round to round (its memory), and send
something beside the weights. All of it is elementwise arithmetic, so that one client's tensors (*shape) and those of a
stack of clients (clients, *shape) take the same code. Tensors go by the names of trained parameters.
"""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedinfer.errors import BadUsage

Named = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class FedAvg:
    """The optimiser's steps and nothing else.

    Reference: McMahan et al. 2017, arXiv:1602.05629.
    """


@dataclass(frozen=True, kw_only=True)
class FedProx:
    """Adds mu/2 ||w - w_sent||² to the loss, so that a device does not drift far from what the server sent.

    The term has no rows in it. With an example plan its gradient is added after the noise, and costs no ε.

    Reference: Li et al. 2020, arXiv:1812.06127, algorithm 2.
    """

    mu: float

    def __post_init__(self) -> None:
        _check_mu(self.mu)


@dataclass(frozen=True, kw_only=True)
class Scaffold:
    """Takes a device's own direction out of its steps, and puts the direction of all in its place.

    A device keeps a control variate c_i, the server sends its own c, and c - c_i is added to each gradient. After K
    steps of rate lr the new c_i is c_i - c + (w_sent - w) / (K lr); what it moved by goes back beside the weights.
    A device without rows keeps its c_i. The optimiser must be `Sgd` without momentum, for which alone that formula
    is the mean of the gradients.

    Reference: Karimireddy et al. 2020, arXiv:1910.06378, algorithm 1, option II.
    """


@dataclass(frozen=True, kw_only=True)
class LocalParameters:
    """Parameters whose names match one of `names` ("head.*") stay on the device; the server gets back what it sent.

    A device starts from its own, at first from what the server sent. With an example plan they train on the same
    releases as all others: rows reach them with noise alone. Trained without it they would carry each row into the
    gradients of all the others, which no clip of single gradients bounds. With a client plan there is no such thing:
    what a device keeps comes from its own rows and from what the server sent, and moves no other device's update.

    Reference: Arivazhagan et al. 2019, arXiv:1912.00818 (all parameters trained together).
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if isinstance(self.names, str) or not self.names:
            raise BadUsage(f"local parameters: got names {self.names!r}, expected a tuple of patterns as 'head.*'")

    def of(self, model: nn.Module) -> tuple[str, ...]:
        """The trained parameters of `model` that stay; one that stands in several places stays if one place matches.

        Raises: BadUsage if a pattern matches none of them, or if none is left for the server.
        """
        first = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        places = [(name, first[id(p)]) for name, p in model.named_parameters(remove_duplicate=False) if id(p) in first]
        found: set[str] = set()
        for pattern in self.names:
            own = {known for name, known in places if fnmatch.fnmatchcase(name, pattern)}
            if not own:
                raise BadUsage(f"local parameters: got {pattern!r}, expected a pattern of {sorted(first.values())}")
            found |= own
        if len(found) == len(first):
            raise BadUsage("local parameters: got all of the model's, expected some that are shared")
        return tuple(name for name in first.values() if name in found)


@dataclass(frozen=True, kw_only=True)
class Ditto:
    """Trains a personal model beside the shared one, which it does not touch: it never leaves the device.

    The personal model starts where it was left, at first from what the server sent, and takes a step on each batch
    that the shared one takes, by the gradient of its loss + mu/2 ||v - w_sent||². "evaluate" is of the personal model;
    buffers are those of the shared one. Under a plan a personal model that cannot be trained stays as it was, and no
    error tells of it.

    Reference: Li et al. 2021, arXiv:2012.04221, algorithm 1.
    """

    mu: float

    def __post_init__(self) -> None:
        _check_mu(self.mu)


Algorithm = FedAvg | FedProx | Scaffold | LocalParameters | Ditto


@dataclass(frozen=True, kw_only=True)
class Pull:
    """What is added to gradients: `mu` times the way from `toward` to the weights; without a `mu`, `toward` itself."""

    toward: Sequence[Tensor] = field(repr=False)
    mu: float | None

    def added(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        """The gradients with it."""
        if self.mu is None:
            return [gradient + shift for gradient, shift in zip(gradients, self.toward, strict=True)]
        triples = zip(weights, gradients, self.toward, strict=True)
        return [torch.add(gradient, weight - anchor, alpha=self.mu) for weight, gradient, anchor in triples]

    def of_first(self, clients: int) -> "Pull":
        """Of the first `clients` of a stack."""
        return Pull(toward=[tensor[:clients] for tensor in self.toward], mu=self.mu)


def first_memory(algorithm: Algorithm, sent: Named, local: Sequence[str]) -> Named:
    """What a device remembers before its first round; `local` names the parameters that stay there."""
    match algorithm:
        case Scaffold():
            return {name: torch.zeros_like(weight) for name, weight in sent.items()}
        case LocalParameters():
            return {name: sent[name] for name in local}
        case Ditto():
            return sent
    return {}


def shared_pull(algorithm: Algorithm, sent: Named, memory: Named, control: Named) -> Pull | None:
    """The pull on the steps whose result is shared."""
    match algorithm:
        case FedProx():
            return Pull(toward=list(sent.values()), mu=algorithm.mu)
        case Scaffold():
            return Pull(toward=[control[name] - memory[name] for name in sent], mu=None)
    return None


def personal_pull(algorithm: Algorithm, sent: Named) -> Pull | None:
    """The pull on the steps of a personal model, if there is one."""
    return Pull(toward=list(sent.values()), mu=algorithm.mu) if isinstance(algorithm, Ditto) else None


def control_of(algorithm: Algorithm, like: Named, given: Named | None) -> Named:
    """The server's control variate in the types of the weights `like`; empty for an algorithm that has none.

    Raises: BadUsage if it is not one of this model.
    """
    if not isinstance(algorithm, Scaffold):
        return {}
    given = given or {}
    if {name: tensor.shape for name, tensor in given.items()} != {name: w.shape for name, w in like.items()}:
        raise BadUsage(
            f"scaffold: got control variates {sorted(given)}, expected one of the shape of each trained parameter; "
            "a server that sends them is fedinfer.simulation.ScaffoldStrategy"
        )
    return {name: given[name].to(weight) for name, weight in like.items()}


def control_moves(sent: Named, moved: Named, control: Named, path: Tensor) -> Named:
    """By how much SCAFFOLD's c_i move; `path` () or (clients,) is the number of steps times their rate.

    Where no step was taken, nothing moves.
    """
    moves = {}
    for name, weight in moved.items():
        length = path.to(weight.dtype).reshape(*path.shape, *[1] * (weight.dim() - path.dim()))
        mean = (sent[name] - weight) / torch.where(length > 0.0, length, 1.0)
        moves[name] = torch.where(length > 0.0, mean - control[name], 0.0)
    return moves


def _check_mu(mu: float) -> None:
    if not 0.0 < mu < math.inf:
        raise BadUsage(f"mu: got {mu}, expected a finite number above 0")
