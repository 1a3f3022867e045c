"""Make text from files and plugins safe to show: nothing in it may move the cursor, colour the screen or hide text."""

from __future__ import annotations

import re

_UNPRINTABLE = re.compile(
    # Control characters but for tab and line feed, the marks that override the direction of writing, and the separators
    # that some terminals take for line feeds.
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]"
)


def printable(text: str) -> str:
    """Return ``text`` with every character that a terminal would obey written as an escape, such as ``\\x1b``."""
    return _UNPRINTABLE.sub(_escaped, text)


def shorten(text: str, length: int = 120) -> str:
    """Return a text that fits into a sentence."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
