"""Settings of the C library for freed memory. Never imports torch."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt."""
_MOST_KEPT = (1 << 30, 1 << 25)
"""Largest piece in bytes that is kept; glibc before 2.35 refuses more than the second."""
_OWN_CHOICES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed(environment: Mapping[str, str] = os.environ) -> None:
    """Let glibc keep what is freed until :func:`give_back`; elsewhere, or where the user chose, nothing happens.

    Every layer of every pass asks for the same few large pieces. By default each goes back to the system at once, which
    then has to clear it again page by page for the next: about an eighth of the time of optimising targets on a CPU.
    """
    set_option = _function("mallopt")
    if set_option is None or any(name in environment for name in _OWN_CHOICES):
        return
    # Both or none, because setting one of them stops glibc from adapting the other.
    if any(set_option(_MMAP_THRESHOLD, most) for most in _MOST_KEPT):
        set_option(_TRIM_THRESHOLD, 2**31 - 1)


def give_back() -> None:
    """Return to the system what glibc has freed and keeps; elsewhere nothing happens.

    Batches of texts of ever other lengths leave its heap in pieces, so that a process grows although nothing is held.
    """
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def _function(name: str) -> Callable[..., Any] | None:
    """Return a function of the C library, or None where it is another library or cannot be asked."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
