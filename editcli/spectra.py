"""Norms and spectra of single matrices: what tells a healthy edited weight from a collapsing one.

Everything here takes torch tensors of shape (d_out, d_in) and works in float64. Small matrices are decomposed exactly,
large ones estimated with the error stated (:mod:`editcli.krylov`). The definitions of LS and SS are inferred from how
the literature uses the names, not taken from a published formula.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from editcli import krylov

Method = Literal["auto", "exact", "randomized"]

EXACT_LIMIT = 4096
"""Smaller side up to which ``auto`` decomposes exactly on a CPU; that size takes about half a minute."""
EXACT_LIMIT_ACCELERATED = 8192
"""The same on an accelerator."""
NORM_LIMIT = 1024
"""Smaller side up to which the spectral norm alone is exact; a Lanczos recurrence finds it in seconds at any size."""

_GRAM_LIMIT = 1e-7
"""Smallest over largest eigenvalue down to which the Gram matrix gives singular values to 1e-7; else a full SVD."""
_CHUNK = 1 << 22
"""Elements that are widened to float64 at a time."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The singular values of one matrix, with its leading singular vectors."""

    frobenius: float
    values: Tensor
    """Singular values, descending, float64 on the CPU: all of them when exact, the leading ones otherwise."""
    nuclear: float
    """The sum of all singular values."""
    entropy: float
    """The entropy of ``values / nuclear``, in nats."""
    left: Tensor
    """(d_out, k) leading left singular vectors, on the CPU."""
    right: Tensor
    """(d_in, k) leading right singular vectors, on the CPU."""
    exact: bool
    error: float
    """Relative error of any figure here: 0 when exact, else the larger of a residual and two standard errors."""

    @property
    def spectral(self) -> float:
        """sigma_1."""
        return float(self.values[0]) if len(self.values) else 0.0

    @property
    def effective_rank(self) -> float:
        """exp(entropy of sigma / sum sigma) (Roy and Vetterli, 2007); 0 for a zero matrix."""
        return math.exp(self.entropy) if self.nuclear > 0 else 0.0

    @property
    def stable_rank(self) -> float:
        """||W||_F^2 / sigma_1^2; 0 for a zero matrix."""
        return (self.frobenius / self.spectral) ** 2 if self.spectral > 0 else 0.0

    def k(self, tau: float) -> int:
        """Return the smallest k whose leading values hold the share ``tau`` of the sum of sigma (arXiv:2601.11042)."""
        reached = torch.cumsum(self.values, 0) >= tau * self.nuclear * (1 - 1e-12)
        return int(reached.to(torch.uint8).argmax()) + 1 if bool(reached.any()) else len(self.values)


@dataclass(frozen=True, slots=True)
class Similarity:
    """How far the leading k singular directions of two matrices agree."""

    k: int
    ls: float
    """Low-rank subspace similarity: cosine of the two rank-k reconstructions (inferred formula)."""
    ss_left: float
    """Singular vector similarity: mean |u_0i . u_ni| over i <= k (inferred formula)."""
    ss_right: float
    angles_left: tuple[float, ...]
    """Principal angles between the left subspaces, in degrees, ascending."""
    angles_right: tuple[float, ...]

    @property
    def ss(self) -> float:
        """The mean of both sides."""
        return (self.ss_left + self.ss_right) / 2


def frobenius(matrix: Tensor) -> float:
    """Return ||W||_F, accumulated in float64 whatever the dtype."""
    return math.sqrt(sum(float(part.double().square().sum()) for (part,) in _chunks(matrix)))


def distance(first: Tensor, second: Tensor) -> float:
    """Return ||A - B||_F, subtracted and accumulated in float64."""
    return math.sqrt(sum(float((a.double() - b.double()).square().sum()) for a, b in _chunks(first, second)))


def spectral_norm(
    matrix: Tensor, *, method: Method = "auto", device: torch.device | None = None
) -> tuple[float, float]:
    """Return sigma_1 and its relative error."""
    device = _capable(device)
    if method == "exact" or (method == "auto" and min(matrix.shape) <= NORM_LIMIT):
        values = singular_values(matrix, device=device)
        return (float(values[0]) if len(values) else 0.0), 0.0
    return krylov.estimate_largest(matrix.to(device, torch.float32))


def singular_values(matrix: Tensor, *, device: torch.device | None = None) -> Tensor:
    """Return all singular values, descending, float64 on the CPU; exact, whatever the size."""
    return _decompose(matrix.to(_capable(device), torch.float64), vectors=False)[0].cpu()


def spectrum(
    matrix: Tensor,
    *,
    tau: float = 0.1,
    vectors: int = 0,
    method: Method = "auto",
    device: torch.device | None = None,
) -> Spectrum:
    """Decompose ``matrix``; keep the leading k(``tau``) singular vectors, and at least ``vectors`` of them."""
    device = _capable(device)
    norm = frobenius(matrix)
    if not is_exact(matrix, method=method, device=device):
        return _estimate(matrix.to(device, torch.float32), norm, tau, vectors)
    values, left, right = _decompose(matrix.to(device, torch.float64), vectors=True)
    nuclear = float(values.sum())
    shares = values / nuclear if nuclear > 0 else values
    entropy = float(torch.special.entr(shares).sum())
    found = Spectrum(norm, values.cpu(), nuclear, entropy, left, right, exact=True, error=0.0)
    return _trim(found, max(vectors, found.k(tau)))


def similarity(base: Spectrum, edited: Spectrum, k: int) -> Similarity:
    """Compare the leading ``k`` singular directions; both spectra must hold that many vectors."""
    left = base.left[:, :k].double().T @ edited.left[:, :k].double()
    right = base.right[:, :k].double().T @ edited.right[:, :k].double()
    before, after = base.values[:k], edited.values[:k]
    product = float((before[:, None] * after[None, :] * left * right).sum())
    scale = float(before.norm() * after.norm())
    return Similarity(
        k=k,
        ls=product / scale if scale > 0 else 0.0,
        ss_left=float(left.diagonal().abs().mean()),
        ss_right=float(right.diagonal().abs().mean()),
        angles_left=principal_angles(base.left[:, :k], edited.left[:, :k]),
        angles_right=principal_angles(base.right[:, :k], edited.right[:, :k]),
    )


def principal_angles(first: Tensor, second: Tensor) -> tuple[float, ...]:
    """Return the angles between two subspaces with orthonormal bases (d, k), in degrees, ascending."""
    first, second = first.double(), second.double()
    overlap = first.T @ second
    cosines = torch.linalg.svdvals(overlap).clamp(0, 1)
    # Near zero the arc cosine loses half the digits; the sine, from what sticks out of the first subspace, does not.
    sines = torch.linalg.svdvals(second - first @ overlap).flip(0).clamp(0, 1)
    angles = torch.where(cosines > math.sqrt(0.5), torch.asin(sines), torch.acos(cosines))
    return tuple(torch.rad2deg(angles).sort().values.tolist())


def is_exact(matrix: Tensor, *, method: Method, device: torch.device) -> bool:
    """Say whether ``matrix`` is decomposed exactly under ``method``."""
    if method != "auto":
        return method == "exact"
    return min(matrix.shape) <= (EXACT_LIMIT if device.type == "cpu" else EXACT_LIMIT_ACCELERATED)


def _decompose(matrix: Tensor, *, vectors: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return all singular values (and vectors) of a float64 matrix, through the small Gram matrix where safe."""
    tall = matrix.shape[0] >= matrix.shape[1]
    gram = matrix.T @ matrix if tall else matrix @ matrix.T
    if vectors:
        squares, basis = torch.linalg.eigh(gram)
    else:
        squares, basis = torch.linalg.eigvalsh(gram), gram
    if len(squares) and squares[0] > _GRAM_LIMIT * squares[-1]:
        values, small = squares.sqrt().flip(0), basis.flip(1)
        if not vectors:
            return values, gram, gram
        other = (matrix @ small if tall else matrix.T @ small) / values
        return (values, other, small) if tall else (values, small, other)
    if not vectors:
        return torch.linalg.svdvals(matrix), gram, gram
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return values, left, right.T


def _estimate(matrix: Tensor, norm: float, tau: float, vectors: int) -> Spectrum:
    """Estimate the spectrum of a large float32 matrix; the leading part grows until it holds the share ``tau``."""
    size = min(matrix.shape)
    count = min(size, max(vectors, 1 + size // 64))
    top = krylov.leading(matrix, count)
    sums = krylov.estimate_sums(matrix, top)
    while count < size and float(top.values.sum()) < tau * sums.nuclear:
        count = min(size, 2 * count)
        top = krylov.leading(matrix, count)
    error = max(top.error, sums.error)
    found = Spectrum(norm, top.values.cpu(), sums.nuclear, sums.entropy, top.left, top.right, exact=False, error=error)
    return _trim(found, max(vectors, found.k(tau)))


def _trim(found: Spectrum, count: int) -> Spectrum:
    """Keep ``count`` vectors of each side, on the CPU, without holding on to the rest of their storage."""
    left, right = (side[:, :count].cpu().clone() for side in (found.left, found.right))
    return Spectrum(
        found.frobenius, found.values, found.nuclear, found.entropy, left, right, exact=found.exact, error=found.error
    )


def _capable(device: torch.device | None) -> torch.device:
    """Return ``device`` when it computes in float64, else the CPU."""
    if device is None:
        return torch.device("cpu")
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):  # Some accelerators have no float64 and say so in either way.
        return torch.device("cpu")
    return device


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield matching pieces of tensors of one shape."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), _CHUNK):
        yield tuple(tensor[start : start + _CHUNK] for tensor in flat)
