"""Convert parsed JSON into types: a value that does not fit is one clause that names its field."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

T = TypeVar("T")


class UnreadableError(ValueError):
    """A value is not the record that it should be; the text says where and why, but not in which file."""


def convert(value: Any, kind: type[T], *, texts: bool = False) -> T:
    """Return a parsed value as ``kind``; raise :class:`UnreadableError` naming the field that does not fit.

    With ``texts``, numbers are written as texts, as the metadata of a safetensors file are.
    """
    try:
        return msgspec.convert(value, kind, strict=not texts)
    except (msgspec.ValidationError, RecursionError) as error:
        raise UnreadableError(reason(error)) from error


def reason(error: Exception) -> str:
    """Return msgspec's sentence with the field first, as its owner would write it: ``edits.read``."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    what, _, place = str(error).rpartition(" - at ")
    if not what:
        return str(error)
    field = place.strip("`").removeprefix("$").removeprefix(".").replace("[...]", "[]")
    return f"{field.removeprefix('key in ')}: {what}" if field else what
