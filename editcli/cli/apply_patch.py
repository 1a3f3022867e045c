"""``editcli apply-patch``: rebuild an edited model from its base and a patch."""

from __future__ import annotations

import click

from editcli.cli.apply_options import trust_options
from editcli.cli.common import App, Command, json_option, option, print_json
from editcli.cli.settings import config_option
from editcli.export.recipe import PatchRecipe


@click.command(cls=Command)
@click.argument("base", metavar="BASE")
@click.argument("patch", metavar="PATCH")
@option(
    "--out", default="", env=False, metavar="DIR", section="Output", help="A new folder.  [default: <patch>-applied]"
)
@trust_options
@json_option
@config_option
@click.pass_obj
def apply_patch(app: App, /, base: str, patch: str, out: str, trust_remote_code: bool, as_json: bool) -> None:
    """Rebuild an edited model from BASE and PATCH, the output of "editcli export --format patch".

    Both are folders or hub ids (ID@REVISION for one of its commits). Every tensor that the patch replaces is compared
    first: a base that the patch was not made for is refused.
    """
    recipe = PatchRecipe(base=base, patch=patch, out=out, trust_remote_code=trust_remote_code)
    # Torch takes seconds to import, so it waits until the command line has been read.
    from editcli.export.run import apply_patch as run

    report = run(recipe, app.reporter)
    if as_json:
        print_json(report.to_json())
        return
    from editcli.render.export import patch_table

    app.show(patch_table(report))
