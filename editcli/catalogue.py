"""List what plugins bring, as plain data."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from editcli.errors import PluginError, near_miss
from editcli.options import describe
from editcli.plugins import Plugins, Registered

OTHER_HOOKS: Mapping[str, str] = {
    "format": "editcli_formats",
    "architecture": "editcli_architectures",
    "command": "editcli_commands",
}
"""Kinds of things that plugins bring besides components, and the hooks that bring them."""


def catalogue(plugins: Plugins, name: str | None = None) -> list[dict[str, Any]]:
    """Return one row for everything that plugins bring, or for what is called ``name``.

    A row has ``name, kind, plugin, distribution, version, api, summary, paper, options``. Raises
    :class:`PluginError`, with the near miss, when nothing is called ``name``.
    """
    rows = [*_components(plugins), *_others(plugins)]
    if name is None:
        return rows
    chosen = [row for row in rows if name in (row["name"], row["plugin"])]
    if not chosen:
        if name in plugins.broken:
            raise PluginError(f"plugin {name!r} could not be loaded: {plugins.broken[name]}")
        raise PluginError(f"nothing called {name!r} is installed{near_miss(name, {row['name'] for row in rows})}")
    return chosen


def _components(plugins: Plugins) -> Iterator[dict[str, Any]]:
    for kind in plugins.kinds:
        for registered in plugins.all(kind).values():
            yield _component(registered)


def _component(registered: Registered) -> dict[str, Any]:
    component = registered.component
    return {
        "name": registered.name,
        "kind": registered.kind,
        "plugin": registered.plugin,
        "distribution": registered.distribution,
        "version": registered.version,
        "api": registered.api,
        "summary": _first_line(component),
        "paper": getattr(component, "reference", ""),
        "options": describe(component.Options),
    }


def _others(plugins: Plugins) -> Iterator[dict[str, Any]]:
    for kind, hook in OTHER_HOOKS.items():
        for plugin, item in plugins.brought(hook):
            source = plugins.source(plugin)
            yield {
                "name": str(getattr(item, "name", item)),
                "kind": kind,
                "plugin": plugin,
                "distribution": source.distribution,
                "version": source.version,
                "api": source.api,
                "summary": _first_line(item),
                "paper": str(getattr(item, "reference", "")),
                "options": [],
            }


def _first_line(item: Any) -> str:
    # A click command carries its help text; everything else is described by its own docstring.
    text = getattr(item, "help", None) or inspect.getdoc(item) or ""
    return text.strip().partition("\n")[0]
