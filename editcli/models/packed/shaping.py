"""Rounding that keeps what an edit does, though most of its numbers are smaller than half a step of the type.

Rounded to the nearest, an edited matrix of few bits is nearly the one before: the edit is lost with the rounding. So
the error E of rounding is kept small where the edit acts. With its change D = U S V^T, columns are rounded one after
the other, each after correction for what the earlier ones left:

    e = E V,   w_i <- w_i - e (sum_{j >= i} v_j v_j^T + l I)^-1 v_i,

where v_i is row i of V S / s_1. That is GPTQ (2210.17323) with the Hessian V S^2 V^T / s_1^2 + l I in place of the one
of calibration texts. A matrix that was not changed is rounded to the nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from editcli.models.packed.blocks import CHUNK, Rounding, Scales

DIRECTIONS = 32
"""Directions of the change that are kept; a change of higher rank is kept in its leading ones."""
COLUMNS = 24
"""Columns for each direction: where the matrix has fewer, keeping it costs the others too much."""
_DAMPING = 0.0001
_SPARE, _ROUNDS = 8, 3
"""Extra directions and passes of the subspace iteration that finds them (Halko et al., 0909.4061)."""


def shaped(weight: Tensor, before: Tensor, scales: Scales, rounding: Rounding) -> Tensor:
    """Return what is stored for ``weight``, (rows, columns), of which a file held ``before``.

    Each of ``scales`` has the shape of the weight.
    """
    directions = _directions(weight - before)
    if directions is None:
        return _nearest(weight, scales, rounding)
    # The columns in which the change acts most come first, as they can be corrected for by all others.
    order = torch.argsort(directions.square().sum(1), descending=True, stable=True)
    columns, gains = weight.T[order], _gains(directions[order])
    steps = tuple(one.T[order] for one in scales)
    stored: Tensor | None = None
    error = torch.zeros(len(weight), directions.shape[1])
    for place, (column, gain) in enumerate(zip(columns, gains, strict=True)):
        target = (column - error @ gain).unsqueeze(1)
        code, value = rounding(target, tuple(one[place] for one in steps))
        error += torch.outer(value.squeeze(1) - column, directions[order[place]])
        stored = torch.empty(columns.shape, dtype=code.dtype) if stored is None else stored
        stored[order[place]] = code.squeeze(1)
    assert stored is not None, "a matrix has columns"
    return stored.T.contiguous()


def _nearest(weight: Tensor, scales: Scales, rounding: Rounding) -> Tensor:
    numbers, steps = weight.reshape(-1, 1), tuple(one.reshape(-1) for one in scales)
    parts = [
        rounding(numbers[start : start + CHUNK], tuple(one[start : start + CHUNK] for one in steps))[0]
        for start in range(0, len(numbers), CHUNK)
    ]
    return torch.cat(parts).reshape(weight.shape)


def _directions(change: Tensor) -> Tensor | None:
    """Return the rows v_i, (columns, rank); None where nothing changed."""
    count = max(1, min(DIRECTIONS, change.shape[1] // COLUMNS))
    rank = min(count + _SPARE, *change.shape)
    left = torch.randn(change.shape[0], rank, generator=torch.Generator().manual_seed(0))
    for _ in range(_ROUNDS):
        right = torch.linalg.qr(change.T @ left).Q
        left = torch.linalg.qr(change @ right).Q
    _, values, right = torch.linalg.svd(left.T @ change, full_matrices=False)
    largest = float(values[0])
    if not largest > 0:
        return None
    return (right[:count].T * (values[:count] / largest)).contiguous()


def _gains(directions: Tensor) -> Tensor:
    """Return the factor of the error for every column, (columns, rank)."""
    rank = directions.shape[1]
    # What the columns from each place on can still correct, in float64 because it is a sum of differences.
    exact = directions.double()
    left = exact.T @ exact + _DAMPING * torch.eye(rank, dtype=torch.float64)
    gains = torch.empty_like(directions)
    for place, row in enumerate(exact):
        gains[place] = torch.linalg.solve(left, row).float()
        left -= torch.outer(row, row)
    return gains
