"""What ``editcli apply --recipe`` says below the table of the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from editcli.render.run import run_table

if TYPE_CHECKING:
    from editcli.runs.repeat import Repetition

SHOWN_TENSORS = 5
"""Tensors that are named; ``--json`` names all."""


def repetition_view(repeated: Repetition) -> RenderableType:
    """Draw a repeated run and whether it came out the same."""
    return Group(run_table(repeated.report), *_lines(repeated))


def _lines(repeated: Repetition) -> list[Text]:
    if repeated.identical:
        text = f"identical: all {repeated.tensors} edited tensors are bit by bit those of {repeated.of}"
        return [Text(text, style="green")]
    named = ", ".join(repeated.differ[:SHOWN_TENSORS]) + (" ..." if len(repeated.differ) > SHOWN_TENSORS else "")
    lines = [
        Text(f"different: {len(repeated.differ)} of {repeated.tensors} edited tensors are not those of {repeated.of}"),
        Text(f"tensors: {named}"),
    ]
    if not repeated.same_edits:
        lines.append(Text("the edits in force are others: the recorded run was undone in part, or ended elsewhere"))
    if repeated.environment:
        lines.append(Text(f"on another machine: {'; '.join(repeated.environment)}"))
    for line in lines:
        line.stylize("yellow")
    return lines
