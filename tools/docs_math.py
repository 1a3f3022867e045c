"""A hook of the documentation site: turn LaTeX into MathML while the site is built, so that readers fetch no script."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_MARKED = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
"""What pymdownx.arithmatex leaves of ``$...$`` and ``$$...$$`` in its generic mode."""


def on_page_content(content: str, **_: Any) -> str:
    """Return the page with every equation as MathML; called by mkdocs for each page."""
    return _MARKED.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    element, opening, latex = match.groups()
    display = "block" if opening == "[" else "inline"
    return f'<{element} class="math">{convert(html.unescape(latex.strip()), display=display)}</{element}>'
