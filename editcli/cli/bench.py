"""``editcli bench``: stacks side by side on one stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from editcli.cli.apply_options import (
    COUNT,
    assignments_option,
    code_options,
    device_options,
    preset_option,
    seed_option,
    source_options,
)
from editcli.cli.common import App, Command, json_option, option, print_json
from editcli.cli.settings import component_settings, config_option
from editcli.settings.recipe import Recipe

EDITS = "sample_edits/stream.jsonl"
STACKS = "memit,memit+nas,memit+revive,alphaedit,rlsedit,rlsedit+nas"


@click.command(cls=Command)
@source_options
@device_options
@code_options
@option(
    "--stacks",
    default=STACKS,
    metavar="STACK,...",
    section="Method",
    help=f"Stacks to compare, each EDITOR+STABILIZER+...  [default: {STACKS.replace(',', ', ')}]",
)
@option(
    "--edits",
    default=EDITS,
    show_default=True,
    metavar="FILE",
    section="Method",
    help="The stream that every stack gets.",
)
@option("--batch-size", "-b", type=COUNT, default=100, show_default=True, section="Method", help="Edits at once.")
@option("--limit", "--until", type=COUNT, section="Method", help="Take only the first N edits.")
@preset_option("Method")
@assignments_option
@seed_option("Method")
@option(
    "--eval-every",
    "--every",
    type=COUNT,
    default=1,
    show_default=True,
    section="Run",
    help="Measure what is retained every N batches.",
)
@option(
    "--out",
    default="bench",
    show_default=True,
    metavar="DIR",
    section="Output",
    help="Folder for one run per stack, bench.json and bench.png; a stopped bench goes on in it.",
)
@json_option
@config_option
@click.pass_context
def bench(
    context: click.Context,
    /,
    stacks: str,
    assignments: tuple[str, ...],
    as_json: bool,
    **values: Any,
) -> int:
    """Run stacks of editor and stabilizers on one stream from one base, and compare what they retain.

    Shows retained efficacy, generalization and specificity, the norm ratio R_n, the collapse point CP@60, and whether
    early edits were overwritten. Without --model the bundled model is edited.
    """
    app: App = context.obj
    if values["edits"] == EDITS and not Path(EDITS).is_file():
        raise click.UsageError(f"there is no {EDITS} in this folder; pass a stream of edits with --edits", context)
    recipe = Recipe(settings=component_settings(context, assignments), **values)
    recipe.check(app.plugins)
    app.announce(recipe.model)
    # Torch takes seconds to import, so it waits until the command line has been found to make sense.
    from editcli.commands import bench as library

    report = library.bench(recipe, library.parse_stacks(stacks, app.plugins), app.plugins, app.reporter)
    from editcli.render.bench import bench_table, plot_bench

    if plot_bench(report, Path(recipe.out) / "bench.png", app.reporter):
        app.reporter.note(f"Curves: {Path(recipe.out) / 'bench.png'}")
    if as_json:
        print_json(report.to_json())
    else:
        app.show(bench_table(report))
    return 0 if report.complete else 130
