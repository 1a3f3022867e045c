"""Draw what ``inspect`` found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from editcli.health.inspect import Figures, Inspection, SiteInspection
from editcli.records.history import TopEdit
from editcli.render.run import STYLES

SPARK_WIDTH = 16
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of a table of sites; it is left out when no site has the figure."""

    title: str
    cell: Callable[[SiteInspection], str | Text | None]
    right: bool = True


def inspection_view(found: Inspection) -> Group:
    """Return the head, the tables of sites, and what a run's journal adds."""
    parts: list[RenderableType] = [_head(found)]
    if found.wanted.norms or found.wanted.spectral:
        parts += [_sites(found, [*_NORMS, _curve_column(found)]), *_spectral_table(found)]
    else:
        parts.append(_sites(found, _BARE))
    parts += [_reasons(site) for site in found.sites if site.verdict.reasons]
    if found.top_edits:
        parts.append(_top_table(found.top_edits))
    parts += [Text(note, style="dim") for note in _notes(found)]
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
    _Column("LS", lambda site: _number(site.similarity and site.similarity.ls, ".4f")),
    _Column("SS", lambda site: _number(site.similarity and site.similarity.ss, ".4f")),
    _Column("angle", _largest_angle),
)


def _curve_column(found: Inspection) -> _Column:
    history = found.history

    def cell(site: SiteInspection) -> str | None:
        return (sparkline(history.series(site.site.module, "ratio")) or None) if history else None

    return _Column("R_n over the run", cell, right=False)


def _spectral_table(found: Inspection) -> Iterator[Table]:
    if found.wanted.spectral:
        yield _sites(found, _SPECTRAL)


def _sites(found: Inspection, columns: Sequence[_Column]) -> Table:
    """Return one row per site, with the columns for which there is any figure."""
    cells = [(column, [column.cell(site) for site in found.sites]) for column in columns]
    kept = [(column, values) for column, values in cells if any(value is not None for value in values)]
    table = _table()
    for column, _ in kept:
        table.add_column(column.title, justify="right" if column.right else "left", overflow="fold")
    for row in zip(*(values for _, values in kept), strict=True):
        table.add_row(*("-" if value is None else value for value in row))
    return table


def _table(title: str | None = None) -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=title, title_justify="left")


def _head(found: Inspection) -> Text:
    text = Text.assemble((found.model, "bold"), f": {found.family}, {found.layers} layers, ")
    text.append("tied embeddings" if found.tied else "embeddings not tied")
    text.append(f"\npreset {found.preset.name} ({found.preset.label}): layers {layer_ranges(found.preset.layers)} (*)")
    if found.statistics_bytes:
        text.append(f", {_size(found.statistics_bytes)} for their statistics")
    if found.base:
        text.append(f"\ncompared with {found.base}")
    if found.verdict:
        text.append("\nverdict: ").append(found.verdict, style=STYLES[found.verdict])
    return text


def _reasons(site: SiteInspection) -> Text:
    text = f"layer {site.site.layer} is {site.verdict.word}: {'; '.join(site.verdict.reasons)}"
    return Text(text + (f"; no longer fine since batch {site.since[0]} (edit {site.since[1]})" if site.since else ""))


def _notes(found: Inspection) -> Iterator[str]:
    errors = [site.now.error for site in found.sites if site.now and site.now.error > 0]
    if errors:
        yield f"Large matrices are estimated; relative error up to {max(errors):.1e}."
    if found.wanted.spectral:
        where = f"k(tau) at tau = {found.wanted.tau:g}"
        if found.base:
            where += ", and for the base's k: LS and SS (inferred formulas), the largest principal angle in degrees"
        yield f"{where}."
    if (found.wanted.norms or found.wanted.spectral) and found.base is None:
        yield "Without a base there is no ratio, drift or verdict; pass --base MODEL."


def _top_table(edits: Sequence[TopEdit]) -> Table:
    table = _table("Edits that wrote most")
    table.add_column("edit", overflow="fold")
    table.add_column("batch", justify="right")
    table.add_column("||D||_F", justify="right")
    table.add_column("fact", overflow="fold")
    for edit in edits:
        table.add_row(Text(edit.id), str(edit.step), f"{edit.norm:.4g}", Text(f"{edit.prompt} -> {edit.target}"))
    return table


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
