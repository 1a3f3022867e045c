"""The curvature of a loss in one weight as a Kronecker product, and the directions in which it is small."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from editcli.plugin import double, eigh


@dataclass(frozen=True, slots=True)
class Curvature:
    """A (d_in, d_in) and B (d_out, d_out) of one site, with their eigenvectors and the mask, all float64."""

    inputs: Tensor
    gradients: Tensor
    tokens: int
    """The number of tokens that A and B are means over."""
    right: Tensor
    """U_A."""
    left: Tensor
    """U_B."""
    mask: Tensor
    """(d_out, d_in) bool, true where b_i a_j is small."""

    @classmethod
    def of(cls, inputs: Tensor, gradients: Tensor, *, tokens: int, gamma: float, site: str) -> Curvature:
        """Decompose both factors; raises :class:`editcli.plugin.NumericalError` where one is not finite."""
        (a, right), (b, left) = (eigh(factor, site=site) for factor in (inputs, gradients))
        return cls(inputs, gradients, tokens, right, left, small(b.clamp_min(0), a.clamp_min(0), gamma))

    def counting(self, inputs: Tensor, gradients: Tensor, *, gamma: float, site: str) -> Curvature:
        """Return the curvature with the columns k (d_in, t) and g (d_out, t) of t more tokens averaged in."""
        total = self.tokens + inputs.shape[1]
        means = []
        for mean, columns in ((self.inputs, inputs), (self.gradients, gradients)):
            columns = double(columns, mean.device).to(mean)
            means.append((self.tokens * mean + columns @ columns.T) / total)
        return Curvature.of(*means, tokens=total, gamma=gamma, site=site)

    def flat(self, gradient: Tensor) -> Tensor:
        """Return the part of ``gradient``, (d_out, d_in), along which the curvature is small."""
        left, right = self.left.to(gradient), self.right.to(gradient)
        return left @ ((left.T @ gradient @ right) * self.mask.to(gradient)) @ right.T


def small(b: Tensor, a: Tensor, gamma: float) -> Tensor:
    """Return where b_i a_j is below the value at which the descending products reach the share gamma of their sum."""
    products = torch.outer(b, a)
    descending = products.flatten().sort(descending=True).values
    reached = descending.cumsum(0) >= gamma * descending.sum()
    return products < descending[int(reached.int().argmax())]
