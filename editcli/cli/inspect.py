"""``editcli inspect``: show the editable matrices of a model, and how healthy they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from editcli.cli.app import App
from editcli.cli.command import command
from editcli.cli.options import argument, option, options_of, tau_option, threshold_option
from editcli.settings.recipe import Recipe

FIGURES = "Figures"


@command()
@argument("model", "[MODEL|RUN]", "model", envvar="EDITCLI_MODEL")
@option("--norms", is_flag=True, section=FIGURES, help="Norms of every site; against a base also R_n and drift.")
@option(
    "--spectral",
    is_flag=True,
    section=FIGURES,
    help="Singular values, effective and stable rank, k(tau); against a base LS, SS (inferred formulas) and angles.",
)
@option("--base", value="model", section=FIGURES, help="Compare with this model; a run knows its own.")
@tau_option
@options_of(
    Recipe,
    "preset",
    "layers",
    "device",
    preset={"section": FIGURES},
    layers={"section": FIGURES, "metavar": "4-8", "help": "Only these layers."},
    device={"section": "Run", "help": "Where to decompose matrices."},
)
@option(
    "--svd",
    type=click.Choice(["auto", "exact", "randomized"]),
    default="auto",
    section=FIGURES,
    help="auto decomposes small matrices exactly and estimates large ones, with the error stated.",
)
@threshold_option
@option("--plot", value="path", section="Output", help="Draw the figures to a .png, .svg or .html file.")
def inspect(app: App, /, model: str | None, plot: Path | None, **values: Any) -> None:
    """Show the editable matrices of MODEL, or the health of those that RUN edited; never loads the model.

    Without --norms or --spectral only names and shapes are read. MODEL is a folder or a hub id, RUN the output of
    "editcli apply"; without either the configured model is shown, else the bundled one.
    """
    # Torch takes seconds to import, so the command line is read first.
    from editcli.health.inspect import inspect as run
    from editcli.health.inspect import wanted_from
    from editcli.models.loading import choose_device
    from editcli.pages.plots import check_plot, plot_inspection
    from editcli.render.inspect import inspection_view

    check_plot(plot)
    report = run(
        model,
        wanted=wanted_from(values, plot=plot is not None),
        base=values["base"],
        preset=values["preset"],
        device=choose_device(values["device"]),
        families=app.plugins.families(),
        reporter=app.reporter,
    )
    if plot is not None:
        plot_inspection(report, plot)
        app.reporter.note(f"Drawn to {plot}")
    app.emit(report, inspection_view)
