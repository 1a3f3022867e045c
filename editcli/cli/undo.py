"""``editcli undo``: take back batches or single edits."""

from __future__ import annotations

from typing import Any

import click

from editcli.cli.app import App
from editcli.cli.apply import EXIT_CODES
from editcli.cli.command import command
from editcli.cli.options import COUNT, argument, option


@command()
@argument("run", "RUN", "folder")
@option("--batches", type=COUNT, env=False, section="What", help="Take back the last N batches.  [default: 1]")
@option(
    "--to",
    type=click.IntRange(min=0),
    env=False,
    metavar="STEP",
    section="What",
    help="Restore the weights after batch STEP; 0 is the base.",
)
@option(
    "--edit",
    "edits",
    multiple=True,
    env=False,
    metavar="ID",
    section="What",
    help="Take back only this edit; repeatable.",
)
@option("--dry-run", is_flag=True, cli_only=True, section="Run", help="Print the plan and its cost; write nothing.")
def undo(app: App, /, dry_run: bool, **values: Any) -> int:
    """Take back the last batches of RUN, the output of "editcli apply", or single edits of it.

    The weights are then bit by bit those of before. Leaving out an edit in the middle recomputes all batches after it.
    "editcli apply --resume" continues from there; the journal records the undo.
    """
    # Torch takes seconds to import, so the command line is read first.
    from editcli.render.run import run_table, undo_table
    from editcli.runs.undo import Undo, plan_undo
    from editcli.runs.undo import undo as take_back

    request = Undo(**values)
    if dry_run:
        app.emit(plan_undo(request), undo_table)
        return 0
    report = take_back(request, app.plugins, app.reporter)
    app.emit(report, run_table)
    return EXIT_CODES.get(report.status, 0)
