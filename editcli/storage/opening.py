"""Open files that somebody else may have made: regular files only, of bounded size, that lie where they seem to lie.

A folder from elsewhere may hold a named pipe that never answers, a link to a device that never ends, a link to a
private file, or a file of terabytes that takes no room on the disk. Everything that editcli reads goes through here,
and what another library opens by its name is checked here first. What is refused is one :class:`FileError`.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from editcli.errors import FileError, MissingFileError

_MIB, _GIB = 1 << 20, 1 << 30
_PIECE = 4 * _MIB
"""Bytes that are read at once."""


@dataclass(frozen=True, slots=True)
class Kind:
    """The purpose of a file, and the most bytes that are read of it."""

    noun: str
    limit: int
    piped: bool = False
    """Whether the user may give a pipe instead, as in ``editcli apply <(...)``."""


CONFIG = Kind("a model's configuration", 16 * _MIB)
INDEX = Kind("a shard index", 40 * _MIB)
TOKENIZER = Kind("a tokenizer file", 128 * _MIB)
TEMPLATE = Kind("a chat template", 4 * _MIB)
RECORD = Kind("a record", 40 * _MIB)
JOURNAL = Kind("a journal", 256 * _MIB)
TABLE = Kind("a table of edits", 256 * _MIB)
SETTINGS = Kind("a settings file", _MIB)
PAGE = Kind("a page", 256 * _MIB)
TEXT = Kind("a text", 256 * _MIB)
EDITS = Kind("an edits file", 4 * _GIB, piped=True)
CORPUS = Kind("a corpus", 8 * _GIB)
BESIDE = Kind("a file beside a model", _GIB)
PICKLE = Kind("a file of tensors", 1 << 40)
TENSORS = Kind("a safetensors file", 1 << 50)
"""Tensors are read one by one, and only after the header has been checked against the size of the file."""
GGUF = Kind("a GGUF file", 1 << 50)
"""Likewise."""

KINDS = (
    *(CONFIG, INDEX, TOKENIZER, TEMPLATE, RECORD, JOURNAL, TABLE, SETTINGS, PAGE, TEXT, EDITS, CORPUS, BESIDE),
    *(TENSORS, GGUF, PICKLE),
)
"""All kinds. A JSON document takes up to 22 times its size in memory, so 40 MiB of it stay under 1 GB."""

_STRANGE = (
    (stat.S_ISDIR, "it is a folder; pass a file"),
    (stat.S_ISFIFO, "it is a named pipe and not a file; put a copy of the file there"),
    (stat.S_ISSOCK, "it is a socket and not a file; put a copy of the file there"),
    (stat.S_ISCHR, "it is a device and not a file; put a copy of the file there"),
    (stat.S_ISBLK, "it is a device and not a file; put a copy of the file there"),
)
_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_BINARY", "O_CLOEXEC", "O_NOCTTY", "O_NONBLOCK"))
"""Without O_NONBLOCK, opening a named pipe waits for somebody who writes to it."""
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


def expanded(path: Path | str) -> Path:
    """Return a path with ``~`` and ``~USER`` replaced by a home; of a user who is not known it stays as it is."""
    return Path(os.path.expanduser(path))


def open_regular(path: Path | str, kind: Kind, *, folder: Path | None = None) -> BinaryIO:
    """Open a regular file for reading its bytes; raise :class:`FileError` for anything else.

    ``folder`` is the one that the file belongs to: no link may lead out of it, but into a hub cache. Without it the
    user named the file, and the user's links are followed. A file that grows past the limit raises while it is read.
    """
    place = Path(path)
    real = place if folder is None else _within(place, folder)
    # Opening a device may have an effect of its own, so what lies there is looked at before and after it is opened.
    try:
        _refuse_strange(os.stat(real), place, kind)
        descriptor = os.open(real, _FLAGS if folder is None else _FLAGS | _NO_LINK)
    except FileError:
        raise
    except (OSError, ValueError) as error:
        raise _unreadable(place, error) from error
    try:
        _refuse_strange(os.fstat(descriptor), place, kind)
        return io.BufferedReader(_Bounded(descriptor, place, kind))
    except BaseException:
        os.close(descriptor)
        raise


def open_given(path: Path | str, kind: Kind) -> BinaryIO:
    """Open a file that the user named on the command line: a pipe as well, where the kind allows it."""
    place = Path(path)
    if kind.piped and place.is_fifo():
        # Waits until somebody writes, as every program does to which a user gives a pipe.
        return place.open("rb")
    return open_regular(place, kind)


def read_bytes(path: Path | str, kind: Kind, *, folder: Path | None = None) -> bytes:
    """Return a file's bytes; raises as :func:`open_regular` does."""
    with open_regular(path, kind, folder=folder) as file:
        return file.read()


def read_text(path: Path | str, kind: Kind, *, folder: Path | None = None, errors: str = "strict") -> str:
    """Return a file's text; raises as :func:`open_regular` does, and UnicodeDecodeError where it is not UTF-8."""
    return read_bytes(path, kind, folder=folder).decode("utf-8", errors)


def check(path: Path | str, kind: Kind, *, folder: Path | None = None) -> None:
    """Raise as :func:`open_regular` does, for a file that another library opens by its name."""
    open_regular(path, kind, folder=folder).close()


def is_there(path: Path | str) -> bool:
    """Tell whether a name is taken, even by a pipe or a broken link: opening it reports the error.

    Raises :class:`FileError` where the folder may not be entered, since what lies in it is not known then.
    """
    try:
        os.lstat(path)
    except PermissionError as error:
        raise _unreadable(Path(path), error) from error
    except (OSError, ValueError):
        return False
    return True


def is_own(path: Path, folder: Path | None = None) -> bool:
    """Tell whether a file of a model folder lies in it, or is a link into a hub cache, as huggingface_hub makes them.

    ``folder`` is by default the one that holds ``path``. The cache keeps contents in ``models--OWNER--NAME/blobs``; its
    snapshots, and the folders that older versions downloaded to, hold links there.
    """
    folder, real = _resolved(folder or path.parent), _resolved(path)
    if real.is_relative_to(folder) or _in_hub_cache(real):
        return True
    return folder.parent.name == "snapshots" and real.is_relative_to(folder.parent.parent / "blobs")


class _Bounded(io.FileIO):
    """A file that is read up to the limit of its kind, even when it grows while it is read."""

    def __init__(self, descriptor: int, place: Path, kind: Kind):
        super().__init__(descriptor, "rb")
        self._place, self._kind = place, kind

    def readinto(self, buffer: object, /) -> int | None:
        size = super().readinto(buffer)  # pyright: ignore[reportArgumentType]
        if size and self.tell() > self._kind.limit:
            raise _too_large(self._place, self._kind)
        return size

    def readall(self) -> bytes:
        # In pieces, because one read of all that a kind allows would first take as much memory.
        pieces: list[bytes] = []
        while piece := super().read(_PIECE):
            pieces.append(piece)
            if self.tell() > self._kind.limit:
                raise _too_large(self._place, self._kind)
        return b"".join(pieces)


def _refuse_strange(facts: os.stat_result, place: Path, kind: Kind) -> None:
    """Raise :class:`FileError` unless a file is a regular one of a size that its kind may have."""
    for test, reason in _STRANGE:
        if test(facts.st_mode):
            raise FileError(place, reason)
    if facts.st_size > kind.limit:
        raise _too_large(place, kind)


def _too_large(place: Path, kind: Kind) -> FileError:
    return FileError(
        place, f"it is larger than {kind.limit:,} bytes, the most that {kind.noun} may have; put the right file there"
    )


def _within(place: Path, folder: Path) -> Path:
    """Return where a file really lies; raise :class:`FileError` where a link leads out of its folder."""
    try:
        real = _resolved(place)
        if is_own(place, folder):
            return real
    except OSError as error:
        raise _unreadable(place, error) from error
    raise FileError(place, f"it is a link to {real}, out of its folder {folder}; put a copy of the file there")


def _resolved(path: Path) -> Path:
    """Return a path without links; links in a circle are an OSError in every version of Python."""
    try:
        return path.resolve()
    except RuntimeError as error:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from error


def _unreadable(place: Path, error: Exception) -> FileError:
    """Return the error for a file that the system does not open; a name with NUL in it is a ValueError."""
    if isinstance(error, FileNotFoundError):
        return MissingFileError(place, "there is no such file; check the path", error.errno)
    if isinstance(error, PermissionError):
        return FileError(place, "there is no permission to read it; change its permissions", error.errno)
    if not isinstance(error, OSError):
        return FileError(place, f"its name cannot be one ({error}); check the path")
    return FileError(place, f"{error.strerror or error}; check the file", error.errno)


def _in_hub_cache(real: Path) -> bool:
    places = ((folder.name, folder.parent.name) for folder in real.parents)
    return any(name in ("blobs", "snapshots") and owner.startswith("models--") for name, owner in places)
