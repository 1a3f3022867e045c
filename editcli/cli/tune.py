"""``editcli tune``: search the layers and settings that edit a model best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from editcli.cli.app import App
from editcli.cli.command import command
from editcli.cli.config import refuse_idle_options
from editcli.cli.options import argument, assignments_option, options_of
from editcli.settings.recipe import ChatLoadingSettings, Recipe
from editcli.settings.recipes import TuneRecipe
from editcli.settings.setting import settings_of
from editcli.tuning.space import SOURCE

METHOD = ("editor", "stabilizers", "preset", "layers", "batch_size", "stats", "solve_device", "corpus")


@command()
@argument("model", "MODEL", "model")
@argument("edits", "[EDITS.jsonl]", "file")
@options_of(TuneRecipe)
@options_of(
    Recipe,
    *METHOD,
    "limit",
    "on_error",
    "out",
    *settings_of(ChatLoadingSettings),
    batch_size={"help": "Edits written at once.  [default: a quarter of a trial; 1 for rome]"},
    out={"default": "tune", "env": False, "help": "Folder for the trials, preset.toml, tune.json and tune.png."},
)
@assignments_option
def tune(app: App, /, edits: str | None, assignments: tuple[str, ...], **values: Any) -> int:
    """Search the layers and settings with which a method edits MODEL best, and write them to a preset file.

    MODEL is a folder, a hub id or 'bundled'. Every trial edits the model in memory with edits drawn from EDITS.jsonl,
    or with bundled facts that the model knows, and is scored by efficacy, generalization, specificity and drift. The
    model's preset is the first trial. Layers and settings on the command line are fixed. Needs editcli[tune].
    """
    if edits is None and values["limit"]:
        raise click.UsageError("--limit takes the first edits of a file; give EDITS.jsonl, or use --sample")
    search = {name: values.pop(name) for name in settings_of(TuneRecipe)}
    run = Recipe(edits=edits or SOURCE, settings=app.settings(assignments), **values).resolved(app.plugins)
    refuse_idle_options(run, assignments, app.plugins)
    recipe = TuneRecipe(run=run, **search)
    # Torch and Optuna take seconds to import, so the command line is checked first.
    from editcli.render.tune import plot_search, tune_view
    from editcli.tuning import search as library

    report = library.tune(recipe, app.plugins, app.reporter)
    if plot_search(report, plot := Path(run.out) / "tune.png", app.reporter):
        app.reporter.note(f"Curves: {plot}")
    app.emit(report, tune_view)
    return 130 if report.status == "interrupted" else 0
