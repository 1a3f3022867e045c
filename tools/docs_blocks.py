"""Generated parts of documentation pages: between two comments, so that what is written by hand around them stays."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def replaced(text: str, name: str, content: str) -> str:
    """Return ``text`` with ``content`` between its comments ``name: begin`` and ``name: end``; else raise KeyError."""
    pattern = re.compile(rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)", re.DOTALL)
    if not pattern.search(text):
        raise KeyError(f"the page has no comments '{name}: begin' and '{name}: end'")
    return pattern.sub(lambda match: f"{match[1]}{content.rstrip()}\n{match[2]}", text, count=1)


def finish(pages: Mapping[Path, str], arguments: list[str]) -> int:
    """Write the pages that changed; with ``--check`` only name them. Return the exit code."""
    stale = [path for path, text in pages.items() if not path.is_file() or path.read_text("utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'stale' if '--check' in arguments else 'written'}", file=sys.stderr)
        if "--check" not in arguments:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(pages[path], "utf-8")
    return 1 if stale and "--check" in arguments else 0
