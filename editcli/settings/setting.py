"""Settings, declared once: fields of recipes from which options, variables, keys of ``editcli.toml`` and docs derive.

``setting(default, "help")`` declares one, as ``option`` does for a plugin. Never imports torch.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from editcli.errors import OptionError, near_miss
from editcli.formatting import LARGEST


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A field of a recipe that the command line sets; ``name``, ``kind`` and ``default`` are the field's own."""

    help: str
    name: str = ""
    kind: Any = str
    """The field's type."""
    default: Any = ...
    """The field's default; ``...`` where it has to be given."""
    section: str = "Run"
    """The section of ``--help``."""
    flags: tuple[str, ...] = ()
    """Spellings on the command line besides, or instead of, the field's name with dashes."""
    variable: str | None = None
    """The variable that sets it; None names it after the field."""
    env: bool = True
    """Whether a variable and the top of ``editcli.toml`` set it: not where each command has its own meaning of it."""
    cli_only: bool = False
    """Whether only the command line may set it, because it deletes, continues a run or runs a stranger's code."""
    bare: str | None = None
    """Its value when the command line gives the option alone; None where it needs a value."""
    value: str = ""
    """The kind of its text, such as ``file`` or ``device``: decides what a shell offers."""
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    least: int | None = None
    decides: bool = False
    """Whether another value makes another run of a stack in a bench."""
    place: bool = False
    """Whether it says where things are, or where to compute: a repeated run may have another."""
    loads: bool = False
    """Whether it says how a model is loaded: it does nothing for a model in memory."""
    folder: bool = False
    """Whether it belongs to a run folder: it does nothing for a run in memory."""

    @property
    def flag(self) -> str:
        """The long spelling."""
        named = [flag for flag in self.flags if flag.startswith("--")]
        return named[0] if named else "--" + self.name.replace("_", "-")

    @property
    def declarations(self) -> tuple[str, ...]:
        """All spellings; a truth value that a file may set has one for each value."""
        off = f"/--no-{self.flag[2:]}" if self.kind is bool and self.env and not self.cli_only else ""
        return (self.flag + off, *(flag for flag in self.flags if flag != self.flag))

    def require(self, value: Any) -> None:
        """Raise :class:`OptionError` for a value that is out of range or none of the choices."""
        if self.choices and value not in self.choices:
            known = ", ".join(self.choices)
            raise OptionError(f"{self.flag} must be one of {known}, not {value!r}{near_miss(value, self.choices)}")
        if self.least is not None and value is not None and value < self.least:
            raise OptionError(f"{self.flag} must be at least {self.least}")
        if isinstance(value, int) and value > LARGEST:
            raise OptionError(f"{self.flag} must be at most {LARGEST}")


def setting(default: Any, help: str, **facts: Any) -> Any:
    """Declare a setting: its default, one line of help, and facts of :class:`Setting`.

    ``...`` as ``default`` makes a field that has to be given.
    """
    metadata = {"setting": Setting(help=help, default=default, **facts)}
    return (
        dataclasses.field(metadata=metadata)
        if default is ...
        else dataclasses.field(default=default, metadata=metadata)
    )


def like(recipe: type[Any], name: str, **changes: Any) -> Any:
    """Declare the setting ``name`` of another recipe, with changes."""
    declared = settings_of(recipe)[name]
    facts = {field.name: getattr(declared, field.name) for field in dataclasses.fields(Setting)}
    return setting(**{**facts, **changes})


@functools.cache
def settings_of(recipe: type[Any]) -> Mapping[str, Setting]:
    """Return a recipe's settings by name: its own in the order of their declaration, then those it inherits."""
    hints = typing.get_type_hints(recipe)
    fields = {field.name: field for field in dataclasses.fields(recipe)}
    order = dict.fromkeys(name for cls in recipe.__mro__ for name in inspect.get_annotations(cls))
    return {
        name: dataclasses.replace(fields[name].metadata["setting"], name=name, kind=hints[name])
        for name in order
        if name in fields and "setting" in fields[name].metadata
    }


def check_values(recipe: Any) -> None:
    """Raise :class:`OptionError` for the first setting of ``recipe`` that is out of range or none of its choices."""
    for name, declared in settings_of(type(recipe)).items():
        declared.require(getattr(recipe, name))
