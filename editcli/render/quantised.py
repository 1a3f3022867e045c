"""Draw what ``eval --as`` measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich.console import RenderableType
from rich.text import Text

from editcli.commands.quantised import QuantisedEvaluation
from editcli.evaluation.metrics import Evaluation
from editcli.formatting import number
from editcli.render.tables import table

Rows = Callable[[Evaluation], Iterator[tuple[str, float | None]]]


def quantised_table(
    evaluation: Evaluation, quantised: Sequence[QuantisedEvaluation], rows: Rows
) -> Iterator[RenderableType]:
    """Draw one row for each metric of ``rows``: the model, and each quantised copy beside it."""
    if not quantised:
        return
    columns = ("model", *(one.name for one in quantised))
    drawn = table("metric", *columns, right=columns, title="Once quantised", title_justify="left", padding=(0, 1))
    figures = [dict(rows(one)) for one in (evaluation, *(one.evaluation for one in quantised))]
    for name in figures[0]:
        drawn.add_row(name, *(number(one.get(name), ".4f", missing="-") for one in figures))
    yield drawn
    libraries = ", ".join(dict.fromkeys(one.library for one in quantised))
    yield Text(f"quantised in memory by {libraries}; --json names the tensors", style="dim")
