"""``editcli bench``: compare stacks on one stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from editcli.cli.app import App
from editcli.cli.command import command
from editcli.cli.options import assignments_option, option, options_of
from editcli.settings.recipe import ChatLoadingSettings, Recipe
from editcli.settings.setting import settings_of

EDITS = "sample_edits/stream.jsonl"
STACKS = "memit,memit+nas,memit+revive,alphaedit,rlsedit,rlsedit+nas"

OUT_HELP = "Folder for one run per stack, bench.json and bench.png; a stopped bench continues in it."


@command()
@option(
    "--stacks",
    default=STACKS,
    show_default=False,
    value="stacks",
    section="Method",
    help=f"Stacks to compare, each EDITOR+STABILIZER+...  [default: {STACKS.replace(',', ', ')}]",
)
@options_of(
    Recipe,
    *("model", "revision", "edits", "batch_size", "limit", "preset", "eval_every", "out"),
    *settings_of(ChatLoadingSettings),
    edits={"default": EDITS, "section": "Method", "help": "Stream for every stack."},
    batch_size={"default": 100, "help": "Edits written at once."},
    eval_every={"default": 1},
    out={"default": "bench", "help": OUT_HELP},
)
@assignments_option
def bench(app: App, /, stacks: str, assignments: tuple[str, ...], **values: Any) -> int:
    """Run stacks of editor and stabilizers on one stream from one base, and compare their retention.

    Shows retained efficacy, generalization and specificity, the norm ratio R_n, the collapse point CP@60, and whether
    early edits were overwritten. Without --model the bundled model is edited.
    """
    if values["edits"] == EDITS and not Path(EDITS).is_file():
        raise click.UsageError(f"there is no {EDITS} in this folder; pass a stream of edits with --edits")
    recipe = Recipe(settings=app.settings(assignments), **values)
    recipe.check(app.plugins)
    app.announce(recipe.model)
    # Torch takes seconds to import, so the command line is checked first.
    from editcli.commands import bench as library
    from editcli.render.bench import bench_table, plot_bench

    report = library.bench(recipe, library.parse_stacks(stacks, app.plugins), app.plugins, app.reporter)
    if plot_bench(report, plot := Path(recipe.out) / "bench.png", app.reporter):
        app.reporter.note(f"Curves: {plot}")
    app.emit(report, bench_table)
    return 0 if report.complete else 130
