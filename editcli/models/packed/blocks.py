"""Matrices in rectangular blocks that have one scale each, and the search for the scales that lose least."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 22
"""Numbers that are rounded at a time, so that a large matrix takes little more memory than itself."""

Scales = tuple[Tensor, ...]
"""What rounds a block, such as a scale and a zero point: each of shape (blocks,)."""
Rounding = Callable[[Tensor, Scales], tuple[Tensor, Tensor]]
"""Takes numbers, (blocks, size), and their scales; returns what is stored and the numbers that it stands for."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix of ``shape`` cut into blocks of ``rows`` x ``columns``; those at the edges may be parts of one."""

    shape: tuple[int, int]
    rows: int
    columns: int

    @property
    def grid(self) -> tuple[int, int]:
        """How many blocks lie below and beside each other."""
        return -(-self.shape[0] // self.rows), -(-self.shape[1] // self.columns)

    def split(self, matrix: Tensor) -> Tensor:
        """Return a matrix as (blocks, numbers of a block), where a block beyond the edge is filled with zeros."""
        below, beside = self.grid
        pad = (0, beside * self.columns - self.shape[1], 0, below * self.rows - self.shape[0])
        whole = torch.nn.functional.pad(matrix, pad) if any(pad) else matrix
        parted = whole.reshape(below, self.rows, beside, self.columns).transpose(1, 2)
        return parted.reshape(below * beside, self.rows * self.columns)

    def join(self, blocks: Tensor) -> Tensor:
        """Return the matrix of which :meth:`split` made blocks."""
        below, beside = self.grid
        whole = blocks.reshape(below, beside, self.rows, self.columns).transpose(1, 2)
        return whole.reshape(below * self.rows, beside * self.columns)[: self.shape[0], : self.shape[1]].contiguous()

    def spread(self, scales: Tensor) -> Tensor:
        """Return the scale of every number of the matrix; ``scales`` has one for each block, row by row."""
        grid = scales.reshape(self.grid)
        return (
            grid.repeat_interleave(self.rows, 0)[: self.shape[0]]
            .repeat_interleave(self.columns, 1)[:, : self.shape[1]]
            .contiguous()
        )


def least_loss(
    blocks: Tensor, candidates: Callable[[Tensor], Iterable[Scales]], before: Scales, rounding: Rounding
) -> Scales:
    """Return the scales of each block, (blocks,), with which rounding to the nearest loses least.

    ``candidates`` offers scales for some blocks beside those ``before``, which win where nothing loses less: so
    numbers that were stored stay as they are.
    """
    size = max(1, CHUNK // max(1, blocks.shape[1]))
    scales: list[list[Tensor]] = [[] for _ in before]
    for start in range(0, len(blocks), size):
        part = blocks[start : start + size]
        held = tuple(one[start : start + size] for one in before)
        for column, one in zip(scales, _best(part, (held, *candidates(part)), rounding), strict=True):
            column.append(one)
    return tuple(torch.cat(column) for column in scales)


def _best(part: Tensor, offers: Sequence[Scales], rounding: Rounding) -> Scales:
    """Return, for each block, the first of the offers whose squared error is the least."""
    best, least = offers[0], _error(part, offers[0], rounding)
    for offer in offers[1:]:
        error = _error(part, offer, rounding)
        better = error < least
        least = torch.where(better, error, least)
        best = tuple(torch.where(better, new, old) for new, old in zip(offer, best, strict=True))
    return best


def _error(part: Tensor, offer: Scales, rounding: Rounding) -> Tensor:
    return (rounding(part, offer)[1] - part).square_().sum(1).nan_to_num_(nan=torch.inf)
