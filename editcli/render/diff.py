"""Draw how two models differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from editcli.formatting import number, plural
from editcli.health.diff import Diff, Spoken, TensorDiff
from editcli.render.tables import table

_LEGEND = "A base, B edited: drift ||B - A|| / ||A||, ratio ||B|| / ||A||, largest change of a number, rank of B - A."


def diff_view(diff: Diff) -> Group:
    """Return the tensors that differ, those that only one model has, and the texts of both models."""
    count = len(diff.tensors)
    verb = "differs" if count == 1 else "differ"
    changed = f"{count} of {plural(diff.compared, 'tensor')} {verb}"
    parts: list[RenderableType] = [
        Text.assemble((diff.base, "bold"), " -> ", (diff.edited, "bold")),
        Text(changed if count else f"all {diff.compared} tensors are equal"),
    ]
    if diff.tensors:
        parts.append(_tensors(diff.tensors))
        parts.append(Text(_LEGEND, style="dim"))
    parts += _lists(diff)
    if diff.generations:
        parts.append(_spoken(diff.generations))
    return Group(*parts)


def _tensors(tensors: Sequence[TensorDiff]) -> Table:
    figures = ("drift", "ratio", "largest", "rank")
    rows = table("tensor", *figures, right=figures)
    for tensor in tensors:
        cells = (number(value, missing="-") for value in (tensor.relative, tensor.ratio, tensor.largest))
        rank = "-" if tensor.rank is None else f"{tensor.rank} of {min(tensor.shape)}"
        rows.add_row(Text(tensor.name), *cells, rank)
    return rows


def _spoken(generations: Sequence[Spoken]) -> Table:
    texts = table("prompt", "base", "edited")
    for column in texts.columns:
        column.ratio = 1
    for spoken in generations:
        style = "" if spoken.base == spoken.edited else "bold"
        texts.add_row(Text(spoken.prompt), Text(spoken.base.strip()), Text(spoken.edited.strip(), style=style))
    return texts


def _lists(diff: Diff) -> Iterator[Text]:
    for title, names in (
        ("only in the base", diff.missing),
        ("only in the edited model", diff.added),
        ("of another shape", diff.reshaped),
    ):
        if names:
            yield Text(f"{title}: {', '.join(names)}")
