"""What the commands share: the application object, options with groups and variables, printing JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import click

from editcli.cli import libraries
from editcli.distributed.launch import Launch
from editcli.errors import OptionError
from editcli.formatting import shorten
from editcli.models.chat_settings import check_arguments, parse_arguments
from editcli.plugin.manager import Plugins
from editcli.settings.recipe import parse_layers

if TYPE_CHECKING:
    from editcli.render.console import RichReporter


OTHER = "Other options"
"""The section of options that name none."""


class App:
    """What a command gets with ``@click.pass_obj``: the plugins and where to report."""

    def __init__(self, plugins: Plugins, launch: Launch | None = None):
        self.plugins, self.launch = plugins, launch or Launch()
        self.verbosity = 0
        """-1 quiet, 0 normal, 1 verbose; set by ``-q`` and ``-v`` while the command line is read."""

    @cached_property
    def reporter(self) -> RichReporter:
        """Progress, notes and warnings, on stderr."""
        from editcli.render.console import RichReporter

        return RichReporter(verbosity=lambda: self.verbosity)

    def announce(self, model: str | None) -> None:
        """Say which model is loaded, before the libraries that load it are imported: they take seconds themselves."""
        if self.launch.leads:
            self.reporter.note(f"Loading {model or 'the model that ships with editcli'}")

    def show(self, renderable: Any) -> None:
        """Draw a table on stdout."""
        from editcli.render.console import stdout

        stdout().print(renderable)


LAST = ("Output", "Hub", "Run", OTHER)
"""The sections that end every ``--help``, in this order; what a command is about comes before."""


class Option(click.Option):
    """An option that belongs to a section of ``--help`` and can be set by a variable ``EDITCLI_<NAME>``."""

    def __init__(self, *args: Any, section: str = OTHER, **kwargs: Any):
        self.section = section
        super().__init__(*args, **kwargs)
        if self.metavar is None and isinstance(self.type, click.IntRange):
            # A number that is counted with; versions of click differ in how they ask for the name of a value.
            self.metavar = "N"

    def consume_value(self, ctx: click.Context, opts: Any) -> Any:
        """Return the value and its source; click 8.1 trips over a single value of an option that repeats."""
        try:
            return super().consume_value(ctx, opts)
        except TypeError as error:
            given = ctx.lookup_default(self.name or "")
            raise click.BadParameter(f"{shorten(repr(given))} is no value for it", ctx=ctx, param=self) from error

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """Convert a value; a settings file may hold a type that click's own converters trip over."""
        try:
            return super().type_cast_value(ctx, value)
        except (AttributeError, TypeError, OverflowError) as error:
            raise click.BadParameter(f"{shorten(repr(value))} is no value for it", ctx=ctx, param=self) from error

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Leave out bounds: who goes beyond them is told."""
        extra = super().get_help_extra(ctx)
        extra.pop("range", None)
        return extra


class Command(click.Command):
    """A command whose ``--help`` shows its options in sections.

    ``shared`` says that the processes of a launcher can run it together; any other would do all of its work in each of
    them and write over the others, and is refused.
    """

    def __init__(self, *args: Any, shared: bool = False, **kwargs: Any):
        self.shared = shared
        super().__init__(*args, **kwargs)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section for each group of options: what the command is about first, then those of ``LAST``."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                sections.setdefault(getattr(parameter, "section", OTHER), []).append(record)
        for title in sorted(sections, key=lambda title: LAST.index(title) if title in LAST else -1):
            with formatter.section(title):
                formatter.write_dl(sections[title])


def option(*declarations: str, section: str = OTHER, env: bool = True, **settings: Any) -> Callable[[Any], Any]:
    """Declare an option of a :class:`Command`; unless ``env`` is false, ``EDITCLI_<NAME>`` sets it too."""
    if env:
        settings.setdefault("envvar", variable(declarations))
    return click.option(*declarations, cls=Option, section=section, **settings)


def variable(declarations: tuple[str, ...]) -> str:
    """Return the environment variable of an option declared as ``declarations``."""
    plain = [text for text in declarations if text.isidentifier()]
    long = [text.partition("/")[0].lstrip("-") for text in declarations if text.startswith("--")]
    return "EDITCLI_" + (plain or long)[0].replace("-", "_").upper()


class CommaSeparated(click.ParamType):
    """Texts of an option that may repeat; one value, or one variable, may also hold several with commas."""

    name = "name"
    envvar_list_splitter = ","

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return one name without the blanks around it."""
        if not isinstance(value, str):
            self.fail(f"{value!r} is not a text", param, ctx)
        return value.strip()


class LayerRange(click.ParamType):
    """Layer numbers such as ``4-8,10``; a settings file may also hold a number or a list of numbers."""

    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Return the layers in ascending order."""
        if isinstance(value, tuple):
            return value
        texts = value if isinstance(value, list) else [value]
        try:
            return parse_layers(",".join(str(text) for text in texts))
        except OptionError as error:
            self.fail(str(error), param, ctx)


class JsonObject(click.ParamType):
    """Variables of a chat template; a settings file may also hold a table."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Mapping[str, Any]:
        """Return the object."""
        try:
            if not isinstance(value, Mapping):
                return parse_arguments(str(value))
            check_arguments(value)
            return value
        except OptionError as error:
            self.fail(str(error), param, ctx)


def split_commas(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """Split ``a,b`` into two values; a click callback."""
    return tuple(part.strip() for text in value or () for part in text.split(",") if part.strip())


def json_option(command: Any) -> Any:
    """Add ``--json``: one JSON document on stdout instead of tables."""
    return option(
        "--json",
        "as_json",
        is_flag=True,
        env=False,
        section="Output",
        help="Print one JSON document instead of tables.",
    )(command)


def print_json(document: Mapping[str, Any] | list[Any]) -> None:
    """Print one JSON document on stdout; numbers that JSON does not know become null."""
    text = json.dumps(_finite(document), indent=2, ensure_ascii=False)
    # JSON escapes the first 32 control characters; terminals obey these as well, and they can only be inside texts.
    click.echo(text.translate({code: f"\\u{code:04x}" for code in range(0x7F, 0xA0)}))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def verbosity_options() -> list[click.Option]:
    """Return ``-v`` and ``-q``."""
    return [
        Option(
            ["-v", "--verbose"],
            is_flag=True,
            expose_value=False,
            callback=_set_verbosity(1),
            help="Say more; show the warnings of the libraries below.",
        ),
        Option(
            ["-q", "--quiet"],
            is_flag=True,
            expose_value=False,
            callback=_set_verbosity(-1),
            help="Say nothing but warnings, errors and results.",
        ),
    ]


def _set_verbosity(level: int) -> Callable[[click.Context, click.Parameter, bool], None]:
    def callback(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        app = context.find_object(App)
        if value and app is not None:
            app.verbosity = level
            if level > 0:
                libraries.show()

    return callback
