"""``editcli undo``: take back batches or single edits."""

from __future__ import annotations

import click

from editcli.cli.apply import EXIT_CODES
from editcli.cli.common import App, Command, json_option, option, print_json
from editcli.cli.settings import config_option


@click.command(cls=Command)
@click.argument("run", metavar="RUN")
@option(
    "--batches",
    type=click.IntRange(min=1),
    env=False,
    section="What",
    help="Take back the last N batches.  [default: 1]",
)
@option(
    "--to",
    type=click.IntRange(min=0),
    env=False,
    metavar="STEP",
    section="What",
    help="Go back to how it was after batch STEP; 0 is the base.",
)
@option(
    "--edit",
    "edits",
    multiple=True,
    env=False,
    metavar="ID",
    section="What",
    help="Take back this edit alone; repeat it.",
)
@option("--dry-run", is_flag=True, env=False, section="Run", help="Say what it would do and cost; write nothing.")
@json_option
@config_option
@click.pass_obj
def undo(
    app: App,
    /,
    run: str,
    batches: int | None,
    to: int | None,
    edits: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
) -> int:
    """Take back the last batches of RUN, the output of "editcli apply", or single edits of it.

    The weights are then bit by bit what they were before. Leaving out an edit in the middle computes again what came
    after it. "editcli apply --resume" goes on from there; the journal keeps what was taken back.
    """
    # Torch takes seconds to import, so it waits until the command line has been read.
    from editcli.runs.undo import Undo, plan_undo
    from editcli.runs.undo import undo as take_back

    request = Undo(run=run, batches=batches, to=to, edits=edits)
    if dry_run:
        plan = plan_undo(request)
        if as_json:
            print_json(plan.to_json())
        else:
            from editcli.render.run import undo_table

            app.show(undo_table(plan))
        return 0
    report = take_back(request, app.plugins, app.reporter)
    if as_json:
        print_json(report.to_json())
    else:
        from editcli.render.run import run_table

        app.show(run_table(report))
    return EXIT_CODES.get(report.status, 0)
