"""The page of a run: one self-contained HTML file with the summary, the curves, the spectra and every edit.

Nothing is fetched: the charts are inline SVG, style and script are in the page, and a content security policy forbids
anything else, also to text that comes out of an edits file.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from editcli.errors import OptionError, StateError
from editcli.health.inspect import Inspection
from editcli.pages.charts import Chart, history_charts, norm_charts, spectrum_charts
from editcli.pages.evidence import view_of
from editcli.pages.plots import COLOURS, inline_svg, require_matplotlib
from editcli.records.decoding import encode
from editcli.records.edits import MEANINGS, edit_rows
from editcli.records.evidence import read_evidence, state_of
from editcli.records.record import RunRecord
from editcli.runs.card import command_line
from editcli.settings.recipe import Recipe
from editcli.storage.files import write_bytes
from editcli.storage.opening import PAGE, is_there, open_regular

MARK = '<meta name="generator" content="editcli">'
"""Marks a page as written by editcli; only such pages are overwritten."""
MAX_ROWS = 5000
"""Edits that the table shows; beyond, a browser takes seconds to lay it out."""


def check_page(path: Path) -> None:
    """Raise, before anything is computed, when no page can be written to ``path``."""
    require_jinja()
    require_matplotlib()
    if not path.absolute().parent.is_dir():
        raise OptionError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise OptionError(f"cannot write {path}: it is a folder; name a file such as {path / 'report.html'}")
    if is_there(path) and not path.is_file():
        raise OptionError(f"cannot write {path}: it is no regular file; name another one")
    if path.is_file() and MARK.encode() not in _head(path):
        raise OptionError(f"{path} exists and is no page of editcli; choose another -o, or remove it first")


def _head(path: Path) -> bytes:
    """Return the beginning of a file that would be written over."""
    with open_regular(path, PAGE) as file:
        return file.read(4096)


def require_jinja() -> None:
    """Raise :class:`OptionError` when jinja2 is not installed."""
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise OptionError("pages need jinja2; install it with: pip install 'editcli[report]'") from error


def run_page(inspection: Inspection) -> str:
    """Return the page of an inspected run; raise :class:`StateError` when ``inspection`` is no run."""
    if inspection.history is None:
        raise StateError(
            f"{inspection.model} is no output of editcli apply (it has no editcli/run.json); give a run's folder"
        )
    history, record = inspection.history, inspection.history.record
    rows = list(edit_rows(history))
    counts = {word: sum(row.outcome == word for row in rows) for word in MEANINGS}
    return _render(
        "run.html.j2",
        title=f"{Path((record and record.model) or inspection.model).name}, edited",
        inspection=inspection,
        record=record,
        methods=[name for name in (record.editor, *(record.stabilizers or ())) if name] if record else [],
        tiles=_tiles(record),
        charts=[_figure(chart) for chart in history_charts(history)],
        spectra=[_figure(chart) for chart in (*_level_charts(inspection), *spectrum_charts(inspection))],
        rows=rows[:MAX_ROWS],
        hidden=max(0, len(rows) - MAX_ROWS),
        counts={word: count for word, count in counts.items() if count},
        meanings=MEANINGS,
        provenance=_provenance(record),
        evidence=view_of(read_evidence(history.folder), history, state_of(history.folder)),
    )


def chart_page(inspection: Inspection, charts: Sequence[Chart]) -> str:
    """Return a page of charts alone, for ``inspect --plot FILE.html``."""
    require_jinja()
    return _render(
        "charts.html.j2", title=inspection.model, inspection=inspection, charts=[_figure(chart) for chart in charts]
    )


def write_page(path: Path, page: str) -> None:
    """Write a page; raise :class:`OptionError` with the reason when that fails."""
    try:
        write_bytes(path, page.encode())
    except OSError as error:
        raise OptionError(f"cannot write {path}: {error.strerror or error}") from error


def _render(template: str, **values: Any) -> str:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    script = _template("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        mark=Markup(MARK),
        style=Markup(_template("page.css")),
        script=Markup(script),
        script_digest=digest,
        colours=len(COLOURS),
        **values,
    )


def _template(name: str) -> str:
    return (files("editcli.pages") / "templates" / name).read_text("utf-8")


def _figure(chart: Chart) -> dict[str, Any]:
    """Return a chart's title and drawing; the drawing is matplotlib's, which escapes what is written in it."""
    from markupsafe import Markup

    return {"title": chart.title, "svg": Markup(inline_svg(chart))}


def _level_charts(inspection: Inspection) -> list[Chart]:
    """Return the charts over layers that compare with the base; R_n and drift have curves of their own."""
    return [chart for chart in norm_charts(inspection) if len(chart.series) > 1]


def _tiles(record: RunRecord | None) -> list[tuple[str, str, str]]:
    """Return the summary as (name, value, remark)."""
    if record is None:
        return []
    edits, tiles = record.edits, []
    if edits is not None:
        tiles.append(("edits written", _number(edits.applied), f"{_number(edits.rejected)} rejected"))
    efficacy = encode(record.efficacy) or {}
    for when, figures in efficacy.items():
        if figures:
            remark = f"success {_number(figures.get('efficacy_success'))}"
            tiles.append((f"efficacy {when}", _number(figures.get("efficacy_accuracy")), remark))
    for name, pair in (("generalization", record.generalization), ("specificity", record.specificity)):
        if pair is not None:
            tiles.append((name, _number(pair.accuracy.after), f"before {_number(pair.accuracy.before)}"))
    total = (record.seconds or {}).get("total")
    tiles.append(("time", f"{_number(total)} s", record.status))
    return tiles


def _provenance(record: RunRecord | None) -> list[tuple[str, str]]:
    """Return where the run came from as (name, text)."""
    if record is None:
        return []
    made = record.provenance
    rows = [
        ("command", _command(record)),
        ("base", f"{made.base.name} {made.base.revision or ''}".strip()),
        ("base fingerprint", made.base.fingerprint),
        ("edits file", made.edits.file),
        ("edits sha256", made.edits.sha256),
        ("plugins", ", ".join(f"{part.name} ({part.distribution} {part.version})" for part in made.plugins)),
        ("versions", ", ".join(f"{name} {value}" for name, value in made.versions.items())),
        ("device", made.device),
        ("written", made.written),
        ("options", json.dumps({"targets": made.targets, **made.options}, indent=1)),
    ]
    return [(name, text) for name, text in rows if text]


def _command(record: RunRecord) -> str:
    try:
        return command_line(Recipe.from_json(record.recipe))
    except OptionError:  # A record of another version; the page does without its command.
        return ""


def _number(value: Any) -> str:
    """Write a figure with four digits; what is not known as a dash."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
