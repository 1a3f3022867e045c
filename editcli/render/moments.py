"""Tables of ``editcli stats``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from editcli.formatting import duration, size
from editcli.render.tables import table

if TYPE_CHECKING:
    from editcli.commands.stats import MomentsReport


def moments_table(report: MomentsReport) -> RenderableType:
    """Draw one line for each site's second moment."""
    if not report.sites:
        whose = "" if report.model is None else f" for {report.model}"
        return Text(f"There are no second moments{whose} yet; apply computes them when it needs them.")
    rows = table("site", "d_in", "tokens", "text", "size", "", right=("d_in", "tokens"))
    for site in report.sites:
        # The hash of a corpus file is recognised by its first digits.
        corpus = site.corpus if ":" in site.corpus else site.corpus[:12]
        state = "new" if site.computed else "kept"
        rows.add_row(Text(site.module), f"{site.width:,}", f"{site.tokens:,}", Text(corpus), size(site.bytes), state)
    where = f"written to {report.out}" if report.out else f"kept in {Path(report.sites[0].path).parent}"
    spent = f"computed in {duration(report.seconds)}, " if any(site.computed for site in report.sites) else ""
    return Group(rows, Text(spent + where, style="dim", overflow="fold"))
