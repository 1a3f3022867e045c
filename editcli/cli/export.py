"""``editcli export``: make an adapter, a patch or a plain folder of a run."""

from __future__ import annotations

from typing import Any

import click

from editcli.cli.apply_options import COUNT, device_options, seed_option, trust_options
from editcli.cli.common import App, Command, json_option, option, print_json
from editcli.cli.settings import config_option
from editcli.export.recipe import FORMATS, LORA, ExportRecipe

FORMAT_HELP = (
    "lora: a PEFT adapter; patch: the changed tensors, for apply-patch; full: the model without the run's state."
)
RANK_HELP = "Largest rank of the adapter, per matrix.  [default: what loses nothing, up to half a matrix's size]"
REVISION_HELP = "Branch to push to; needed where the repository exists already."


@click.command(cls=Command)
@click.argument("run", metavar="RUN")
@option(
    "--format",
    "-f",
    type=click.Choice(FORMATS),
    default=LORA,
    show_default=True,
    env=False,
    section="What",
    help=FORMAT_HELP,
)
@option("--rank", type=COUNT, env=False, metavar="R", section="What", help=RANK_HELP)
@option("--base", env=False, metavar="MODEL", section="What", help="The base, if it is not where the run found it.")
@option(
    "--eval/--no-eval",
    "evaluate",
    envvar="EDITCLI_EVAL",
    default=True,
    show_default=True,
    section="Measure",
    help="Ask the base with the adapter for the run's edits.",
)
@option("--sample", type=COUNT, default=100, show_default=True, section="Measure", help="Ask for N edits.")
@seed_option("Measure")
@device_options
@trust_options
@option(
    "--out", default="", env=False, metavar="DIR", section="Output", help="A new folder.  [default: <run>-<format>]"
)
@json_option
@option("--push", env=False, metavar="REPO", section="Hub", help="Send the result to a new repository of the hub.")
@option("--private", is_flag=True, env=False, section="Hub", help="Let only its owner see the new repository.")
@option("--revision", env=False, metavar="BRANCH", section="Hub", help=REVISION_HELP)
@config_option
@click.pass_obj
def export(app: App, /, as_json: bool, **values: Any) -> None:
    """Make of RUN, the output of "editcli apply", what others can use.

    An adapter gives the edited model on the untouched base; a patch rebuilds its folder byte for byte. What is
    written names no path of this machine but an adapter's base, where that is a folder and nothing is pushed.
    """
    recipe = ExportRecipe(**values)
    # Torch takes seconds to import, so it waits until the command line has been found to make sense.
    from editcli.export.run import export as run

    report = run(recipe, app.plugins, app.reporter)
    if as_json:
        print_json(report.to_json())
        return
    from editcli.render.export import export_table

    app.show(export_table(report))
