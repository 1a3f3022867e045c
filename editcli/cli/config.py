"""Join the command line with ``editcli.toml`` and ``EDITCLI_*`` variables."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from editcli.cli.app import App
from editcli.errors import OptionError
from editcli.plugin.manager import Plugins
from editcli.plugin.options import parse_assignments
from editcli.plugin.wrapping import wrapped_name, wrapping_option
from editcli.settings.config import Config, load_config
from editcli.settings.core import CORE

if TYPE_CHECKING:
    from editcli.settings.recipe import Recipe


def refuse_idle_options(recipe: Recipe, assignments: Iterable[str], plugins: Plugins) -> None:
    """Raise when ``-o`` sets an option of a method that the run does not use."""
    for name in parse_assignments(assignments):
        if name in plugins.all("stabilizer") and name not in recipe.stabilizers:
            raise OptionError(f"-o {name}... was given, but {name} is not in this run; add --stabilizer {name}")
        if name not in plugins.all("editor") or recipe.editor in (None, name):
            continue
        wrapped = wrapped_name(recipe.editor, recipe.settings, plugins)
        if wrapped is None:
            raise OptionError(f"-o {name}... was given, but the editor is {recipe.editor}; add --editor {name}")
        if name != wrapped:
            raise OptionError(
                f"-o {name}... was given, but the editor is {recipe.editor}, which wraps {wrapped}; "
                f"add -o {wrapping_option(recipe.editor, plugins)}={name}"
            )


def read_config(context: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    """Read the settings file into the command's defaults and the application; the callback of ``--config``."""
    app = context.find_object(App)
    if context.resilient_parsing or app is None:
        return
    config = load_config(path)
    _check(config, context, app)
    shared, settable = (_names(context.command, which) for which in (_is_shared, _is_settable))
    table = config.tables.get(context.info_name or "", {})
    context.default_map = {
        **{shared[key]: value for key, value in config.values.items() if key in shared},
        **{settable[key]: value for key, value in table.items()},
    }
    context.meta["editcli.settings.config"] = config.source
    app.tables = {name: table for name, table in config.tables.items() if name not in _commands()}
    if app.launch.leads:
        _warn_near_misses(context, app)


def _check(config: Config, context: click.Context, app: App) -> None:
    from editcli.cli.apply import apply
    from editcli.settings.recipe import check_section

    name, command = context.info_name or "", context.command
    components = {component for kind in app.plugins.kinds for component in app.plugins.all(kind)}
    shared, typed = ({*_names(apply, which), *_names(command, which)} for which in (_is_shared, _is_typed))
    config.check(options=shared, tables={*components, *CORE, *_commands()}, cli_only=typed)
    table = Config(f"{config.source} [{name}]", config.tables.get(name, {}))
    table.check(options=_names(command, _is_settable), tables=(), cli_only=typed)
    for section, options in config.tables.items():
        if section not in _commands():
            try:
                check_section(section, options, app.plugins)
            except OptionError as error:
                raise OptionError(f"{config.source}: {error}") from error


def _commands() -> frozenset[str]:
    from editcli.cli.main import COMMANDS

    return frozenset(COMMANDS)


def _names(command: click.Command, which: Callable[[click.Parameter], bool]) -> dict[str, str]:
    """Map every name of the parameters of one kind, with underscores, to the parameter's name."""
    names: dict[str, str] = {}
    for parameter in filter(which, command.params):
        long = (text[2:].replace("-", "_") for text in parameter.opts if text.startswith("--"))
        names.update(dict.fromkeys([str(parameter.name), *long], str(parameter.name)))
    return names


def _is_typed(parameter: click.Parameter) -> bool:
    """Tell whether only the command line may set a parameter."""
    return getattr(parameter, "cli_only", False)


def _is_shared(parameter: click.Parameter) -> bool:
    """Tell whether a parameter means the same to every command, so that variables and the top of the file set it."""
    return parameter.envvar is not None and not _is_typed(parameter)


def _is_settable(parameter: click.Parameter) -> bool:
    """Tell whether the command's own table of the file may set a parameter."""
    return _is_shared(parameter) or (isinstance(parameter, click.Option) and not _is_typed(parameter))


def _warn_near_misses(context: click.Context, app: App) -> None:
    """Warn about a variable that looks like a mistyped one of editcli; any other may belong to another command."""
    known = [str(parameter.envvar) for parameter in context.command.params if parameter.envvar]
    for name in sorted(os.environ):
        if name.startswith("EDITCLI_") and name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.9)
            if close:
                app.reporter.warn(f"the variable {name} is not read by anything; did you mean {close[0]}?")
