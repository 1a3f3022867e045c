"""What the shell offers for an option or an argument; nothing here imports torch or looks into a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem
from click.types import StringParamType

from editcli.cli.common import App, CommaSeparated
from editcli.plugin.manager import Plugins, catalogue
from editcli.plugin.options import describe
from editcli.settings.core import CORE
from editcli.settings.guards import BATCH_FIGURES, SITE_FIGURES

Suggest = Callable[[Plugins], Iterable[tuple[str, str]]]
"""Returns values, each with a line of help."""

FOLDERS, FILES = "dir", "file"
"""Kinds of completion that the shell does by itself."""


class Suggested(StringParamType):
    """A text for which the shell offers values."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return what fits what was typed so far."""
        return suggest(ctx, param, incomplete)


class SuggestedList(CommaSeparated):
    """Texts with commas, for the last of which the shell offers values."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return what fits the text after the last comma."""
        before, comma, last = incomplete.rpartition(",")
        found = suggest(ctx, param, last)
        return [CompletionItem(before + comma + item.value, item.type, item.help) for item in found]


def with_suggestions(command: click.Command) -> click.Command:
    """Let the shell complete a command's texts, and those of its subcommands."""
    for parameter in command.params:
        if type(parameter.type) is StringParamType:
            parameter.type = Suggested()
        elif type(parameter.type) is CommaSeparated:
            parameter.type = SuggestedList()
    if isinstance(command, click.Group):
        for part in command.commands.values():
            with_suggestions(part)
    return command


def suggest(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the values that a parameter may take and that begin with ``incomplete``."""
    known = SUGGESTIONS.get(f"{ctx.info_name} {param.name}", SUGGESTIONS.get(param.name or ""))
    kind, values = known if known is not None else (None, None)
    items = [CompletionItem(incomplete, type=kind)] if kind is not None else []
    app = ctx.find_object(App)
    if values is not None and app is not None:
        found = values(app.plugins)
        items += [CompletionItem(value, help=text) for value, text in found if value.startswith(incomplete)]
    return items


def _components(kind: str) -> Suggest:
    return lambda plugins: [(row["name"], row["summary"]) for row in catalogue(plugins) if row["kind"] == kind]


def _options(plugins: Plugins) -> Iterator[tuple[str, str]]:
    """Yield ``NAME.KEY=VALUE`` with the values that are possible, or with the default."""
    owners = [(row["name"], row["options"]) for row in catalogue(plugins)]
    for name, options in [*owners, *((section, describe(options)) for section, options in CORE.items())]:
        for option in options:
            values = option["type"].split("|") if "|" in option["type"] else [option["default"]]
            for value in values:
                text = "none" if value is None else value
                yield f"{name}.{option['name']}={text}", option["help"]


def _models(plugins: Plugins) -> Iterator[tuple[str, str]]:
    """Yield the bundled model and the hub ids that are cached here."""
    yield "bundled", "the small model that ships with editcli"
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    for path in sorted(cache.glob("models--*")):
        yield path.name.removeprefix("models--").replace("--", "/"), "in the hub's cache"


def _given(*values: str) -> Suggest:
    return lambda plugins: [(value, "") for value in values]


_DEVICES = (None, _given("auto", "cpu", "cuda", "mps"))
_MODELS = (FOLDERS, _models)

SUGGESTIONS: Mapping[str, tuple[str | None, Any]] = {
    "editor": (None, _components("editor")),
    "stabilizers": (None, _components("stabilizer")),
    "stacks": (None, _components("editor")),
    "form": (None, _components("format")),
    "assignments": (None, _options),
    "model": _MODELS,
    "base": _MODELS,
    "edited": _MODELS,
    "device": _DEVICES,
    "solve_device": _DEVICES,
    "device_map": (None, _given("auto", "balanced", "sequential")),
    "corpus": (FILES, _given("english", "self")),
    "stop_if": (None, _given(*(f"{name}>" for name in SITE_FIGURES), *(f"{name}<" for name in BATCH_FIGURES))),
    "run": (FOLDERS, None),
    "patch": (FOLDERS, None),
    "out": (FOLDERS, None),
    "convert out": (FILES, None),
    "edits": (FILES, None),
    "undo edits": (None, None),
    "file": (FILES, None),
    "stats": (FILES, None),
    "text": (FILES, None),
    "prompts": (FILES, None),
    "preset": (FILES, None),
}
"""What is offered, by the name of the parameter, or of the command and the parameter: a kind and values."""
