"""The tables of ``editcli export`` and ``editcli apply-patch``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from editcli.export.report import ExportReport, FileReport, PatchReport, SiteExport
from editcli.formatting import size

WHAT = {"lora": "LoRA adapter", "patch": "patch", "full": "plain model folder"}


def export_table(report: ExportReport) -> RenderableType:
    """Draw what was exported: format, files, size, ranks and errors of the sites, efficacy."""
    facts = _facts()
    facts.add_row("format", Text(f"{report.format}, a {WHAT[report.format]} for {report.base}"))
    for name, value in (*_content(report), *_efficacy(report)):
        facts.add_row(name, value)
    if report.pushed is not None:
        facts.add_row("pushed to", Text(f"{report.pushed.repo}, {report.pushed.revision}: {report.pushed.url}"))
    parts: list[RenderableType] = [facts]
    if report.sites:
        parts.append(_sites(report.sites))
    return Group(*parts, Text.assemble((f"{report.out}/", "bold"), " holds the result"))


def patch_table(report: PatchReport) -> RenderableType:
    """Draw what applying a patch gave."""
    facts = _facts()
    facts.add_row("base", Text(report.base))
    facts.add_row("patch", Text(report.patch))
    facts.add_row("files", _files(report.files, report.bytes))
    facts.add_row("replaced", Text(_tensors(report.tensors)))
    same = "every file is the run's, byte for byte" if not report.different else "not the run's files byte for byte"
    facts.add_row("verified", Text(f"reopened; {same}"))
    return Group(facts, Text.assemble((f"{report.out}/", "bold"), " holds the edited model"))


def _content(report: ExportReport) -> Iterator[tuple[str, Text]]:
    yield "files", _files(report.files, report.bytes)
    if not report.sites:
        yield "changed", Text(_tensors(report.tensors))


def _efficacy(report: ExportReport) -> Iterator[tuple[str, Text]]:
    """Yield the adapter's figures with those that the run recorded."""
    found = report.efficacy
    if found is None:
        return
    of = "all" if found.edits == found.of else f"{found.edits:,} of"
    for name, value in found.adapter.items():
        if value is not None:
            recorded = None if found.run is None else found.run.get(name)
            beside = "" if recorded is None else f"; the run itself {100 * recorded:.1f} %"
            yield name, Text(f"{100 * value:.1f} % on {of} {found.of:,} edits{beside}")


def _sites(sites: Sequence[SiteExport]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("site", "rank", "of", "relative error", "to the file"):
        table.add_column(heading, overflow="fold", justify="left" if heading == "site" else "right")
    for site in sites:
        needed = "more" if site.needed is None else str(site.needed)
        errors = f"{site.relative_error:.1e}", f"{site.saved_error:.1e}"
        table.add_row(Text(site.module), str(site.rank), needed, *errors)
    return table


def _facts() -> Table:
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    return facts


def _files(files: Sequence[FileReport], total: int) -> Text:
    return Text(f"{size(total)}: {', '.join(file.name for file in files)}")


def _tensors(names: Sequence[str]) -> str:
    return f"{len(names)} tensors: {', '.join(names)}"
