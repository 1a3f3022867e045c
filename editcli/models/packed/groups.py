"""Columns of a matrix in groups that share scales, also where a file lists the group of each column."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from editcli.models.packed.blocks import Blocks
from editcli.models.packed.layout import PackingError


@dataclass(frozen=True, slots=True)
class Groups:
    """An order of the columns in which each group is a block, and the blocks."""

    blocks: Blocks
    """The groups as blocks of the ordered matrix."""
    order: Tensor | None = None
    """The column at every place, (places,); None where they are in order. A short group has a column twice."""
    place: Tensor | None = None
    """The place of every column, (columns,)."""

    @classmethod
    def even(cls, rows: int, columns: int, count: int) -> Groups:
        """Return ``count`` groups of neighbouring columns, of which the last may be smaller."""
        return cls(Blocks((rows, columns), 1, -(-columns // count)))

    @classmethod
    def listed(cls, rows: int, groups: Tensor, count: int) -> Groups:
        """Return the groups that a file lists, one number for each column; raise :class:`PackingError` for others."""
        groups = groups.long()
        if bool(((groups < 0) | (groups >= count)).any()):
            raise PackingError(f"its columns are in groups up to {int(groups.max())}, and there are scales of {count}")
        ordered, sizes = torch.argsort(groups, stable=True), torch.bincount(groups, minlength=count)
        starts, width = torch.cumsum(sizes, 0) - sizes, int(sizes.max())
        place = torch.empty_like(ordered)
        place[ordered] = groups[ordered] * width + torch.arange(len(groups)) - starts[groups[ordered]]
        # A group that has fewer columns is filled up with its first one; one without any, with some other column.
        inside = torch.arange(width).expand(count, width)
        inside = torch.where(inside < sizes.unsqueeze(1), inside, 0)
        order = ordered[(starts.unsqueeze(1) + inside).clamp(max=len(groups) - 1).reshape(-1)]
        return cls(Blocks((rows, count * width), 1, width), order, place)

    def ordered(self, matrix: Tensor) -> Tensor:
        """Return a matrix, (rows, columns), in the order of the groups, (rows, places)."""
        return matrix if self.order is None else matrix[:, self.order]

    def spread(self, *scales: Tensor) -> tuple[Tensor, ...]:
        """Return the scale of every number of the matrix, (rows, columns), float32, of each kind of scales."""
        every = (self.blocks.spread(one.float()) for one in scales)
        return tuple(one if self.place is None else one[:, self.place] for one in every)
