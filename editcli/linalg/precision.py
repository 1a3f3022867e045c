"""Which precision a device has, and where matrices that need float64 are solved."""

from __future__ import annotations

import torch
from torch import Tensor


def double_device(device: torch.device | None) -> torch.device:
    """Return ``device`` if it computes in float64, else the CPU; None is the CPU."""
    if device is None:
        return torch.device("cpu")
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    # Which of the two a device without float64 raises depends on its backend.
    except (TypeError, RuntimeError):
        return torch.device("cpu")
    return device


def double(tensor: Tensor, device: torch.device | None) -> Tensor:
    """Return ``tensor`` in float64 on ``device``, or on the CPU where ``device`` has no float64."""
    # In two steps, because a combined one may convert before it leaves a device without float64.
    return tensor.to(double_device(device)).to(torch.float64)


def working_dtype(device: torch.device) -> torch.dtype:
    """Return the precision of the (d_in, d_in) matrices on ``device``: float64 on a CPU, float32 elsewhere."""
    return torch.float64 if device.type == "cpu" else torch.float32
