"""Read and replace a projection's weight, also where accelerate keeps it elsewhere until the layer runs."""

from __future__ import annotations

from collections import ChainMap
from typing import Any

import torch
from torch import Tensor, nn

from editcli.models.experts import edited_parameter, weight_name
from editcli.models.sharded import parted, whole_weight


def device_of(module: nn.Module) -> torch.device:
    """Return the device on which a module computes."""
    weight = edited_parameter(module)
    return torch.device(_hook(module).execution_device) if weight.is_meta else weight.device


def read_weight(module: nn.Module) -> Tensor:
    """Return a module's weight as the model holds it, on the device on which the module computes."""
    weight = edited_parameter(module).detach()
    return read_offloaded(module, weight_name(module)).to(device_of(module)) if weight.is_meta else whole_weight(weight)


def read_offloaded(module: nn.Module, name: str) -> Tensor:
    """Return one of a module's own parameters that accelerate keeps elsewhere, where it keeps it."""
    return _hook(module).weights_map[name]


def replace_weight(module: nn.Module, value: Tensor) -> None:
    """Replace a module's weight, cast to the dtype in which the model holds it."""
    weight = edited_parameter(module)
    if not weight.is_meta:
        with torch.no_grad():
            weight.copy_(parted(value, weight))
        return
    hook = _hook(module)
    # The map may be shared by the whole model or lie on disk; the new weight only goes in front of it.
    replacement = {weight_name(module): value.to(device="cpu", dtype=weight.dtype).contiguous()}
    hook.weights_map = ChainMap(replacement, getattr(hook.weights_map, "parents", None) or hook.weights_map)


def _hook(module: nn.Module) -> Any:
    """Return accelerate's hook on an offloaded module."""
    hook: Any = module._hf_hook
    # Several hooks on one module come wrapped; the one with the weights is what counts.
    inner = [part for part in getattr(hook, "hooks", (hook,)) if getattr(part, "weights_map", None) is not None]
    return inner[0]
