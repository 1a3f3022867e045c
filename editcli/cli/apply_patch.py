"""``editcli apply-patch``: rebuild an edited model from its base and a patch."""

from __future__ import annotations

from typing import Any

from editcli.cli.app import App
from editcli.cli.command import command
from editcli.cli.options import argument, options_of
from editcli.export.recipe import PatchRecipe


@command()
@argument("base", "BASE", "model")
@argument("patch", "PATCH", "folder")
@options_of(PatchRecipe)
def apply_patch(app: App, /, **values: Any) -> None:
    """Rebuild an edited model from BASE and PATCH, the output of "editcli export --format patch".

    Both are folders or hub ids (ID@REVISION for one of its commits). Every tensor that the patch replaces is compared
    first: a patch for another base is refused.
    """
    recipe = PatchRecipe(**values)
    # Torch takes seconds to import, so the command line is checked first.
    from editcli.export.run import apply_patch as run
    from editcli.render.export import patch_table

    app.emit(run(recipe, app.reporter), patch_table)
