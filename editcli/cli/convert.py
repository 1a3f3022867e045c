"""``editcli convert``: turn other tools' edit files into ours."""

from __future__ import annotations

from pathlib import Path

import click

from editcli.cli.common import App, Command, json_option, option, print_json
from editcli.cli.settings import config_option
from editcli.errors import EditError
from editcli.requests.formats import find_format
from editcli.settings.recipe import ON_ERROR


@click.command(cls=Command)
@click.argument("file", metavar="FILE")
@option("--from", "form", env=False, metavar="FORMAT", section="Input", help="Format of FILE.  [default: look and see]")
@option(
    "--on-error",
    type=click.Choice(ON_ERROR),
    default="skip",
    show_default=True,
    section="Input",
    help="What to do with a record that cannot be used: skip and name it, or stop.",
)
@option("--out", env=False, metavar="FILE", section="Output", help="File to write.  [default: standard output]")
@option("--overwrite", is_flag=True, env=False, section="Output", help="Replace OUT if it exists.")
@json_option
@config_option
@click.pass_obj
def convert(
    app: App, /, file: str, form: str | None, on_error: str, out: str | None, overwrite: bool, as_json: bool
) -> None:
    """Turn FILE (a JSON array or JSON lines; "-" is standard input) into an edits file.

    'editcli plugins' lists the formats. apply, eval and check read lines of these formats as they stand.
    """
    from editcli.requests.convert import convert as run

    if out is not None and not overwrite and Path(out).exists():
        raise EditError(f"{out} exists; pass --overwrite to replace it")
    if as_json and out is None:
        raise click.UsageError("--json prints a report on standard output; pass --out for the edits")
    formats = app.plugins.formats()
    chosen = None if form is None else find_format(form, formats)
    done = run(file, formats, form=chosen, skip_bad=on_error == "skip")
    for text in (*done.edits.warnings, *(f"left out: {error}" for error in done.edits.rejected)):
        app.reporter.warn(text)
    if not done.edits.requests:
        raise EditError(f"{file}: no record is usable, so nothing was written; choose another --from")
    if out is None:
        for line in done.lines():
            click.echo(line)
    else:
        done.write(Path(out))
    if as_json:
        print_json({**done.to_json(), "out": out})
    app.reporter.note(done.summary())
