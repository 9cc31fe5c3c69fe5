"""One model with the weights of many clients: gradients of a whole cohort in the time of a few matrix products.

A stack takes weights with a leading axis of clients, (C, *shape), and rows of all clients in one batch, (C * B, ...),
client after client. `LinearStack` puts batched products in the place of linear layers and leaves the rest of the
model's code as it is: whatever treats examples independently does not notice that they belong to different clients.
The gradient at a layer's weights is made from its inputs a and the gradients b at its outputs, weighted by example, so
that clipping each example costs no more than averaging them. `VmapStack` takes any model that `torch.func` can
transform, and lays out per-example gradients where it must clip. `Turns` (in `turns.py`) runs clients one after
another, which is fastest for large models. None is trusted: `choose` compares each with the device's own code on real
rows, and takes the first that agrees.

Reference: Goodfellow 2015, arXiv:1510.01799; Bu et al. 2023, arXiv:2210.00038 (book-keeping).
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedinfer.algorithms import Ditto
from fedinfer.errors import BadUsage
from fedinfer.local_task import LocalTask, in_double
from fedinfer.privacy import PrivacyPlan, clipped_gradient
from fedinfer.privacy.bookkeeping import MARGIN
from fedinfer.simulation.turns import Turns, is_large

State = Mapping[str, Tensor]
Rows = tuple[Tensor, Tensor]
# Rows and clients on which a stack must agree with the device's code before it is used, and how well.
PROBE_ROWS = (4, 2, 3)
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}


class Stack(Protocol):
    """Gradients of C clients at once, in the order of the model's trained parameters."""

    def use(self, state: State) -> None:
        """Take from `state` what is not trained: frozen parameters and buffers."""

    def gradients(self, weights: Sequence[Tensor], x: Tensor, y: Tensor, share: Tensor) -> tuple[list[Tensor], Tensor]:
        """Gradients (C, *shape) of each client's sum of losses weighted by `share` (C, B); the losses (C, B)."""

    def clipped(
        self, weights: Sequence[Tensor], x: Tensor, y: Tensor, present: Tensor, clip_norm: float
    ) -> list[Tensor]:
        """Sums (C, *shape) of the gradients of examples that are `present` (C, B), each clipped to `clip_norm`."""


class StackedLinear(nn.Module):
    """`nn.Linear` for C clients; it keeps what it was given and what it gave, for one backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.stacked_weight: Tensor
        self.stacked_bias: Tensor | None = None
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2:
            raise BadUsage(f"linear layer: got inputs of shape {tuple(x.shape)}, expected (rows, inputs)")
        rows = x.view(len(self.stacked_weight), -1, x.shape[1])
        transposed = self.stacked_weight.transpose(1, 2)
        if self.stacked_bias is None:
            output = torch.bmm(rows, transposed)
        else:
            output = torch.baddbmm(self.stacked_bias[:, None], rows, transposed)
        if not output.requires_grad:
            output.requires_grad_()
        self.seen.append((rows.detach(), output))
        return output.flatten(0, 1)


class LinearStack:
    """For models whose parameters all belong to linear layers that run once, on (rows, inputs).

    Raises: BadUsage if the model is another.
    """

    def __init__(self, task: LocalTask) -> None:
        net = copy.deepcopy(task.model).train()
        self._double = task.example_plan is not None
        self._net = net.double() if self._double else net
        self._loss = task.loss
        self._layers: dict[str, StackedLinear] = {}
        self._trained = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
        names = {name for name, _ in net.named_parameters(remove_duplicate=False)}
        for name, module in list(net.named_modules()):
            if getattr(module, "inplace", False) is True:
                # The outputs of layers are looked at again after the model has run.
                module.inplace = False
            if type(module) is nn.Linear:
                prefix = f"{name}." if name else ""
                names -= {f"{prefix}weight", f"{prefix}bias"}
                self._layers[prefix] = StackedLinear()
        if names or not self._layers:
            raise BadUsage(f"model: got parameters {sorted(names)} outside linear layers")
        if len({id(parameter) for parameter in net.parameters()}) != len(
            list(net.named_parameters(remove_duplicate=False))
        ):
            raise BadUsage("model: got parameters that stand in two places")
        for prefix, layer in self._layers.items():
            if not prefix:
                self._net = layer
            else:
                parent, _, child = prefix[:-1].rpartition(".")
                setattr(net.get_submodule(parent), child, layer)
        self._fixed: dict[str, Tensor] = {}

    def use(self, state: State) -> None:
        trained = set(self._trained)
        self._fixed = {name: self._cast(tensor) for name, tensor in state.items() if name not in trained}
        for name, buffer in self._net.named_buffers():
            buffer.copy_(self._fixed[name])

    def gradients(self, weights: Sequence[Tensor], x: Tensor, y: Tensor, share: Tensor) -> tuple[list[Tensor], Tensor]:
        losses, outputs = self._forward(weights, x, y)
        backward = torch.autograd.grad(losses, outputs, grad_outputs=share.flatten())
        return self._products(backward), losses.detach().view(share.shape)

    def clipped(
        self, weights: Sequence[Tensor], x: Tensor, y: Tensor, present: Tensor, clip_norm: float
    ) -> list[Tensor]:
        losses, outputs = self._forward(weights, x, y)
        backward = torch.autograd.grad(losses.sum(), outputs)
        squared = torch.zeros_like(present, dtype=losses.dtype)
        for (prefix, layer), output_grad in zip(self._layers.items(), backward, strict=True):
            inputs = layer.seen[0][0]
            reach = (inputs * inputs).sum(2) * float(f"{prefix}weight" in self._trained)
            reach = reach + float(f"{prefix}bias" in self._trained)
            squared += (output_grad * output_grad).sum(2) * reach
        factors, counted = clip_factors(squared, present, clip_norm)
        weighted = [torch.where(counted[..., None], each * factors[..., None], 0.0) for each in backward]
        if not bool(torch.isfinite(squared).all()):
            # 0 * NaN is NaN: inputs that count for nothing are emptied, not multiplied.
            for layer in self._layers.values():
                inputs, output = layer.seen[0]
                layer.seen[0] = (torch.where(counted[..., None], inputs, 0.0), output)
        return self._products(weighted)

    def _forward(self, weights: Sequence[Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        by_name = dict(zip(self._trained, weights, strict=True))
        clients = len(weights[0])
        for prefix, layer in self._layers.items():
            layer.seen.clear()
            layer.stacked_weight = self._stacked(f"{prefix}weight", by_name, clients)
            if f"{prefix}bias" in by_name or f"{prefix}bias" in self._fixed:
                layer.stacked_bias = self._stacked(f"{prefix}bias", by_name, clients)
        losses = self._loss(self._net(self._cast(x)), self._cast(y))
        if any(len(layer.seen) != 1 for layer in self._layers.values()):
            raise BadUsage("model: got a linear layer that does not run exactly once")
        if any(layer.seen[0][1]._version for layer in self._layers.values()):
            raise BadUsage("model: got code that changes a linear layer's output in place")
        return losses, [layer.seen[0][1] for layer in self._layers.values()]

    def _stacked(self, name: str, by_name: Mapping[str, Tensor], clients: int) -> Tensor:
        if name in by_name:
            return by_name[name]
        return self._fixed[name].expand(clients, *self._fixed[name].shape)

    def _products(self, backward: Sequence[Tensor]) -> list[Tensor]:
        found: dict[str, Tensor] = {}
        for (prefix, layer), output_grad in zip(self._layers.items(), backward, strict=True):
            if f"{prefix}weight" in self._trained:
                found[f"{prefix}weight"] = torch.bmm(output_grad.transpose(1, 2), layer.seen[0][0])
            if f"{prefix}bias" in self._trained:
                found[f"{prefix}bias"] = output_grad.sum(1)
            layer.seen.clear()
        return [found[name] for name in self._trained]

    def _cast(self, tensor: Tensor) -> Tensor:
        return in_double(tensor) if self._double else tensor


class VmapStack:
    """For any model that `torch.func.vmap` can run over a leading axis of its parameters."""

    def __init__(self, task: LocalTask) -> None:
        net = copy.deepcopy(task.model).train()
        self._double = task.example_plan is not None
        self._net = net.double() if self._double else net
        self._loss = task.loss
        self._trained = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
        self._unique = {name for name, _ in net.named_parameters()} | {name for name, _ in net.named_buffers()}
        self._fixed: dict[str, Tensor] = {}

    def use(self, state: State) -> None:
        kept = self._unique - set(self._trained)
        self._fixed = {name: self._cast(tensor) for name, tensor in state.items() if name in kept}

    def gradients(self, weights: Sequence[Tensor], x: Tensor, y: Tensor, share: Tensor) -> tuple[list[Tensor], Tensor]:
        leaves = [weight.detach().requires_grad_() for weight in weights]
        losses = vmap(self._losses)(dict(zip(self._trained, leaves, strict=True)), *self._by_client(x, y, share))
        return list(torch.autograd.grad((losses * share).sum(), leaves)), losses.detach()

    def clipped(
        self, weights: Sequence[Tensor], x: Tensor, y: Tensor, present: Tensor, clip_norm: float
    ) -> list[Tensor]:
        def loss_of_one(parameters: dict[str, Tensor], one_x: Tensor, one_y: Tensor) -> Tensor:
            return self._losses(parameters, one_x[None], one_y[None]).sum()

        of_client = vmap(grad(loss_of_one), in_dims=(None, 0, 0))
        parameters = dict(zip(self._trained, weights, strict=True))
        each = vmap(of_client)(parameters, *self._by_client(x, y, present))
        squared = torch.stack([each[name].flatten(2).square().sum(2) for name in self._trained]).sum(0)
        factors, counted = clip_factors(squared, present, clip_norm)
        sums = []
        for name in self._trained:
            flat = torch.where(counted[..., None], each[name].flatten(2), 0.0)
            total = torch.bmm(factors[:, None], flat)[:, 0]
            sums.append(total.view(len(present), *each[name].shape[2:]))
        return sums

    def _losses(self, parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return self._loss(functional_call(self._net, {**self._fixed, **parameters}, (x,)), y)

    def _by_client(self, x: Tensor, y: Tensor, like: Tensor) -> Rows:
        x, y = self._cast(x), self._cast(y)
        return x.view(*like.shape, *x.shape[1:]), y.view(*like.shape, *y.shape[1:])

    def _cast(self, tensor: Tensor) -> Tensor:
        return in_double(tensor) if self._double else tensor


def clip_factors(squared: Tensor, present: Tensor, clip_norm: float) -> tuple[Tensor, Tensor]:
    """By how much each gradient of squared norm (C, B) is scaled, and which count at all."""
    norms = squared.sqrt()
    counted = present & torch.isfinite(norms)
    factors = torch.clamp(MARGIN * clip_norm / norms.clamp_min(torch.finfo(norms.dtype).tiny), max=1.0)
    return torch.where(counted, factors, 0.0), counted


def makers(task: LocalTask) -> tuple[Callable[[LocalTask], Stack], ...]:
    """Stacks in the order of their speed."""
    return (LinearStack, Turns, VmapStack) if is_large(task) else (LinearStack, VmapStack, Turns)


def choose(task: LocalTask, state: State, rows: Sequence[Rows]) -> Callable[[], Stack]:
    """A maker of stacks that agree with the device's own code on the first of `rows`, client by client.

    Raises: BadUsage if none does; it says why of the last that was tried.
    """
    probes = [(x[:count], y[:count]) for (x, y), count in zip((r for r in rows if len(r[0])), PROBE_ROWS, strict=False)]
    if not probes:
        raise BadUsage("local task: got no rows to try a stack on")
    reason = ""
    for make in makers(task):
        try:
            _agree(task, make(task), state, probes)
        except Exception as error:
            # Whatever a model does in a stack, it will do it on the device too, and the device's code is what counts.
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        return lambda make=make: make(task)  # type: ignore[misc]
    raise BadUsage(f"local task: got a model that no stack computes ({reason})")


def _agree(task: LocalTask, stack: Stack, state: State, probes: Sequence[Rows]) -> None:
    net = copy.deepcopy(task.model).train()
    net.load_state_dict(dict(state))
    plan = task.example_plan
    if plan is not None:
        net.double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = [p.detach() for p in net.parameters() if p.requires_grad]
        near = [torch.stack([w + 0.05 * torch.randn_like(w) for _ in probes]) for w in weights]
        stack.use(state)
        index, present = (part.to(probes[0][0].device) for part in padded([len(x) for x, _ in probes]))
        x = torch.cat([x for x, _ in probes])[index]
        y = torch.cat([y for _, y in probes])[index]
        if plan is None or isinstance(task.algorithm, Ditto):
            share = present.to(near[0].dtype) / present.sum(1, keepdim=True)
            _same(net, weights, near, probes, stack.gradients(near, x, y, share)[0], _mean_gradients(task, plan))
        if plan is not None:
            _same(net, weights, near, probes, stack.clipped(near, x, y, present, plan.clip_norm), _sums(task, plan))


Gradients = Callable[[nn.Module, Tensor, Tensor], list[Tensor]]


def _mean_gradients(task: LocalTask, plan: PrivacyPlan | None) -> Gradients:
    def gradients(net: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
        x, y = (x, y) if plan is None else (in_double(x), in_double(y))
        return list(torch.autograd.grad(task.loss(net(x), y).mean(), [p for p in net.parameters() if p.requires_grad]))

    return gradients


def _sums(task: LocalTask, plan: PrivacyPlan) -> Gradients:
    def gradients(net: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
        return list(clipped_gradient(net, task.loss, in_double(x), in_double(y), clip_norm=plan.clip_norm).values())

    return gradients


def _same(
    net: nn.Module,
    weights: Sequence[Tensor],
    near: Sequence[Tensor],
    probes: Sequence[Rows],
    got: Sequence[Tensor],
    device: Gradients,
) -> None:
    """Raises: BadUsage unless `got` are the gradients of the device's own code at the weights `near`."""
    for client, (x, y) in enumerate(probes):
        for weight, other in zip(weights, near, strict=True):
            weight.copy_(other[client])
        buffers = [buffer.clone() for buffer in net.buffers()]
        expected = device(net, x, y)
        if any(not torch.equal(old, new) for old, new in zip(buffers, net.buffers(), strict=True)):
            raise BadUsage("model: got buffers that change in training, as those of BatchNorm do")
        one = torch.cat([gradient[client].flatten() for gradient in got])
        other = torch.cat([gradient.flatten() for gradient in expected])
        if not bool((one - other).norm() <= TOLERANCE.get(one.dtype, 1e-3) * other.norm()):
            raise BadUsage("model: got another gradient when examples share a batch or numbers are drawn anew")


def padded(sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Row numbers (C * B,) of clients whose rows lie one after another, and which of (C, B) are there.

    The gaps of a client are filled with its own first row.
    """
    lengths = torch.tensor(sizes)
    starts = lengths.cumsum(0) - lengths
    places = torch.arange(max(sizes))
    present = places[None] < lengths[:, None]
    return torch.where(present, starts[:, None] + places[None], starts[:, None]).flatten(), present
