"""Draw how two models differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from editcli.health.diff import Diff, Spoken, TensorDiff

_LEGEND = "A base, B edited: drift ||B - A|| / ||A||, ratio ||B|| / ||A||, largest change of a number, rank of B - A."


def diff_view(found: Diff) -> Group:
    """Return the tensors that differ, what only one model has, and what both say."""
    count = len(found.tensors)
    verb = "differs" if count == 1 else "differ"
    parts: list[RenderableType] = [
        Text.assemble((found.base, "bold"), " -> ", (found.edited, "bold")),
        Text(f"{count} of {found.compared} tensors {verb}" if count else f"all {found.compared} tensors are equal"),
    ]
    if found.tensors:
        parts.append(_tensors(found.tensors))
        parts.append(Text(_LEGEND, style="dim"))
    parts += _lists(found)
    if found.generations:
        parts.append(_spoken(found.generations))
    return Group(*parts)


def _tensors(tensors: Sequence[TensorDiff]) -> Table:
    table = _table()
    table.add_column("tensor", overflow="fold")
    for title in ("drift", "ratio", "largest", "rank"):
        table.add_column(title, justify="right")
    for tensor in tensors:
        table.add_row(
            Text(tensor.name),
            _number(tensor.relative),
            _number(tensor.ratio),
            _number(tensor.largest),
            "-" if tensor.rank is None else f"{tensor.rank} of {min(tensor.shape)}",
        )
    return table


def _spoken(generations: Sequence[Spoken]) -> Table:
    table = _table()
    for title in ("prompt", "base", "edited"):
        table.add_column(title, overflow="fold", ratio=1)
    for spoken in generations:
        style = "" if spoken.base == spoken.edited else "bold"
        table.add_row(Text(spoken.prompt), Text(spoken.base.strip()), Text(spoken.edited.strip(), style=style))
    return table


def _lists(found: Diff) -> Iterator[Text]:
    for title, names in (
        ("only in the base", found.missing),
        ("only in the edited model", found.added),
        ("of another shape", found.reshaped),
    ):
        if names:
            yield Text(f"{title}: {', '.join(names)}")


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
