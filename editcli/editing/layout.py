"""How the rows of target optimisation are laid out in chunks: exactly on a CPU, in few sizes on an accelerator.

A CPU is busy with every token, so a chunk there is as narrow as its rows, and it shrinks with every edit that is done.
An accelerator is idle between two kernels, and it prepares anew for every new shape; so rows, columns, past columns
and logits are padded there to a few sizes, which repeat from step to step and from batch to batch, and the rows are
laid out anew only when that saves more than half of the work. Padding changes no result: padded rows and columns have
no weight in any loss, and no token sees a later one.

Work is counted in tokens; ``allowance`` is the number of tokens whose work costs as much as one more call of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from editcli.models.sizes import column_size, power_of_two, row_size, row_size_within

LEAST_PAST = 16
"""Past columns on an accelerator, which attention alone reads: fewer save nothing."""


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that are computed together, the widest first, and the size to which they are padded."""

    members: tuple[int, ...]
    """Indices of the rows."""
    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        """The tokens that are computed, with padding."""
        return self.rows * self.columns


class Layout(Protocol):
    """A policy for one kind of device."""

    def allowance(self, block: int) -> float:
        """Return the tokens whose work costs as much as one more call of a block of ``block`` weights."""
        ...

    @property
    def patience(self) -> int:
        """Steps between two looks at which edits are done; a look waits for the device."""
        ...

    def groups(self, widths: Sequence[int], *, allowance: float, most: int) -> list[Group]:
        """Return groups of about ``most`` tokens that hold every row once; ``widths`` are the rows' columns."""
        ...

    def past(self, columns: int) -> int:
        """Return the padded number of past columns."""
        ...

    def logits(self, count: int, group: Group) -> int:
        """Return the padded number of ``count`` logits of one kind in a group."""
        ...

    def shrinks(self, now: Sequence[Group], smaller: Sequence[Group], *, allowance: float) -> bool:
        """Tell whether to lay out the rows that are left anew."""
        ...


@dataclass(frozen=True, slots=True)
class Exact:
    """No more padding than the widest row of a chunk asks for."""

    setup: float = 60e6
    """Multiplications with weights that cost as much as the overhead of one call of a block."""
    patience: int = 1

    def allowance(self, block: int) -> float:
        """Return the overhead of a call over the multiplications of a token."""
        return self.setup / block

    def groups(self, widths: Sequence[int], *, allowance: float, most: int) -> list[Group]:
        """Let a narrower row join a group while the padding that this costs is less work than another call."""
        groups: list[list[int]] = []
        wasted = 0
        for row in _widest_first(widths):
            width = widths[groups[-1][0]] if groups else 0
            wasted += width - widths[row]
            if not groups or wasted > allowance or width * (len(groups[-1]) + 1) > most:
                groups.append([])
                wasted = 0
            groups[-1].append(row)
        return [Group(tuple(group), len(group), widths[group[0]]) for group in groups]

    def past(self, columns: int) -> int:
        """Return ``columns``."""
        return columns

    def logits(self, count: int, group: Group) -> int:
        """Return ``count``."""
        return count

    def shrinks(self, now: Sequence[Group], smaller: Sequence[Group], *, allowance: float) -> bool:
        """Return True: a row less is work saved."""
        return True


@dataclass(frozen=True, slots=True)
class Bucketed:
    """Rows, columns, past columns and logits in few sizes."""

    setup: float = 8e10
    """The same; a block's kernels are issued again for every call."""
    rest: float = 2e7
    """Weights whose products cost as much per token as a block's other operations, which are many for a small block."""
    patience: int = 4
    worth: float = 0.4
    """Rows are laid out anew where that leaves at most this share of the work."""

    def allowance(self, block: int) -> float:
        """Return the overhead of a call over the work of a token."""
        return self.setup / (block + self.rest)

    def groups(self, widths: Sequence[int], *, allowance: float, most: int) -> list[Group]:
        """Choose the sizes of columns that cost least, then fill pieces of few sizes, the widest rows first."""
        order, groups = _widest_first(widths), list[Group]()
        while order:
            columns, count = self._first_level([column_size(widths[row]) for row in order], allowance, most)
            for rows in _pieces(count, columns, allowance, most):
                # Narrower rows fill the room that is left in the last piece.
                groups.append(Group(tuple(order[:rows]), rows, columns))
                order = order[rows:]
        return groups

    def _first_level(self, columns: Sequence[int], allowance: float, most: int) -> tuple[int, int]:
        """Return the columns and the number of rows of the first group, where all groups together cost least.

        ``columns`` are the sizes of all rows, descending. A group holds all rows of some sizes in a row, so the least
        cost of the rows from each size downwards is that of a first group and of the rows below it.
        """
        levels = [(size, len(list(rows))) for size, rows in groupby(columns)]
        least: list[tuple[float, int]] = [(0.0, 0)] * (len(levels) + 1)
        for start in reversed(range(len(levels))):
            size, count, options = levels[start][0], 0, list[tuple[float, int]]()
            for end in range(start + 1, len(levels) + 1):
                count += levels[end - 1][1]
                cost = sum(rows * size + allowance for rows in _pieces(count, size, allowance, most))
                options.append((cost + least[end][0], count))
            least[start] = min(options)
        return levels[0][0], least[0][1]

    def past(self, columns: int) -> int:
        """Return the next size from 16 on; none stays none."""
        return column_size(max(columns, LEAST_PAST)) if columns else 0

    def logits(self, count: int, group: Group) -> int:
        """Return the number of rows, doubled until it holds ``count``; none stays none, and few a size of rows."""
        if row_size(count) < group.rows:
            return row_size(count) if count else 0
        return min(power_of_two(count, least=group.rows), group.tokens)

    def shrinks(self, now: Sequence[Group], smaller: Sequence[Group], *, allowance: float) -> bool:
        """Return whether the smaller layout does at most ``worth`` of the work."""
        return work(smaller, allowance) <= self.worth * work(now, allowance)


def work(groups: Sequence[Group], allowance: float) -> float:
    """Return what a step over ``groups`` costs, in tokens."""
    return sum(group.tokens + allowance for group in groups)


def layout_for(device_type: str) -> Layout:
    """Return the policy for a type of device."""
    return Exact() if device_type == "cpu" else Bucketed()


def _widest_first(widths: Sequence[int]) -> list[int]:
    return sorted(range(len(widths)), key=lambda row: (-widths[row], row))


def _pieces(count: int, columns: int, allowance: float, most: int) -> list[int]:
    """Return numbers of rows, each a size, that hold ``count`` rows at the least cost; none exceeds ``most`` tokens."""
    largest = row_size_within(max(1, most // columns))
    if count > largest:
        return [largest, *_pieces(count - largest, columns, allowance, most)]
    whole, part = row_size(count), row_size_within(count)
    if part == count:
        return [count]
    split = [part, *_pieces(count - part, columns, allowance, most)]
    # A single row is no size to split many rows into: each piece is a call.
    alone = whole > largest or (
        part > 1 and sum(split) * columns + len(split) * allowance < whole * columns + allowance
    )
    return split if alone else [whole]
