"""Draw a bench: one row per stack, and its curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from editcli.commands.bench import BenchReport, Curve, Point
from editcli.errors import OptionError
from editcli.formatting import number
from editcli.pages.charts import Chart, Series
from editcli.render.tables import percent, table
from editcli.reporting import Reporter
from editcli.storage.files import write_bytes

_PAIRS = (("efficacy", "efficacy"), ("general.", "generalization"), ("specif.", "specificity"))
_ENDS = (("early", 0), ("late", -1))
_SHORT = {"exponential": "exp.", "linear": "linear", "power": "power", "square root": "root"}
_LEGEND = (
    "Retained at the end on a fixed sample of the stream, in percent: success/accuracy, both teacher_forced (the "
    "answer is fed in; 'editcli eval' lets the model write). success: the right answer is more probable than its "
    "rival; accuracy: the greedy answer is right. CP@60: edits when efficacy was first below 60 %. early, late: "
    "efficacy of the first and the last quarter's edits. R_n: the largest of any site; doubling: edits in which it "
    "doubles by the straight line through ln R_n; exp., linear, power, root: share of R_n's variance that such a "
    "law explains, r2, the largest in bold. s: seconds per edit."
)


def bench_table(report: BenchReport) -> RenderableType:
    """Draw what every stack retains, and below it what it does to the norms."""
    retained = _stacks("edits", *(short for short, _ in _PAIRS), "CP@60", *(short for short, _ in _ENDS))
    norms = _stacks("R_n", "doubling", *_SHORT.values(), "s")
    for curve in report.curves:
        retained.add_row(curve.stack, *_retained(curve))
        norms.add_row(curve.stack, *_norms(curve))
    title = Text(f"Stacks on {report.edits}", style="bold")
    return Group(title, retained, norms, Text(_LEGEND, style="dim"))


def bench_charts(report: BenchReport) -> list[Chart]:
    """Return the curves of all stacks along the stream, of what the edits have fields for."""
    figures = {
        "Retained efficacy": "efficacy_success",
        "Exact answers": "efficacy_accuracy",
        "Neighbours kept": "specificity_success",
        "Exact neighbours": "specificity_accuracy",
        "Paraphrases": "generalization_success",
    }
    whole = (-0.03, 1.03)
    charts = [Chart(title, "edits", name, _series(report, name), limits=whole) for title, name in figures.items()]
    ratios = _all(report, lambda point: point.ratio)
    # A figure whose fields the edits do not have is left out; the norms are always known.
    known = [chart for chart in charts if not chart.empty]
    return [*known, Chart("Largest R_n", "edits", "||W_n|| / ||W_0||", ratios, log=True, reference=1.0)]


def plot_bench(report: BenchReport, path: Path, reporter: Reporter) -> bool:
    """Draw the curves to a PNG file; without matplotlib say so and return False."""
    from editcli.pages.plots import draw

    try:
        from editcli.pages.plots import require_matplotlib

        require_matplotlib()
    except OptionError as error:
        reporter.note(str(error))
        return False
    write_bytes(path, draw(bench_charts(report), "png"))
    return True


def _stacks(*figures: str) -> Table:
    """Return a table of one line per stack, which a narrow terminal cuts instead of wrapping it."""
    stacks = table("stack", *figures, right=figures)
    for column in stacks.columns:
        column.no_wrap = True
    return stacks


def _retained(curve: Curve) -> Sequence[str]:
    last = curve.last
    if last is None:
        return ("0", *["n/a"] * (len(_PAIRS) + len(_ENDS) + 1))
    return (
        f"{last.edits:,}",
        *(_pair(last.figures, name) for _, name in _PAIRS),
        "/".join("-" if edits is None else f"{edits:,}" for edits in curve.collapse.values()),
        *(_pair({name: quarters[end] for name, quarters in curve.cohorts.items()}, "efficacy") for _, end in _ENDS),
    )


def _norms(curve: Curve) -> Sequence[str | Text]:
    growth, last, spent = curve.growth, curve.last, curve.seconds_per_edit
    ratio, seconds = number(last and last.ratio, ".2f"), number(spent, ".2f")
    if growth is None:
        return (ratio, *["n/a"] * (len(_SHORT) + 1), seconds)
    doubling = number(growth.doubling, ",.0f", missing="-")
    explained = (Text(f"{growth.r2[law]:.3f}", style="bold" if law == growth.law else "") for law in _SHORT)
    return (ratio, doubling, *explained, seconds)


def _pair(figures: Mapping[str, float | None], name: str) -> str:
    return "/".join(percent(figures.get(f"{name}_{form}")) for form in ("success", "accuracy"))


def _series(report: BenchReport, figure: str) -> tuple[Series, ...]:
    return _all(report, lambda point: point.figures.get(figure))


def _all(report: BenchReport, value: Callable[[Point], float | None]) -> tuple[Series, ...]:
    series = []
    for curve in report.curves:
        points = [(float(point.edits), value(point)) for point in curve.points]
        series.append(Series(curve.stack, tuple((x, y) for x, y in points if y is not None)))
    return tuple(series)
