"""The declarative local task: what a device does with its rows in a round, said as data.

Because it is data, the same task runs on one device (`train`, here) and for a whole cohort as one program
(`fedinfer/simulation/cohort.py`), with the same answer.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedinfer.algorithms import (
    Algorithm,
    Ditto,
    FedAvg,
    LocalParameters,
    Named,
    Pull,
    Scaffold,
    control_moves,
    control_of,
    first_memory,
    personal_pull,
    shared_pull,
)
from fedinfer.errors import BadUsage, ShapeMismatch
from fedinfer.optimisers import Optimiser, Sgd
from fedinfer.privacy import NoiseStream, PrivacyPlan, clipped_gradient
from fedinfer.privacy.row_by_row import row_by_row

if TYPE_CHECKING:
    from fedinfer.local_app import Load, LocalApp

LossFn = Callable[[Tensor, Tensor], Tensor]
Indices = NDArray[np.int64]
# Rounding to single precision may carry a clipped norm past its bound by 2**-24 of it.
CLIP_MARGIN = 1.0 - 2.0**-22
# No trained model comes near it, and no square of what it makes overflows.
MAX_WEIGHT = 1e9


@dataclass(frozen=True, kw_only=True)
class LocalUpdate:
    """What leaves a device: the new state by the names of `state_dict`, and what goes with it.

    Without a plan `loss` is the mean over the steps of the batch's mean loss before the step, and `examples` is the
    number of rows. With a plan `loss` is None, because no plan accounts for it, and `examples` is the constant 1.
    `auxiliary` is what an algorithm sends beside the weights. `memory` never leaves: the device keeps it.
    """

    state: Mapping[str, Tensor] = field(repr=False)
    loss: float | None = field(repr=False)
    examples: int = field(repr=False)
    auxiliary: Named = field(repr=False)
    memory: Named = field(repr=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalTask:
    """Some steps, or epochs, of an optimiser on a device's own rows, from weights that came from the server.

    `loss(output, y)` gives per-example losses (B,); a batch counts by their mean. Batches are those of a shuffled
    pass over the rows, cut into pieces of `batch_size` of which the last may be smaller; after a pass comes another.
    A batch larger than the data is all of it. A device without rows sends back what it got, with a count of 0.

    With a plan of unit "example" each step is one release of the plan: `plan.sample` chooses the rows (`batch_size`
    is not used), each row's gradient is clipped, the sum gets noise and is divided by `plan.divisor`, and only then
    does the optimiser see it. It computes in double precision and linear layers row by row, so that a row cannot change
    how the others are rounded; other layers and the loss are torch's own, whose last bit may depend on the batch. An
    epoch is 1 / rate steps, a number that everybody may know.

    With a plan of unit "client" a device trains as without one, clips its whole update to `plan.clip_norm` and says
    nothing else; whoever sums the updates must release the sum by the plan. The server is trusted.

    `algorithm` says what is done besides: see `fedinfer/algorithms.py`. What it keeps on the device is the `memory`
    of one round, given to the next.

    Guarantees: with a plan of unit "example" the update is a function of `releases` releases of the plan, of those of
    earlier rounds and of nothing else that is private, whatever the algorithm; with unit "client" it differs from the
    weights sent by at most `plan.clip_norm` in L2 norm, over all parameters together.
    """

    model: nn.Module
    loss: LossFn
    optimiser: Optimiser
    steps: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    plan: PrivacyPlan | None = None
    algorithm: Algorithm = field(default_factory=FedAvg)

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise BadUsage(f"local task: got steps={self.steps} and epochs={self.epochs}, expected one of them")
        for name in ("steps", "epochs", "batch_size"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise BadUsage(f"{name}: got {value}, expected a whole number of at least 1")
        if self.batch_size is None and self.example_plan is None:
            raise BadUsage("batch_size: got none, expected one unless a plan of unit 'example' samples the rows")
        if self.example_plan is not None and self.example_plan.min_honest > 1:
            raise BadUsage(
                f"plan: got one for {self.example_plan.min_honest} honest devices, expected 1; local steps have no "
                "secure sum between them"
            )
        if isinstance(self.algorithm, Scaffold):
            if not (isinstance(self.optimiser, Sgd) and self.optimiser.momentum == 0.0):
                raise BadUsage(f"scaffold: got {self.optimiser}, expected Sgd without momentum")
            if self.plan is not None and self.example_plan is None:
                raise BadUsage(
                    "scaffold: got a plan of unit 'client', which clips weights alone, expected unit 'example' or none"
                )
        # A pattern that fits no parameter is an error here and not on every device.
        _ = self.local_names

    @cached_property
    def local_names(self) -> tuple[str, ...]:
        """The trained parameters that stay on the device."""
        return self.algorithm.of(self.model) if isinstance(self.algorithm, LocalParameters) else ()

    @cached_property
    def trained_names(self) -> tuple[str, ...]:
        """The names of the parameters that training moves, each once."""
        return tuple(name for name, _ in trained(self.model))

    @cached_property
    def places(self) -> Mapping[str, str]:
        """By every name that a trained parameter has in a state: the first of its names."""
        first = {id(p): name for name, p in self.model.named_parameters() if p.requires_grad}
        every = self.model.named_parameters(remove_duplicate=False)
        return {name: first[id(parameter)] for name, parameter in every if id(parameter) in first}

    @property
    def example_plan(self) -> PrivacyPlan | None:
        """The plan, if each step is a release of it."""
        return self.plan if self.plan is not None and self.plan.unit == "example" else None

    @property
    def releases(self) -> int:
        """How many releases of an example plan a round makes: a public number; 0 without such a plan."""
        if self.example_plan is None:
            return 0
        return self.steps or (self.epochs or 0) * math.ceil(1.0 / self.example_plan.sampling_rate)

    def client_app(self, load: "Load") -> "LocalApp":
        """A Flower ClientApp of this task over the rows (x, y) of `load(partition_id, num_partitions)`.

        It runs as it is on a SuperNode, in Flower's simulation and in `fedinfer.simulation`.
        """
        from fedinfer.local_app import LocalApp

        return LocalApp(self, load)

    def batches(self, rows: int, stream: Callable[[], NoiseStream]) -> list[Indices]:
        """The rows of each step of a task without an example plan; `stream` is called once, if anything is drawn."""
        if rows == 0:
            return []
        size = min(self.batch_size or rows, rows)
        count = self.steps or (self.epochs or 0) * math.ceil(rows / size)
        if size == rows:
            return [np.arange(rows)] * count
        found: list[Indices] = []
        numbers = stream()
        while len(found) < count:
            order = np.argsort(numbers.uniform(rows), kind="stable")
            found += [order[start : start + size] for start in range(0, rows, size)]
        return found[:count]

    def train(
        self,
        state: Mapping[str, Tensor],
        x: Tensor,
        y: Tensor,
        stream: NoiseStream,
        *,
        done: int = 0,
        memory: Named | None = None,
        control: Named | None = None,
    ) -> LocalUpdate:
        """One round on one device, from `state`.

        `done` counts the releases that the plan has already made, `memory` is what the device kept of its last round,
        and `control` is SCAFFOLD's c, by the names of trained parameters.

        Raises: ShapeMismatch if x and y differ in length; BadUsage for a control variate that is not one; torch's own
        errors for a state that is not the model's.
        """
        check_rows(x, y)
        net = copy.deepcopy(self.model).train()
        net.load_state_dict(dict(state))
        control = control_of(self.algorithm, dict(trained(net)), control)
        self.check_sent(net.state_dict(), control)
        if self.example_plan is not None:
            row_by_row(net).double()
            x, y, control = in_double(x), in_double(y), all_in_double(control)
        weights = dict(trained(net))
        sent = {name: weight.clone() for name, weight in weights.items()}
        first = first_memory(self.algorithm, sent, self.local_names)
        memory = {name: (memory or first)[name].to(weight.dtype) for name, weight in first.items()}
        for name in self.local_names:
            weights[name].copy_(memory[name])
        pull = shared_pull(self.algorithm, sent, memory, control)
        loss = 0.0
        if self.example_plan is not None:
            batches = self._private_steps(net, x, y, stream, done, pull)
        else:
            batches = self.batches(len(x), lambda: stream)
            loss = self._plain_steps(net, x, y, batches, pull)
        moved = {name: weight.clone() for name, weight in weights.items()}
        fixed = {name: tensor.clone() for name, tensor in net.state_dict().items() if name not in moved}
        own_pull = personal_pull(self.algorithm, sent)
        if own_pull is not None:
            for name, weight in weights.items():
                weight.copy_(memory[name])
            with hidden_from_server(self.plan):
                self._plain_steps(net, x, y, batches, own_pull)
                memory = weights
        memory, auxiliary = self.leaving(sent, moved, memory, control, len(batches))
        own = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        examples, shown = (len(x), loss) if self.plan is None else (1, None)
        return LocalUpdate(
            state=self._answer(state, moved, fixed),
            loss=shown,
            examples=examples,
            auxiliary={name: tensor.to(own[name]) for name, tensor in auxiliary.items()},
            memory={name: tensor.to(own[name]) for name, tensor in memory.items()},
        )

    def check_sent(self, state: Mapping[str, Tensor], control: Named) -> None:
        """Raises: BadUsage for weights or control variates that an example plan refuses.

        What the device itself remembers is not looked at: Ditto's comes from rows without noise, and a refusal would
        tell of it.
        """
        if self.example_plan is not None:
            check_ordinary(state)
            check_ordinary(control)

    def leaving(
        self, sent: Named, moved: Named, memory: Named, control: Named, steps: int | Tensor
    ) -> tuple[Named, Named]:
        """What the device remembers and what it sends beside the weights, after `steps` () or (clients,) steps."""
        if isinstance(self.algorithm, LocalParameters):
            return {name: moved[name] for name in self.local_names}, {}
        if not isinstance(self.algorithm, Scaffold):
            return memory, {}
        assert isinstance(self.optimiser, Sgd)
        moves = control_moves(sent, moved, control, torch.as_tensor(steps) * self.optimiser.lr)
        return {name: memory[name] + move for name, move in moves.items()}, moves

    def evaluate(
        self, state: Mapping[str, Tensor], x: Tensor, y: Tensor, *, memory: Named | None = None
    ) -> tuple[float, int]:
        """The mean loss over all rows, and their number: for the device's own eyes if there is a plan.

        Local parameters and Ditto's personal model are those of `memory`, if there is one.
        """
        check_rows(x, y)
        net = copy.deepcopy(self.model).eval()
        net.load_state_dict(self.personal(state, memory))
        with torch.no_grad():
            return (float(self.loss(net(x), y).mean()) if len(x) else 0.0), len(x)

    def personal(self, state: Mapping[str, Tensor], memory: Named | None) -> dict[str, Tensor]:
        """The state that a device uses itself: the server's, with its own in place of what it keeps for itself."""
        if not memory or not isinstance(self.algorithm, LocalParameters | Ditto):
            return dict(state)
        return {name: memory.get(self.places.get(name, name), old) for name, old in state.items()}

    def _plain_steps(
        self, net: nn.Module, x: Tensor, y: Tensor, batches: Sequence[Indices], pull: Pull | None
    ) -> float:
        """A step on each batch; a batch without rows has a gradient of zero."""
        weights = [parameter for parameter in net.parameters() if parameter.requires_grad]
        values = [weight.detach() for weight in weights]
        optimiser_state = self.optimiser.start(values)
        total = 0.0
        for number, batch in enumerate(batches, start=1):
            gradients: Sequence[Tensor] = [torch.zeros_like(value) for value in values]
            if len(batch):
                rows = torch.from_numpy(batch)
                mean = self.loss(net(x[rows]), y[rows]).mean()
                gradients = torch.autograd.grad(mean, weights)
                total += float(mean.detach())
            if pull is not None:
                gradients = pull.added(values, gradients)
            self.optimiser.step(values, gradients, optimiser_state, number)
        return total / max(1, len(batches))

    def _private_steps(
        self, net: nn.Module, x: Tensor, y: Tensor, stream: NoiseStream, done: int, pull: Pull | None
    ) -> list[Indices]:
        """The steps of an example plan; the rows that it sampled for each, which are private."""
        plan = self.example_plan
        assert plan is not None
        weights = [parameter.detach() for parameter in net.parameters() if parameter.requires_grad]
        optimiser_state = self.optimiser.start(weights)
        batches = []
        for number in range(1, self.releases + 1):
            batches.append(plan.sample(len(x), stream, step=done + number))
            rows = torch.from_numpy(batches[-1])
            sums = clipped_gradient(net, self.loss, x[rows], y[rows], clip_norm=plan.clip_norm)
            total = torch.cat([gradient.reshape(-1) for gradient in sums.values()])
            released = torch.from_numpy(plan.release(total.cpu().numpy(), stream)).to(total)
            gradients = cut(released, weights)
            if pull is not None:
                # No row is in it: it is added to what was released, and the release is what it was.
                gradients = pull.added(weights, gradients)
            self.optimiser.step(weights, gradients, optimiser_state, number)
        return batches

    def _answer(self, sent: Mapping[str, Tensor], moved: Named, fixed: Named) -> dict[str, Tensor]:
        """The state that leaves: `moved` trained parameters, clipped if the plan says so, and buffers as in `fixed`."""
        shared = {place: name for place, name in self.places.items() if name not in self.local_names}
        if self.plan is not None and self.plan.unit == "client":
            names = [name for name in moved if name in shared]
            before, after = [sent[name][None] for name in names], [moved[name][None] for name in names]
            clip_updates(before, after, clip_norm=self.plan.clip_norm)
        answer = {}
        for name, old in sent.items():
            if name in shared:
                answer[name] = moved[shared[name]] if self.plan is None else moved[shared[name]].to(old.dtype)
            else:
                # Under a plan running statistics have had neither a clip nor noise, and stay here as local ones do.
                answer[name] = fixed[name] if self.plan is None and name not in self.places else old
        return answer


@contextmanager
def hidden_from_server(plan: PrivacyPlan | None) -> Iterator[None]:
    """Under a plan an error ends what stands in it and is forgotten, because an answer of errors would tell of rows."""
    try:
        yield
    except Exception:
        if plan is None:
            raise


def trained(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The values of the parameters that training moves, each once."""
    return ((name, parameter.detach()) for name, parameter in net.named_parameters() if parameter.requires_grad)


def check_rows(x: Tensor, y: Tensor) -> None:
    """Raises: ShapeMismatch if x and y differ in length."""
    if x.dim() < 1 or y.dim() < 1 or len(x) != len(y):
        raise ShapeMismatch(got=tuple(y.shape), expected=f"({len(x)}, ...)", what="y")


def check_ordinary(state: Mapping[str, Tensor]) -> None:
    """Raises: BadUsage for weights with which a network would overflow, and the last bit of a row decide."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool((tensor.abs() <= MAX_WEIGHT).all()):
            raise BadUsage(f"weights {name!r}: got NaN, infinity or a number beyond {MAX_WEIGHT:g}, expected none")


def in_double(tensor: Tensor) -> Tensor:
    """Floating-point numbers in double precision; class numbers as they are."""
    return tensor.double() if tensor.is_floating_point() else tensor


def all_in_double(tensors: Named) -> Named:
    """The same tensors in double precision."""
    return {name: tensor.double() for name, tensor in tensors.items()}


def cut(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Cut the last axis of `flat` (..., d) into tensors (..., *shape) of the shapes of `like`."""
    parts = torch.split(flat, [tensor.numel() for tensor in like], dim=-1)
    return [part.reshape(*flat.shape[:-1], *tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def clip_updates(before: Sequence[Tensor], after: Sequence[Tensor], *, clip_norm: float) -> None:
    """Draw each client's weights in `after` (C, *shape) back until they are within `clip_norm` of `before`, in place.

    `before` is (C, *shape) or (1, *shape). An update that is not finite becomes zero.

    Guarantees: the L2 norm of after - before, over all tensors of a client, is at most `clip_norm`, up to the
    rounding of the weights themselves.
    Reference: McMahan et al. 2018, arXiv:1710.06963.
    """
    moves = [(new.double() - old.double()).flatten(1) for old, new in zip(before, after, strict=True)]
    norms = torch.stack([move.square().sum(1) for move in moves]).sum(0).sqrt()
    finite = torch.isfinite(norms)
    factors = torch.where(norms > clip_norm, CLIP_MARGIN * clip_norm / norms, torch.ones_like(norms))
    for old, new, move in zip(before, after, moves, strict=True):
        kept = torch.where(finite[:, None], move * factors[:, None], 0.0)
        new.copy_(old.double() + kept.reshape(new.shape))
