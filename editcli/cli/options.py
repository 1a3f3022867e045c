"""Options and arguments: declared here, or derived from the settings of a recipe."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from editcli.cli.app import App
from editcli.cli.config import read_config
from editcli.cli.values import VALUES, split_commas
from editcli.formatting import shorten
from editcli.settings.setting import Setting, settings_of

OTHER = "Other options"
"""The section of options that name none."""
COUNT = click.IntRange(min=1)


class Option(click.Option):
    """An option with a section of ``--help``; ``cli_only`` keeps settings files from setting it."""

    def __init__(self, *args: Any, section: str = OTHER, cli_only: bool = False, **kwargs: Any):
        self.section, self.cli_only = section, cli_only
        super().__init__(*args, **kwargs)
        if self.metavar is None and isinstance(self.type, click.IntRange):
            # Versions of click differ in how they ask a type for the name of a value.
            self.metavar = "N"

    def consume_value(self, ctx: click.Context, opts: Any) -> Any:
        """Return the value and its source; click 8.1 fails on a single value of an option that repeats."""
        try:
            return super().consume_value(ctx, opts)
        except TypeError as error:
            given = ctx.lookup_default(self.name or "")
            raise click.BadParameter(f"{shorten(repr(given))} is no value for it", ctx=ctx, param=self) from error

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """Convert a value; a settings file may hold a type that click's own converters fail on."""
        try:
            return super().type_cast_value(ctx, value)
        except (AttributeError, TypeError, OverflowError) as error:
            raise click.BadParameter(f"{shorten(repr(value))} is no value for it", ctx=ctx, param=self) from error

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Hide range bounds from ``--help``; the parser reports a violation anyway."""
        extra = super().get_help_extra(ctx)
        extra.pop("range", None)
        return extra


def option(
    *declarations: str, section: str = OTHER, env: bool = True, cli_only: bool = False, value: str = "", **facts: Any
) -> Callable[[Any], Any]:
    """Declare an option; ``EDITCLI_<NAME>`` sets it too, unless ``env`` is false or it is ``cli_only``.

    ``value`` names one of :data:`VALUES`: the kind of its value.
    """
    if value:
        kind = VALUES[value]
        facts = {"metavar": kind.metavar, "shell_complete": kind.complete, "type": kind.type, **facts}
    if env and not cli_only:
        facts.setdefault("envvar", _variable(declarations))
    if facts.get("default") is not None:
        facts.setdefault("show_default", facts["default"] not in ("", ()) and facts["default"] is not False)
    return click.option(*declarations, cls=Option, section=section, cli_only=cli_only, **facts)


def argument(name: str, metavar: str, value: str, **facts: Any) -> Callable[[Any], Any]:
    """Declare an argument; brackets in ``metavar`` make it optional."""
    complete, required = VALUES[value].complete, not metavar.startswith("[")
    return click.argument(name, metavar=metavar, required=required, shell_complete=complete, **facts)


def options_of(recipe: type[Any], *names: str, **changes: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Declare options for the settings of a recipe: those in ``names``, else all that may be left out.

    ``changes`` replaces facts of single settings, such as ``out={"default": "bench"}``.
    """
    declared = settings_of(recipe)
    chosen = [replace(declared[name], **changes.get(name, {})) for name in names or declared]

    def decorate(command: Any) -> Any:
        # Decorators apply from the last to the first.
        for setting in reversed(chosen):
            if setting.default is not ...:
                command = _option_of(setting)(command)
        return command

    return decorate


def _option_of(setting: Setting) -> Callable[[Any], Any]:
    facts: dict[str, Any] = {"help": setting.help, "default": setting.default}
    facts |= {name: text for name, text in (("metavar", setting.metavar), ("envvar", setting.variable)) if text}
    if setting.bare is not None:
        facts |= {"is_flag": False, "flag_value": setting.bare}
    elif setting.kind is bool:
        facts["is_flag"] = True
    elif setting.choices:
        facts["type"] = click.Choice(setting.choices)
    elif setting.default == ():
        facts |= {"multiple": True, "callback": split_commas}
    elif setting.least is not None:
        facts["type"] = click.IntRange(min=setting.least)
    elif float in (setting.kind, *typing.get_args(setting.kind)):
        facts["type"] = float
    return option(
        *setting.declarations,
        setting.name,
        section=setting.section,
        env=setting.env,
        cli_only=setting.cli_only,
        value=setting.value,
        **facts,
    )


def _variable(declarations: tuple[str, ...]) -> str:
    plain = [text for text in declarations if text.isidentifier()]
    long = [text.partition("/")[0].lstrip("-") for text in declarations if text.startswith("--")]
    return "EDITCLI_" + (plain or long)[0].replace("-", "_").upper()


assignments_option = option(
    "-o",
    "--option",
    "assignments",
    multiple=True,
    env=False,
    value="assignment",
    section="Method",
    help="Set an option of a method; repeatable. 'editcli plugins NAME' lists them.",
)
tau_option = option("--tau", default=0.1, metavar="SHARE", section="Figures", help="Share of the spectrum for k(tau).")
threshold_option = option(
    "--threshold",
    "thresholds",
    multiple=True,
    metavar="NAME=VALUE",
    section="Figures",
    help="Limit of a healthy site: drifting_ or collapsing_, followed by ratio (1.25, 2.5), drift (0.75, 2.25), "
    "spectral (2, 5) or rank (0.9, 0.5); repeatable.",
)


def json_option() -> click.Option:
    """Return ``--json``: one JSON document on stdout instead of tables."""
    text = "Print one JSON document instead of tables."
    return _switch(
        "--json", "as_json", lambda app: setattr(app, "as_json", True), text, section="Output", cli_only=True
    )


def config_option() -> click.Option:
    """Return ``--config``; the file's values become the command's defaults."""
    return Option(
        ["--config"],
        type=click.Path(dir_okay=False, path_type=Path),
        envvar="EDITCLI_CONFIG",
        cli_only=True,
        is_eager=True,
        expose_value=False,
        callback=read_config,
        section="Run",
        help="Settings file to read instead of ./editcli.toml.",
    )


def verbosity_options() -> list[click.Option]:
    """Return ``-v`` and ``-q``."""
    more, less = "Say more; show the warnings of other libraries.", "Print only warnings, errors and results."
    return [
        _switch("-v", "--verbose", lambda app: app.set_verbosity(1), more),
        _switch("-q", "--quiet", lambda app: app.set_verbosity(-1), less),
    ]


def _switch(first: str, second: str, act: Callable[[App], None], text: str, **facts: Any) -> click.Option:
    """Return a flag that changes the application while the command line is read."""

    def callback(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        app = context.find_object(App)
        if value and app is not None:
            act(app)

    return Option([first, second], is_flag=True, expose_value=False, callback=callback, help=text, **facts)
