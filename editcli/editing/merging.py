"""Facts of one subject in one batch share an offset (MEMIT-Merge, arXiv 2502.07322).

Their keys at the subject's last token are nearly the same, and least squares gives nearly equal keys the mean of their
values: with a target for each fact, none of them would be written. So the offset delta of such facts is one, optimised
on the texts of all of them, and minimises the mean of their losses; each fact's target is z = h + delta at its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from editcli.editing.steering import Row


def merged(rows: Sequence[Sequence[Row]], groups: Sequence[Sequence[int]]) -> list[list[Row]]:
    """Return the texts of each group of edits; together they weigh as much as those of one edit."""
    return [[replace(row, weight=row.weight / len(group)) for edit in group for row in rows[edit]] for group in groups]


def members(rows: Sequence[Sequence[Row]]) -> tuple[list[int], list[int]]:
    """Return, for each edit of some groups of texts, its first text, counted over all groups, and its group."""
    first: list[int] = []
    owner: list[int] = []
    passed = 0
    for group, texts in enumerate(rows):
        starts = [place for place, row in enumerate(texts) if place == 0 or row.edit != texts[place - 1].edit]
        first += [passed + place for place in starts]
        owner += [group] * len(starts)
        passed += len(texts)
    return first, owner
