"""The tables that all views share: one look for rows of figures, one for facts about a single thing."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text


def table(*headings: str, right: Collection[str] = (), **settings: Any) -> Table:
    """Return an empty table whose cells fold; the columns named in ``right`` hold numbers. ``settings`` are rich's."""
    grid = Table(**{"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1, 0, 0), **settings})
    for heading in headings:
        grid.add_column(heading, overflow="fold", justify="right" if heading in right else "left")
    return grid


def facts(rows: Iterable[tuple[str, str | Text]]) -> Table:
    """Return one line per fact, its name dim."""
    grid = Table(box=None, show_header=False, pad_edge=False)
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, Text(value) if isinstance(value, str) else value)
    return grid


def percent(value: float | None, *, missing: str = "n/a") -> str:
    """Return a fraction as a whole number of percent, without the sign."""
    return missing if value is None else f"{100 * value:.0f}"
