"""Read text files of any size line by line in bounded memory, and JSON that only holds what JSON can say."""

from __future__ import annotations

import hashlib
import io
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
    """The lines of a file; the sha256 covers all of it, however many lines were asked for."""

    def __init__(self, file: BinaryIO):
        # A program may have put a plain buffer in the place of standard input, which cannot be looked into.
        self._file = file if isinstance(file, io.BufferedReader) else io.BufferedReader(cast(Any, file))
        self._digest = hashlib.sha256()

    @property
    def head(self) -> bytes:
        """The beginning of the file, a few thousand bytes at most; to be read before any line."""
        return self._file.peek(1)

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Yield number and text of every line that is not blank; of one that is too long only the beginning."""
        number = 0
        # Two bytes more than the longest line, for its ending.
        while raw := self._take(MAX_LINE_BYTES + 2):
            number += 1
            rest = raw
            while not rest.endswith(b"\n") and (rest := self._take(_CHUNK)):
                pass
            # Files that were joined bring a byte order mark each.
            text = raw.removeprefix(_BOM)
            if text.strip():
                yield number, text.removesuffix(b"\n").rstrip(b"\r")

    def read(self, limit: int) -> bytes | None:
        """Return what is left, or None where it is more than ``limit`` bytes."""
        data = self._file.read(limit + 1)
        self._digest.update(data)
        return data if len(data) <= limit else None

    def sha256(self) -> str:
        """Read to the end and return the file's sha256."""
        while data := self._file.read(_CHUNK):
            self._digest.update(data)
        return self._digest.hexdigest()

    def _take(self, limit: int) -> bytes:
        data = self._file.readline(limit)
        self._digest.update(data)
        return data


@contextmanager
def opened(source: str | Path, name: str) -> Iterator[Lines]:
    """Open a file or a pipe, or standard input for ``-``; raise :class:`RequestError` when it cannot be read."""
    try:
        if str(source) == "-":
            yield Lines(sys.stdin.buffer)
            return
        with open_given(source, EDITS) as file:
            yield Lines(file)
    except OSError as error:
        raise RequestError(f"cannot be read: {error.strerror or error}", file=name) from error


def no_constant(name: str) -> Any:
    """Refuse NaN and the infinities, which Python reads and JSON does not know."""
    raise ValueError(f"{name} is not a JSON value")


def finite_float(text: str) -> float:
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
