"""Deal work out so that no process has much more of it than another."""

from __future__ import annotations

from collections.abc import Sequence


def balanced(costs: Sequence[float], size: int) -> list[list[int]]:
    """Deal items out to ``size`` ranks: the costliest first, each to the rank that has the least so far.

    Returns the items of every rank, ascending. The same costs give the same shares everywhere; ties go to the item and
    the rank with the smaller number. No share exceeds 4/3 of the best possible (Graham, 1969).
    """
    shares: list[list[int]] = [[] for _ in range(size)]
    loads = [0.0] * size
    for item in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        rank = min(range(size), key=lambda number: (loads[number], number))
        shares[rank].append(item)
        loads[rank] += costs[item]
    return [sorted(share) for share in shares]
