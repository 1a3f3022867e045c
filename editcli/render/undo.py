"""The table of ``editcli undo --dry-run``."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from editcli.runs.undo import UndoPlan
from editcli.words import duration

SHOWN_EDITS = 8
"""Ids that are listed."""


def undo_table(plan: UndoPlan) -> RenderableType:
    """Draw what an undo would take back, keep and compute again."""
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    more = "" if len(plan.edits) <= SHOWN_EDITS else f" and {len(plan.edits) - SHOWN_EDITS:,} more"
    again = f"{plan.redone_edits:,} edits in {len(plan.redo):,} batches, about {duration(plan.seconds)}"
    for name, value in (
        ("run", plan.out),
        ("taken back", f"{len(plan.edits):,} edits: {', '.join(plan.edits[:SHOWN_EDITS])}{more}"),
        ("stays", f"{plan.step:,} batches, replayed from their factors"),
        ("computed again", again if plan.redo else "nothing"),
    ):
        facts.add_row(name, Text(value))
    return Group(facts, Text("Nothing was written: this is a dry run.", style="dim"))
