"""Say times, sizes and rates as one would."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Return a time as one would say it: ``0.4 s``, ``42 s``, ``3 min 5 s``, ``2 h 7 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: float) -> str:
    """Return a number of bytes as one would say it: ``11.5 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def rate(speed: float) -> str:
    """Return a number a second with three digits that matter."""
    if speed >= 100:
        return f"{speed:,.0f}"
    return f"{speed:.1f}" if speed >= 10 else f"{speed:.2f}"
