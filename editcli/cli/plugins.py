"""``editcli plugins``: list plugins, and start a package for a new one."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from editcli.cli.app import App
from editcli.cli.command import Command, command
from editcli.cli.options import option
from editcli.plugin.manager import catalogue
from editcli.scaffold.package import KINDS, LICENSES, scaffold

package_option = partial(option, section="The package", env=False)


class PluginsGroup(Command, click.Group):
    """A group in which any word but a subcommand is the name of a component to show."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in sections, then the subcommands."""
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Resolve the first word to a subcommand, else to ``show`` with that name."""
        return super().resolve_command(ctx, args) if args[0] in self.commands else (show.name, show, args)


@command(cls=PluginsGroup, config=False, invoke_without_command=True, subcommand_metavar="[NAME | new NAME]")
def plugins(app: App, /) -> None:
    """Show the editors, stabilizers, named stacks, diagnostics and formats of all plugins.

    With NAME, show everything about one of them: its options with types and defaults, its paper, and its distribution.
    'editcli plugins new NAME' writes a package for a plugin of your own.
    """
    if click.get_current_context().invoked_subcommand is None:
        app.emit({"plugins": catalogue(app.plugins), "broken": app.plugins.broken}, _table)


@command("show", config=False)
@click.argument("name")
def show(app: App, /, name: str) -> None:
    """Show everything about NAME."""
    app.emit({"plugins": catalogue(app.plugins, name), "broken": {}}, _detail)


@command("new", config=False)
@click.argument("name")
@package_option(
    "--kind", type=click.Choice(list(KINDS)), metavar=f"[{'|'.join(KINDS)}]", required=True, help="Kind of component."
)
@package_option("--out", value="folder", help="Folder to write, new or empty.  [default: editcli-NAME]")
@package_option(
    "--license",
    type=click.Choice(LICENSES, case_sensitive=False),
    metavar=f"[{'|'.join(LICENSES)}]",
    default=LICENSES[0],
    help="Licence of the package.",
)
@package_option("--author", help="Author named in the licence and pyproject.toml.")
def new(app: App, /, name: str, kind: str, out: str | None, license: str, author: str | None) -> None:
    """Write a package for a plugin called NAME, ready to publish.

    It holds a working method of about 40 lines, to be replaced by yours; its tests, which pass; pyproject.toml, README,
    licence and a CI workflow. A folder that is not empty is refused.
    """
    from editcli.render.plugins import scaffolded

    made = scaffold(name, app.plugins, kind=kind, out=out, license=license, author=author)
    fields = {field: getattr(made, field) for field in made.__slots__}
    app.emit({**fields, "folder": str(made.folder)}, lambda _: scaffolded(made))


def _table(report: dict[str, Any]) -> Any:
    from editcli.render.plugins import plugins_table

    return plugins_table(report["plugins"], report["broken"])


def _detail(report: dict[str, Any]) -> Any:
    from editcli.render.plugins import plugin_detail

    return plugin_detail(report["plugins"])


plugins.add_command(new)
