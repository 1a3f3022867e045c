"""``editcli export``: convert a run into an adapter, a patch or a plain folder."""

from __future__ import annotations

from typing import Any

from editcli.cli.app import App
from editcli.cli.command import command
from editcli.cli.options import argument, options_of
from editcli.export.recipe import ExportRecipe


@command()
@argument("run", "RUN", "folder")
@options_of(ExportRecipe)
def export(app: App, /, **values: Any) -> None:
    """Convert a finished run into a LoRA adapter, a patch or a plain model folder; RUN is the output of apply.

    An adapter gives the edited model on the untouched base; a patch rebuilds its folder byte for byte. The files name
    no path of this machine, except an adapter its base, where that is a folder and nothing is pushed.
    """
    recipe = ExportRecipe(**values)
    # Torch takes seconds to import, so the command line is checked first.
    from editcli.export.run import export as run
    from editcli.render.export import export_table

    app.emit(run(recipe, app.plugins, app.reporter), export_table)
