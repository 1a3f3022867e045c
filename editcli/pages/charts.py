"""The charts of a run as plain data, from a run's history and an inspection."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from editcli.health.inspect import Figures, Inspection, SiteInspection
from editcli.records.history import History
from editcli.records.journal import IMMEDIATE, RETAINED, BatchRecord

Figure = Literal["ratio", "drift", "update_norm"]
MAX_POINTS = 400
"""Points of one curve that are drawn; a page for thousands of batches must stay small."""

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Series:
    """One curve; points whose value is not known are left out."""

    label: str
    points: Points
    faint: bool = False
    """True for what other curves are compared with."""


@dataclass(frozen=True, slots=True)
class Chart:
    """A titled set of curves over one horizontal axis."""

    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    log: bool = False
    reference: float | None = None
    """A horizontal line, for instance the value before the first edit."""
    limits: tuple[float | None, float | None] = (None, None)
    """Lowest and highest y, where they are known beforehand."""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not any(series.points for series in self.series)


def history_charts(history: History) -> list[Chart]:
    """Return the curves of a run over its edits: R_n, drift, efficacies, update norms, time, other diagnostics."""
    edits = _edits_so_far(history.batches)
    charts = [
        Chart("R_n per site", "edits", "||W_n|| / ||W_0||", _per_site(history, "ratio", edits), reference=1.0),
        Chart("Drift per site", "edits", "||W_n - W_0|| / ||W_0||", _per_site(history, "drift", edits)),
        Chart("Efficacy", "edits", "share of edits", tuple(_efficacies(history, edits)), limits=(-0.03, 1.03)),
        Chart("Update norm per batch", "edits", "||D||_F", _per_site(history, "update_norm", edits)),
        Chart(
            "Time per batch",
            "edits",
            "seconds",
            (_curve("seconds", history, edits, lambda b: b.duration),),
            limits=(0, None),
        ),
        *_diagnostic_charts(history, edits),
    ]
    return [chart for chart in charts if not chart.empty]


def spectrum_charts(inspection: Inspection) -> list[Chart]:
    """Return one chart per site of its singular values, beside the base's; empty without spectra."""
    charts = []
    for site in inspection.sites:
        base = Series("base", site.base.curve if site.base else (), faint=True)
        now = Series("edited" if site.base else "weight", site.now.curve if site.now else ())
        series = tuple(one for one in (base, now) if one.points)
        charts.append(Chart(f"Singular values, layer {site.site.layer}", "index", "sigma", series, log=True))
    return [chart for chart in charts if not chart.empty]


def norm_charts(inspection: Inspection) -> list[Chart]:
    """Return R_n, drift, norms and effective rank over the layers."""
    charts = [
        Chart("R_n by layer", "layer", "||W_n|| / ||W_0||", (_by_layer("R_n", inspection, _ratio),), reference=1.0),
        Chart("Drift by layer", "layer", "||W_n - W_0|| / ||W_0||", (_by_layer("drift", inspection, _drift),)),
        Chart("Frobenius norm by layer", "layer", "||W||_F", _pair(inspection, lambda f: f.frobenius)),
        Chart("Spectral norm by layer", "layer", "sigma_1", _pair(inspection, lambda f: f.spectral)),
        Chart("Effective rank by layer", "layer", "effective rank", _pair(inspection, lambda f: f.effective_rank)),
    ]
    return [chart for chart in charts if not chart.empty]


def _ratio(site: SiteInspection) -> float | None:
    return site.ratio


def _drift(site: SiteInspection) -> float | None:
    return site.drift


def _pair(inspection: Inspection, figure: Callable[[Figures], float | None]) -> tuple[Series, ...]:
    """Return a figure of the base's matrices, if there is a base, and of the model's."""
    base = _by_layer("base", inspection, lambda site: figure(site.base) if site.base else None)
    now = _by_layer(
        "edited" if base.points else "weight", inspection, lambda site: figure(site.now) if site.now else None
    )
    return (Series(base.label, base.points, faint=True), now) if base.points else (now,)


def _by_layer(label: str, inspection: Inspection, figure: Callable[[SiteInspection], float | None]) -> Series:
    return Series(label, _known((site.site.layer, figure(site)) for site in inspection.sites))


def _per_site(history: History, figure: Figure, edits: Sequence[int]) -> tuple[Series, ...]:
    return tuple(
        Series(f"layer {layer}", _thin(_known(zip(edits, history.series(module, figure), strict=True))))
        for module, layer in sorted(history.sites.items(), key=lambda site: site[1])
    )


def _efficacies(history: History, edits: Sequence[int]) -> Iterator[Series]:
    for when in (IMMEDIATE, RETAINED):
        for figure in ("efficacy_accuracy", "efficacy_success"):
            label = f"{when}, {figure.removeprefix('efficacy_')}"
            series = _curve(label, history, edits, lambda b, w=when, f=figure: b.measured(w).get(f))
            if series.points:
                yield series


def _diagnostic_charts(history: History, edits: Sequence[int]) -> Iterator[Chart]:
    """Yield one chart per diagnostic figure; ``spectral/layer 3`` is the curve of layer 3 in the chart of spectral."""
    names = dict.fromkeys(name for batch in history.batches for name in batch.diagnostics)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition("/")[0], []).append(name)
    for group, members in groups.items():
        series = (
            _curve(n.partition("/")[2] or n, history, edits, lambda b, n=n: b.diagnostics.get(n)) for n in members
        )
        yield Chart(group.replace("_", " ").capitalize(), "edits", group.replace("_", " "), tuple(series))


def _curve(label: str, history: History, edits: Sequence[int], figure: Callable[[BatchRecord], float | None]) -> Series:
    return Series(label, _thin(_known(zip(edits, map(figure, history.batches), strict=True))))


def _edits_so_far(batches: Sequence[BatchRecord]) -> list[int]:
    total, counts = 0, []
    for batch in batches:
        total += len(batch.edits)
        counts.append(total)
    return counts


def _known(points: Iterable[tuple[float, float | None]]) -> Points:
    return tuple((x, y) for x, y in points if y is not None)


def _thin(points: Points) -> Points:
    """Keep at most :data:`MAX_POINTS` points, evenly spread, the last one always."""
    step = max(1, -(-len(points) // MAX_POINTS))
    return points[::-1][::step][::-1]
