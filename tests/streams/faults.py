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


def arm(call: int, strike: Callable[[], None]) -> None:
    """Let ``strike`` happen at the ``call``-th write, sync or rename from now on; for a process of its own only."""
    left = call

    def struck() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    class Torn:
        """A file whose write may end in the middle."""

        def __init__(self, file: Any):
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def __enter__(self) -> Torn:
            return self

        def __exit__(self, *error: object) -> None:
            self._file.close()

        def write(self, data: Any) -> int:
            if struck():
                self._file.write(bytes(data)[: len(data) // 2])
                self._file.flush()
                strike()
            return self._file.write(data)

    def faulty(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if struck():
                strike()
            return real(*arguments, **options)

        return wrapped

    def open_file(
        path: pathlib.Path, mode: str = "r", *rest: Any, real: Any = pathlib.Path.open, **options: Any
    ) -> Any:
        file = real(path, mode, *rest, **options)
        return Torn(file) if mode == "ab" else file

    fdopen = os.fdopen
    # The real sync is left out: what is tested is the order of steps, and a disk has better to do.
    os.fsync = faulty(lambda descriptor: None)
    os.replace = faulty(os.replace)
    os.fdopen = lambda *arguments: Torn(fdopen(*arguments))
    pathlib.Path.open = open_file
