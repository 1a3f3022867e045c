"""How far an edited weight moved along the leading singular directions of its base: an alarm that needs weights alone.

Along the i-th singular direction of W_0 = sum_i sigma_i u_i v_i^T, n edits have written u_i^T (W_n - W_0) v_i. If every
edit adds a step c_i of random sign there, they add up to sqrt(n) |c_i|, which is sqrt(n) |c_i| / sigma_i of what was
there. arXiv:2606.00570 reports a correlation of -0.7 to -0.96 of this figure with performance. We take c_i to be
u_i^T (W_n - W_0) v_i / sqrt(n), so that the number of edits cancels, and the mean over the leading directions; both are
inferred, since how the paper estimates c_i and averages is not known to us.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from editcli.linalg import krylov
from editcli.linalg.precision import double_device
from editcli.linalg.spectra import NORM_LIMIT, spectrum

LEADING = 16
"""Directions that are watched: few, so that a large matrix takes seconds."""
_CHUNK = 1 << 22
"""Elements that are widened to float64 at a time."""


@dataclass(frozen=True, slots=True)
class Directions:
    """Leading singular directions: ``left`` (d_out, k), ``values`` (k,), ``right`` (d_in, k); float64 on the CPU."""

    left: Tensor
    values: Tensor
    right: Tensor


def leading_directions(matrix: Tensor, *, count: int = LEADING, device: torch.device | None = None) -> Directions:
    """Return the ``count`` leading singular directions of a (d_out, d_in) matrix, or all where it has fewer.

    They are exact up to a smaller side of 1,024 and come from a few rounds of subspace iteration beyond.
    """
    count = min(count, *matrix.shape)
    if min(matrix.shape) <= NORM_LIMIT:
        top = spectrum(matrix, vectors=count, method="exact", device=device)
    else:
        top = krylov.leading(matrix.to(double_device(device), torch.float32), count)
    sides = (side[:, :count].double().cpu() for side in (top.left, top.right))
    left, right = sides
    return Directions(left, top.values[:count].double().cpu(), right)


def along(directions: Directions, matrix: Tensor) -> Tensor:
    """Return u_i^T M v_i for every direction, (k,) float64 on the CPU; M is (d_out, d_in)."""
    total = torch.zeros(len(directions.values), dtype=torch.float64)
    height = max(1, _CHUNK // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), height):
        rows = matrix[start : start + height].cpu().double()
        total += ((rows @ directions.right) * directions.left[start : start + height]).sum(0)
    return total


def relative_change(directions: Directions, before: Tensor, after: Tensor) -> float | None:
    """Return the mean of |after_i - before_i| / sigma_i over the base's directions with sigma_i > 0.

    ``before`` and ``after`` are what :func:`along` returns of W_0 and W_n, (k,) each. None for a base of zeros.
    """
    known = directions.values > 0
    if not bool(known.any()):
        return None
    return float(((after - before).abs()[known] / directions.values[known]).mean())


def change_along(base: Tensor, edited: Tensor, *, device: torch.device | None = None) -> float | None:
    """Return :func:`relative_change` of two weights (d_out, d_in); None for a base of zeros."""
    directions = leading_directions(base, device=device)
    return relative_change(directions, along(directions, base), along(directions, edited))
