"""Give up root's right to read and write whatever it likes, so that permissions hold for root as for any user.

Permissions of files say nothing to root, so a check of them that root runs would pass whatever editcli does. Linux
divides root's rights: without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, root is the owner of its files and no more.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_VERSION = 0x20080522
"""Version 3 of Linux's capability sets: effective, permitted, inheritable, and the three again for higher numbers."""
_READ_AND_WRITE_ALL = 0b110
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
_EFFECTIVE = 0


def _call(name: str, sets: ctypes.Array[ctypes.c_uint32]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    head = (ctypes.c_uint32 * 2)(_VERSION, 0)
    if getattr(libc, name)(head, sets):
        raise OSError(ctypes.get_errno(), name)


@contextmanager
def without_rights() -> Iterator[bool]:
    """Give up the rights in this thread and take them back at the end; yield whether permissions hold meanwhile."""
    if os.geteuid() != 0 or sys.platform != "linux":
        yield permissions_hold()
        return
    before, less = ((ctypes.c_uint32 * 6)() for _ in range(2))
    for sets in (before, less):
        _call("capget", sets)
    less[_EFFECTIVE] &= ~_READ_AND_WRITE_ALL
    _call("capset", less)
    try:
        yield permissions_hold()
    finally:
        _call("capset", before)


def give_up_rights() -> None:
    """Give up the rights for good, also in every process that this one starts; for a forked child."""
    if os.geteuid() != 0 or sys.platform != "linux":
        return
    sets = (ctypes.c_uint32 * 6)()
    _call("capget", sets)
    for index in range(3):
        sets[index] &= ~_READ_AND_WRITE_ALL
    _call("capset", sets)


def permissions_hold() -> bool:
    """Tell whether a file without permissions cannot be read by this process."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "x")
        path.touch(mode=0)
        try:
            path.open("rb").close()
        except PermissionError:
            return True
        return False
