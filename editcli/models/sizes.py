"""The sizes to which an accelerator's tensors are padded, so that few shapes occur: each new shape costs preparation.

Few rows come in fours of each other, many in equal steps, and columns in steps of a third to a half: many rows can be
split into several pieces, but a text cannot.
"""

from __future__ import annotations

ROWS = (1, 16, 64, 256)
"""The smallest numbers of rows; the next sizes are multiples of the last."""
STEP = 32
"""Long texts are padded to multiples of this."""


def row_size(count: int) -> int:
    """Return the smallest size of 1, 16, 64, 256, 512, 768, ... that holds ``count`` rows."""
    return next((size for size in ROWS if size >= count), -(-count // ROWS[-1]) * ROWS[-1])


def row_size_within(count: int) -> int:
    """Return the largest size of 1, 16, 64, 256, 512, 768, ... that is at most ``count``, which is at least 1."""
    return max(size for size in (*ROWS, count // ROWS[-1] * ROWS[-1]) if size <= count)


def column_size(count: int) -> int:
    """Return the smallest size of 1, 2, 4, 6, 8, 12, 16, 24, 32, ... that holds ``count`` columns."""
    size = 1
    while size < count:
        size *= 2
    between = 3 * size // 4
    return between if size >= 8 and between >= count else size


def power_of_two(count: int, *, least: int = 1) -> int:
    """Return the smallest power of two, from ``least`` on, that is at least ``count``."""
    size = least
    while size < count:
        size *= 2
    return size


def text_size(count: int) -> int:
    """Return the tokens to which texts of at most ``count`` tokens are padded where they are read once."""
    return column_size(count) if count <= STEP else -(-count // STEP) * STEP
