"""``editcli inspect``: what can be edited in a model, and how healthy it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from editcli.cli.apply_options import preset_option, tau_option
from editcli.cli.common import App, Command, LayerRange, json_option, option, print_json
from editcli.cli.settings import config_option

FIGURES = "Figures"


@click.command(cls=Command)
@click.argument("model", metavar="[MODEL|RUN]", required=False, envvar="EDITCLI_MODEL")
@option("--norms", is_flag=True, section=FIGURES, help="Norms of every site; against a base also R_n and drift.")
@option(
    "--spectral",
    is_flag=True,
    section=FIGURES,
    help="Singular values, effective and stable rank, k(tau); against a base LS, SS (inferred formulas) and angles.",
)
@option("--base", metavar="MODEL", section=FIGURES, help="Compare with this model; a run knows its own.")
@tau_option(FIGURES)
@preset_option(FIGURES)
@option("--layers", type=LayerRange(), metavar="4-8", section=FIGURES, help="Only these layers.")
@option(
    "--svd",
    type=click.Choice(["auto", "exact", "randomized"]),
    default="auto",
    show_default=True,
    section=FIGURES,
    help="auto decomposes small matrices exactly and estimates large ones, with the error stated.",
)
@option(
    "--threshold",
    "thresholds",
    multiple=True,
    metavar="NAME=VALUE",
    section=FIGURES,
    help="Where a site stops being fine: drifting_ or collapsing_, followed by ratio (1.25, 2.5), drift (0.75, 2.25), "
    "spectral (2, 5) or rank (0.9, 0.5).",
)
@option(
    "--device", default="auto", show_default=True, metavar="DEVICE", section="Run", help="Where to decompose matrices."
)
@option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    section="Output",
    help="Draw the figures to a .png, .svg or .html file.",
)
@json_option
@config_option
@click.pass_obj
def inspect(app: App, /, model: str | None, as_json: bool, plot: Path | None, **values: Any) -> None:
    """Show what can be edited in MODEL, or how the edited matrices of RUN fare; never loads the model.

    Without --norms or --spectral only names and shapes are read. MODEL is a folder or a hub id, RUN the output of
    "editcli apply"; without either the configured model is shown, else the bundled one.
    """
    # Torch takes seconds to import, so it waits until the command line has been read.
    from editcli.health.inspect import inspect as run
    from editcli.health.inspect import wanted_from
    from editcli.models.loading import choose_device
    from editcli.pages.plots import check_plot, plot_inspection

    check_plot(plot)
    found = run(
        model,
        wanted=wanted_from(values, plot=plot is not None),
        base=values["base"],
        preset=values["preset"],
        device=choose_device(values["device"]),
        families=app.plugins.families(),
        reporter=app.reporter,
    )
    if plot is not None:
        plot_inspection(found, plot)
        app.reporter.note(f"Drawn to {plot}")
    if as_json:
        print_json(found.to_json())
        return
    from editcli.render.inspect import inspection_view

    app.show(inspection_view(found))
