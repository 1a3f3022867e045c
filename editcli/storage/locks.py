"""Locks on files that end with the process that holds them, however that ends."""

from __future__ import annotations

import sys


def locked(descriptor: int) -> bool | None:
    """Lock an open file for this process alone; False when another holds it, None where files cannot be locked."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # A file system without locks, such as some network disks.
        return None
    return True
