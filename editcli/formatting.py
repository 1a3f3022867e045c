"""Format figures, counts, times and sizes for people, and make text from files and plugins safe to show."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

LARGEST = 2**63 - 1
"""Largest whole number of a record, an option or a setting: beyond, other programs read another number."""

_UNPRINTABLE = re.compile(
    # Control characters but for tab and line feed, the marks that override the direction of writing, and the separators
    # that some terminals take for line feeds.
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]"
)


def printable(text: str) -> str:
    """Return ``text`` with every character that a terminal would obey written as an escape, such as ``\\x1b``."""
    return _UNPRINTABLE.sub(_escaped, text)


def finite(value: Any) -> Any:
    """Return a value as JSON can hold it, at every depth: a number that is not finite becomes None (null)."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shorten(text: str, length: int = 120) -> str:
    """Return a text that fits into a sentence."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def number(value: float | None, form: str = ".4g", *, missing: str = "n/a") -> str:
    """Return a figure in a format such as ``.3f``, ``missing`` for None; a figure that rounds to 0 has no sign."""
    if value is None:
        return missing
    text = format(value, form)
    return text if text.strip("-0.") else text.lstrip("-")


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: ``1 edit``, ``2,000 edits``, ``2 batches``."""
    ending = "" if count == 1 else "es" if noun.endswith(("ch", "s")) else "s"
    return f"{count:,} {noun}{ending}"


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def duration(seconds: float) -> str:
    """Return a time such as ``0.4 s``, ``42 s``, ``3 min 5 s`` or ``2 h 7 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: float) -> str:
    """Return a number of bytes in decimal units, as disks and the hub count them: ``11.5 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def rate(speed: float) -> str:
    """Return a number per second with about three significant digits."""
    if speed >= 100:
        return f"{speed:,.0f}"
    return f"{speed:.1f}" if speed >= 10 else f"{speed:.2f}"
