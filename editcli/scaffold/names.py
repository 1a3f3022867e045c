"""From the name that a plugin author chooses to those of distribution, module, component and class."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass

from editcli.errors import OptionError, PluginError
from editcli.plugin.manager import Plugins, catalogue
from editcli.settings.core import CORE

PREFIX = "editcli"
LONGEST = 60
"""Longer names would make file names that not every file system takes."""
_DISTRIBUTION = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
"""A distribution's name, as PEP 508 defines it."""
RESERVED = (*CORE, PREFIX, "new")
"""Names that mean something else on the command line."""


@dataclass(frozen=True, slots=True)
class Names:
    """The names of a plugin and of everything in it, made from ``name``."""

    name: str
    """The component's and the entry point's name: a lower-case identifier."""
    kind: str

    @property
    def distribution(self) -> str:
        """The name on the package index."""
        return f"{PREFIX}-{self.name.replace('_', '-')}"

    @property
    def module(self) -> str:
        """The module that the entry point names."""
        return f"{PREFIX}_{self.name}"

    @property
    def title(self) -> str:
        """The name in a sentence."""
        return self.name.replace("_", " ").capitalize()

    @property
    def cls(self) -> str:
        """The class; the kind at its end keeps it apart from what it imports."""
        plain = self.name.removesuffix(f"_{self.kind}")
        return "".join(part.capitalize() for part in (*plain.split("_"), self.kind))


def choose_names(text: str, kind: str) -> Names:
    """Return the names of a plugin that its author calls ``text``; raise :class:`OptionError` when none can be made."""
    if not _DISTRIBUTION.fullmatch(text) or len(text) > LONGEST:
        raise OptionError(
            f"{text!r} cannot name a package; use at most {LONGEST} letters, digits, '-', '_' and '.', with a letter "
            "first and a letter or digit last"
        )
    plain = re.sub(r"[-_.]+", "_", text.lower())
    name = plain.removeprefix(f"{PREFIX}_")
    if not name.isidentifier():
        raise OptionError(f"{text!r} cannot name a plugin: its name has to begin with a letter; choose another")
    if name in RESERVED:
        raise OptionError(f"{name!r} already means something else to editcli; choose another name")
    return Names(name, kind)


def refuse_clash(names: Names, plugins: Plugins) -> None:
    """Raise :class:`PluginError` when something of these names is installed already."""
    for row in catalogue(plugins):
        if names.name in (row["name"], row["plugin"]):
            raise PluginError(
                f"{names.name!r} is the name of {row['kind']} {row['name']!r} from {row['distribution']} already; "
                "choose another name"
            )
    if names.name in plugins.broken:
        raise PluginError(
            f"a plugin named {names.name!r} is installed, though it cannot be loaded; choose another name"
        )
    if importlib.util.find_spec(names.module) is not None:
        raise PluginError(f"a module named {names.module!r} is installed already; choose another name")
