"""``editcli report``: write one page about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from editcli.cli.app import App
from editcli.cli.command import command
from editcli.cli.options import argument, option, options_of, tau_option, threshold_option
from editcli.settings.recipe import LoadingSettings


@command(json=False)
@argument("run", "RUN", "folder")
@option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("report.html"),
    metavar="FILE",
    env=False,
    section="Output",
    help="The page to write.",
)
@option("--base", value="model", section="Figures", help="The model that was edited, if it has moved.")
@option(
    "--spectra/--no-spectra",
    default=True,
    section="Figures",
    help="Decompose the edited matrices; minutes for a model of several billion parameters.",
)
@tau_option
@threshold_option
@options_of(LoadingSettings, "device", device={"section": "Run", "help": "Where to decompose matrices."})
def report(app: App, /, run: str, out: Path, spectra: bool, tau: float, **values: Any) -> None:
    """Write one self-contained HTML page about RUN, the output of "editcli apply".

    It needs no network and no other file: curves, spectra, verdict, provenance, and every edit with its outcome.
    """
    # Torch takes seconds to import, so the command line is read first.
    from editcli.health.inspect import Wanted, inspect
    from editcli.health.verdict import parse_thresholds
    from editcli.models.loading import choose_device
    from editcli.pages.page import check_page, run_page, write_page
    from editcli.records.state import RunFolder

    check_page(out)
    RunFolder(Path(run)).require()
    inspection = inspect(
        run,
        wanted=Wanted(norms=True, spectral=spectra, tau=tau, thresholds=parse_thresholds(values["thresholds"])),
        base=values["base"],
        device=choose_device(values["device"]),
        families=app.plugins.families(),
        reporter=app.reporter,
    )
    write_page(out, run_page(inspection))
    app.reporter.note(f"Written to {out}")
