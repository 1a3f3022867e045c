"""``editcli eval``: measure edits on a model."""

from __future__ import annotations

from typing import Any

import click

from editcli.cli.app import App
from editcli.cli.command import command
from editcli.cli.options import argument, options_of
from editcli.settings.recipes import EvalRecipe


@command(shared=True)
@argument("model", "MODEL", "model")
@argument("edits", "[EDITS.jsonl]", "file")
@options_of(EvalRecipe)
def eval_(app: App, /, **values: Any) -> None:
    """Measure the edits of EDITS.jsonl on MODEL, a folder, a hub id or 'bundled': nothing is changed.

    Each metric is reported under its protocol's name; it is null if the file lacks the fields it needs.
    """
    if values["edits"] is None and not any(values[name] for name in ("harness", "suite", "base")):
        raise click.UsageError("give EDITS.jsonl, or what else to measure: --suite, --harness or --base")
    from editcli.commands.evaluate import measure
    from editcli.distributed.group import joined
    from editcli.render.eval import evaluation_table

    with joined(app.launch, device=values["device"], device_map=values["device_map"]) as team:
        report = measure(EvalRecipe(**values), app.plugins, app.reporter, team=team)
    app.emit(report, evaluation_table)
