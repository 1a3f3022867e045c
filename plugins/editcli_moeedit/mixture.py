"""The solve over the experts of one layer, each with a symmetric matrix C_j of its own.

With the key k = (g_1 k_1, ..., g_E k_E) of a token, the mixture's output is W k, W = [W_1 ... W_E]. A batch
minimises ::

    sum_t || r_t - sum_j X_j g_tj k_tj ||^2 + sum_j tr(X_j C_j^-1 X_j^T)

over the changes X_j, where C_j^-1 penalises what expert j is committed to, and C_j = 0 along directions that it may not
write. Its solution has a closed form (Woodbury), in which the experts meet in an n x n matrix alone ::

    X_j = R (I + G)^-1 K_j^T C_j,    G = sum_j K_j^T C_j K_j,    K_j = (g_1j k_1j ... g_nj k_nj)

Block coordinate descent, as published, reaches the same by solving for one expert at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from editcli.plugin import LowRank, NumericalError


@dataclass(frozen=True, slots=True)
class Mixture:
    """C_j of every expert of one site. Immutable: :meth:`downdated` returns the next one."""

    matrices: Tensor
    """(E, d, d), each symmetric and positive semidefinite."""
    site: str
    """Module name of the site, for messages."""

    @classmethod
    def of(cls, matrices: Tensor, *, site: str, device: torch.device) -> Mixture:
        """Take the matrices onto ``device``, in float64 where it has that."""
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return cls(matrices.to(device=device, dtype=dtype), site)

    def split(self, keys: Tensor) -> Tensor:
        """Return keys (E d, n) as K_j of each expert, (E, d, n)."""
        return keys.to(self.matrices).unflatten(0, (len(self.matrices), -1))

    def solve(self, keys: Tensor, residual: Tensor) -> LowRank:
        """Return the exact X = [X_1 ... X_E], (d_out, E d), for ``keys`` (E d, n) and ``residual`` (d_out, n)."""
        parts = self.split(keys)
        images = self.matrices @ parts
        factor = self._factor((parts.mT @ images).sum(dim=0))
        coefficients = torch.cholesky_solve(residual.to(factor).T, factor).T
        return LowRank(left=coefficients.to(images), right=images.flatten(0, 1))

    def descend(self, keys: Tensor, residual: Tensor, orders: Sequence[Sequence[int]]) -> LowRank:
        """Return X after block coordinate descent: in every pass, one solve for each expert of its order.

        Each solve is exact for its expert, with the others as they are: X_j = S (I + K_j^T C_j K_j)^-1 K_j^T C_j, where
        S = R - sum over i != j of X_i K_i.
        """
        parts = self.split(keys)
        images, grams = self.matrices @ parts, parts.mT @ (self.matrices @ parts)
        left = residual.to(images)
        factors = {expert: self._factor(grams[expert]) for expert in {e for order in orders for e in order}}
        coefficients = {expert: torch.zeros_like(left) for expert in factors}
        for order in orders:
            for expert in order:
                rest = left + coefficients[expert] @ grams[expert]
                factor = factors[expert]
                coefficients[expert] = torch.cholesky_solve(rest.to(factor).T, factor).T.to(left)
                left = rest - coefficients[expert] @ grams[expert]
        return _joined(coefficients, images)

    def active(self, keys: Tensor) -> list[int]:
        """Return the experts that any of the keys (E d, n) is routed to."""
        return self.split(keys).flatten(1).any(dim=1).nonzero().flatten().tolist()

    def downdated(self, keys: Tensor) -> Mixture:
        """Return C_j once ``keys`` (E d, n) were written: C_j - C_j K_j (I + K_j^T C_j K_j)^-1 K_j^T C_j.

        Each expert remembers its own keys; what two experts share of an edit is left out, as a matrix of all pairs of
        experts would be E times as wide.
        """
        parts, matrices = self.split(keys), self.matrices.clone()
        for expert in self.active(keys):
            image = matrices[expert] @ parts[expert]
            factor = self._factor(parts[expert].T @ image)
            root = torch.linalg.solve_triangular(factor, image.T.to(factor), upper=False).T.to(matrices)
            left = matrices[expert] - root @ root.T
            matrices[expert] = (left + left.T) / 2
        return replace(self, matrices=matrices)

    def _factor(self, gram: Tensor) -> Tensor:
        """Return the Cholesky factor of I + G, (n, n) float64 on the CPU."""
        gram = gram.to("cpu", torch.float64)
        if not bool(torch.isfinite(gram).all()):
            raise NumericalError("the keys or the memory of past edits are not finite", site=self.site)
        factor, failed = torch.linalg.cholesky_ex((gram + gram.T) / 2 + torch.eye(len(gram), dtype=gram.dtype))
        if int(failed) != 0:
            raise NumericalError("the memory of past edits lost definiteness", site=self.site)
        return factor


def _joined(coefficients: dict[int, Tensor], images: Tensor) -> LowRank:
    """Return [X_1 ... X_E] with X_j = A_j (C_j K_j)^T, from the A_j of the experts that have one."""
    experts, size = sorted(coefficients), images.shape[1]
    left = torch.cat([coefficients[expert] for expert in experts], dim=1)
    right = images.new_zeros(len(images) * size, left.shape[1])
    for place, expert in enumerate(experts):
        columns = slice(place * images.shape[2], (place + 1) * images.shape[2])
        right[expert * size : (expert + 1) * size, columns] = images[expert]
    return LowRank(left, right)


def filled(moments: Tensor, tokens: Tensor, least: float) -> Tensor:
    """Return the moments C_j (E, d, d) of experts that read ``tokens`` (E,), each as of at least so many tokens.

    An expert that read fewer is given the rest from the layer's mean moment, sum_j n_j C_j / sum_j n_j: of a rarely
    used expert next to nothing is known, and what the layer's other experts see is the best guess.
    """
    mean = (tokens[:, None, None] * moments).sum(dim=0) / tokens.sum().clamp_min(1)
    share = (tokens / tokens.clamp_min(least))[:, None, None]
    return share * moments + (1 - share) * mean
