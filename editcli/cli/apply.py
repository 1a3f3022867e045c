"""``editcli apply``: edit a model."""

from __future__ import annotations

from typing import Any

import click

from editcli.cli.apply_options import method_options, model_options, output_options, run_options
from editcli.cli.common import App, Command, json_option, print_json
from editcli.cli.settings import component_settings, config_option, refuse_idle_options
from editcli.recipe import Recipe

EXIT_CODES = {"stopped": 3, "interrupted": 130}
"""Exit codes of runs that ended early with their last good state saved."""


@click.command(cls=Command)
@click.argument("edits", metavar="EDITS.jsonl")
@model_options
@method_options
@output_options
@run_options
@json_option
@config_option
@click.pass_context
def apply(context: click.Context, /, assignments: tuple[str, ...], dry_run: bool, as_json: bool, **values: Any) -> int:
    """Write the facts of EDITS.jsonl into a model and save it as a plain Hugging Face folder.

    EDITS.jsonl holds one object a line, for instance {"prompt": "The capital of {} is", "subject": "France",
    "target_new": "Lyon"}; "-" reads standard input. Without --model the bundled model is edited.
    """
    app = context.obj
    recipe = Recipe(settings=component_settings(context, assignments), **values)
    recipe.check(app.plugins)
    refuse_idle_options(recipe, assignments, app.plugins)
    return _plan(recipe, app, as_json) if dry_run else _apply(recipe, app, as_json)


def _plan(recipe: Recipe, app: App, as_json: bool) -> int:
    # Torch takes seconds to import, so it waits until the command line has been found to make sense.
    from editcli.runs.dryrun import plan

    outcome = plan(recipe, app.plugins, app.reporter)
    if as_json:
        print_json(outcome.to_json())
    else:
        from editcli.render.run import plan_table

        app.show(plan_table(outcome))
    return 0


def _apply(recipe: Recipe, app: App, as_json: bool) -> int:
    from editcli.distributed.group import joined
    from editcli.runs.apply import apply as run

    with joined(app.launch, device=recipe.device, device_map=recipe.device_map) as team:
        report = run(recipe, app.plugins, app.reporter, team=team)
    if not app.launch.leads:
        return EXIT_CODES.get(report.status, 0)
    if as_json:
        print_json(report.to_json())
    else:
        from editcli.render.run import run_table

        app.show(run_table(report))
    return EXIT_CODES.get(report.status, 0)
