"""Editors that wrap another one: an option names it, and the program builds it with its own options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from editcli.errors import OptionError, PluginError
from editcli.plugin.interfaces import Component, Editor
from editcli.plugin.options import build

if TYPE_CHECKING:
    from editcli.plugin.manager import Plugins


def wrapping_option(editor: str, plugins: Plugins) -> str | None:
    """Return the option by which ``editor`` takes another, as ``NAME.KEY``; None for one that wraps none."""
    kind = plugins.all("editor").get(editor)
    option = "" if kind is None else cast("type[Editor]", kind.component).wraps
    return f"{editor}.{option}" if option else None


def wrapped_name(editor: str, settings: Mapping[str, Mapping[str, Any]], plugins: Plugins) -> str | None:
    """Return the name of the editor that ``editor`` wraps with these settings; None for one that wraps none."""
    kind = plugins.all("editor").get(editor)
    if kind is None or not (option := cast("type[Editor]", kind.component).wraps):
        return None
    return str(getattr(build(kind.component.Options, settings.get(editor, {}), owner=editor), option))


def give_wrapped(component: Component, settings: Mapping[str, Mapping[str, Any]], plugins: Plugins) -> None:
    """Give an editor the one that it wraps, with its options of ``settings``; do nothing for every other component.

    Raises :class:`OptionError` where there is no such editor, and for one that wraps another itself.
    """
    if not isinstance(component, Editor) or not component.wraps:
        return
    name, where = str(getattr(component.options, component.wraps)), f"{component.name}.{component.wraps}"
    if name in plugins.stacks():
        raise OptionError(f"{where}: {name!r} is a named stack; name the editor that it stands for")
    try:
        kind = cast("type[Editor]", plugins.find("editor", name).component)
    except PluginError as error:
        raise OptionError(f"{where}: {error}") from error
    wrapped = kind(build(kind.Options, settings.get(name, {}), owner=name))
    if wrapped.wraps:
        raise OptionError(f"{where}: {name} wraps an editor itself; name one that does not")
    if wrapped.writes_experts and not component.writes_experts:
        raise OptionError(
            f"{where}: {name} writes routed experts, which {component.name} does not; name another editor"
        )
    component.wrap(wrapped)
