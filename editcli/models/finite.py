"""A base whose weights are not all finite, refused by the name of the tensor.

One NaN makes every activation after it NaN: nothing can be edited, measured or sampled, and what fails first says
nothing of the cause. The check is one pass over the weights in memory that allocates nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from editcli.errors import ModelError
from editcli.models.offload import read_offloaded
from editcli.models.sharded import is_split
from editcli.storage.checkpoint import Checkpoint


def refuse_nonfinite(model: Any, checkpoint: Checkpoint) -> None:
    """Raise :class:`ModelError` naming the first parameter that holds a NaN or an infinite number."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            # A tied matrix is one parameter under two names.
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if not is_finite(_value(module, name, parameter)):
                raise _refusal(f"{path}.{name}".lstrip("."), parameter, checkpoint)


def is_finite(values: Tensor) -> bool:
    """Tell whether all numbers of a tensor are finite, in memory for two numbers only."""
    if values.numel() == 0 or not values.is_floating_point():
        return True
    # The extremes of numbers with a NaN among them are NaN.
    lowest, highest = torch.aminmax(values)
    return bool(torch.isfinite(lowest) & torch.isfinite(highest))


def _value(module: torch.nn.Module, name: str, parameter: Tensor) -> Tensor:
    if is_split(parameter):
        part: Any = parameter
        return part.to_local()
    return read_offloaded(module, name) if parameter.is_meta else parameter


def _refusal(name: str, parameter: Tensor, checkpoint: Checkpoint) -> ModelError:
    """Return the error for a parameter; one that is finite in its file has overflowed in the dtype of the model."""
    try:
        stored = checkpoint.tensor_for(name)
        overflowed = is_finite(checkpoint.read(stored))
    except ModelError:
        stored, overflowed = name, False
    if overflowed:
        kind = str(parameter.dtype).removeprefix("torch.")
        return ModelError(f"{stored} of {checkpoint.folder} overflows in {kind}; use --dtype bfloat16 or float32")
    return ModelError(
        f"{stored} of {checkpoint.folder} holds numbers that are not finite (NaN or infinite), so the model computes "
        "nothing; download it again or choose another checkpoint"
    )
