"""Commands with options in sections, and a group that imports a command only when it runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import click

from editcli.cli.app import App
from editcli.cli.options import OTHER, config_option, json_option, verbosity_options
from editcli.errors import near_miss
from editcli.plugin.manager import Plugins

LAST = ("Output", "Hub", "Run", OTHER)
"""The sections at the end of every ``--help``, in this order; a command's own sections come before."""


class Command(click.Command):
    """A command whose ``--help`` shows its options in sections.

    ``shared`` says that the processes of a launcher can run it together; every other command is refused there, because
    each process would do all of its work and overwrite the others' output.
    """

    def __init__(self, *args: Any, shared: bool = False, **kwargs: Any):
        self.shared = shared
        super().__init__(*args, **kwargs)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section for each group of options: the command's own first, then those of :data:`LAST`."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                sections.setdefault(getattr(parameter, "section", OTHER), []).append(record)
        for title in sorted(sections, key=lambda title: LAST.index(title) if title in LAST else -1):
            with formatter.section(title):
                formatter.write_dl(sections[title])


def command(
    name: str | None = None, *, json: bool = True, config: bool = True, cls: type[Command] = Command, **settings: Any
) -> Callable[[Callable[..., Any]], Any]:
    """Make a command of a function of the :class:`App`, with the options that all commands have."""

    def decorate(function: Callable[..., Any]) -> click.Command:
        built = click.command(name, cls=cls, **settings)(click.pass_obj(function))
        shared = [*([json_option()] if json else []), *([config_option()] if config else []), *verbosity_options()]
        built.params.extend(shared)
        return built

    return decorate


class LazyGroup(click.Group):
    """A group whose commands are named in a table ``name -> (module:attribute, help)``."""

    def __init__(self, *args: Any, commands_table: Mapping[str, tuple[str, str]] | None = None, **kwargs: Any):
        # Without this, click would print the full help instead of a one-line error.
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
            self.add_command(getattr(importlib.import_module(module), attribute), cmd_name)
        return self.commands.get(cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, naming the near miss when there is none."""
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None and not ctx.resilient_parsing:
            known = self.list_commands(ctx)
            raise click.UsageError(f"there is no command {name!r}{near_miss(name, known)}", ctx)
        resolved = super().resolve_command(ctx, args)
        _refuse_launcher(ctx, *resolved[:2])
        return resolved

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table, importing none of the built-in ones."""
        rows = [(name, self._short_help(name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def _short_help(self, name: str) -> str:
        return self.table[name][1] if name in self.table else self.commands[name].get_short_help_str(limit=80)


def _refuse_launcher(ctx: click.Context, name: str | None, command: click.Command | None) -> None:
    """Refuse a command that the processes of a launcher cannot run together."""
    app = ctx.find_object(App)
    if app is None or app.launch.size == 1 or isinstance(command, LazyGroup) or getattr(command, "shared", False):
        return
    raise click.UsageError(
        f"{app.launch.size} processes cannot run '{ctx.command_path} {name}' together; run it without a launcher", ctx
    )


def add_plugin_commands(group: LazyGroup, plugins: Plugins) -> None:
    """Add the commands of plugins, with ``-v`` and ``-q``; one with a built-in's name is refused with a warning."""
    for plugin, command in plugins.commands():
        if command.name in group.list_commands(click.Context(group)):
            plugins.leave_out(plugin, f"its command {command.name!r} is already taken")
        else:
            taken = {text for parameter in command.params for text in parameter.opts}
            command.params.extend(option for option in verbosity_options() if not taken & set(option.opts))
            group.add_command(command)
