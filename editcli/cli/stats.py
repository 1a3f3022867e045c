"""``editcli stats``: reference-text statistics of a model."""

from __future__ import annotations

from typing import Any

import click

from editcli.cli.app import App
from editcli.cli.command import LazyGroup, command
from editcli.cli.options import COUNT, argument, option, options_of
from editcli.settings.core import StatisticsOptions
from editcli.settings.recipes import STATISTICS, MomentsRecipe

COMMANDS = {
    "compute": ("editcli.cli.stats:compute", "Compute the missing statistics of a model, ahead of an edit."),
    "show": ("editcli.cli.stats:show", "List the statistics in the cache."),
}

stats = LazyGroup(name="stats", commands_table=COMMANDS, help="Compute and show the second moments of keys on text.")


@command(shared=True)
@argument("model", "[MODEL]", "model")
@options_of(MomentsRecipe)
@option("--tokens", type=COUNT, section=STATISTICS, help="Tokens to read.  [default: 10 for each dimension of a key]")
@option("--max-length", type=click.IntRange(min=2), section=STATISTICS, help="Longest sequence.  [default: 512]")
def compute(app: App, /, tokens: int | None, max_length: int | None, **values: Any) -> None:
    """Compute the second moments of MODEL that the cache lacks; without MODEL, those of the bundled model."""
    from editcli.commands.stats import compute as run
    from editcli.distributed.group import joined
    from editcli.plugin.options import build
    from editcli.render.moments import moments_table

    sizes = {name: value for name, value in (("tokens", tokens), ("max_length", max_length)) if value is not None}
    options = build(StatisticsOptions, {**app.settings().get("statistics", {}), **sizes}, owner="statistics")
    with joined(app.launch, device=values["device"], device_map=values["device_map"]) as team:
        recipe = MomentsRecipe(options=options, **values)
        report = run(recipe, app.plugins.families(), app.reporter, team=team)
    app.emit(report, moments_table)


@command()
@argument("model", "[MODEL]", "model")
@options_of(MomentsRecipe, "revision")
def show(app: App, /, model: str | None, revision: str | None) -> None:
    """List the second moments in the cache: those of MODEL, or of every model."""
    from editcli.commands.stats import show as run
    from editcli.render.moments import moments_table

    app.emit(run(model, revision=revision, families=app.plugins.families()), moments_table)
