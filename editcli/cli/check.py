"""``editcli check``: validate an edits file."""

from __future__ import annotations

from typing import Any

from editcli.cli.app import App
from editcli.cli.command import command
from editcli.cli.options import argument, assignments_option, options_of
from editcli.settings.recipe import Recipe

UNUSABLE = 2
"""Exit code when an edit is refused, as for every unusable input file."""
SETTINGS = ("model", "revision", "chat_template", "system", "template_args", "trust_remote_code", "editor", "preset")


@command()
@argument("edits", "EDITS.jsonl", "file")
@options_of(Recipe, *SETTINGS, "limit")
@assignments_option
def check(app: App, /, edits: str, assignments: tuple[str, ...], **values: Any) -> int:
    """Check EDITS.jsonl against a model's tokenizer, without loading its weights.

    Shows for every edit the token at which it is written, the text between prompt and target, the target's tokens, and
    likely mistakes. Edits that apply would refuse are named; the exit code is then 2.
    """
    from editcli.commands.check import check as run
    from editcli.render.eval import check_table

    settings, formats = app.settings(assignments), app.plugins.formats()
    report = run(edits, formats=formats, settings=settings, plugins=app.plugins, reporter=app.reporter, **values)
    app.emit(report, check_table)
    return UNUSABLE if report.rejected else 0
