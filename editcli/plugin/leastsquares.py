"""The one linear solve behind the least-squares editors, and the step by which it remembers.

Every editor that spreads a residual over keys under a quadratic penalty writes the same formula with another Q, a
symmetric positive semidefinite (d_in, d_in) matrix, the *inverse Gram*: the inverse of what the layer is committed to
already, such as w C with C = E[k k^T] in MEMIT ::

    D = R (I + K^T Q K)^-1 K^T Q            the update: O(d_in^2 n), no d_in^3 after ``prepare``
    Q <- Q - Q K (I + K^T Q K)^-1 K^T Q     the memory of it (Woodbury)
    Q <- Q + Q K (I - K^T Q K)^-1 K^T Q     the memory let go of it again

Q is float64 on a CPU and float32 elsewhere, symmetric after every step. The n x n systems are always solved in
float64 on the CPU: they are small, as a wide batch is solved in parts, and not every accelerator has float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from editcli.errors import NumericalError
from editcli.linalg.precision import double, working_dtype
from editcli.plugin.interfaces import LowRank
from editcli.reporting import Reporter, Silent

PART = 1024
"""Columns of one system. A wider batch is solved in parts, one after the other: recursive least squares gives the same
update for n (d_in^2 + d_in PART + PART^2) operations, in place of n (d_in^2 + d_in n + n^2)."""
SINGULAR = 1e13
"""A unit-diagonal matrix whose Cholesky pivots span more than this is singular for all that float64 can tell."""


@dataclass(frozen=True, slots=True)
class InverseGram:
    """Q of one site. Immutable: :meth:`downdated` returns the next one, so a snapshot of it stays what it was."""

    matrix: Tensor
    """(d_in, d_in), symmetric positive semidefinite."""
    site: str
    """Module name of the site, for messages."""
    reporter: Reporter = field(default_factory=Silent)

    @classmethod
    def of(cls, matrix: Tensor, *, site: str, device: torch.device, reporter: Reporter) -> InverseGram:
        """Take a float64 Q as it is, onto ``device`` in the precision that is used there."""
        return cls(matrix.to(device=device, dtype=working_dtype(device)), site, reporter)

    @classmethod
    def inverting(
        cls, gram: Tensor, *, site: str, device: torch.device, reporter: Reporter, ridge: float = 0.0
    ) -> InverseGram:
        """Take Q = ``gram``^-1; raise :class:`NumericalError` when ``gram`` is indefinite or singular."""
        inverse = invert(double(gram, device), site=site, reporter=reporter, ridge=ridge)
        return cls.of(inverse, site=site, device=device, reporter=reporter)

    def solve(self, keys: Tensor, residual: Tensor, *, exact: bool = False) -> LowRank:
        """Return D = R (I + K^T Q K)^-1 K^T Q for ``keys`` (d_in, n) and ``residual`` (d_out, n).

        With ``exact`` the identity is left out, so that D K = R exactly; raises :class:`NumericalError` when two keys
        are then the same. The factors have Q's dtype and device.

        Of more than :data:`PART` keys each part is solved for what the parts before it leave of its residual, with Q
        :meth:`downdated` by them, unless ``exact``.
        """
        lefts, rights = list[Tensor](), list[Tensor]()
        size = max(1, keys.shape[1]) if exact else PART
        for (part, image, factor), asked in zip(
            self._parts(keys, size, exact=exact), residual.split(size, dim=1), strict=True
        ):
            if lefts:
                asked = asked.to(self.matrix) - torch.cat(lefts, dim=1) @ (torch.cat(rights, dim=1).T @ part)
            coefficients = torch.cholesky_solve(asked.to("cpu", torch.float64).T, factor).T
            lefts.append(coefficients.to(self.matrix))
            rights.append(image)
        if len(lefts) == 1:
            return LowRank(left=lefts[0], right=rights[0])
        return LowRank(left=torch.cat(lefts, dim=1), right=torch.cat(rights, dim=1))

    def downdated(self, keys: Tensor) -> InverseGram:
        """Return Q once ``keys`` (d_in, n) have been written, so that later updates leave them alone."""
        memory = self
        for part in keys.to(self.matrix).split(PART, dim=1):
            image = memory.matrix @ part
            memory = memory._without(image, memory._factor(part, image))
        return memory

    def _parts(self, keys: Tensor, size: int, *, exact: bool = False) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield ``size`` keys at a time with Q K and the factor of their system, for Q without the keys before them."""
        memory, parts = self, keys.to(self.matrix).split(size, dim=1)
        for number, part in enumerate(parts, start=1):
            image = memory.matrix @ part
            factor = memory._factor(part, image, exact=exact)
            yield part, image, factor
            if number < len(parts):
                memory = memory._without(image, factor)

    def _without(self, image: Tensor, factor: Tensor) -> InverseGram:
        """Return Q - Q K S^-1 K^T Q for ``image`` Q K (d_in, n) and the Cholesky ``factor`` of S = I + K^T Q K."""
        # With S = L L^T the step is Q - (Q K L^-T)(Q K L^-T)^T, symmetric by construction.
        root = torch.linalg.solve_triangular(factor, image.T.to("cpu", torch.float64), upper=False).T.to(self.matrix)
        matrix = symmetrise(torch.addmm(self.matrix, root, root.T, alpha=-1.0))
        slack = torch.finfo(matrix.dtype).eps * matrix.shape[0] ** 0.5 * self.matrix.diagonal()
        if not bool((matrix.diagonal() >= -slack).all()):
            raise NumericalError("the memory of past edits lost definiteness", site=self.site, condition=float("inf"))
        return replace(self, matrix=matrix)

    def releasable(self, keys: Tensor) -> list[int]:
        """Return the columns of ``keys`` (d_in, m) that Q can let go of together, the first ones before the later.

        Q can while I - K^T Q K stays positive definite by more than its rounding: always for keys that it was
        :meth:`downdated` by, as far as their number format tells them apart.
        """
        keys = keys.to(self.matrix)
        system, rounding = self._remainder(keys)
        chosen: list[int] = []
        for column in range(keys.shape[1]):
            tried = [*chosen, column]
            part = system[tried][:, tried] - rounding * torch.eye(len(tried), dtype=system.dtype)
            if int(torch.linalg.cholesky_ex(part).info) == 0:
                chosen = tried
        return chosen

    def released(self, keys: Tensor) -> InverseGram:
        """Return Q without ``keys`` (d_in, m) that were remembered: Q + Q K (I - K^T Q K)^-1 K^T Q.

        The opposite of :meth:`downdated`. Raises :class:`NumericalError` for keys that are not :meth:`releasable`.
        """
        keys = keys.to(self.matrix)
        factor, failed = torch.linalg.cholesky_ex(self._remainder(keys)[0])
        if int(failed) != 0:
            raise NumericalError("the memory of past edits lost definiteness", site=self.site, condition=float("inf"))
        image = self.matrix @ keys
        root = torch.linalg.solve_triangular(factor, image.T.to("cpu", torch.float64), upper=False).T.to(self.matrix)
        return replace(self, matrix=symmetrise(torch.addmm(self.matrix, root, root.T)))

    def _remainder(self, keys: Tensor) -> tuple[Tensor, float]:
        """Return I - K^T Q K, (m, m) float64 on the CPU, and a bound of its rounding."""
        gram = symmetric((keys.T @ (self.matrix @ keys)).to("cpu", torch.float64))
        spread = keys.abs().T @ self.matrix.diagonal().clamp_min(0).sqrt()
        return torch.eye(gram.shape[0], dtype=gram.dtype) - gram, self._rounding(spread.max())

    def _factor(self, keys: Tensor, image: Tensor, *, exact: bool = False) -> Tensor:
        """Return the Cholesky factor of K^T Q K (+ I unless ``exact``), (n, n) float64 on the CPU."""
        gram = symmetric((keys.T @ image).to("cpu", torch.float64))
        spread = keys.abs().T @ self.matrix.diagonal().clamp_min(0).sqrt()
        return factorise(gram, self._rounding(spread.max()), exact=exact, site=self.site, reporter=self.reporter)

    def _rounding(self, spread: Tensor) -> float:
        """Bound the rounding of k^T Q k: |Q_ij| <= sqrt(Q_ii Q_jj) for a semidefinite Q, so ``spread``^2 bounds it."""
        dimension = self.matrix.shape[0]
        return float(spread.double() ** 2) * torch.finfo(self.matrix.dtype).eps * dimension**0.5


def ridge(keys: Tensor, residual: Tensor, *, site: str, reporter: Reporter) -> LowRank:
    """Return D = R (I + K^T K)^-1 K^T, the solve with Q = I, without forming a (d_in, d_in) matrix."""
    gram = symmetric((keys.T @ keys).to("cpu", torch.float64))
    rounding = float(gram.diagonal().max()) * torch.finfo(keys.dtype).eps * keys.shape[0] ** 0.5
    factor = factorise(gram, rounding, site=site, reporter=reporter)
    coefficients = torch.cholesky_solve(residual.to("cpu", torch.float64).T, factor).T
    return LowRank(left=coefficients.to(keys), right=keys)


def factorise(gram: Tensor, rounding: float, *, site: str, reporter: Reporter, exact: bool = False) -> Tensor:
    """Return the Cholesky factor of ``gram`` + I, or of ``gram`` itself when ``exact``; (n, n) float64.

    ``gram`` is K^T Q K, semidefinite up to ``rounding`` or Q is not what it should be: :class:`NumericalError`. Where
    ``rounding`` drowns the identity it is added to the diagonal, and said.
    """
    if not bool(torch.isfinite(gram).all()):
        raise NumericalError("the keys or the memory of past edits are not finite", site=site, condition=float("nan"))
    identity = torch.eye(gram.shape[0], dtype=gram.dtype)
    system = gram if exact else gram + identity
    # Where keys repeat, the gram is singular, and the factorisation itself rounds by so much (Higham, 2002, ch. 10).
    factorising = 8 * len(gram) * torch.finfo(gram.dtype).eps * float(gram.diagonal().abs().max())
    floor = max(rounding, factorising, torch.finfo(gram.dtype).tiny)
    if int(torch.linalg.cholesky_ex(gram + floor * identity).info) != 0:
        raise NumericalError("the memory of past edits lost definiteness", site=site, condition=condition(system))
    factor, failed = torch.linalg.cholesky_ex(system)
    if exact and (int(failed) != 0 or _pivots(factor) ** 2 > SINGULAR):
        reason = "two edits of one batch have the same key; write them in different batches (--batch-size 1)"
        raise NumericalError(reason, site=site, condition=condition(system))
    if int(failed) != 0:
        reporter.warn(f"{site}: added {floor:.3g} to the diagonal of a batch's system to make up for rounding")
        factor = torch.linalg.cholesky(system + floor * identity)
    return factor


def invert(gram: Tensor, *, site: str, reporter: Reporter, ridge: float = 0.0) -> Tensor:
    """Return ``gram``^-1 for a symmetric positive definite (d, d) float64 matrix, by Cholesky.

    The matrix is first scaled to unit diagonal, which makes the test for singularity independent of the units'
    scales; ``ridge`` is added to that diagonal, so that each unit gains this share of its own second moment. A unit
    that never fired on the reference text (a zero row) gets a zero row in the inverse: its weights are
    left alone, and that is noted. Raises :class:`NumericalError` when the rest is indefinite or singular.
    """
    diagonal = gram.diagonal()
    if not bool(torch.isfinite(gram).all()):
        raise NumericalError("the second moment of its keys is not finite", site=site, condition=float("nan"))
    silent = diagonal == 0
    scale = torch.where(diagonal > 0, diagonal, torch.inf).rsqrt()
    scaled = gram * scale[:, None] * scale
    scaled.diagonal()[silent] = 1.0
    scaled.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(scaled)
    broken = int(failed) != 0 or bool(silent.all())
    estimate = float("inf") if broken else _pivots(factor) ** 2
    if estimate > SINGULAR:
        reason = (
            "the second moment of its keys is singular or indefinite; gather more reference text (raise "
            "statistics.tokens_per_dim) or set the editor's option ridge to 1e-6"
        )
        raise NumericalError(reason, site=site, condition=estimate)
    if bool(silent.any()):
        count = int(silent.sum())
        reporter.note(f"{site}: {count} of {len(silent)} inputs never fired on the reference text and stay untouched")
    inverse = symmetrise(torch.cholesky_inverse(factor).mul_(scale[:, None]).mul_(scale))
    # LAPACK fills columns; the transpose is the same matrix in rows, as everything else here is.
    return inverse if inverse.is_contiguous() else inverse.T


def eigh(matrix: Tensor, *, site: str) -> tuple[Tensor, Tensor]:
    """Return the ascending eigenvalues and the eigenvectors of a symmetric matrix; NumericalError if not finite."""
    if not bool(torch.isfinite(matrix).all()):
        raise NumericalError("the second moment of its keys is not finite", site=site, condition=float("nan"))
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors


def condition(matrix: Tensor) -> float:
    """Return the condition number of a symmetric matrix: the ratio of its extreme absolute eigenvalues."""
    magnitudes = torch.linalg.eigvalsh(matrix).abs()
    return float(magnitudes.max() / magnitudes.min())


def symmetric(matrix: Tensor) -> Tensor:
    """Return (M + M^T) / 2, which rounding cannot make asymmetric."""
    return (matrix + matrix.T) / 2


def symmetrise(matrix: Tensor, *, block: int = 1024) -> Tensor:
    """Replace a matrix by :func:`symmetric` of it, in place and block by block: at this size a copy is gigabytes."""
    size = matrix.shape[0]
    for row in range(0, size, block):
        for column in range(row, size, block):
            upper = matrix[row : row + block, column : column + block]
            lower = matrix[column : column + block, row : row + block]
            mean = (upper + lower.T) / 2
            upper.copy_(mean)
            lower.copy_(mean.T)
    return matrix


def _pivots(factor: Tensor) -> float:
    """Return the ratio of a Cholesky factor's extreme pivots; its square bounds the condition number from below."""
    pivots = factor.diagonal()
    return float(pivots.max() / pivots.min())
