"""``editcli report``: one page that shows a run."""

from __future__ import annotations

from pathlib import Path

import click

from editcli.cli.apply_options import tau_option
from editcli.cli.common import App, Command, option
from editcli.cli.settings import config_option


@click.command(cls=Command)
@click.argument("run", metavar="RUN")
@option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("report.html"),
    show_default=True,
    metavar="FILE",
    section="Output",
    help="The page to write.",
)
@option("--base", metavar="MODEL", section="Figures", help="The model that was edited, if it has moved.")
@option(
    "--spectra/--no-spectra",
    default=True,
    show_default=True,
    section="Figures",
    help="Decompose the edited matrices; minutes for a model of several billion parameters.",
)
@tau_option("Figures")
@option(
    "--threshold",
    "thresholds",
    multiple=True,
    metavar="NAME=VALUE",
    section="Figures",
    help="Where a site stops being fine; as for inspect.",
)
@option(
    "--device", default="auto", show_default=True, metavar="DEVICE", section="Run", help="Where to decompose matrices."
)
@config_option
@click.pass_obj
def report(
    app: App,
    /,
    run: str,
    output: Path,
    base: str | None,
    spectra: bool,
    tau: float,
    thresholds: tuple[str, ...],
    device: str,
) -> None:
    """Write one self-contained HTML page about RUN, the output of "editcli apply".

    It needs no network and no other file: curves, spectra, verdict, provenance, and every edit with its outcome.
    """
    # Torch takes seconds to import, so it waits until the command line has been read.
    from editcli.health.inspect import Wanted, inspect
    from editcli.health.verdict import parse_thresholds
    from editcli.models.loading import choose_device
    from editcli.pages.page import check_page, run_page, write_page
    from editcli.records.state import RunFolder

    check_page(output)
    RunFolder(Path(run)).require()
    found = inspect(
        run,
        wanted=Wanted(norms=True, spectral=spectra, tau=tau, thresholds=parse_thresholds(thresholds)),
        base=base,
        device=choose_device(device),
        families=app.plugins.families(),
        reporter=app.reporter,
    )
    write_page(output, run_page(found))
    app.reporter.note(f"Written to {output}")
