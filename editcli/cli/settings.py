"""Join the command line with ``editcli.toml`` and ``EDITCLI_*`` variables."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from editcli.cli.common import App, option
from editcli.errors import OptionError
from editcli.plugin.manager import Plugins
from editcli.plugin.options import merge, parse_assignments
from editcli.settings.config import Config, environment_settings, load_config
from editcli.settings.core import CORE
from editcli.settings.recipe import Recipe, check_section

_META = "editcli.component-settings"


def config_option(command: Any) -> Any:
    """Add ``--config``; the file's values become the command's defaults."""
    return option(
        "--config",
        type=click.Path(dir_okay=False, path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=_read_config,
        section="Run",
        help="Settings file to read instead of ./editcli.toml.",
    )(command)


def component_settings(context: click.Context, assignments: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """Return component options: the file's tables, then ``EDITCLI_OPTIONS``, then ``-o``."""
    return merge(context.meta.get(_META, {}), environment_settings(os.environ), parse_assignments(assignments))


def refuse_idle_options(recipe: Recipe, assignments: Iterable[str], plugins: Plugins) -> None:
    """Raise when ``-o`` sets an option of a method that the command line leaves out: it would do nothing."""
    for name in parse_assignments(assignments):
        if name in plugins.all("stabilizer") and name not in recipe.stabilizers:
            raise OptionError(f"-o {name}... was given, but {name} is not in this run; add --stabilizer {name}")
        if name in plugins.all("editor") and recipe.editor not in (None, name):
            raise OptionError(f"-o {name}... was given, but the editor is {recipe.editor}; add --editor {name}")


def _read_config(context: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    app = context.find_object(App)
    if context.resilient_parsing or app is None:
        return
    config = load_config(path)
    _check(config, context, app)
    shared, own = _names(context.command), _names(context.command, shared=False)
    table = config.tables.get(context.info_name or "", {})
    context.default_map = {
        **{shared[key]: value for key, value in config.values.items() if key in shared},
        **{own[key]: value for key, value in table.items()},
    }
    context.meta["editcli.settings.config"] = config.source
    context.meta[_META] = {name: table for name, table in config.tables.items() if name not in _commands()}
    if app.launch.leads:
        _warn_near_misses(context, app)


def _check(config: Config, context: click.Context, app: App) -> None:
    from editcli.cli.apply import apply

    components = {name for kind in app.plugins.kinds for name in app.plugins.all(kind)}
    config.check(options={*_names(apply), *_names(context.command)}, tables={*components, *CORE, *_commands()})
    own = context.info_name or ""
    table = Config(f"{config.source} [{own}]", config.tables.get(own, {}))
    table.check(options=_names(context.command, shared=False), tables=())
    for name, table in config.tables.items():
        if name not in _commands():
            try:
                check_section(name, table, app.plugins)
            except OptionError as error:
                raise OptionError(f"{config.source}: {error}") from error


def _commands() -> frozenset[str]:
    from editcli.cli.main import COMMANDS

    return frozenset(COMMANDS)


def _names(command: click.Command, *, shared: bool = True) -> dict[str, str]:
    """Map every name of an option, with underscores, to its parameter's name.

    ``shared`` leaves out the options that no variable sets either: they mean something else to each command, as --out.
    """
    names: dict[str, str] = {}
    for parameter in command.params:
        set_by_option = isinstance(parameter, click.Option) and not shared
        if parameter.name and (parameter.envvar or set_by_option):
            long = (text[2:].replace("-", "_") for text in parameter.opts if text.startswith("--"))
            names.update(dict.fromkeys([parameter.name, *long], parameter.name))
    return names


def _warn_near_misses(context: click.Context, app: App) -> None:
    """Warn about a variable that looks like a mistyped one of ours; any other may belong to another command."""
    known = [str(parameter.envvar) for parameter in context.command.params if parameter.envvar]
    for name in sorted(os.environ):
        if name.startswith("EDITCLI_") and name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.9)
            if close:
                app.reporter.warn(f"the variable {name} is not read by anything; did you mean {close[0]}?")
