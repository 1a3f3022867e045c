"""Running mean, deviation and covariance of feature columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-6
"""Least eigenvalue of a covariance that is inverted, as a share of the largest; StableEdit's is this number itself."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Running count, mean and summed squared deviation of feature columns, (features,) each, float64."""

    count: int = 0
    mean: Tensor | None = None
    squares: Tensor | None = None
    scatter: Tensor | None = None
    """Summed products of deviations, (d, d), of the last d features; None where they are not counted."""

    def tensors(self) -> dict[str, Tensor]:
        """Return ``count``, ``mean`` and ``squares`` as tensors, and ``scatter`` where it is counted."""
        if self.mean is None or self.squares is None:
            return {}
        scatter = {} if self.scatter is None else {"scatter": self.scatter}
        return {"count": torch.tensor(self.count), "mean": self.mean, "squares": self.squares, **scatter}

    def counting(self, columns: Tensor, *, last: int = 0) -> Moments:
        """Return the statistics with the columns of a (features, t) matrix counted in (Chan's update).

        ``last`` is the number of features, from the end, whose products are counted too.
        """
        columns = columns.to("cpu", torch.float64)
        added, mean = columns.shape[1], columns.mean(dim=1)
        centred = columns - mean[:, None]
        squares, rows = centred.square().sum(dim=1), slice(len(columns) - last, None)
        scatter = centred[rows] @ centred[rows].T if last else None
        if self.mean is None or self.squares is None:
            return Moments(added, mean, squares, scatter)
        total, gap = self.count + added, mean - self.mean
        weight = self.count * added / total
        squares = self.squares + squares + gap.square() * weight
        if scatter is not None and self.scatter is not None:
            scatter = self.scatter + scatter + torch.outer(gap[rows], gap[rows]) * weight
        return Moments(total, self.mean + gap * (added / total), squares, scatter)

    def normalise(self, columns: Tensor) -> Tensor:
        """Return (x - mean) / deviation for each column; a coordinate that never varied becomes 0."""
        assert self.mean is not None, "nothing has been counted yet"
        assert self.squares is not None, "nothing has been counted yet"
        deviation = (self.squares / max(self.count - 1, 1)).sqrt().to(columns)[:, None]
        centred = columns - self.mean.to(columns)[:, None]
        # A deviation that is not a number stays one, for the guard against such updates to see.
        return (centred / deviation).where(deviation != 0, 0.0)

    def whitened(self, columns: Tensor) -> Tensor | None:
        """Return Cov^(-1/2) (x - mean) of columns (d, t) of the last d features; None while these are too few.

        Cov is the scatter over n - d - 1, which makes its inverse unbiased, and needs n > d + 1 columns.
        """
        assert self.mean is not None, "nothing has been counted yet"
        size = len(columns)
        if self.scatter is None or self.count <= size + 1:
            return None
        values, vectors = torch.linalg.eigh(self.scatter / (self.count - size - 1))
        # A covariance that is not finite stays so, for the guard against such updates to see.
        root = values.clamp_min(FLOOR * float(values[-1])).rsqrt()
        inverse = (vectors * root) @ vectors.T
        return inverse.to(columns) @ (columns - self.mean[-size:, None].to(columns))
