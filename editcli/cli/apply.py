"""``editcli apply``: edit a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from editcli.cli.apply_options import method_options, model_options, output_options, repeat_option, run_options
from editcli.cli.common import App, Command, json_option, print_json
from editcli.cli.settings import component_settings, config_option, refuse_idle_options
from editcli.records.requirements import check_resumable, refuse_missing
from editcli.settings.recipe import Recipe

EXIT_CODES = {"stopped": 3, "interrupted": 130}
"""Exit codes of runs that ended early with their last good state saved."""

PLACES = (
    *("edits", "model", "revision", "out", "overwrite", "corpus", "stats"),
    *("device", "device_map", "solve_device", "parallel", "trust_remote_code"),
)
"""Settings that ``--recipe`` leaves to the command line: where things are, and where to compute."""
UNRELATED = ("repeated", "dry_run", "as_json", "verbose", "quiet")
"""Options that decide nothing about a run."""


@click.command(cls=Command, shared=True)
@click.argument("edits", metavar="EDITS.jsonl", required=False)
@model_options
@method_options
@output_options
@run_options
@repeat_option
@json_option
@config_option
@click.pass_context
def apply(
    context: click.Context,
    /,
    assignments: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
    repeated: Path | None,
    **values: Any,
) -> int:
    """Write the facts of EDITS.jsonl into a model and save it as a plain Hugging Face folder.

    EDITS.jsonl holds one object a line, for instance {"prompt": "The capital of {} is", "subject": "France",
    "target_new": "Lyon"}; "-" reads standard input. Without --model the bundled model is edited.

    --recipe OUT/editcli/run.json repeats that run into a new folder and compares the weights: same base, edits, options
    and seed, whatever settings files and variables say. It exits with 1 when a tensor differs.
    """
    app = context.obj
    if repeated is not None:
        return _repeat(context, repeated, values, dry_run=dry_run, as_json=as_json)
    if values["edits"] is None:
        raise click.MissingParameter(ctx=context, param=context.command.params[0])
    recipe = Recipe(settings=component_settings(context, assignments), **values)
    recipe.check(app.plugins)
    if recipe.resume:
        check_resumable(recipe.folder, app.plugins)
    refuse_idle_options(recipe, assignments, app.plugins)
    return _plan(recipe, app, as_json) if dry_run else _apply(recipe, app, as_json)


def _plan(recipe: Recipe, app: App, as_json: bool) -> int:
    if not app.launch.leads:
        return 0
    app.announce(recipe.model)
    # Torch takes seconds to import, so it waits until the command line has been found to make sense.
    from editcli.runs.planning import plan

    # One process looks ahead for all, so it looks at the whole model.
    outcome = plan(replace(recipe, parallel="data"), app.plugins, app.reporter)
    if as_json:
        print_json(outcome.to_json())
    else:
        from editcli.render.run import plan_table

        app.show(plan_table(outcome))
    return 0


def _repeat(context: click.Context, file: Path, values: Mapping[str, Any], *, dry_run: bool, as_json: bool) -> int:
    from editcli.commands.repeat import read_recorded

    if context.obj.launch.size > 1:
        raise click.UsageError("--recipe repeats a run in one process; start it without torchrun", context)
    recorded = read_recorded(file)
    recipe = replace(recorded.recipe, **_given(context, values))
    refuse_missing({"provenance": recorded.environment}, context.obj.plugins, run=file)
    recipe.check(context.obj.plugins)
    if dry_run:
        return _plan(recipe, context.obj, as_json)
    context.obj.announce(recipe.model)
    from editcli.commands.repeat import repeat

    outcome = repeat(recorded, recipe, context.obj.plugins, context.obj.reporter)
    if as_json:
        print_json(outcome.to_json())
    else:
        from editcli.render.run import repetition_view

        context.obj.show(repetition_view(outcome))
    return EXIT_CODES.get(outcome.report.status, 0 if outcome.identical else 1)


def _given(context: click.Context, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the command line itself gives; refuse what would make it another run."""
    given = [
        parameter
        for parameter in context.command.params
        if context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
    ]
    for parameter in given:
        if parameter.name not in (*PLACES, *UNRELATED):
            flags = " or ".join([*parameter.opts, *parameter.secondary_opts])
            raise click.UsageError(f"--recipe repeats a run as it was; leave out {flags}", context)
    return {str(p.name): values[p.name] for p in given if p.name in PLACES}


def _apply(recipe: Recipe, app: App, as_json: bool) -> int:
    app.announce(recipe.model)
    from editcli.distributed.group import joined
    from editcli.runs.apply import apply as run

    divided = recipe.parallel == "data"
    with joined(app.launch, device=recipe.device, device_map=recipe.device_map, divided=divided) as team:
        report = run(recipe, app.plugins, app.reporter, team=team)
    if not app.launch.leads:
        return EXIT_CODES.get(report.status, 0)
    if as_json:
        print_json(report.to_json())
    else:
        from editcli.render.run import run_table

        app.show(run_table(report))
    return EXIT_CODES.get(report.status, 0)
