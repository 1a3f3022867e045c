"""Running mean and deviation of feature columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Moments:
    """Running count, mean and summed squared deviation of feature columns, (features,) each, float64."""

    count: int = 0
    mean: Tensor | None = None
    squares: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return ``count``, ``mean`` and ``squares`` as tensors."""
        if self.mean is None or self.squares is None:
            return {}
        return {"count": torch.tensor(self.count), "mean": self.mean, "squares": self.squares}

    def counting(self, columns: Tensor) -> Moments:
        """Return the statistics with the columns of a (features, t) matrix counted in (Chan's update)."""
        columns = columns.to("cpu", torch.float64)
        added, mean = columns.shape[1], columns.mean(dim=1)
        squares = (columns - mean[:, None]).square().sum(dim=1)
        if self.mean is None or self.squares is None:
            return Moments(added, mean, squares)
        total, gap = self.count + added, mean - self.mean
        squares = self.squares + squares + gap.square() * (self.count * added / total)
        return Moments(total, self.mean + gap * (added / total), squares)

    def normalise(self, columns: Tensor) -> Tensor:
        """Return (x - mean) / deviation for each column; a coordinate that never varied becomes 0."""
        assert self.mean is not None, "nothing has been counted yet"
        assert self.squares is not None, "nothing has been counted yet"
        deviation = (self.squares / max(self.count - 1, 1)).sqrt().to(columns)[:, None]
        centred = columns - self.mean.to(columns)[:, None]
        # A deviation that is not a number stays one, for the guard against such updates to see.
        return (centred / deviation).where(deviation != 0, 0.0)
