"""The tables of ``editcli export`` and ``editcli apply-patch``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from editcli.export.report import ExportReport, FileReport, PatchReport, SiteExport
from editcli.formatting import plural, size
from editcli.render.tables import facts, table

WHAT = {"lora": "LoRA adapter", "patch": "patch", "full": "plain model folder"}


def export_table(report: ExportReport) -> RenderableType:
    """Draw what was exported: format, files, size, ranks and errors of the sites, efficacy."""
    form = f"{report.format}, a {WHAT[report.format]} for {report.base}"
    rows: list[tuple[str, str | Text]] = [("format", form), *_content(report), *_efficacy(report)]
    if report.pushed is not None:
        rows.append(("pushed to", f"{report.pushed.repo}, {report.pushed.revision}: {report.pushed.url}"))
    parts: list[RenderableType] = [facts(rows)]
    if report.sites:
        parts.append(_sites(report.sites))
    return Group(*parts, Text.assemble((f"{report.out}/", "bold"), " holds the result"))


def patch_table(report: PatchReport) -> RenderableType:
    """Draw what applying a patch gave."""
    same = "every file is the run's, byte for byte" if not report.different else "not the run's files byte for byte"
    rows = (
        ("base", report.base),
        ("patch", report.patch),
        ("files", _files(report.files, report.bytes)),
        ("replaced", _tensors(report.tensors)),
        ("verified", f"reopened; {same}"),
    )
    return Group(facts(rows), Text.assemble((f"{report.out}/", "bold"), " holds the edited model"))


def _content(report: ExportReport) -> Iterator[tuple[str, str]]:
    yield "files", _files(report.files, report.bytes)
    if not report.sites:
        yield "changed", _tensors(report.tensors)


def _efficacy(report: ExportReport) -> Iterator[tuple[str, str]]:
    """Yield the adapter's figures with those that the run recorded."""
    efficacy = report.efficacy
    if efficacy is None:
        return
    of = "all" if efficacy.edits == efficacy.of else f"{efficacy.edits:,} of"
    for name, value in efficacy.adapter.items():
        if value is not None:
            recorded = None if efficacy.run is None else efficacy.run.get(name)
            beside = "" if recorded is None else f"; the run itself {100 * recorded:.1f} %"
            yield name, f"{100 * value:.1f} % on {of} {plural(efficacy.of, 'edit')}{beside}"


def _sites(sites: Sequence[SiteExport]) -> Table:
    figures = ("rank", "of", "relative error", "to the file")
    rows = table("site", *figures, right=figures)
    for site in sites:
        needed = "more" if site.needed is None else str(site.needed)
        errors = f"{site.relative_error:.1e}", f"{site.saved_error:.1e}"
        rows.add_row(Text(site.module), str(site.rank), needed, *errors)
    return rows


def _files(files: Sequence[FileReport], total: int) -> str:
    return f"{size(total)}: {', '.join(file.name for file in files)}"


def _tensors(names: Sequence[str]) -> str:
    return f"{plural(len(names), 'tensor')}: {', '.join(names)}"
