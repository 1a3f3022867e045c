"""Read text files of any size line by line in bounded memory, as JSON without Python's extensions."""

from __future__ import annotations

import hashlib
import io
import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from editcli.errors import RequestError
from editcli.storage.opening import EDITS, open_given

MAX_LINE_BYTES = 1 << 20
"""A longer line is refused before it is held: no edit needs it, and a hostile file must not exhaust memory."""
MAX_DEPTH = 64
"""Lists and objects inside each other; deeper ones may be read by one JSON library and exhaust the stack of another."""

_BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 20


class Lines:
    """An iterator over the lines of a file that are not blank; the sha256 covers the whole file.

    A line that is too long raises :class:`RequestError`, and the next one can be read all the same.
    """

    def __init__(self, file: BinaryIO, name: str):
        # A program may have replaced standard input by a plain buffer, which has no peek().
        self._file = file if isinstance(file, io.BufferedReader) else io.BufferedReader(cast(Any, file))
        self._digest, self._name = hashlib.sha256(), name
        self.number = 0
        """Number of the last line that was read, from 1."""

    @property
    def head(self) -> bytes:
        """The beginning of the file, a few thousand bytes at most; to be read before any line."""
        return self._file.peek(1)

    def __iter__(self) -> Lines:
        """Return the lines themselves."""
        return self

    def __next__(self) -> bytes:
        """Return the next line that is not blank, without its ending."""
        # Two bytes more than the longest line, for its ending.
        while raw := self._take(MAX_LINE_BYTES + 2):
            self.number += 1
            rest = raw
            while not rest.endswith(b"\n") and (rest := self._take(_CHUNK)):
                pass
            # Joined files bring a byte order mark each.
            text = raw.removeprefix(_BOM)
            if text.strip():
                return self._bounded(text.removesuffix(b"\n").rstrip(b"\r"))
        raise StopIteration

    def read(self, limit: int) -> bytes | None:
        """Return the rest of the file, or None if it has more than ``limit`` bytes."""
        data = self._file.read(limit + 1)
        self._digest.update(data)
        return data if len(data) <= limit else None

    def sha256(self) -> str:
        """Read to the end and return the file's sha256."""
        while data := self._file.read(_CHUNK):
            self._digest.update(data)
        return self._digest.hexdigest()

    def _bounded(self, text: bytes) -> bytes:
        if len(text) > MAX_LINE_BYTES:
            reason = f"the line is longer than {MAX_LINE_BYTES:,} bytes"
            raise RequestError(reason, file=self._name, line=self.number)
        return text

    def _take(self, limit: int) -> bytes:
        data = self._file.readline(limit)
        self._digest.update(data)
        return data


@contextmanager
def opened(source: str | Path, name: str) -> Iterator[Lines]:
    """Open a file or a pipe, or standard input for ``-``; raise :class:`RequestError` when it cannot be read."""
    try:
        if str(source) == "-":
            yield Lines(sys.stdin.buffer, name)
            return
        with open_given(source, EDITS) as file:
            yield Lines(file, name)
    except OSError as error:
        raise RequestError(f"cannot be read: {error.strerror or error}", file=name) from error


def strict_json(text: str | bytes) -> Any:
    """Parse JSON; raise ValueError for NaN, the infinities and numbers too large for a float."""
    return json.loads(text, parse_constant=no_constant, parse_float=_finite_float)


def no_constant(name: str) -> Any:
    """Refuse NaN and the infinities, which Python reads and JSON does not know."""
    raise ValueError(f"{name} is not a JSON value")


def _finite_float(text: str) -> float:
    """Read a number of JSON; refuse one that is too large for a float, which Python would make infinite."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def is_deep(value: Any) -> bool:
    """Tell whether lists and objects are nested deeper than :data:`MAX_DEPTH`."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [item for outer in level for item in _inside(outer)]
        if not level:
            return False
    return True


def _inside(value: Any) -> list[Any]:
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [item for item in items if isinstance(item, (Mapping, list, tuple))]
