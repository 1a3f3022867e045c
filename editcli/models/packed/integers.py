"""Blocks of numbers as small whole numbers: W = (q - z) s with a scale s and a zero point z for each block.

Scales and zero points are those that lose least of three kinds: the ones before, the ones that span a block from its
least to its largest number, and the ones that span a share of that and cut off the rest. The last are what GPTQ and AWQ
search as well (2210.17323, 2306.00978): with few bits, a finer step is worth more than the extremes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from editcli.models.packed.blocks import Blocks, Scales, least_loss

_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_FEW_BITS = 4
"""Up to this many bits, shares of the span are tried; beyond, rounding hardly depends on the span."""


@dataclass(frozen=True, slots=True)
class Integers:
    """Whole numbers from 0 up to 2^bits - 1."""

    bits: int
    lowest: int = 0
    """The least zero point that can be stored."""

    @property
    def last(self) -> int:
        """The largest number."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of blocks that are symmetric."""
        return 1 << self.bits - 1

    def fit(self, weight: Tensor, blocks: Blocks, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
        """Return scales and zero points for a matrix, in the types and shapes of those before.

        Where all zero points are the middle, they stay it.
        """
        symmetric = bool((zeros == self.middle).all())

        def fitting(part: Tensor) -> Iterator[Scales]:
            for share in _SHARES if self.bits <= _FEW_BITS else _SHARES[:1]:
                yield self._spanning(part, share, scales.dtype, symmetric=symmetric)

        before = (scales.float().reshape(-1), zeros.float().reshape(-1))
        steps, centres = least_loss(blocks.split(weight), fitting, before, self.round)
        return steps.to(scales.dtype).reshape(scales.shape), centres.to(zeros.dtype).reshape(zeros.shape)

    def round(self, part: Tensor, scales: Scales) -> tuple[Tensor, Tensor]:
        """Return the numbers q, uint8, of some blocks, and what they stand for."""
        steps, zeros = (one.unsqueeze(1) for one in scales)
        codes = (part / torch.where(steps != 0, steps, 1) + zeros).round_().clamp_(0, self.last)
        return codes.to(torch.uint8), (codes - zeros) * steps

    def _spanning(self, part: Tensor, share: float, dtype: torch.dtype, *, symmetric: bool) -> Scales:
        """Return the scales that span a share of each block, in the precision in which they are stored."""
        if symmetric:
            steps = _storable(2 * share * part.abs().amax(1) / self.last, dtype)
            return steps, torch.full_like(steps, self.middle)
        low, high = share * part.amin(1).clamp(max=0), share * part.amax(1).clamp(min=0)
        steps = _storable((high - low) / self.last, dtype)
        return steps, (-low / steps).round_().clamp_(self.lowest, self.last)


def _storable(steps: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scales as they will be read from the file, none of which is zero."""
    stored = steps.to(dtype).float()
    return torch.where(stored > 0, stored, 1)
