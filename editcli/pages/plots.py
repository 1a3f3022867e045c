"""Draw charts with matplotlib, for files and for the page of a run.

Matplotlib because one well-kept library then draws PNG, SVG and the page's inline SVG, with no script to ship: the page
stays small, prints sharply and asks no network. It is an extra, ``editcli[report]``.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editcli.errors import OptionError
from editcli.health.inspect import Inspection
from editcli.pages.charts import Chart, Series, history_charts, norm_charts, spectrum_charts
from editcli.storage.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".html")
COLOURS = ("#3366aa", "#c2571a", "#2b8a5f", "#9a4fb0", "#b58900", "#b0305c", "#2a93a6", "#6b6b6b")
"""Colours of the curves in a file; the page replaces them by variables, so that they follow light and dark."""
INK, GRID, FAINT = "#20262e", "#d5dae1", "#8f98a3"
_DASHES = ("-", "--", ":", "-.")
_WIDTH, _HEIGHT = 4.2, 2.9
"""Inches; narrow enough that a chart is readable on a phone without zooming."""


def check_plot(path: Path | None) -> None:
    """Raise :class:`OptionError` when nothing can be drawn to ``path``; before anything is computed."""
    if path is None:
        return
    if path.suffix.lower() not in FORMATS:
        raise OptionError(f"cannot draw to {path}: end its name in {', '.join(FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise OptionError(f"cannot draw to {path}: there is no folder {path.parent}")
    require_matplotlib()


def require_matplotlib() -> None:
    """Raise :class:`OptionError` when matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise OptionError("charts need matplotlib; install it with: pip install 'editcli[report]'") from error


def plot_inspection(inspection: Inspection, path: Path) -> None:
    """Draw the charts of an inspection, and the curves of its run, to a PNG, SVG or HTML file."""
    charts = [
        *norm_charts(inspection),
        *(history_charts(inspection.history) if inspection.history else ()),
        *spectrum_charts(inspection),
    ]
    if not charts:
        raise OptionError(f"there is nothing to draw for {inspection.model}; add --norms or --spectral")
    if path.suffix.lower() == ".html":
        from editcli.pages.page import chart_page

        data = chart_page(inspection, charts).encode()
    else:
        data = draw(charts, path.suffix.lower().removeprefix("."))
    try:
        write_bytes(path, data)
    except OSError as error:
        raise OptionError(f"cannot write {path}: {error.strerror or error}") from error


def draw(charts: Sequence[Chart], form: str) -> bytes:
    """Return charts side by side as one ``png`` or ``svg`` file; the same charts give the same bytes."""
    from matplotlib.figure import Figure

    columns = min(3, len(charts))
    rows = -(-len(charts) // columns)
    with _style():
        figure = Figure(figsize=(_WIDTH * columns, _HEIGHT * rows), layout="constrained", facecolor="white")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for place, chart in zip(axes, charts, strict=False):
            _draw(place, chart)
            place.set_title(chart.title, loc="left", fontsize=10, fontweight="bold", color=INK)
        for place in axes[len(charts) :]:
            place.set_axis_off()
        return _save(figure, form)


def inline_svg(chart: Chart) -> str:
    """Return one chart as an ``<svg>`` element whose colours are the page's variables."""
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.subplots()
        axes.patch.set_visible(False)
        _draw(axes, chart)
        text = _save(figure, "svg").decode()
    return _themed(text[text.index("<svg") :], chart.title)


def _themed(svg: str, title: str) -> str:
    """Leave to the page what belongs to it: colours, fonts, the size; and drop ids that nothing refers to."""
    for colour, name in _variables().items():
        svg = svg.replace(colour, f"var(--{name})")
    for pattern in (
        r"<metadata>.*?</metadata>",
        r"<defs>\s*<style.*?</style>\s*</defs>",
        r"font-family: [^;]*; ",
        r' id="(?![mp][0-9a-f]{10}")[^"]*"',
        r' xmlns(:\w+)?="[^"]*"',
    ):
        svg = re.sub(pattern, "", svg, flags=re.DOTALL)
    head, body = svg.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{escape(title)}">{body}'


def _variables() -> Mapping[str, str]:
    named = {colour: f"c{number}" for number, colour in enumerate(COLOURS, start=1)}
    return {**named, INK: "ink", GRID: "grid", FAINT: "faint"}


@contextmanager
def _style() -> Iterator[None]:
    """Draw with settings of our own, whatever the user's matplotlibrc says, and leave no trace."""
    import matplotlib

    settings: Any = {
        **matplotlib.rcParamsDefault,
        "svg.fonttype": "none",
        "svg.hashsalt": "editcli",
        "text.parse_math": False,
        "font.size": 9,
        "axes.edgecolor": GRID,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    settings.pop("backend", None)
    settings.pop("backend_fallback", None)
    with matplotlib.rc_context(settings):
        yield


def _draw(axes: Axes, chart: Chart) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if chart.reference is not None:
        axes.axhline(chart.reference, color=FAINT, linewidth=0.8, linestyle=":")
    for number, series in enumerate(chart.series):
        _draw_series(axes, series, number)
    if chart.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(*chart.limits)
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.y)
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02)
    if chart.x == "layer":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(chart.series) > 1:
        axes.legend(loc="best", frameon=False, fontsize=8, ncols=2 if len(chart.series) > 4 else 1)


def _draw_series(axes: Axes, series: Series, number: int) -> None:
    if not series.points:
        return
    xs, ys = zip(*series.points, strict=True)
    axes.plot(
        xs,
        ys,
        label=series.label,
        color=FAINT if series.faint else COLOURS[number % len(COLOURS)],
        linestyle=_DASHES[number // len(COLOURS) % len(_DASHES)],
        linewidth=1.4,
        # A single batch makes no line, and few points read better with marks.
        marker="o" if len(xs) <= 24 else None,
        markersize=2.5,
    )


def _save(figure: Figure, form: str) -> bytes:
    buffer = io.BytesIO()
    # Without its date the file depends on the charts alone.
    metadata = {"Date": None} if form == "svg" else {"Software": None}
    figure.savefig(buffer, format=form, dpi=150, metadata=metadata)
    return buffer.getvalue()
