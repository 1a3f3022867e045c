"""Draw a search: the best trials with their trade-off, the comparison on held-out edits, and its curves."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from editcli.errors import OptionError
from editcli.formatting import duration, number, plural
from editcli.pages.charts import Chart, Series
from editcli.render.tables import percent, table
from editcli.reporting import Reporter
from editcli.storage.files import write_bytes
from editcli.tuning.objective import SCORE, Figures
from editcli.tuning.report import TuneReport
from editcli.tuning.space import SOURCE
from editcli.tuning.study import DONE, PRUNED, Record, by_score

SHOWN = 8
"""Trials that are listed; all of them are in ``tune.json``."""
_FIGURES = ("efficacy", "general.", "specif.", "KL", "R_n")
_LEGEND = (
    "Of all edits of a trial at its end, in percent: efficacy is the accuracy of the greedy answer, generalization and "
    "specificity the share of prompts where the right answer is likelier than its rival. KL: drift from the base on "
    "ordinary text, nats per token. score: harmonic mean of the three, minus {price:g} x KL. s: seconds of the trial."
)


def tune_view(report: TuneReport) -> RenderableType:
    """Draw the result of a search."""
    listed = _listed(report)
    parts: list[RenderableType] = [_headline(report), _trade_off(report, listed), _settings(listed)]
    if report.held_out is not None:
        parts.append(_comparison(report))
    return Group(*parts, Text(_LEGEND.format(price=report.kl_price), style="dim"), *_ending(report))


def search_charts(report: TuneReport) -> list[Chart]:
    """Return the curves of a search over its trials."""
    done = [trial for trial in report.trials if trial.state == DONE and trial.score is not None]
    scores = tuple((float(trial.number), trial.score or 0.0) for trial in done)
    best = tuple(zip((x for x, _ in scores), accumulate((y for _, y in scores), max), strict=True))
    reached = tuple(
        Series(name, _points(done, lambda figures, name=name: getattr(figures, name)))
        for name in ("efficacy", "generalization", "specificity")
    )
    drift = (Series("KL", _points(done, lambda figures: figures.kl)),)
    reference = None if report.guess is None else report.guess.score
    charts = [
        Chart("Score", "trial", "score", (Series("trial", scores), Series("best", best)), reference=reference),
        Chart("Trade-off", "trial", "share", reached, limits=(-0.03, 1.03)),
        Chart("Drift from the base", "trial", "nats per token", drift, limits=(0.0, None)),
    ]
    return [chart for chart in charts if not chart.empty]


def plot_search(report: TuneReport, path: Path, reporter: Reporter) -> bool:
    """Draw the curves to a PNG file; without matplotlib, or without a trial, say so and return False."""
    from editcli.pages.plots import draw, require_matplotlib

    charts = search_charts(report)
    if not charts:
        return False
    try:
        require_matplotlib()
    except OptionError as error:
        reporter.note(str(error))
        return False
    write_bytes(path, draw(charts, "png"))
    return True


def _headline(report: TuneReport) -> Text:
    method = "+".join((report.editor, *report.stabilizers))
    early = sum(trial.state == PRUNED for trial in report.trials)
    done = plural(sum(trial.state == DONE for trial in report.trials), "trial")
    text = Text.assemble((f"{done} done", "bold"), f" and {early} ended early, {method} on {report.model}")
    if report.status != "done":
        text.append(f", {report.status}", style="bold yellow")
    return text


def _listed(report: TuneReport) -> list[Record]:
    """Return the best trials, and the guess below them where it is not one of them."""
    ranked = by_score(report.trials)
    listed = ranked[:SHOWN]
    return listed if report.guess is None or report.guess in listed else [*listed, report.guess]


def _trade_off(report: TuneReport, listed: Sequence[Record]) -> Table:
    rows = _trials("trial", "score", *_FIGURES, "s")
    for trial in listed:
        name = f"{trial.number} (guess)" if report.guess is not None and trial.number == report.guess.number else ""
        style = "bold" if report.best is not None and trial.number == report.best.number else ""
        cells = _cells(trial.figures)
        rows.add_row(name or str(trial.number), number(trial.score, SCORE), *cells, f"{trial.seconds:.0f}", style=style)
    rows.add_section()
    rows.add_row("unedited", "", *_cells(report.base), "", style="dim")
    return rows


def _settings(listed: Sequence[Record]) -> Table:
    names = [(name, key) for name, section in listed[0].settings.items() for key in section] if listed else []
    rows = _trials("trial", "layers", *(key for _, key in names))
    for trial in listed:
        values = (f"{trial.settings[name][key]:.4g}" for name, key in names)
        rows.add_row(str(trial.number), _layers(trial.layers), *values)
    return rows


def _comparison(report: TuneReport) -> Table:
    comparison = report.held_out
    assert comparison is not None, "only a comparison that was made is drawn"
    rows = _trials("held out", "score", *_FIGURES)
    for name, score, figures in (
        ("guess", comparison.guess_score, comparison.guess),
        ("best trial", comparison.best_score, comparison.best),
    ):
        rows.add_row(name, number(score, SCORE), *_cells(figures))
    return rows


def _ending(report: TuneReport) -> Iterator[Text]:
    if report.held_out is not None and not report.held_out.confirmed:
        yield Text(
            "On held-out edits the best trial is worse than the guess, so the preset holds the guess. A larger "
            "--sample or more --minutes may find better settings.",
            style="yellow",
        )
    elif report.best is not None and report.guess is not None and report.best.number == report.guess.number:
        yield Text("No trial was better than the guess; the preset holds the guess.", style="yellow")
    yield Text(f"{duration(report.seconds)}; all trials are in {report.out}/tune.json")
    if report.preset is not None:
        edits = "EDITS.jsonl" if report.edits == SOURCE else report.edits
        command = ["editcli", "apply", edits, "--model", report.model, "--preset", report.preset]
        command += [text for name in report.stabilizers for text in ("-s", name)]
        yield Text(f"Use it: {shlex.join(command)}")


def _cells(figures: Figures | None) -> tuple[str, ...]:
    if figures is None:
        return ("n/a",) * len(_FIGURES)
    fractions = map(percent, (figures.efficacy, figures.generalization, figures.specificity))
    return (*fractions, number(figures.kl, ".4f"), number(figures.ratio, ".3f", missing=""))


def _layers(layers: Sequence[int]) -> str:
    row = list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]}-{layers[-1]}" if row and len(layers) > 1 else ",".join(map(str, layers))


def _points(trials: Sequence[Record], value: Callable[[Figures], float | None]) -> tuple[tuple[float, float], ...]:
    values = ((trial.number, value(trial.figures)) for trial in trials if trial.figures is not None)
    return tuple((float(number), y) for number, y in values if y is not None)


def _trials(first: str, *figures: str) -> Table:
    rows = table(first, *figures, right=figures)
    rows.columns[0].no_wrap = True
    return rows
