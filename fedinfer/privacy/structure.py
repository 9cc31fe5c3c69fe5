"""What a model is made of, as far as per-example gradients go: its trained parameters and the layers that hold them.

Layers for which an example has no gradient of its own, or that keep what they saw of examples, are refused.
"""

from dataclasses import dataclass
from weakref import ref

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fedinfer.errors import BadUsage
from fedinfer.privacy.layers import is_known


@dataclass(frozen=True, kw_only=True)
class Structure:
    """`layers` hold the parameters that are `trained`; `known` says whether `layers.py` knows them all.

    `state` changes with the model's modules, their training modes and which parameters are trained. `buffers` are all
    of the model's, by name, with the module and the name there.
    """

    trained: dict[str, nn.Parameter]
    layers: list[nn.Module]
    buffers: dict[str, tuple[nn.Module, str]]
    known: bool
    state: tuple[object, ...]


def examined(model: nn.Module) -> Structure:
    """The structure of a model.

    Raises: BadUsage for a layer that mixes examples or keeps what it saw of them, with what to use instead; for a
    parameter that is neither float32 nor float64, or has a hook on its gradient; under autocast.
    """
    trained: dict[str, nn.Parameter] = {}
    buffers: dict[str, tuple[nn.Module, str]] = {}
    state: list[object] = []
    layers, seen, known = [], set(), True
    for prefix, module in model.named_modules():
        if isinstance(module, _SUSPECTS) and (reason := _reason(module)):
            raise BadUsage(f"layer {prefix!r}: got {type(module).__name__}, which {reason}")
        state += [ref(module), module.training]
        for name in module._buffers:
            buffers[f"{prefix}.{name}" if prefix else name] = module, name
        trains = False
        for name, parameter in module._parameters.items():
            state.append(parameter is not None and parameter.requires_grad)
            if parameter is None or not parameter.requires_grad:
                continue
            trains = True
            if id(parameter) not in seen:
                seen.add(id(parameter))
                trained[f"{prefix}.{name}" if prefix else name] = parameter
        if trains:
            layers.append(module)
            known = known and is_known(module)
    for device in {parameter.device for parameter in trained.values()}:
        if torch.is_autocast_enabled(device.type):
            raise BadUsage(f"autocast: got it enabled for {device.type}, expected none; leave it out")
    for name, parameter in trained.items():
        if parameter.dtype is not torch.float32 and parameter.dtype is not torch.float64:
            raise BadUsage(f"parameter {name!r}: got {parameter.dtype}, expected torch.float32 or torch.float64")
        if parameter._backward_hooks:
            raise BadUsage(f"parameter {name!r}: got a hook on its gradient, expected none; change the sum instead")
    return Structure(trained=trained, layers=layers, buffers=buffers, known=known, state=tuple(state))


_SUSPECTS = (_BatchNorm, _InstanceNorm, nn.Embedding, nn.EmbeddingBag)


def _reason(module: nn.Module) -> str | None:
    if isinstance(module, _BatchNorm):
        return "mixes examples; use GroupNorm or LayerNorm"
    if isinstance(module, _InstanceNorm):
        return "keeps statistics of examples; use track_running_stats=False" if module.track_running_stats else None
    if module.max_norm is not None:
        return "changes the rows that examples look up, without noise; use max_norm=None"
    return "mixes examples; use scale_grad_by_freq=False" if module.scale_grad_by_freq else None
