"""Strikes at the n-th of all writes, syncs and renames that a process makes; a write is struck in its middle."""

from __future__ import annotations

import errno
import os
import pathlib
import signal
from collections.abc import Callable
from typing import Any


def kill() -> None:
    """End this process as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


def fill() -> None:
    """Fail as a full disk does."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Blow:
    """Strikes when it is asked for the ``call``-th time."""

    def __init__(self, call: int, strike: Callable[[], None]):
        self._left, self._strike = call, strike

    def falls(self, prepare: Callable[[], object] | None = None) -> None:
        """Count one more call and strike if it is the one, after what has to happen first."""
        self._left -= 1
        if self._left == 0:
            if prepare is not None:
                prepare()
            self._strike()


class Torn:
    """A file whose write may end in the middle."""

    def __init__(self, file: Any, blow: Blow):
        self._file, self._blow = file, blow

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Torn:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        self._blow.falls(lambda: self._write_half(data))
        return self._file.write(data)

    def _write_half(self, data: Any) -> None:
        self._file.write(bytes(data)[: len(data) // 2])
        self._file.flush()


def faulty(real: Callable[..., Any], blow: Blow) -> Callable[..., Any]:
    """Return a function that may strike instead of doing what ``real`` does."""

    def wrapped(*arguments: Any, **options: Any) -> Any:
        blow.falls()
        return real(*arguments, **options)

    return wrapped


def arm(call: int, strike: Callable[[], None]) -> None:
    """Let ``strike`` happen at the ``call``-th write, sync or rename from now on; for a process of its own only."""
    blow, fdopen, path_open = Blow(call, strike), os.fdopen, pathlib.Path.open

    def open_file(path: pathlib.Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        file = path_open(path, mode, *rest, **options)
        return Torn(file, blow) if mode == "ab" else file

    # The real sync is left out: what is tested is the order of steps, and a disk has better to do.
    os.fsync = faulty(lambda descriptor: None, blow)
    os.replace = faulty(os.replace, blow)
    os.fdopen = lambda *arguments: Torn(fdopen(*arguments), blow)
    pathlib.Path.open = open_file  # pyright: ignore[reportAttributeAccessIssue]
