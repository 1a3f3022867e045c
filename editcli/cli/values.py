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
from editcli.models.chat_settings import check_arguments, parse_arguments
from editcli.plugin.manager import Plugins, catalogue
from editcli.plugin.options import describe
from editcli.settings.core import CORE
from editcli.settings.guards import BATCH_FIGURES, SITE_FIGURES
from editcli.settings.recipe import parse_layers

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]
"""Returns the values that begin with a text; click's ``shell_complete``."""


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


def after_comma(complete: Complete | None) -> Complete | None:
    """Return the completion of texts with commas: that of the text after the last one."""

    def completed(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",")
        items = complete(ctx, param, last) if complete is not None else []
        return [CompletionItem(before + comma + item.value, item.type, item.help) for item in items]

    return completed if complete is not None else None


def completion(
    listed: Callable[[Plugins], Iterable[tuple[str, str]]] = lambda plugins: (), *, paths: str | None = None
) -> Complete:
    """Return the completion with values and their help; ``paths`` lets the shell add ``file`` or ``dir`` names."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        app = ctx.find_object(App)
        values = listed(app.plugins) if app is not None else ()
        items = [CompletionItem(value, help=text) for value, text in values if value.startswith(incomplete)]
        return [CompletionItem(incomplete, type=paths), *items] if paths else items

    return complete


def words(*values: str, paths: str | None = None) -> Complete:
    """Return the completion with fixed values."""
    return completion(lambda plugins: [(value, "") for value in values], paths=paths)


def _components(kind: str) -> Complete:
    return completion(
        lambda plugins: [(row["name"], row["summary"]) for row in catalogue(plugins) if row["kind"] == kind]
    )


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
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    for path in sorted(cache.glob("models--*")):
        yield path.name.removeprefix("models--").replace("--", "/"), "in the hub's cache"


@dataclass(frozen=True, slots=True)
class Value:
    """A kind of value: its name in ``--help``, its completion, and how it is read if not as a text."""

    metavar: str | None = None
    complete: Complete | None = None
    type: click.ParamType | None = None


VALUES: Mapping[str, Value] = {
    "assignment": Value("NAME.KEY=VALUE", completion(_assignments)),
    "corpus": Value("TEXT", words("english", "self", paths="file")),
    "device": Value("DEVICE", words("auto", "cpu", "cuda", "mps")),
    "device_map": Value("MAP", words("auto", "balanced", "sequential")),
    "editor": Value("NAME", _components("editor")),
    "existing folder": Value("DIR", completion(paths="dir"), click.Path(exists=True, file_okay=False)),
    "file": Value("FILE", completion(paths="file")),
    "folder": Value("DIR", completion(paths="dir")),
    "format": Value("FORMAT", _components("format")),
    "guard": Value("EXPR", words(*(f"{name}>" for name in SITE_FIGURES), *(f"{name}<" for name in BATCH_FIGURES))),
    "json": Value("JSON", None, JsonObject()),
    "layers": Value("LAYERS", None, LayerRange()),
    "model": Value("MODEL", completion(_models, paths="dir")),
    "stacks": Value("STACK,...", after_comma(_components("editor"))),
    "stabilizer": Value("NAME", _components("stabilizer")),
}
"""The kinds of values by the names under which settings and options are declared."""
