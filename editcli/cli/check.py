"""``editcli check``: validate an edits file."""

from __future__ import annotations

from typing import Any

import click

from editcli.cli.apply_options import (
    COUNT,
    assignments_option,
    code_options,
    editor_option,
    preset_option,
    source_options,
)
from editcli.cli.common import App, Command, json_option, option, print_json
from editcli.cli.settings import component_settings, config_option

UNUSABLE = 2
"""Exit code when an edit was refused, as for any unusable input file."""


@click.command(cls=Command)
@click.argument("edits", metavar="EDITS.jsonl")
@source_options
@code_options
@editor_option
@preset_option("Method")
@assignments_option
@option("--limit", type=COUNT, section="Run", help="Check only the first N edits.")
@json_option
@config_option
@click.pass_context
def check(context: click.Context, /, edits: str, assignments: tuple[str, ...], as_json: bool, **values: Any) -> int:
    """Check EDITS.jsonl against a model's tokenizer, without loading its weights.

    Shows for every edit the token at which it is written, what stands between prompt and target, the target's tokens,
    and what looks like a mistake. Refuses what apply would refuse; the exit code is then 2.
    """
    from editcli.commands.check import check as run

    app: App = context.obj
    report = run(
        edits,
        formats=app.plugins.formats(),
        settings=component_settings(context, assignments),
        plugins=app.plugins,
        reporter=app.reporter,
        **values,
    )
    if as_json:
        print_json(report.to_json())
    else:
        from editcli.render.eval import check_table

        app.show(check_table(report))
    return UNUSABLE if report.rejected else 0
