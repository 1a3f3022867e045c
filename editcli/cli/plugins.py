"""``editcli plugins``: what is installed, and how to begin a plugin of one's own."""

from __future__ import annotations

from functools import partial

import click

from editcli.cli.common import App, Command, json_option, option, print_json
from editcli.cli.group import with_verbosity
from editcli.plugin.manager import catalogue
from editcli.scaffold.package import KINDS, LICENSES, scaffold

package_option = partial(option, section="The package", env=False)


class PluginsGroup(Command, click.Group):
    """A group in which any word but a subcommand is the name of what is to be shown."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in sections, then the subcommands."""
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add a subcommand that takes ``-v`` and ``-q`` as well."""
        super().add_command(with_verbosity(cmd), name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Take the first word for a subcommand, else for a name that ``show`` explains."""
        if args[0] in self.commands:
            return super().resolve_command(ctx, args)
        return show.name, with_verbosity(show), args


@click.group(cls=PluginsGroup, invoke_without_command=True, subcommand_metavar="[NAME | new NAME]")
@json_option
@click.pass_context
def plugins(context: click.Context, /, as_json: bool) -> None:
    """Show what plugins bring: editors, stabilizers, diagnostics, formats.

    With NAME, show everything about one of them: its options with types and defaults, its paper, the distribution that
    brought it. 'editcli plugins new NAME' writes a package for a plugin of your own.
    """
    if context.invoked_subcommand is None:
        _show(context.ensure_object(App), None, as_json)


@click.command(cls=Command, name="show")
@click.argument("name")
@json_option
@click.pass_context
def show(context: click.Context, /, name: str, as_json: bool) -> None:
    """Show everything about NAME."""
    before = context.parent is not None and context.parent.params["as_json"]
    _show(context.ensure_object(App), name, as_json or before)


@plugins.command(cls=Command)
@click.argument("name")
@package_option(
    "--kind", type=click.Choice(list(KINDS)), metavar=f"[{'|'.join(KINDS)}]", required=True, help="What it brings."
)
@package_option("--out", metavar="DIR", help="Folder to write, new or empty.  [default: editcli-NAME]")
@package_option(
    "--license",
    type=click.Choice(LICENSES, case_sensitive=False),
    metavar=f"[{'|'.join(LICENSES)}]",
    default=LICENSES[0],
    show_default=True,
    help="Licence of the package.",
)
@package_option("--author", help="Who the licence and pyproject.toml name.")
@json_option
@click.pass_obj
def new(app: App, /, name: str, kind: str, out: str | None, license: str, author: str | None, as_json: bool) -> None:
    """Write a package for a plugin called NAME, ready to publish.

    It holds a method that works, of about 40 lines, to be replaced by yours; its tests, which pass; pyproject.toml,
    README, licence and a CI workflow. A folder that holds anything is never written into.
    """
    made = scaffold(name, app.plugins, kind=kind, out=out, license=license, author=author)
    if as_json:
        print_json({**{field: getattr(made, field) for field in made.__slots__}, "folder": str(made.folder)})
        return
    from editcli.render.plugins import scaffolded

    app.show(scaffolded(made))


def _show(app: App, name: str | None, as_json: bool) -> None:
    rows = catalogue(app.plugins, name)
    if as_json:
        print_json({"plugins": rows, "broken": app.plugins.broken if name is None else {}})
        return
    from editcli.render.plugins import plugin_detail, plugins_table

    app.show(plugins_table(rows, app.plugins.broken) if name is None else plugin_detail(rows))
