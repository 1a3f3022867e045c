"""Draw a bench: one row per stack, and its curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from editcli.errors import OptionError
from editcli.pages.charts import Chart, Series
from editcli.report import Reporter
from editcli.runs.bench import BenchReport, Curve, Point
from editcli.runs.files import write_bytes

_COLUMNS = (
    ("eff.", "efficacy_accuracy"),
    ("succ.", "efficacy_success"),
    ("gen.", "generalization_accuracy"),
    ("spec.", "specificity_accuracy"),
)
_LEGEND = (
    "In percent, retained at the end on a fixed sample of the stream: eff. efficacy_accuracy, succ. efficacy_success, "
    "gen. and spec. accuracy. R_n: the largest of any site. CP@60: edits when efficacy_success first fell below 60 %. "
    "early, late: share of the first and the last quarter's edits that is answered at the end. s: seconds per edit."
)


def bench_table(report: BenchReport) -> RenderableType:
    """Draw one row for each stack."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("stack", no_wrap=True)
    for heading in ("edits", *(short for short, _ in _COLUMNS), "R_n", "CP@60", "early", "late", "s"):
        table.add_column(heading, justify="right")
    for curve in report.curves:
        table.add_row(*_cells(curve))
    return Group(Text(f"Stacks on {report.edits}", style="bold"), table, Text(_LEGEND, style="dim"))


def bench_charts(report: BenchReport) -> list[Chart]:
    """Return the curves of all stacks along the stream."""
    shares = (-0.03, 1.03)
    return [
        Chart("Retained efficacy", "edits", "efficacy_success", _series(report, "efficacy_success"), limits=shares),
        Chart("Exact answers", "edits", "efficacy_accuracy", _series(report, "efficacy_accuracy"), limits=shares),
        Chart("Specificity", "edits", "specificity_accuracy", _series(report, "specificity_accuracy"), limits=shares),
        Chart("Largest R_n", "edits", "||W_n|| / ||W_0||", _all(report, lambda p: p.ratio), log=True, reference=1.0),
    ]


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


def _cells(curve: Curve) -> Sequence[str]:
    last = curve.last
    if last is None:
        return (curve.stack, "0", *["n/a"] * (len(_COLUMNS) + 5))
    return (
        curve.stack,
        f"{last.edits:,}",
        *(_percent(last.figures.get(name)) for _, name in _COLUMNS),
        f"{last.ratio:.2f}",
        "-" if curve.collapse is None else f"{curve.collapse:,}",
        *(_percent(curve.cohorts[place] if curve.cohorts else None) for place in (0, -1)),
        "n/a" if curve.seconds_per_edit is None else f"{curve.seconds_per_edit:.2f}",
    )


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.0f}"


def _series(report: BenchReport, figure: str) -> tuple[Series, ...]:
    return _all(report, lambda point: point.figures.get(figure))


def _all(report: BenchReport, value: Callable[[Point], float | None]) -> tuple[Series, ...]:
    found = []
    for curve in report.curves:
        points = [(float(point.edits), value(point)) for point in curve.points]
        found.append(Series(curve.stack, tuple((x, y) for x, y in points if y is not None)))
    return tuple(found)
