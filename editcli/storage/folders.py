"""New folders that appear whole or not at all, and whether a folder may be written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from editcli.errors import StateError
from editcli.storage.files import sync_folder
from editcli.storage.locks import locked

_LOCK = ".lock"


def may_write(folder: Path) -> bool:
    """Tell whether this process may make and remove files in a folder."""
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Make a folder that holds several results; where the block fails before the first one, remove it again."""
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if created:
            with suppress(OSError):
                folder.rmdir()
        raise


def refuse_taken(out: Path) -> None:
    """Raise :class:`StateError` unless ``out`` is free: absent, or an empty folder."""
    if out.exists() and not out.is_dir():
        raise StateError(f"{out} is a file; choose another --out")
    if out.is_dir() and any(out.iterdir()):
        raise StateError(f"{out} exists and is not empty; choose another --out, or remove it first")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a hidden folder beside ``out`` that takes its name when the block succeeds and vanishes when it fails.

    What a killed process left in it is removed by the next that writes to the same ``out``; one that another process
    is writing is refused with :class:`StateError`, as is an ``out`` that is taken.
    """
    refuse_taken(out)
    place = out.resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.parent / f".{place.name}.partial"
    if partial.is_symlink():
        raise StateError(f"{partial} is a symbolic link, and what it leads to would be cleared; remove the link")
    busy = StateError(f"{out} is being written by another editcli process; wait for it or stop it")
    with _alone(partial, busy) as release:
        try:
            _clear(partial)
            yield partial
            if os.name != "posix":
                # Elsewhere no folder with an open file can be renamed.
                release()
            _take_name(partial, place)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def _alone(partial: Path, busy: StateError) -> Iterator[Callable[[], None]]:
    """Make the hidden folder and hold it, and yield what lets it go; raise ``busy`` when another process does.

    The lock is the operating system's, so it ends with its process however that ends, and it is on the folder itself:
    a file for it would stay in the result of a process that is killed between taking the name and removing the file.
    """
    partial.mkdir(exist_ok=True)
    if os.name != "posix":
        with _alone_by_file(partial, busy) as release:
            yield release
        return
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        held = locked(descriptor)
        # The process that held the folder may have renamed it to its final name, or removed it.
        if held is False or not _is_still(partial, descriptor):
            raise busy
        if held is None:
            with _alone_by_file(partial, busy) as release:
                yield release
        else:
            yield lambda: None
    finally:
        os.close(descriptor)


def _is_still(partial: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(partial), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextmanager
def _alone_by_file(partial: Path, busy: StateError) -> Iterator[Callable[[], None]]:
    """Hold a folder where folders cannot be locked: on Windows, and on some network disks."""
    lock = FileLock(partial / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise busy from error
    try:
        yield lock.release
    finally:
        lock.release()


def _clear(partial: Path) -> None:
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


def _take_name(partial: Path, place: Path) -> None:
    (partial / _LOCK).unlink(missing_ok=True)
    for folder in (*(path for path in partial.rglob("*") if path.is_dir()), partial):
        sync_folder(folder)
    if place.is_dir():
        # Not every system renames a folder over an empty one.
        place.rmdir()
    os.replace(partial, place)
    sync_folder(place.parent)
