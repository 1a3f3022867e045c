"""Norms and spectra of single matrices: the figures that tell a healthy edited weight from a
collapsing one.

Everything here takes torch tensors of shape (d_out, d_in) and works in float64. Small matrices are decomposed exactly,
large ones estimated with the error stated (:mod:`editcli.linalg.krylov`). LS and SS are defined as inferred from how
the literature uses the names, not taken from a published formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from editcli.linalg import krylov
from editcli.linalg.precision import double, double_device

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
        """Return the smallest k whose leading values sum to ``tau`` times the sum of sigma (arXiv:2601.11042)."""
        return _leading_count(self.values, self.nuclear, tau)


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
    device = double_device(device)
    if method == "exact" or (method == "auto" and min(matrix.shape) <= NORM_LIMIT):
        values = singular_values(matrix, device=device)
        return (float(values[0]) if len(values) else 0.0), 0.0
    return krylov.estimate_largest(matrix.to(device, torch.float32))


def singular_values(matrix: Tensor, *, device: torch.device | None = None) -> Tensor:
    """Return all singular values, descending, float64 on the CPU; exact, whatever the size."""
    return _values(double(matrix, device)).cpu()


def spectrum(
    matrix: Tensor,
    *,
    tau: float = 0.1,
    vectors: int = 0,
    method: Method = "auto",
    device: torch.device | None = None,
) -> Spectrum:
    """Decompose ``matrix``; keep the leading k(``tau``) singular vectors, and at least ``vectors`` of them."""
    device = double_device(device)
    norm = frobenius(matrix)
    if not is_exact(matrix, method=method, device=device):
        return _estimate(matrix.to(device, torch.float32), norm, tau, vectors)
    wide = double(matrix, device)
    values, left, right = _decompose(
        wide, lambda values: max(vectors, _leading_count(values, float(values.sum()), tau))
    )
    nuclear = float(values.sum())
    fractions = values / nuclear if nuclear > 0 else values
    entropy = float(torch.special.entr(fractions).sum())
    return Spectrum(norm, values.cpu(), nuclear, entropy, left.cpu(), right.cpu(), exact=True, error=0.0)


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
    """Tell whether ``method`` decomposes ``matrix`` exactly."""
    if method != "auto":
        return method == "exact"
    return min(matrix.shape) <= (EXACT_LIMIT if device.type == "cpu" else EXACT_LIMIT_ACCELERATED)


def _decompose(matrix: Tensor, count: Callable[[Tensor], int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return all singular values of a float64 matrix, and ``count(values)`` singular vectors of each side.

    The small Gram matrix is used where that is safe: it costs a fraction of a full decomposition.
    """
    tall = matrix.shape[0] >= matrix.shape[1]
    gram = matrix.T @ matrix if tall else matrix @ matrix.T
    squares, basis = torch.linalg.eigh(gram)
    safe = len(squares) > 0 and bool(squares[0] > _GRAM_LIMIT * squares[-1])
    values = squares.sqrt().flip(0) if safe else torch.linalg.svdvals(matrix)
    size = count(values)
    # Squaring costs the small values and their vectors their digits, and the leading ones nothing.
    if not safe and (size == 0 or values[size - 1] ** 2 <= _GRAM_LIMIT * values[0] ** 2):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return values, left[:, :size], right.T[:, :size]
    small = basis.flip(1)[:, :size]
    large = (matrix if tall else matrix.T) @ small / values[: small.shape[1]]
    return (values, large, small) if tall else (values, small, large)


def _values(matrix: Tensor) -> Tensor:
    """Return all singular values of a float64 matrix, descending."""
    squares = torch.linalg.eigvalsh(matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T)
    if len(squares) and squares[0] > _GRAM_LIMIT * squares[-1]:
        return squares.sqrt().flip(0)
    return torch.linalg.svdvals(matrix)


def _leading_count(values: Tensor, nuclear: float, tau: float) -> int:
    reached = torch.cumsum(values, 0) >= tau * nuclear * (1 - 1e-12)
    return int(reached.to(torch.uint8).argmax()) + 1 if bool(reached.any()) else len(values)


def _estimate(matrix: Tensor, norm: float, tau: float, vectors: int) -> Spectrum:
    """Estimate the spectrum of a large float32 matrix; the leading part grows until it holds the fraction ``tau``."""
    size = min(matrix.shape)
    count = min(size, max(vectors, 1 + size // 64))
    top = krylov.leading(matrix, count)
    sums = krylov.estimate_sums(matrix, top)
    while count < size and float(top.values.sum()) < tau * sums.nuclear:
        count = min(size, 2 * count)
        top = krylov.leading(matrix, count)
    values = top.values.cpu()
    vectors = max(vectors, _leading_count(values, sums.nuclear, tau))
    # Cloned, so that the rest of the iteration's storage is freed.
    left, right = (side[:, :vectors].cpu().clone() for side in (top.left, top.right))
    error = max(top.error, sums.error)
    return Spectrum(norm, values, sums.nuclear, sums.entropy, left, right, exact=False, error=error)


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield matching pieces of tensors of one shape."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), _CHUNK):
        yield tuple(tensor[start : start + _CHUNK] for tensor in flat)
