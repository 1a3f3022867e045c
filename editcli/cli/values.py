"""Kinds of values on the command line: how each is read, and what the shell completes. Never imports torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from editcli.cli.app import App
from editcli.errors import OptionError
from editcli.plugin.manager import Plugins, catalogue
from editcli.plugin.options import describe
from editcli.settings.core import CORE
from editcli.settings.guards import BATCH_FIGURES, SITE_FIGURES
from editcli.storage.opening import expanded

Listed = Callable[[Plugins], Iterable[tuple[str, str]]]
"""Returns values, each with a line of help."""


class CommaSeparated(click.ParamType):
    """Texts of an option that may repeat; one value, or one variable, may also hold several with commas."""

    name = "name"
    envvar_list_splitter = ","

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return one text without the blanks around it."""
        if not isinstance(value, str):
            self.fail(f"{value!r} is not a text", param, ctx)
        return value.strip()


class LayerRange(click.ParamType):
    """Layer numbers such as ``4-8,10``; a settings file may also hold a number or a list of numbers."""

    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Return the layers in ascending order."""
        from editcli.settings.recipe import parse_layers

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
        from editcli.models.chat_settings import check_arguments, parse_arguments

        try:
            if not isinstance(value, Mapping):
                return parse_arguments(str(value))
            check_arguments(value)
            return value
        except OptionError as error:
            self.fail(str(error), param, ctx)


def split_commas(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """Split ``a,b`` into two values where the option takes commas; a click callback."""
    if not isinstance(parameter.type, CommaSeparated):
        return value
    return tuple(part.strip() for text in value or () for part in text.split(",") if part.strip())


def _assignments(plugins: Plugins) -> Iterator[tuple[str, str]]:
    """Yield ``NAME.KEY=VALUE`` with the values that are possible, or with the default."""
    owners = [(row["name"], row["options"]) for row in catalogue(plugins)]
    for name, options in [*owners, *((section, describe(options)) for section, options in CORE.items())]:
        for option in options:
            values = option["type"].split("|") if "|" in option["type"] else [option["default"]]
            for value in values:
                yield f"{name}.{option['name']}={'none' if value is None else value}", option["help"]


def _models(plugins: Plugins) -> Iterator[tuple[str, str]]:
    """Yield the bundled model and the hub ids in the cache."""
    yield "bundled", "the small model that ships with editcli"
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface")
    cache = expanded(os.environ.get("HF_HUB_CACHE") or home / "hub")
    for path in sorted(cache.glob("models--*")):
        yield path.name.removeprefix("models--").replace("--", "/"), "in the hub's cache"


def _components(*kinds: str) -> Listed:
    return lambda plugins: [(row["name"], row["summary"]) for row in catalogue(plugins) if row["kind"] in kinds]


def _words(*values: str) -> Listed:
    return lambda plugins: [(value, "") for value in values]


@dataclass(frozen=True, slots=True)
class Value:
    """A kind of value."""

    metavar: str
    """Its name in ``--help``."""
    listed: Listed = lambda plugins: ()
    """The values that the shell offers."""
    paths: str | None = None
    """``file`` or ``dir`` lets the shell offer names of files or folders as well."""
    type: click.ParamType | None = None
    """How it is read; None keeps the text."""

    def complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the values that begin with ``incomplete``, or with its text after the last comma; click's own hook."""
        app = ctx.find_object(App)
        values = self.listed(app.plugins) if app is not None else ()
        commas = isinstance(param.type, CommaSeparated)
        before, comma, last = incomplete.rpartition(",") if commas else ("", "", incomplete)
        items = [CompletionItem(before + comma + value, help=text) for value, text in values if value.startswith(last)]
        return [CompletionItem(incomplete, type=self.paths), *items] if self.paths else items


FIGURES = (*(f"{name}>" for name in SITE_FIGURES), *(f"{name}<" for name in BATCH_FIGURES))
VALUES: Mapping[str, Value] = {
    "assignment": Value("NAME.KEY=VALUE", _assignments),
    "corpus": Value("TEXT", _words("english", "self"), "file"),
    "device": Value("DEVICE", _words("auto", "cpu", "cuda", "mps")),
    "device_map": Value("MAP", _words("auto", "balanced", "sequential")),
    "editor": Value("NAME", _components("editor", "stack")),
    "existing folder": Value("DIR", paths="dir", type=click.Path(exists=True, file_okay=False)),
    "file": Value("FILE", paths="file"),
    "folder": Value("DIR", paths="dir"),
    "format": Value("FORMAT", _components("format")),
    "guard": Value("EXPR", _words(*FIGURES), type=CommaSeparated()),
    "json": Value("JSON", type=JsonObject()),
    "layers": Value("LAYERS", type=LayerRange()),
    "model": Value("MODEL", _models, "dir"),
    "path": Value("FILE", paths="file", type=click.Path(dir_okay=False, path_type=Path)),
    "stacks": Value("STACK,...", _components("editor", "stack"), type=CommaSeparated()),
    "stabilizer": Value("NAME", _components("stabilizer"), type=CommaSeparated()),
    "texts": Value("NAME", type=CommaSeparated()),
}
"""The kinds of values by the names under which settings and options are declared."""
