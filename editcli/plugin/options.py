"""Options: one frozen dataclass per component, set from text, TOML or Python.

A component nests its options as ``Options``; ``option(default, "help")`` declares one field. An unknown key or a
value of the wrong type is an :class:`~editcli.errors.OptionError` that names the near miss.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from editcli.errors import OptionError, near_miss
from editcli.formatting import LARGEST, shorten

T = TypeVar("T")


def option(default: Any, help: str) -> Any:
    """Declare one option: its default and one line of help."""
    return dataclasses.field(default=default, metadata={"help": help})


def build(options: type[T], settings: Mapping[str, Any], *, owner: str) -> T:
    """Build ``options`` from ``settings``; raise :class:`OptionError` on an unknown key or an unusable value."""
    hints = typing.get_type_hints(options)
    known = {field.name for field in dataclasses.fields(typing.cast(Any, options))}
    for key in settings:
        if key not in known:
            raise OptionError(f"{owner} has no option {key!r}{near_miss(key, known)}")
    values = {key: _convert(value, hints[key], f"{owner}.{key}") for key, value in settings.items()}
    try:
        return options(**values)
    except ValueError as error:  # Raised by a dataclass's own __post_init__ when values contradict each other.
        raise OptionError(f"{owner}: {error}") from error


def parse_assignments(assignments: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Read ``NAME.KEY=VALUE`` texts into ``{name: {key: text}}``; later ones win."""
    settings: dict[str, dict[str, Any]] = {}
    for text in assignments:
        path, equals, value = text.partition("=")
        name, dot, key = path.strip().partition(".")
        if not (equals and dot and name and key):
            raise OptionError(f"cannot read option {text!r}: write NAME.KEY=VALUE, for instance memit.remember=true")
        settings.setdefault(name, {})[key.replace("-", "_")] = value.strip()
    return settings


def merge(*layers: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Merge ``{name: {key: value}}`` layers, the weakest first."""
    merged: dict[str, dict[str, Any]] = {}
    for layer in layers:
        for name, settings in layer.items():
            merged.setdefault(name, {}).update(settings)
    return merged


def describe(options: type[Any]) -> list[dict[str, Any]]:
    """List an options class as ``{name, type, default, help}`` rows."""
    hints = typing.get_type_hints(options)
    return [
        {
            "name": field.name,
            "type": _type_name(hints[field.name]),
            "default": field.default,
            "help": field.metadata.get("help", ""),
        }
        for field in dataclasses.fields(options)
    ]


def _convert(value: Any, kind: Any, where: str) -> Any:
    """Convert ``value`` (a typed value or its text) to ``kind``."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        return _choice(value, typing.get_args(kind), where)
    if origin in (types.UnionType, typing.Union):
        return _optional(value, typing.get_args(kind), where)
    if kind is bool:
        return _boolean(value, where)
    if kind in (int, float):
        return _number(value, kind, where)
    if kind is str and isinstance(value, str):
        return value
    raise OptionError(f"{where} must be {_type_name(kind)}, not {value!r}")


def _choice(value: Any, choices: tuple[Any, ...], where: str) -> Any:
    for choice in choices:
        if value == choice or str(value) == str(choice):
            return choice
    raise OptionError(f"{where} must be one of {', '.join(map(str, choices))}, not {value!r}")


def _optional(value: Any, kinds: tuple[Any, ...], where: str) -> Any:
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "")):
        return None
    inner = next(kind for kind in kinds if kind is not type(None))
    return _convert(value, inner, where)


def _boolean(value: Any, where: str) -> bool:
    if isinstance(value, bool):
        return value
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise OptionError(f"{where} must be true or false, not {value!r}")


def _number(value: Any, kind: Any, where: str) -> int | float:
    if not isinstance(value, bool):
        try:
            number = kind(value)
        except (TypeError, ValueError, OverflowError):
            number = None
        if isinstance(number, int) and abs(number) > LARGEST:
            raise OptionError(f"{where} must be a whole number up to {LARGEST}, not {shorten(repr(value))}")
        if number is not None and _is_faithful(number, value):
            return number
    raise OptionError(f"{where} must be {_type_name(kind)}, not {shorten(repr(value))}")


def _is_faithful(number: int | float, value: Any) -> bool:
    """Tell whether ``number`` is finite and says what ``value`` said: int(2.5) would silently become 2."""
    if isinstance(number, float):
        return math.isfinite(number)
    return not isinstance(value, float) or number == value


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "|".join(str(choice) for choice in typing.get_args(kind))
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join("none" if k is type(None) else _type_name(k) for k in typing.get_args(kind))
    return {bool: "true|false", int: "a whole number", float: "a number", str: "text"}.get(kind, str(kind))
