"""``editcli plugins``: what is installed."""

from __future__ import annotations

import click

from editcli.catalogue import catalogue
from editcli.cli.common import App, Command, json_option, print_json


@click.command(cls=Command)
@click.argument("name", required=False)
@json_option
@click.pass_obj
def plugins(app: App, /, name: str | None, as_json: bool) -> None:
    """Show installed editors, stabilizers and diagnostics, or everything about NAME."""
    rows = catalogue(app.plugins, name)
    if as_json:
        print_json({"plugins": rows, "broken": app.plugins.broken if name is None else {}})
        return
    from editcli.render.plugins import plugin_detail, plugins_table

    app.show(plugins_table(rows, app.plugins.broken) if name is None else plugin_detail(rows))
