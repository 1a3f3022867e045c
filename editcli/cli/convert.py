"""``editcli convert``: turn edit files of other tools into editcli's own."""

from __future__ import annotations

from pathlib import Path

import click

from editcli.cli.app import App, print_json
from editcli.cli.command import command
from editcli.cli.options import argument, option, options_of
from editcli.errors import EditError
from editcli.requests.formats import find_format
from editcli.settings.recipe import Recipe


@command()
@argument("file", "FILE", "file")
@option("--from", "form", env=False, value="format", section="Input", help="Format of FILE.  [default: auto-detect]")
@options_of(
    Recipe,
    "on_error",
    on_error={
        "default": "skip",
        "section": "Input",
        "help": "Skip and name a record that cannot be used, or stop at it.",
    },
)
@option("--out", env=False, value="file", section="Output", help="File to write.  [default: standard output]")
@option("--overwrite", is_flag=True, cli_only=True, section="Output", help="Replace FILE if it exists.")
def convert(app: App, /, file: str, form: str | None, on_error: str, out: str | None, overwrite: bool) -> None:
    """Turn FILE (a JSON array or JSON lines; "-" is standard input) into an edits file.

    'editcli plugins' lists the formats. apply, eval and check read lines of these formats directly.
    """
    from editcli.requests.convert import convert as run

    if out is not None and not overwrite and Path(out).exists():
        raise EditError(f"{out} exists; pass --overwrite to replace it")
    if app.as_json and out is None:
        raise click.UsageError("--json prints a report on standard output; pass --out for the edits")
    formats = app.plugins.formats()
    done = run(file, formats, form=None if form is None else find_format(form, formats), skip_bad=on_error == "skip")
    for text in (*done.edits.warnings, *(f"left out: {error}" for error in done.edits.rejected)):
        app.reporter.warn(text)
    if not done.edits.requests:
        raise EditError(f"{file}: no record is usable, so nothing was written; choose another --from")
    if out is None:
        for line in done.lines():
            click.echo(line)
    else:
        done.write(Path(out))
    if app.as_json:
        print_json({**done.to_json(), "out": out})
    app.reporter.note(done.summary())
