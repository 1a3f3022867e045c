"""Load plugins, refuse clashes, find components by name, and list what plugins bring as plain data.

This is a loader of our own because pluggy's ``load_setuptools_entrypoints`` silently skips a second plugin of one name
and dies with the first one that fails to import. Here a clash is an error that names both distributions, and a broken
plugin costs one warning line; asking for it by name, or ``EDITCLI_STRICT_PLUGINS=1``, makes it an error. So does one
that was written for another version of the plugin interface, which it declares as ``editcli_api = 2``.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pluggy

from editcli.errors import PluginError, near_miss
from editcli.plugin import hookspecs
from editcli.plugin.families import Family
from editcli.plugin.hookspecs import API_VERSION
from editcli.plugin.interfaces import Component, Diagnostic, Editor, Stabilizer
from editcli.plugin.options import describe
from editcli.plugin.stacks import SUFFIX, NamedStack, read_stack
from editcli.requests.formats import Format

KINDS: Mapping[str, tuple[str, type[Component]]] = {
    "editor": ("editcli_editors", Editor),
    "stabilizer": ("editcli_stabilizers", Stabilizer),
    "diagnostic": ("editcli_diagnostics", Diagnostic),
}
"""Kinds of component: the hook that brings them and the class they derive from."""

OTHER_HOOKS: Mapping[str, str] = {
    "stack": "editcli_stacks",
    "format": "editcli_formats",
    "architecture": "editcli_architectures",
    "command": "editcli_commands",
}
"""Kinds of things that plugins bring besides components, and the hooks that bring them."""

DECLARATION = "editcli_api"
"""The attribute in which a plugin says which version of the plugin interface it was written for."""
UNDECLARED = 1
"""The version of a plugin that does not say: the first, which did not ask."""


@dataclass(frozen=True, slots=True)
class Registered:
    """A component class, with the plugin and the distribution it came from."""

    name: str
    kind: str
    component: type[Component]
    plugin: str
    distribution: str
    version: str
    api: int = UNDECLARED


@dataclass(frozen=True, slots=True)
class Source:
    """Where a plugin came from, and the version of the plugin interface it was written for."""

    distribution: str
    version: str
    api: int = UNDECLARED

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}".strip()


class Plugins:
    """The plugins of this process: what was loaded, what was not and why."""

    kinds = tuple(KINDS)

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager(hookspecs.NAME)
        self.manager.add_hookspecs(hookspecs)
        self.broken: dict[str, str] = {}
        """Plugins that could not be loaded: name -> reason."""
        self.strict = False
        """Whether a plugin that breaks from here on is an error."""
        self.on_broken: Callable[[str, str], None] | None = None
        """Called with name and reason of a plugin that breaks from here on; the program warns of it."""
        self._brought: dict[str, tuple[tuple[str, Any], ...]] = {}
        self._sources: dict[str, Source] = {}
        self._components: dict[str, dict[str, Registered]] | None = None

    def register(self, plugin: Any, name: str, *, distribution: str = "(this process)", version: str = "") -> None:
        """Register a module or object that implements hooks; misspelt hooks and another interface are errors."""
        source = Source(distribution, version, getattr(plugin, DECLARATION, UNDECLARED))
        _check_api(source)
        self.manager.register(plugin, name)
        try:
            self.manager.check_pending()
        except pluggy.PluginValidationError as error:
            self.manager.unregister(name=name)
            raise PluginError(f"plugin {name!r} implements an unknown hook: {error}") from error
        if not self.manager.get_hookcallers(plugin):
            self.manager.unregister(name=name)
            raise PluginError(f"plugin {name!r} implements no hook; mark its hook functions with @editcli.hookimpl")
        self._sources[name] = source
        self._brought, self._components = {}, None

    def load(self, name: str, entry: importlib.metadata.EntryPoint, source: Source) -> None:
        """Load one entry point; a failure is remembered, not raised."""
        try:
            self.register(entry.load(), name, distribution=source.distribution, version=source.version)
        except PluginError as error:
            self.leave_out(name, str(error))
        # A third party's import may raise anything, SystemExit included; it must not take the whole program down.
        except (Exception, SystemExit) as error:
            self.leave_out(name, f"{type(error).__name__}: {error}")

    def leave_out(self, plugin: str, reason: str) -> None:
        """Count ``plugin`` as broken; the rest of what it brings stays. Raises :class:`PluginError` where strict."""
        if plugin in self.broken:
            return
        self.broken[plugin] = reason
        if self.strict:
            raise PluginError(f"plugin {plugin!r} could not be loaded: {reason}")
        if self.on_broken is not None:
            self.on_broken(plugin, reason)

    def source(self, plugin: str) -> Source:
        """Return where ``plugin`` came from."""
        return self._sources[plugin]

    def all(self, kind: str) -> dict[str, Registered]:
        """Return the components of one kind by name."""
        if self._components is None:
            self._components = {k: self._collect(k) for k in KINDS}
        return self._components[kind]

    def find(self, kind: str, name: str) -> Registered:
        """Return the component ``name`` of ``kind``; raise :class:`PluginError` with the near miss."""
        components = self.all(kind)
        if name in components:
            return components[name]
        if name in self.broken:
            raise PluginError(f"{kind} {name!r} could not be loaded: {self.broken[name]}")
        for other in KINDS:
            if other != kind and name in self.all(other):
                hint = "" if other == "diagnostic" else f"; pass it as --{other}"
                raise PluginError(f"{name!r} is {_a(other)}, not {_a(kind)}{hint}")
        if name in self.stacks():
            raise PluginError(f"{name!r} is a named stack, not {_a(kind)}; pass it as --editor")
        known = {*components, *self.stacks()} if kind == "editor" else components
        lost = f" (not loaded: {', '.join(sorted(self.broken))})" if self.broken else ""
        raise PluginError(f"there is no {kind} named {name!r}{near_miss(name, known)}{lost}")

    def stacks(self) -> dict[str, NamedStack]:
        """Return the named stacks; raise :class:`PluginError` when two of them, or one and an editor, share a name."""
        by_name: dict[str, tuple[str, NamedStack]] = {}
        for plugin, stack in self._valid("editcli_stacks", lambda item: isinstance(item, NamedStack), "a NamedStack"):
            other, _ = by_name.setdefault(stack.name, (plugin, stack))
            if stack.name in self.all("editor"):
                other = self.all("editor")[stack.name].plugin
            if other != plugin:
                raise PluginError(
                    f"the name {stack.name!r} of a stack is brought by two plugins, {other} and {plugin}; "
                    f"uninstall one or set EDITCLI_DISABLE={plugin}"
                )
        return {name: stack for name, (_, stack) in sorted(by_name.items())}

    def stack(self, name: str | None) -> NamedStack | None:
        """Return the stack that ``name`` or a file of that name means; None where it is no stack."""
        if name is not None and name.endswith(SUFFIX):
            return read_stack(Path(name))
        return None if name is None else self.stacks().get(name)

    def formats(self) -> tuple[Format, ...]:
        """Return one reader of each installed format, by name; raise :class:`PluginError` when two share a name."""
        by_name: dict[str, tuple[str, Format]] = {}
        for plugin, brought in self._valid("editcli_formats", _is_named(Format), "a named subclass of Format"):
            other, _ = by_name.setdefault(brought.name, (plugin, brought()))
            if other != plugin:
                raise PluginError(
                    f"the format {brought.name!r} is brought by two plugins, {other} and {plugin}; "
                    f"uninstall one or set EDITCLI_DISABLE={plugin}"
                )
        return tuple(form for _, (_, form) in sorted(by_name.items()))

    def families(self) -> tuple[Family, ...]:
        """Return the model families that plugins bring."""
        hook, valid = "editcli_architectures", lambda item: isinstance(item, Family)
        return tuple(family for _, family in self._valid(hook, valid, "a Family"))

    def commands(self) -> tuple[tuple[str, Any], ...]:
        """Return the click commands that plugins bring, each with its plugin."""
        # The library knows nothing of click: a command is recognised by how it is run.
        hook, valid = "editcli_commands", lambda item: bool(getattr(item, "name", "")) and hasattr(item, "make_context")
        return tuple(self._valid(hook, valid, "a named click command"))

    def others(self) -> Iterator[tuple[str, str, Any]]:
        """Yield kind, plugin and object of everything that plugins bring besides components."""
        for kind, hook in OTHER_HOOKS.items():
            for plugin, item in self._call(hook):
                yield kind, plugin, item

    def _valid(self, hook: str, valid: Callable[[Any], bool], what: str) -> Iterator[tuple[str, Any]]:
        """Yield ``(plugin, object)`` for what ``hook`` brings; a plugin that brings anything else is broken."""
        for plugin, item in self._call(hook):
            if valid(item):
                yield plugin, item
            else:
                self.leave_out(plugin, f"{item!r} is not {what}")

    def _call(self, hook: str) -> tuple[tuple[str, Any], ...]:
        """Return ``(plugin, object)`` for everything that ``hook`` brings; a plugin that raises is broken, alone."""
        if hook not in self._brought:
            brought: list[tuple[str, Any]] = []
            for implementation in getattr(self.manager.hook, hook).get_hookimpls():
                name = implementation.plugin_name
                try:
                    brought += [(name, item) for item in implementation.function()]
                # A third party's code may raise anything, SystemExit included.
                except (Exception, SystemExit) as error:
                    self.leave_out(name, f"{type(error).__name__}: {error}")
            self._brought[hook] = tuple(brought)
        return self._brought[hook]

    def _collect(self, kind: str) -> dict[str, Registered]:
        hook, base = KINDS[kind]
        by_name: dict[str, Registered] = {}
        for plugin, component in self._valid(hook, _is_named(base), f"a named subclass of {base.__name__}"):
            source = self._sources[plugin]
            entry = Registered(component.name, kind, component, plugin, source.distribution, source.version, source.api)
            other = by_name.setdefault(entry.name, entry)
            if other is not entry:
                raise PluginError(
                    f"the {kind} {entry.name!r} is brought by two plugins: {other.plugin} ({other.distribution}) and "
                    f"{entry.plugin} ({entry.distribution}); uninstall one or set EDITCLI_DISABLE={entry.plugin}"
                )
        return dict(sorted(by_name.items()))


def _is_named(base: type) -> Callable[[Any], bool]:
    """Return a test for subclasses of ``base`` that have a name."""
    return lambda item: isinstance(item, type) and issubclass(item, base) and bool(getattr(item, "name", ""))


def _check_api(source: Source) -> None:
    """Raise :class:`PluginError` when a plugin was written for another version of the plugin interface."""
    api: Any = source.api
    if type(api) is not int or api < 1:
        raise PluginError(
            f"{source} declares {DECLARATION} = {api!r}, which is no version of the plugin interface; "
            f"write {DECLARATION} = {API_VERSION}"
        )
    if api != API_VERSION:
        name = source.distribution
        other = f"upgrade editcli or install an older {name}" if api > API_VERSION else f"install a newer {name}"
        raise PluginError(
            f"{source} is written for version {api} of the plugin interface and this editcli has version "
            f"{API_VERSION}; {other} (pip install -U {'editcli' if api > API_VERSION else name})"
        )


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def load_plugins(
    entries: Iterable[importlib.metadata.Distribution] | None = None, environ: Mapping[str, str] = os.environ
) -> Plugins:
    """Load every installed plugin of the entry-point group ``editcli``."""
    plugins = Plugins()
    disabled = {name.strip() for name in environ.get("EDITCLI_DISABLE", "").split(",") if name.strip()}
    for name, (entry, source) in sorted(_discover(entries).items()):
        if name not in disabled:
            plugins.load(name, entry, source)
    for kind in KINDS:
        plugins.all(kind)
    plugins.strict = environ.get("EDITCLI_STRICT_PLUGINS") == "1"
    if plugins.strict and plugins.broken:
        name, reason = next(iter(plugins.broken.items()))
        raise PluginError(f"plugin {name!r} could not be loaded: {reason}")
    return plugins


def _discover(
    distributions: Iterable[importlib.metadata.Distribution] | None,
) -> dict[str, tuple[importlib.metadata.EntryPoint, Source]]:
    entries: dict[str, tuple[importlib.metadata.EntryPoint, Source]] = {}
    for distribution in distributions if distributions is not None else importlib.metadata.distributions():
        for entry in distribution.entry_points:
            if entry.group != hookspecs.NAME:
                continue
            source = Source(distribution.metadata["Name"], distribution.version)
            known_entry, known = entries.setdefault(entry.name, (entry, source))
            # The same distribution is listed twice when its folder is on sys.path twice; that is no clash.
            if known.distribution != source.distribution:
                raise PluginError(
                    f"two distributions bring a plugin named {entry.name!r}: {known.distribution} "
                    f"({known_entry.value}) and {source.distribution} ({entry.value}); uninstall one of them"
                )
    return entries


def catalogue(plugins: Plugins, name: str | None = None) -> list[dict[str, Any]]:
    """Return one row for everything that plugins bring, or for what is called ``name``.

    A row has ``name, kind, plugin, distribution, version, api, summary, paper, options``; that of a named stack also
    ``stack``, the command line that it stands for. Raises :class:`PluginError`, with the near miss, when nothing is
    called ``name``.
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
    for kind, plugin, item in plugins.others():
        source = plugins.source(plugin)
        yield {
            "name": str(getattr(item, "name", item)),
            "kind": kind,
            "plugin": plugin,
            "distribution": source.distribution,
            "version": source.version,
            "api": source.api,
            "summary": item.summary if isinstance(item, NamedStack) else _first_line(item),
            "paper": str(getattr(item, "reference", "")),
            "options": [],
            **({"stack": item.written_out} if isinstance(item, NamedStack) else {}),
        }


def _first_line(item: Any) -> str:
    # A click command carries its help text; everything else is described by its own docstring.
    text = getattr(item, "help", None) or inspect.getdoc(item) or ""
    return text.strip().partition("\n")[0]
