"""Decode the records of a run folder into their types: bounded, finite and valid Unicode, or refused.

A record is JSON. It is read up to a limit, parsed by msgspec (strict UTF-8, no NaN, no number out of range), refused
where it is nested too deeply or holds too many values, and converted into a frozen dataclass. A field that the type
does not name is ignored, and kept by :func:`encode` where the record is written again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from editcli.formatting import LARGEST, finite
from editcli.storage.conversion import UnreadableError, reason
from editcli.storage.lines import is_deep
from editcli.storage.opening import RECORD, Kind, read_bytes

T = TypeVar("T")

MAX_VALUES = 4_000_000
"""Values in one document; each takes up to a hundred times its bytes once it is read."""

Count = Annotated[int, Meta(ge=0, le=2**53)]
Size = Annotated[float, Meta(ge=0)]
"""A norm, a ratio of norms or a time."""
Figures = Mapping[str, Annotated[int, Meta(ge=-LARGEST, le=LARGEST)] | float | None]
"""Figures by name, null where there is none."""
Options = Mapping[str, Mapping[str, Any]]
"""Settings of components by name."""


def later(default: Any = None, *, factory: Any = dataclasses.MISSING) -> Any:
    """Declare a field that older versions did not write, with what then holds."""
    if factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=factory, metadata={"later": True})
    return dataclasses.field(default=default, metadata={"later": True})


def optional() -> Any:
    """Declare a field that is left out of a record where it is None."""
    return dataclasses.field(default=None, metadata={"optional": True})


def read_json(path: Path, kind: Kind = RECORD, *, folder: Path | None = None) -> Any:
    """Return the JSON value in a file; raise :class:`UnreadableError` where it is none.

    Raises :class:`FileError` where the file is none that can be read; ``folder`` is the one it belongs to.
    """
    return parse(read_bytes(path, kind, folder=folder))


def parse(text: bytes | str) -> Any:
    """Return a JSON value whose numbers, texts, depth and size any program can hold; else :class:`UnreadableError`."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if sum(data.count(mark) for mark in (b"[", b"{", b",")) > MAX_VALUES:
        raise UnreadableError(f"it has more than {MAX_VALUES:,} values, which no record has")
    value = _decoded(data, Any)
    if is_deep(value):
        raise UnreadableError("it is nested too deeply")
    if any(isinstance(item, int) and abs(item) > LARGEST for item in _items(value)):
        raise UnreadableError(f"it holds a whole number beyond {LARGEST}")
    return value


def decode(text: bytes | str, kind: type[T]) -> T:
    """Return a JSON text as ``kind``, which must leave no value untyped; raise
    :class:`UnreadableError` naming the field that does not fit.
    """
    return _decoded(text, kind)


def encode(value: Any, source: Any = None) -> Any:
    """Return a decoded value as JSON, with the fields of ``source``, what it was decoded from, that its type lacks."""
    if dataclasses.is_dataclass(value):
        before = source if isinstance(source, Mapping) else {}
        known = {field.name for field in dataclasses.fields(value)}
        rest = {name: item for name, item in before.items() if name not in known}
        return {**{name: encode(item, before.get(name)) for name, item in _fields(value, before)}, **rest}
    if isinstance(value, Mapping):
        return {name: encode(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        sources = source if isinstance(source, list) and len(source) == len(value) else [None] * len(value)
        return [encode(item, one) for item, one in zip(value, sources, strict=True)]
    return value


class TooLargeError(UnreadableError):
    """A record would be larger than what is read of it."""


def to_text(value: Any, read: Callable[[Any], Any], *, limit: int = RECORD.limit) -> str:
    """Return a value as a JSON text that can be parsed and ``read`` again; else raise :class:`UnreadableError`.

    A number that is not finite becomes null. Raises :class:`TooLargeError` beyond ``limit`` bytes.
    """
    try:
        text = json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (ValueError, TypeError, RecursionError) as error:
        raise UnreadableError(str(error)) from error
    if len(text.encode("utf-8", "surrogatepass")) > limit:
        raise TooLargeError(f"it would be larger than {limit:,} bytes, the most that is read of it")
    read(parse(text))
    return text


def _fields(value: Any, before: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a dataclass that belong into its JSON object."""
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        # A null that was read is written again.
        absent = item is None and "optional" in field.metadata and before.get(field.name, ...) is not None
        if not (absent or "unwritten" in field.metadata):
            yield field.name, item


def _decoded(text: bytes | str, kind: Any) -> Any:
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise UnreadableError(reason(error)) from error


def refuse_nul(value: Any) -> None:
    """Raise :class:`UnreadableError` where a parsed value holds a NUL, which no name of a file may."""
    if any("\0" in item for item in _items(value) if isinstance(item, str)):
        raise UnreadableError("it holds a NUL character, which no record does")


def _items(value: Any) -> Iterator[Any]:
    """Yield every value inside a parsed one, and the names of fields."""
    level = [value]
    while level:
        yield from level
        inside: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inside += [*item, *item.values()]
            elif isinstance(item, list):
                inside += item
        level = inside
