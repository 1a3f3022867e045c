"""A command group that imports a command only when it is run."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click

from editcli.cli.common import App, verbosity_options
from editcli.cli.suggestions import with_suggestions
from editcli.errors import near_miss
from editcli.plugin.manager import Plugins


class LazyGroup(click.Group):
    """A group whose commands are named in a table ``name -> (module:attribute, help)``."""

    def __init__(self, *args: Any, commands_table: Mapping[str, tuple[str, str]] | None = None, **kwargs: Any):
        # The help in the place of an error would be an error of 20 lines.
        super().__init__(*args, no_args_is_help=False, **kwargs)
        self.table = dict(commands_table or {})
        self.params.extend(verbosity_options())

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return built-in commands in the table's order, then those of plugins."""
        return [*self.table, *sorted(set(self.commands) - set(self.table))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        if cmd_name not in self.commands and cmd_name in self.table:
            module, _, attribute = self.table[cmd_name][0].partition(":")
            self.add_command(furnished(getattr(importlib.import_module(module), attribute)), cmd_name)
        return self.commands.get(cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, naming the near miss when there is none."""
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None and not ctx.resilient_parsing:
            known = self.list_commands(ctx)
            raise click.UsageError(f"there is no command {name!r}{near_miss(name, known)}", ctx)
        found = super().resolve_command(ctx, args)
        _refuse_company(ctx, *found[:2])
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table, importing none of the built-in ones."""
        rows = [(name, self._short_help(name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def _short_help(self, name: str) -> str:
        return self.table[name][1] if name in self.table else self.commands[name].get_short_help_str(limit=80)


def _refuse_company(ctx: click.Context, name: str | None, command: click.Command | None) -> None:
    """Refuse a command that the processes of a launcher cannot run together."""
    app = ctx.find_object(App)
    if app is None or app.launch.size == 1 or isinstance(command, LazyGroup) or getattr(command, "shared", False):
        return
    raise click.UsageError(
        f"{app.launch.size} processes cannot run '{ctx.command_path} {name}' together; run it without a launcher", ctx
    )


def furnished(command: click.Command) -> click.Command:
    """Give a command what all of them have: ``-v``, ``-q`` and values that the shell completes."""
    return with_suggestions(with_verbosity(command))


def with_verbosity(command: click.Command) -> click.Command:
    """Let ``-v`` and ``-q`` be written after the command's name as well."""
    taken = {text for parameter in command.params for text in parameter.opts}
    for option in verbosity_options():
        if not taken & set(option.opts):
            command.params.append(option)
    return command


def add_plugin_commands(group: LazyGroup, plugins: Plugins) -> None:
    """Add the commands that plugins bring; one that takes a built-in's name is refused with a warning."""
    for plugin, command in plugins.commands():
        if command.name in group.list_commands(click.Context(group)):
            plugins.leave_out(plugin, f"its command {command.name!r} is already taken")
        else:
            group.add_command(furnished(command))
