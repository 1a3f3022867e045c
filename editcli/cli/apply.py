"""``editcli apply``: edit a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from editcli.cli.app import App
from editcli.cli.command import command
from editcli.cli.config import refuse_idle_options
from editcli.cli.options import argument, assignments_option, option, options_of
from editcli.records.requirements import check_resumable, refuse_missing
from editcli.settings.recipe import Recipe
from editcli.settings.setting import settings_of

EXIT_CODES = {"stopped": 3, "interrupted": 130}
"""Exit codes of runs that ended early with their last good state saved."""


@command(shared=True)
@argument("edits", "[EDITS.jsonl]", "file")
@options_of(Recipe)
@assignments_option
@option("--dry-run", is_flag=True, cli_only=True, section="Run", help="Check everything and print the plan only.")
@option(
    "--repeat",
    "repeated",
    value="path",
    metavar="RUN.JSON",
    cli_only=True,
    section="Run",
    help="Repeat the run of OUT/editcli/run.json and compare the weights.",
)
def apply(app: App, /, assignments: tuple[str, ...], dry_run: bool, repeated: Path | None, **values: Any) -> int:
    """Write the facts of EDITS.jsonl into a model and save it as a plain Hugging Face folder.

    EDITS.jsonl holds one object a line, for instance {"prompt": "The capital of {} is", "subject": "France",
    "target_new": "Lyon"}; "-" reads standard input. Without --model the bundled model is edited.

    --repeat OUT/editcli/run.json runs that record again into a new folder and compares the weights: same base, edits,
    options and seed, whatever settings files and variables say. The exit code is 1 when a tensor differs.
    """
    if repeated is not None:
        return _repeat(app, repeated, values, dry_run=dry_run)
    if values["edits"] is None:
        raise click.MissingParameter(param_hint="'EDITS.jsonl'", param_type="argument")
    recipe = Recipe(settings=app.settings(assignments), **values)
    if recipe.resume:
        # A component of the run that is missing is named with its distribution, not as an unknown name.
        check_resumable(recipe.folder, app.plugins)
    recipe = recipe.resolved(app.plugins)
    refuse_idle_options(recipe, assignments, app.plugins)
    return _plan(app, recipe) if dry_run else _apply(app, recipe)


def _plan(app: App, recipe: Recipe) -> int:
    if app.launch.leads:
        app.announce(recipe.model)
        # Torch takes seconds to import, so the command line is checked first.
        from editcli.render.run import plan_table
        from editcli.runs.planning import plan

        # Only rank 0 plans, so it must describe the unsharded model.
        app.emit(plan(replace(recipe, parallel="data"), app.plugins, app.reporter), plan_table)
    return 0


def _apply(app: App, recipe: Recipe) -> int:
    app.announce(recipe.model)
    from editcli.distributed.group import joined
    from editcli.render.run import run_table
    from editcli.runs.apply import apply as run

    divided = recipe.parallel == "data"
    with joined(app.launch, device=recipe.device, device_map=recipe.device_map, divided=divided) as team:
        report = run(recipe, app.plugins, app.reporter, team=team)
    app.emit(report, run_table)
    return EXIT_CODES.get(report.status, 0)


def _repeat(app: App, file: Path, values: Mapping[str, Any], *, dry_run: bool) -> int:
    from editcli.commands.repeat import read_recorded, repeat
    from editcli.render.run import repetition_view

    if app.launch.size > 1:
        raise click.UsageError("--repeat repeats a run in one process; start it without torchrun")
    recorded = read_recorded(file)
    recipe = replace(recorded.recipe, **_places(click.get_current_context(), values))
    refuse_missing(recorded.provenance, app.plugins, run=file)
    recipe.check(app.plugins)
    if dry_run:
        return _plan(app, recipe)
    app.announce(recipe.model)
    outcome = repeat(recorded, recipe, app.plugins, app.reporter)
    app.emit(outcome, repetition_view)
    return EXIT_CODES.get(outcome.report.status, 0 if outcome.identical else 1)


def _places(context: click.Context, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return where things are, as far as the command line says; refuse settings that would make it another run."""
    typed, settings = {}, settings_of(Recipe)
    for parameter in context.command.params:
        name = str(parameter.name)
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            if name == "assignments" or (name in settings and not settings[name].place):
                flags = " or ".join([*parameter.opts, *parameter.secondary_opts])
                raise click.UsageError(f"--repeat repeats a run as it was; leave out {flags}")
            if name in settings:
                typed[name] = values[name]
    return typed
