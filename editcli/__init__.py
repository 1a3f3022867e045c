"""Rewrite facts inside a causal language model's weights.

Every public name can be imported from here; none is loaded before it is asked for, so that importing the package, and
listing plugins, does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from editcli.edits import EditRequest as EditRequest
    from editcli.edits import read_edits as read_edits
    from editcli.errors import EditError as EditError
    from editcli.errors import GuardError as GuardError
    from editcli.errors import ModelError as ModelError
    from editcli.errors import NumericalError as NumericalError
    from editcli.errors import OptionError as OptionError
    from editcli.errors import PluginError as PluginError
    from editcli.errors import RequestError as RequestError
    from editcli.errors import StateError as StateError
    from editcli.errors import StatisticsError as StatisticsError
    from editcli.evaluation import evaluate as evaluate
    from editcli.formats import Format as Format
    from editcli.hookspecs import hookimpl as hookimpl
    from editcli.interfaces import Component as Component
    from editcli.interfaces import Diagnostic as Diagnostic
    from editcli.interfaces import Editor as Editor
    from editcli.interfaces import Problem as Problem
    from editcli.interfaces import Session as Session
    from editcli.interfaces import Site as Site
    from editcli.interfaces import Stabilizer as Stabilizer
    from editcli.interfaces import Update as Update
    from editcli.interfaces import Values as Values
    from editcli.models.architectures import Family as Family
    from editcli.models.loading import open_model as open_model
    from editcli.models.loading import resolve_model as resolve_model
    from editcli.options import option as option
    from editcli.plugins import load_plugins as load_plugins
    from editcli.recipe import Recipe as Recipe
    from editcli.report import RunReport as RunReport
    from editcli.runs.library import Edited as Edited
    from editcli.runs.library import EditStream as EditStream
    from editcli.runs.library import Stream as Stream
    from editcli.runs.library import edit as edit

API_VERSION = 1
"""Version of the plugin interface; it grows when a plugin written for the one before would break."""

_HOMES = {
    "editcli.models.architectures": ("Family",),
    "editcli.edits": (
        "EditRequest",
        "read_edits",
    ),
    "editcli.errors": (
        "EditError",
        "GuardError",
        "ModelError",
        "NumericalError",
        "OptionError",
        "PluginError",
        "RequestError",
        "StateError",
        "StatisticsError",
    ),
    "editcli.evaluation": ("evaluate",),
    "editcli.formats": ("Format",),
    "editcli.hookspecs": ("hookimpl",),
    "editcli.interfaces": (
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
    "editcli.runs.library": (
        "EditStream",
        "Edited",
        "Stream",
        "edit",
    ),
    "editcli.models.loading": (
        "open_model",
        "resolve_model",
    ),
    "editcli.options": ("option",),
    "editcli.plugins": ("load_plugins",),
    "editcli.recipe": ("Recipe",),
    "editcli.report": ("RunReport",),
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
