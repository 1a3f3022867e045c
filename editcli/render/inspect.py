"""Draw the result of ``inspect``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from editcli.formatting import size
from editcli.health.inspect import Figures, Inspection, SiteInspection
from editcli.records.history import TopEdit
from editcli.render.run import STYLES
from editcli.render.tables import table

SPARK_WIDTH = 16
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of a table of sites; it is left out when no site has the figure."""

    title: str
    cell: Callable[[SiteInspection], str | Text | None]
    right: bool = True


def inspection_view(inspection: Inspection) -> Group:
    """Return the head, the tables of sites, and the figures of a run's journal."""
    parts: list[RenderableType] = [_head(inspection)]
    if inspection.wanted.norms or inspection.wanted.spectral:
        parts += [_sites(inspection, [*_NORMS, _curve_column(inspection)]), *_spectral_table(inspection)]
    else:
        parts.append(_sites(inspection, _BARE))
    parts += [_reasons(site) for site in inspection.sites if site.verdict.reasons]
    if inspection.top_edits:
        parts.append(_top_table(inspection.top_edits))
    parts += [Text(note, style="dim") for note in _notes(inspection)]
    return Group(*parts)


def sparkline(values: Sequence[float | None], width: int = SPARK_WIDTH) -> str:
    """Return a curve as at most ``width`` block characters, scaled from its least to its greatest value."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    step = -(-len(known) // width)
    # Counted from the end, so that the end of the line is the end of the run.
    picked = known[::-1][::step][::-1]
    low, high = min(known), max(known)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in picked)


def layer_ranges(layers: Sequence[int]) -> str:
    """Write ascending numbers as ranges, for instance ``4-8, 10``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _layer(site: SiteInspection) -> str:
    return f"{site.site.layer}{'*' if site.in_preset else ' '}"


def _shape(site: SiteInspection) -> str:
    return f"{site.shape[0]} x {site.shape[1]}" + (", stored transposed" if site.site.transposed else "")


def _verdict(site: SiteInspection) -> Text | None:
    word = site.verdict.word
    return None if word is None else Text(word, style=STYLES[word])


def _number(value: float | None, form: str = ".4g") -> str | None:
    """Return a figure, or None: a column without any figure is left out."""
    return None if value is None else format(value, form)


def _change(figure: Callable[[Figures], float | None], form: str = ".4g") -> Callable[[SiteInspection], str | None]:
    """Return a cell ``base -> now``, or the figure alone where there is no base."""

    def cell(site: SiteInspection) -> str | None:
        now = _number(figure(site.now), form) if site.now else None
        base = _number(figure(site.base), form) if site.base else None
        return now if base is None or now is None else f"{base} -> {now}"

    return cell


def _largest_angle(site: SiteInspection) -> str | None:
    similarity = site.similarity
    return similarity and f"{max(similarity.angles_left[-1], similarity.angles_right[-1]):.1f}"


_BARE = (
    _Column("layer", _layer),
    _Column("module", lambda site: Text(site.site.module), right=False),
    _Column("shape", _shape, right=False),
    _Column("dtype", lambda site: site.dtype, right=False),
)
_NORMS = (
    _Column("layer", _layer),
    _Column("verdict", _verdict, right=False),
    _Column("R_n", lambda site: _number(site.ratio, ".4f")),
    _Column("drift", lambda site: _number(site.drift, ".4f")),
    _Column("||W||_F", lambda site: _number(site.now and site.now.frobenius)),
    _Column("sigma_1", _change(lambda figures: figures.spectral)),
)
_SPECTRAL = (
    _Column("layer", _layer),
    _Column("effective rank", _change(lambda figures: figures.effective_rank, ".1f")),
    _Column("stable rank", _change(lambda figures: figures.stable_rank, ".1f")),
    _Column("k(tau)", _change(lambda figures: figures.k_tau, "d")),
    _Column("change", lambda site: _number(site.relative_change, ".4f")),
    _Column("LS", lambda site: _number(site.similarity and site.similarity.ls, ".4f")),
    _Column("SS", lambda site: _number(site.similarity and site.similarity.ss, ".4f")),
    _Column("angle", _largest_angle),
)


def _curve_column(inspection: Inspection) -> _Column:
    history = inspection.history

    def cell(site: SiteInspection) -> str | None:
        return (sparkline(history.series(site.site.module, "ratio")) or None) if history else None

    return _Column("R_n over the run", cell, right=False)


def _spectral_table(inspection: Inspection) -> Iterator[Table]:
    if inspection.wanted.spectral:
        yield _sites(inspection, _SPECTRAL)


def _sites(inspection: Inspection, columns: Sequence[_Column]) -> Table:
    """Return one row per site, with the columns for which there is any figure."""
    cells = [(column, [column.cell(site) for site in inspection.sites]) for column in columns]
    known = [(column, values) for column, values in cells if any(value is not None for value in values)]
    rows = table(*(c.title for c, _ in known), right=[c.title for c, _ in known if c.right])
    for row in zip(*(values for _, values in known), strict=True):
        rows.add_row(*("-" if value is None else value for value in row))
    return rows


def _head(inspection: Inspection) -> Text:
    text = Text.assemble((inspection.model, "bold"), f": {inspection.family}, {inspection.layers} layers, ")
    text.append("tied embeddings" if inspection.tied else "embeddings not tied")
    preset = inspection.preset
    text.append(f"\npreset {preset.name} ({preset.label}): layers {layer_ranges(preset.layers)} (*)")
    if inspection.statistics_bytes:
        text.append(f", {size(inspection.statistics_bytes)} for their statistics")
    if inspection.base:
        text.append(f"\ncompared with {inspection.base}")
    if inspection.verdict:
        text.append("\nverdict: ").append(inspection.verdict, style=STYLES[inspection.verdict])
    return text


def _reasons(site: SiteInspection) -> Text:
    text = f"layer {site.site.layer} is {site.verdict.word}: {'; '.join(site.verdict.reasons)}"
    return Text(text + (f"; no longer fine since batch {site.since[0]} (edit {site.since[1]})" if site.since else ""))


def _notes(inspection: Inspection) -> Iterator[str]:
    errors = [site.now.error for site in inspection.sites if site.now and site.now.error > 0]
    if errors:
        yield f"Large matrices are estimated; relative error up to {max(errors):.1e}."
    if inspection.wanted.spectral:
        where = f"k(tau) at tau = {inspection.wanted.tau:g}"
        if inspection.base:
            where += (
                ", and for the base's k: LS and SS (inferred formulas), the largest principal angle in degrees; "
                "change: what was written along the base's 16 leading directions, as a share of their sigma"
            )
        yield f"{where}."
    if (inspection.wanted.norms or inspection.wanted.spectral) and inspection.base is None:
        yield "Without a base there is no ratio, drift or verdict; pass --base MODEL."


def _top_table(edits: Sequence[TopEdit]) -> Table:
    figures, title = ("batch", "||D||_F"), "Edits that wrote most"
    rows = table("edit", *figures, "fact", right=figures, title=title, title_justify="left")
    for edit in edits:
        rows.add_row(Text(edit.id), str(edit.step), f"{edit.norm:.4g}", Text(f"{edit.prompt} -> {edit.target}"))
    return rows
