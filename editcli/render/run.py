"""Tables of ``editcli apply`` (the plan before, the outcome after, a repetition) and of ``editcli undo --dry-run``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from editcli.evaluation.registry import one_protocol
from editcli.formatting import duration, number, plural, size
from editcli.health.verdict import Thresholds, judge
from editcli.render.tables import facts, table
from editcli.reporting import Rejection, RunReport, SiteReport
from editcli.runs.undo import UndoPlan

if TYPE_CHECKING:
    from editcli.commands.repeat import Repetition
    from editcli.runs.planning import Plan

SHOWN = 5
"""Rejected edits that are listed; the rest are in ``rejected.jsonl``."""

STYLES = {"fine": "green", "drifting": "yellow", "collapsing": "bold red"}
_PHASES = ("load", "prepare", "targets", "solve", "eval", "save")


def run_table(report: RunReport) -> RenderableType:
    """Draw what a run did: edits, figures before and after, sites, time and where the result is."""
    parts: list[RenderableType] = [_headline(report), *_rejections(report.rejected)]
    figures = list(_figures(report))
    if figures:
        parts.append(_figures_table(figures))
    parts += [_sites_table(report.sites), *_targets(report.targets), *_routing(report.routing), *_ending(report)]
    return Group(*parts)


def plan_table(plan: Plan) -> RenderableType:
    """Draw what a run would do."""
    method = " + ".join((plan.editor, *plan.stabilizers))
    batches = f"{plural(plan.batches, 'batch')} of {plan.batch_size:,}"
    rows = (
        ("model", f"{plan.model}, preset {plan.preset} ({plan.label})"),
        ("method", method),
        ("edits", f"{plan.edits:,} in {batches}; {plural(plan.tokens, 'token')}"),
        ("memory", plan.memory),
        ("disk", f"{size(plan.bytes['disk'])} in {plan.out}"),
        ("time", "not measured" if plan.seconds is None else f"about {duration(plan.seconds)} for the targets"),
    )
    sites = table("site", "shape")
    for site in plan.sites:
        sites.add_row(Text(site["module"]), " x ".join(map(str, site["shape"])))
    ending = Text("Nothing was written: this is a dry run.", style="dim")
    return Group(facts(rows), *_rejections(plan.rejected), sites, ending)


def _headline(report: RunReport) -> Text:
    method = " + ".join((report.editor, *report.stabilizers))
    count = f"{report.applied:,} of {plural(report.read, 'edit')} applied"
    text = Text.assemble((count, "bold"), f" to {report.model} with {method}")
    if report.status != "done":
        text.append(f", {report.status}", style="bold yellow")
    return text


def _rejections(rejected: Sequence[Rejection]) -> Iterator[Text]:
    for item in rejected[:SHOWN]:
        where = f"line {item.line}, " if item.line is not None else ""
        yield Text(f"rejected: {where}{item.id}: {item.reason}", style="yellow")
    if len(rejected) > SHOWN:
        yield Text(f"and {len(rejected) - SHOWN:,} more, see editcli/rejected.jsonl", style="yellow")


def _figures(report: RunReport) -> Iterator[tuple[str, float | None, float | None, float | None]]:
    """Yield ``(name, before, right after the edit's own batch, at the end)`` for every figure that was measured."""
    efficacy = report.efficacy
    for name in ("efficacy_accuracy", "efficacy_success"):
        before, immediate, retained = (_read(efficacy.get(when), name) for when in ("before", "immediate", "retained"))
        if (before, immediate, retained) != (None, None, None):
            yield name, before, immediate, retained
    for name, pair in (("generalization", report.generalization), ("specificity", report.specificity)):
        if pair is not None:
            yield f"{name}_accuracy", _read(pair["accuracy"], "before"), None, _read(pair["accuracy"], "after")
            yield f"{name}_success", _read(pair, "before"), None, _read(pair, "after")


def _read(figures: Mapping[str, Any] | None, name: str) -> float | None:
    return None if figures is None else figures.get(name)


def _figures_table(figures: Sequence[tuple[str, float | None, float | None, float | None]]) -> Table:
    moments = ("before", "immediate", "retained")
    # Every figure of a run is of one protocol, which heads the column of their names.
    protocol = one_protocol(name for name, *_ in figures)
    rows = table(protocol, *moments, right=moments)
    for name, before, immediate, after in figures:
        row = (_percent(before), _percent(immediate), Text(_percent(after), style="bold"))
        # No edit has the fields for this figure: a row of dashes would say nothing.
        if (before, immediate, after) != (None, None, None):
            rows.add_row(name, *row)
    return rows


def _sites_table(sites: Sequence[SiteReport]) -> Table:
    rows = table("site", "R_n", "drift", "lost by the cast", "verdict", right=("R_n", "drift", "lost by the cast"))
    for site in sites:
        word = judge(Thresholds(), ratio=site.ratio, drift=site.drift).word or ""
        loss = f"{site.cast_loss:.1e}" if site.cast_loss else "nothing"
        verdict = Text(word, style=STYLES.get(word, ""))
        rows.add_row(Text(site.module), number(site.ratio, ".3f"), number(site.drift, ".3f"), loss, verdict)
    return rows


def _targets(counts: Mapping[str, int] | None) -> Iterator[Text]:
    """Say how the optimisation of targets ended: the earliest sign of a bad setting."""
    if counts:
        reached = f"targets: {counts['reached']:,} of {counts['optimised']:,} were reached"
        yield Text(f"{reached}, {counts['clamped']:,} ended at the clamp")


def _routing(routing: Mapping[str, Any] | None) -> Iterator[Text]:
    """Say how far the routers of a mixture moved."""
    if routing:
        share = f"routing: {routing['changed']:.1%} of the experts chosen on {plural(routing['prompts'], 'neighbour')}"
        yield Text(f"{share} are others than before")


def _ending(report: RunReport) -> Iterator[RenderableType]:
    seconds = report.seconds
    spent = [f"{name} {duration(seconds[name])}" for name in _PHASES if seconds.get(name)]
    yield Text(f"{duration(seconds.get('total', 0.0))}: {', '.join(spent)}", style="dim")
    holds = " holds the edited model and, in editcli/, the record of this run"
    if report.status == "interrupted":
        holds = " holds, in editcli/, the edits so far; the model is written when --resume has done the rest"
    elif report.unchanged:
        holds = " holds the model with the weights of the base: every edit was true already; editcli/ has the record"
    elif not report.applied:
        holds = " holds no edit; editcli/ has the record of this run"
    yield Text.assemble((f"{report.out}/", "bold"), holds)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


SHOWN_TENSORS = 5
"""Tensors that are named; ``--json`` names all."""


def repetition_view(repeated: Repetition) -> RenderableType:
    """Draw a repeated run and whether it came out the same."""
    return Group(run_table(repeated.report), *_lines(repeated))


def _lines(repeated: Repetition) -> list[Text]:
    if repeated.identical:
        text = f"identical: all {repeated.tensors} edited tensors are bit by bit those of {repeated.of}"
        return [Text(text, style="green")]
    named = ", ".join(repeated.differ[:SHOWN_TENSORS]) + (" ..." if len(repeated.differ) > SHOWN_TENSORS else "")
    lines = [
        Text(f"different: {len(repeated.differ)} of {repeated.tensors} edited tensors are not those of {repeated.of}"),
        Text(f"tensors: {named}"),
    ]
    if not repeated.same_edits:
        lines.append(Text("the edits in force are others: the recorded run was undone in part, or ended elsewhere"))
    if repeated.environment:
        lines.append(Text(f"on another machine: {'; '.join(repeated.environment)}"))
    for line in lines:
        line.stylize("yellow")
    return lines


SHOWN_EDITS = 8
"""Ids that are listed."""


def undo_table(plan: UndoPlan) -> RenderableType:
    """Draw what an undo would take back, keep and compute again."""
    more = "" if len(plan.edits) <= SHOWN_EDITS else f" and {len(plan.edits) - SHOWN_EDITS:,} more"
    again = f"{plural(plan.redone_edits, 'edit')} in {plural(len(plan.redo), 'batch')}, about {duration(plan.seconds)}"
    rows = (
        ("run", plan.out),
        ("taken back", f"{plural(len(plan.edits), 'edit')}: {', '.join(plan.edits[:SHOWN_EDITS])}{more}"),
        ("stays", f"{plural(plan.step, 'batch')}, replayed from their factors"),
        ("computed again", again if plan.redo else "nothing"),
    )
    return Group(facts(rows), Text("Nothing was written: this is a dry run.", style="dim"))
