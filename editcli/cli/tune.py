"""``editcli tune``: search the layers and settings that edit a model best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from editcli.cli.apply_options import COUNT, code_options, device_options, editing_options, reading_options
from editcli.cli.common import App, Command, json_option, option, print_json
from editcli.cli.settings import component_settings, config_option, refuse_idle_options
from editcli.settings.recipe import Recipe
from editcli.tuning.space import SOURCE

SEARCH = "Search"


@click.command(cls=Command)
@click.argument("model", metavar="MODEL")
@click.argument("edits", metavar="[EDITS.jsonl]", required=False)
@option(
    "--minutes",
    type=float,
    metavar="MINUTES",
    section=SEARCH,
    help="Time for everything, loading and the comparison at the end included.  [default: 10, unless --trials]",
)
@option("--trials", type=COUNT, section=SEARCH, help="Stop after N trials, those before --resume included.")
@option(
    "--sample",
    type=COUNT,
    section=SEARCH,
    help="Edits of a trial; as many are held out.  [default: 8 to 64, what the time allows]",
)
@option(
    "--kl-price",
    type=float,
    default=1.0,
    show_default=True,
    metavar="POINTS",
    section=SEARCH,
    help="What a nat of drift from the base per token takes off the score.",
)
@option("--text", metavar="FILE", section=SEARCH, help="Text for the drift.  [default: the bundled held-out text]")
@editing_options("a quarter of a trial; 1 for rome")
@device_options
@code_options
@reading_options
@option("--resume", is_flag=True, env=False, section="Run", help="Continue the search in DIR.")
@option(
    "--out",
    default="tune",
    show_default=True,
    env=False,
    metavar="DIR",
    section="Output",
    help="Folder for the trials, preset.toml, tune.json and tune.png.",
)
@json_option
@config_option
@click.pass_context
def tune(
    context: click.Context,
    /,
    edits: str | None,
    assignments: tuple[str, ...],
    minutes: float | None,
    trials: int | None,
    sample: int | None,
    kl_price: float,
    text: str | None,
    resume: bool,
    as_json: bool,
    **values: Any,
) -> int:
    """Search the layers and settings with which a method edits MODEL best, and write them to a preset file.

    MODEL is a folder, a hub id or 'bundled'. Every trial edits the model in memory with edits drawn from EDITS.jsonl,
    or with bundled facts that the model knows, and is scored by what they reach, what they spare and how far the model
    drifts. The model's preset is the first trial. Layers and settings that are given are kept. Needs editcli[tune].
    """
    app: App = context.obj
    if edits is None and values["limit"]:
        raise click.UsageError("--limit takes the first edits of a file; give EDITS.jsonl, or use --sample", context)
    run = Recipe(edits=edits or SOURCE, settings=component_settings(context, assignments), **values)
    run.check(app.plugins)
    refuse_idle_options(run, assignments, app.plugins)
    # Torch and Optuna take seconds to import, so a command line that cannot be used is refused before.
    from editcli.tuning.preparation import TuneRecipe
    from editcli.tuning.search import tune as search

    recipe = TuneRecipe(
        run=run, minutes=minutes, trials=trials, sample=sample, kl_price=kl_price, text=text, resume=resume
    )
    report = search(recipe, app.plugins, app.reporter)
    from editcli.render.tune import plot_search, tune_view

    plot = Path(run.out) / "tune.png"
    if plot_search(report, plot, app.reporter):
        app.reporter.note(f"Curves: {plot}")
    if as_json:
        print_json(report.to_json())
    else:
        app.show(tune_view(report))
    return 130 if report.status == "interrupted" else 0
