"""Randomized estimates for matrices too large to decompose: the spectrum's sums and its leading part, with errors.

Sums over all singular values come from stochastic Lanczos quadrature (Ubaru, Chen and Saad, 2017), the leading
singular triplets from subspace iteration (Halko, Martinsson and Tropp, arXiv:0909.4061).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

OVERSAMPLING = 16
"""Extra directions in a subspace iteration; with them the leading ones converge."""

_CONFIDENCE = 2.4
"""Standard errors in a stated error: 95 % of Student's t for eight probes."""


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over a whole spectrum."""

    nuclear: float
    """The sum of all singular values."""
    entropy: float
    """The entropy of the singular values divided by their sum, in nats."""
    error: float
    """Relative error of ``nuclear`` and of exp(``entropy``), the larger one, at 95 % confidence."""


@dataclass(frozen=True, slots=True)
class Leading:
    """Leading singular triplets: ``left`` (rows, k), ``values`` (k,) float64, ``right`` (columns, k)."""

    left: Tensor
    values: Tensor
    right: Tensor
    error: float
    """Largest residual ||A^T u - sigma v|| / sigma_1: no value is further from a singular value than this."""


def estimate_largest(matrix: Tensor, *, probes: int = 2, steps: int = 128, seed: int = 0) -> tuple[float, float]:
    """Return sigma_1 of ``matrix`` (any shape, float32 or float64) and its relative error, a Lanczos residual."""
    starts = _starts(matrix, probes, seed)
    nodes, vectors, last = _ritz(matrix, starts, steps, settled=1e-6)
    best = int(nodes[:, -1].argmax())
    top = float(nodes[best, -1])
    if top <= 0:
        return 0.0, 0.0
    return math.sqrt(top), float(last[best] * vectors[best, -1, -1].abs()) / (2 * top)


def estimate_sums(matrix: Tensor, top: Leading, *, probes: int = 8, steps: int = 48, seed: int = 0) -> Sums:
    """Estimate the nuclear norm and the entropy of ``matrix``; the triplets of ``top`` count exactly.

    Only the rest is sampled: without the large values most of the scatter is gone.
    """
    known = top.left if matrix.shape[0] < matrix.shape[1] else top.right
    starts = _starts(matrix, probes, seed)
    starts = starts - known @ (known.T @ starts)
    squares = (starts.norm(dim=0) ** 2).double().cpu()
    nodes, vectors, _ = _ritz(matrix, starts, steps, known=known)
    sigma = nodes.clamp_min(0).sqrt()
    weights = vectors[:, 0, :] ** 2
    nuclear = float(top.values.sum()) + squares * (weights * sigma).sum(1)
    logs = torch.special.xlogy(top.values, top.values).sum().cpu()
    logs = logs + squares * (weights * torch.special.xlogy(sigma, sigma)).sum(1)
    # The entropy of the means, not the mean of the entropies: the second is biased by the scatter of the first.
    mean = float(nuclear.mean())
    if mean <= 0:
        return Sums(0.0, 0.0, 0.0)
    ranks = (nuclear.log() - logs / nuclear).exp()
    error = _CONFIDENCE * max(_standard_error(nuclear) / mean, _standard_error(ranks) / float(ranks.mean()))
    return Sums(nuclear=mean, entropy=math.log(mean) - float(logs.mean()) / mean, error=error)


def leading(matrix: Tensor, count: int, *, rounds: int = 6, tolerance: float = 1e-4, seed: int = 0) -> Leading:
    """Return the ``count`` leading singular triplets of ``matrix`` by subspace iteration."""
    if matrix.shape[0] < matrix.shape[1]:
        turned = leading(matrix.T, count, rounds=rounds, tolerance=tolerance, seed=seed)
        return Leading(turned.right, turned.values, turned.left, turned.error)
    width = min(count + max(OVERSAMPLING, count // 2), matrix.shape[1])
    basis = _random(matrix, width, seed)
    triplets = _project(matrix, torch.linalg.qr(basis).Q, count)
    for _ in range(rounds):
        if triplets.error <= tolerance:
            break
        basis = torch.linalg.qr(matrix.T @ (matrix @ basis)).Q
        triplets = _project(matrix, basis, count)
    return triplets


def _project(matrix: Tensor, basis: Tensor, count: int) -> Leading:
    """Return the ``count`` leading triplets within the span of ``basis``."""
    left, values, rotation = torch.linalg.svd(matrix @ basis, full_matrices=False)
    left, values, right = left[:, :count], values[:count], (basis @ rotation.T)[:, :count]
    residual = (matrix.T @ left - right * values).norm(dim=0).max()
    error = float(residual / values[0]) if values[0] > 0 else 0.0
    return Leading(left, values.double(), right, error)


def _ritz(
    matrix: Tensor, starts: Tensor, steps: int, *, known: Tensor | None = None, settled: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one Lanczos recurrence per column of ``starts`` on the smaller Gram matrix, side by side.

    Directions of ``known`` (orthonormal columns) stay out. The recurrence ends early once the relative error of the
    largest value is below ``settled``. Returns Ritz values (probes, steps), ascending, their vectors in the Lanczos
    basis, and the last couplings; float64 on the CPU.
    """
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.T
    vector = starts / starts.norm(dim=0).clamp_min(1e-30)
    history: list[Tensor] = []
    diagonal: list[Tensor] = []
    off_diagonal: list[Tensor] = []
    for step in range(1, min(steps, matrix.shape[1]) + 1):
        history.append(vector)
        image = matrix.T @ (matrix @ vector)
        diagonal.append((vector * image).sum(0))
        image = _orthogonalise(image, history, known)
        length = image.norm(dim=0)
        # Below rounding the space is exhausted: a zero vector ends this probe and the others continue.
        alive = length > torch.finfo(matrix.dtype).eps * 10 * diagonal[0].abs().clamp_min(1e-30)
        off_diagonal.append(torch.where(alive, length, torch.zeros_like(length)))
        vector = torch.where(alive, image / length.clamp_min(1e-30), torch.zeros_like(image))
        if settled and step % 8 == 0 and _is_settled(*_solve(diagonal, off_diagonal), settled):
            break
    return _solve(diagonal, off_diagonal)


def _solve(diagonal: list[Tensor], off_diagonal: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the eigenvalues and vectors of the tridiagonal matrices, and the couplings to the next step."""
    couplings = torch.stack(off_diagonal, 1).double().cpu()
    off = couplings[:, :-1]
    tridiagonal = torch.diag_embed(torch.stack(diagonal, 1).double().cpu())
    nodes, vectors = torch.linalg.eigh(tridiagonal + torch.diag_embed(off, 1) + torch.diag_embed(off, -1))
    return nodes, vectors, couplings[:, -1]


def _is_settled(nodes: Tensor, vectors: Tensor, last: Tensor, tolerance: float) -> bool:
    """Tell whether the largest Ritz value of all recurrences is within ``tolerance``, by its residual."""
    best = int(nodes[:, -1].argmax())
    return bool(last[best] * vectors[best, -1, -1].abs() <= 2 * tolerance * nodes[best, -1])


def _orthogonalise(image: Tensor, history: list[Tensor], known: Tensor | None) -> Tensor:
    """Remove every earlier direction, twice: once loses orthogonality to rounding."""
    for _ in range(2):
        if known is not None:
            image = image - known @ (known.T @ image)
        for earlier in history:
            image = image - earlier * (earlier * image).sum(0)
    return image


def _starts(matrix: Tensor, probes: int, seed: int) -> Tensor:
    """Draw random signs on the smaller side, (min(rows, columns), probes)."""
    return _random(matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T, probes, seed).sign()


def _random(matrix: Tensor, width: int, seed: int) -> Tensor:
    """Draw a (columns, width) start; on the CPU, so that every device starts from the same one."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[1], width, generator=generator, dtype=torch.float64)
    return start.to(device=matrix.device, dtype=matrix.dtype)


def _standard_error(samples: Tensor) -> float:
    return float(samples.std() / math.sqrt(len(samples))) if len(samples) > 1 else math.inf
