"""Draw what ``eval --as`` measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from editcli.commands.quantised import QuantisedEvaluation
from editcli.evaluation.registry import value_at
from editcli.formatting import number
from editcli.render.tables import table


def quantised_table(
    sections: Mapping[str, Sequence[tuple[str, str]]], figures: Mapping[str, Any], copies: Sequence[QuantisedEvaluation]
) -> Iterator[RenderableType]:
    """Draw one row for each metric: the model's figure, and that of each quantised copy beside it.

    ``sections`` holds path and title of each metric, by protocol.
    """
    if not copies:
        return
    models = {"model": figures, **{one.name: one.to_json() for one in copies}}
    drawn = table("once quantised", *models, right=(*models,), padding=(0, 1))
    for protocol, metrics in sections.items():
        drawn.add_row(Text(protocol, style="bold"))
        for name, title in metrics:
            values = (value_at(model, name) for model in models.values())
            drawn.add_row(title, *(number(value, ".4f", missing="-") for value in values))
    yield drawn
    libraries = ", ".join(dict.fromkeys(one.library for one in copies))
    yield Text(f"quantised in memory by {libraries}; --json names the tensors", style="dim")
