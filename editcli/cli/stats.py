"""``editcli stats``: the reference-text statistics of a model."""

from __future__ import annotations

from typing import Any

import click

from editcli.cli.apply_options import COUNT, device_options, preset_option, seed_option, trust_options
from editcli.cli.common import App, Command, LayerRange, json_option, option, print_json
from editcli.cli.group import LazyGroup
from editcli.cli.settings import component_settings, config_option

COMMANDS = {
    "compute": ("editcli.cli.stats:compute", "Compute what is missing for a model, ahead of an edit."),
    "show": ("editcli.cli.stats:show", "List what is kept."),
}

stats = LazyGroup(name="stats", commands_table=COMMANDS, help="Compute and show the second moments of keys on text.")


@click.command(cls=Command, shared=True)
@click.argument("model", metavar="[MODEL]", required=False)
@option("--revision", metavar="REVISION", section="Model", help="Branch, tag or commit of a hub id.")
@device_options
@trust_options
@preset_option("Statistics")
@option("--layers", type=LayerRange(), section="Statistics", help="Layers such as 4-8.  [default: the preset's]")
@option(
    "--corpus",
    metavar="TEXT",
    section="Statistics",
    help="Text: english, a file, hf:ID[:CONFIG], or self, which the model writes.",
)
@option("--tokens", type=COUNT, section="Statistics", help="Tokens to read.  [default: 10 for each dimension of a key]")
@option("--max-length", type=click.IntRange(min=2), section="Statistics", help="Longest sequence.  [default: 512]")
@seed_option("Statistics")
@option("--out", env=False, metavar="FILE", section="Output", help="Also write a file for apply --stats.")
@json_option
@config_option
@click.pass_context
def compute(
    context: click.Context, /, tokens: int | None, max_length: int | None, as_json: bool, **values: Any
) -> None:
    """Compute the second moments of MODEL that are not in the cache yet; without MODEL, of the bundled one."""
    from editcli.commands.stats import MomentsRecipe
    from editcli.commands.stats import compute as run
    from editcli.distributed.group import joined
    from editcli.plugin.options import build
    from editcli.settings.core import StatisticsOptions

    given = {"tokens": tokens, "max_length": max_length}
    settings = {
        **component_settings(context).get("statistics", {}),
        **{k: v for k, v in given.items() if v is not None},
    }
    app: App = context.obj
    with joined(app.launch, device=values["device"], device_map=values["device_map"]) as team:
        recipe = MomentsRecipe(options=build(StatisticsOptions, settings, owner="statistics"), **values)
        report = run(recipe, app.plugins.families(), app.reporter, team=team)
    if app.launch.leads:
        _show(app, report, as_json)


@click.command(cls=Command)
@click.argument("model", metavar="[MODEL]", required=False)
@option("--revision", metavar="REVISION", section="Model", help="Branch, tag or commit of a hub id.")
@json_option
@config_option
@click.pass_obj
def show(app: App, /, model: str | None, revision: str | None, as_json: bool) -> None:
    """List the second moments in the cache: those of MODEL, or of every model."""
    from editcli.commands.stats import show as run

    _show(app, run(model, revision=revision, families=app.plugins.families()), as_json)


def _show(app: App, report: Any, as_json: bool) -> None:
    if as_json:
        print_json(report.to_json())
        return
    from editcli.render.moments import moments_table

    app.show(moments_table(report))
