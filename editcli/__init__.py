"""Rewrite facts inside a causal language model's weights.

Every public name can be imported from here; none is loaded before it is asked for, so that importing the package, and
listing plugins, does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from editcli.plugin.hookspecs import API_VERSION as API_VERSION

if TYPE_CHECKING:
    from editcli.api import Edited as Edited
    from editcli.api import EditStream as EditStream
    from editcli.api import Stream as Stream
    from editcli.api import edit as edit
    from editcli.errors import EditError as EditError
    from editcli.errors import FileError as FileError
    from editcli.errors import GuardError as GuardError
    from editcli.errors import ModelError as ModelError
    from editcli.errors import NumericalError as NumericalError
    from editcli.errors import OptionError as OptionError
    from editcli.errors import PluginError as PluginError
    from editcli.errors import RequestError as RequestError
    from editcli.errors import StateError as StateError
    from editcli.errors import StatisticsError as StatisticsError
    from editcli.evaluation.metrics import evaluate as evaluate
    from editcli.models.architectures import Family as Family
    from editcli.models.loading import open_model as open_model
    from editcli.models.loading import resolve_model as resolve_model
    from editcli.plugin.hookspecs import hookimpl as hookimpl
    from editcli.plugin.interfaces import Component as Component
    from editcli.plugin.interfaces import Diagnostic as Diagnostic
    from editcli.plugin.interfaces import Editor as Editor
    from editcli.plugin.interfaces import Problem as Problem
    from editcli.plugin.interfaces import Session as Session
    from editcli.plugin.interfaces import Site as Site
    from editcli.plugin.interfaces import Stabilizer as Stabilizer
    from editcli.plugin.interfaces import Update as Update
    from editcli.plugin.interfaces import Values as Values
    from editcli.plugin.manager import load_plugins as load_plugins
    from editcli.plugin.options import option as option
    from editcli.reporting import RunReport as RunReport
    from editcli.requests.formats import Format as Format
    from editcli.requests.reader import read_edits as read_edits
    from editcli.requests.schema import EditRequest as EditRequest
    from editcli.settings.recipe import Recipe as Recipe

_HOMES = {
    "editcli.models.architectures": ("Family",),
    "editcli.requests.schema": ("EditRequest",),
    "editcli.requests.reader": ("read_edits",),
    "editcli.errors": (
        "EditError",
        "FileError",
        "GuardError",
        "ModelError",
        "NumericalError",
        "OptionError",
        "PluginError",
        "RequestError",
        "StateError",
        "StatisticsError",
    ),
    "editcli.evaluation.metrics": ("evaluate",),
    "editcli.requests.formats": ("Format",),
    "editcli.plugin.hookspecs": ("hookimpl",),
    "editcli.plugin.interfaces": (
        "Component",
        "Diagnostic",
        "Editor",
        "Problem",
        "Session",
        "Site",
        "Stabilizer",
        "Update",
        "Values",
    ),
    "editcli.api": (
        "EditStream",
        "Edited",
        "Stream",
        "edit",
    ),
    "editcli.models.loading": (
        "open_model",
        "resolve_model",
    ),
    "editcli.plugin.options": ("option",),
    "editcli.plugin.manager": ("load_plugins",),
    "editcli.settings.recipe": ("Recipe",),
    "editcli.reporting": ("RunReport",),
}
"""Where each public name lives."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562)."""
    from importlib import import_module

    if name == "__version__":
        return import_module("importlib.metadata").version("editcli")
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'editcli' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "__version__", *(name for names in _HOMES.values() for name in names)])
