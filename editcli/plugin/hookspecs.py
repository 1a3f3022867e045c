"""The hooks a plugin may implement. A hook answers "what do you bring?": it takes nothing and returns classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from editcli.plugin.interfaces import Diagnostic, Editor, Stabilizer
    from editcli.plugin.stacks import NamedStack

NAME = "editcli"

API_VERSION = 2
"""Version of the plugin interface; it grows when a plugin written for the one before would break."""

hookspec = pluggy.HookspecMarker(NAME)
hookimpl = pluggy.HookimplMarker(NAME)


@hookspec
def editcli_editors() -> Sequence[type[Editor]]:  # pyright: ignore[reportReturnType]
    """Return editor classes."""


@hookspec
def editcli_stabilizers() -> Sequence[type[Stabilizer]]:  # pyright: ignore[reportReturnType]
    """Return stabilizer classes."""


@hookspec
def editcli_diagnostics() -> Sequence[type[Diagnostic]]:  # pyright: ignore[reportReturnType]
    """Return diagnostic classes."""


@hookspec
def editcli_formats() -> Sequence[Any]:  # pyright: ignore[reportReturnType]
    """Return readers of edit files in other formats (:class:`editcli.plugin.Format` classes)."""


@hookspec
def editcli_architectures() -> Sequence[Any]:  # pyright: ignore[reportReturnType]
    """Return model families (:class:`editcli.plugin.Family` objects)."""


@hookspec
def editcli_stacks() -> Sequence[NamedStack]:  # pyright: ignore[reportReturnType]
    """Return named stacks (:class:`editcli.plugin.NamedStack` objects), such as ``stacks_in(__name__)``."""


@hookspec
def editcli_commands() -> Sequence[Any]:  # pyright: ignore[reportReturnType]
    """Return click commands to add to the group."""
