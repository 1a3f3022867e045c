"""Turn a run that ended into its report and its provenance record."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import torch

from editcli.distributed.team import versions
from editcli.editing.session import ModelSession
from editcli.evaluation.metrics import Evaluation
from editcli.evaluation.registry import ANSWERS, protocols_of
from editcli.linalg.directions import change_along
from editcli.linalg.ratios import ratio
from editcli.models.loading import LoadedModel
from editcli.plugin.interfaces import Site
from editcli.plugin.manager import Plugins
from editcli.plugin.plain import recorded
from editcli.records.edits import superseded
from editcli.records.journal import IMMEDIATE, RETAINED
from editcli.records.record import BaseRef, FileRef, Provenance, Requirement
from editcli.reporting import Rejection, RunReport, SiteReport
from editcli.requests.superseding import supersede
from editcli.runs.card import carried
from editcli.runs.planning import Planned
from editcli.runs.stream import Stream
from editcli.settings.core import TargetOptions

EFFICACY = ("efficacy_accuracy", "efficacy_success")
COUNTED = ("optimised", "reached", "clamped")
"""The counts of targets in a record."""
MISSED = 0.1
"""Share of the targets that may miss the stop loss before a warning says so."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ending:
    """How a run ended: ``before`` and ``after`` are None where nothing was evaluated."""

    status: str
    stopped_by: str | None
    before: Evaluation | None
    after: Evaluation | None
    weights: Mapping[Site, torch.Tensor]
    """The weights as saved."""
    seconds: Mapping[str, float]
    out: str
    read: int
    """Edits that were read from the run's files, whatever became of them."""
    rejected: Sequence[Rejection]
    """Edits of the files that could not be used."""
    routing: Mapping[str, Any] | None = None
    """How far the routers of a mixture of experts moved."""


def report_run(planned: Planned, stream: Stream, ending: Ending) -> RunReport:
    """Return the report of a run, over all batches that are in force."""
    written = stream.position.requests
    dropped = stream.dropped
    lines = {request.id: request.line for request in written}
    rejected = [*ending.rejected, *(Rejection(edit, why, lines.get(edit)) for edit, why in dropped.items())]
    overwritten = [superseded(one) for one in supersede(written, given_up=dropped)[1] if one.request.id not in dropped]
    unwritten = [
        Rejection(edit, f"superseded by the edit {by!r}, which gives the same prompt another target", None, by)
        for report in stream.reports
        for edit, by in (report.superseded or {}).items()
    ]
    before, after = ending.before, ending.after
    return RunReport(
        status=ending.status,
        model=planned.source.name,
        editor=planned.editor.name,
        stabilizers=tuple(part.name for part in planned.stabilizers),
        read=ending.read,
        applied=len(written) - len(dropped) - len(overwritten),
        rejected=(*rejected, *overwritten, *unwritten),
        efficacy={
            "before": None if before is None else efficacy(before),
            "immediate": _immediate(stream),
            "retained": None if after is None else efficacy(after),
        },
        generalization=_before_after(before, after, "generalization"),
        specificity=_before_after(before, after, "specificity"),
        protocols=protocols_of(_measured(stream)) if planned.recipe.evaluate else {},
        sites=tuple(_site_reports(stream.session, ending.weights)),
        seconds=dict(ending.seconds),
        out=ending.out,
        stopped_by=ending.stopped_by,
        targets=_targets(stream),
        already_true=tuple(edit for report in stream.reports for edit in report.already_true or ()),
        components={part.name: recorded(part, stream.session.reporter) for part in planned.components},
        preset={
            "name": planned.preset.name,
            "label": planned.preset.label,
            "layers": list(planned.layers),
            "file": planned.preset.file,
            "sha256": planned.preset.sha256,
        },
        routing=ending.routing,
    )


def provenance(planned: Planned, plugins: Plugins, loaded: LoadedModel) -> Provenance:
    """Return where a run's model came from: base, edits, plugins, options, versions, machine."""
    brought = [plugins.find("editor", planned.editor.name)]
    brought += [plugins.find("stabilizer", part.name) for part in planned.stabilizers]
    source = planned.source
    return Provenance(
        base=BaseRef(
            name=source.name,
            folder=str(source.place),
            revision=source.revision,
            commit=source.commit,
            fingerprint=loaded.checkpoint.fingerprint(),
            card=carried(source.folder) if source.gguf is None else {},
        ),
        edits=FileRef(file=planned.file.source, sha256=planned.file.sha256),
        plugins=tuple(Requirement(name=b.name, distribution=b.distribution, version=b.version) for b in brought),
        options={part.name: dataclasses.asdict(part.options) for part in planned.components},
        targets=dataclasses.asdict(planned.targets),
        statistics=dataclasses.asdict(planned.statistics),
        layers=tuple(planned.layers),
        batch_size=planned.batch_size,
        versions=versions(),
        device=str(loaded.input_device),
        dtype=str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        written=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def rounded_differently(old: Provenance, new: Provenance) -> Iterator[str]:
    """Yield a warning for everything in two provenances that may make the same arithmetic round differently."""
    before = _arithmetic(old)
    for what, parts in _arithmetic(new).items():
        # A part that only one of the two has belongs to another stack, which is refused with a sentence of its own.
        pairs = [(name, before[what].get(name, value), value) for name, value in parts.items()]
        others = [f"{name} was {earlier}, now {value}".strip() for name, earlier, value in pairs if earlier != value]
        if others:
            yield (
                f"this run was made with other {what} ({'; '.join(others)}); what is written from here on may "
                "differ in its last digits"
            )


def _arithmetic(provenance: Provenance) -> dict[str, Mapping[str, str]]:
    """Return what decides how the arithmetic rounds, by kind and name."""
    return {
        "versions": provenance.versions,
        "plugins": {part.name: f"{part.distribution} {part.version}".strip() for part in provenance.plugins},
        "device": {"": provenance.device} if provenance.device else {},
    }


def efficacy(evaluation: Evaluation) -> dict[str, float | None]:
    """Return efficacy under its two names."""
    return {name: getattr(evaluation, name) for name in EFFICACY}


def _targets(stream: Stream) -> dict[str, int] | None:
    """Return how the optimisation of targets ended over all batches in force; None where nothing was counted."""
    counted = [report.targets for report in stream.reports if report.targets]
    return {name: sum(counts.get(name, 0) for counts in counted) for name in COUNTED} if counted else None


def missed_targets(counts: Mapping[str, int] | None, targets: TargetOptions) -> str | None:
    """Return a warning when more than a tenth of the targets did not reach the stop loss, with what to change."""
    if not counts or counts["optimised"] - counts["reached"] <= MISSED * counts["optimised"]:
        return None
    missed = counts["optimised"] - counts["reached"]
    # Where most of them lie at the clamp, longer steps change nothing; more of them still turn the offset.
    if 2 * counts["clamped"] > counts["optimised"]:
        which = f"targets.clamp={targets.clamp:g} (behind a norm targets.norm_clamp={targets.norm_clamp:g})"
        cause = f"{counts['clamped']:,} ended at the clamp; raise targets.steps={targets.steps} or {which}"
    elif targets.lr_kind == "absolute":
        cause = f"set targets.lr_kind=relative, or raise targets.lr={targets.lr:g} or targets.steps={targets.steps}"
    else:
        cause = f"raise targets.steps={targets.steps} or targets.lr={targets.lr:g}"
    goal = f"targets.stop_loss={targets.stop_loss:g}" + (" or targets.stop=greedy" if targets.stop == "greedy" else "")
    return (
        f"{missed:,} of {counts['optimised']:,} targets did not reach {goal}, so "
        f"these edits may not be answered: {cause}"
    )


def _immediate(stream: Stream) -> dict[str, float | None] | None:
    """Return the mean over edits of what was measured right after each edit's own batch."""
    measured = [(len(r.edits), figures) for r in stream.reports if (figures := r.measured(IMMEDIATE))]
    if not measured:
        return None
    return {name: _mean([(edits, figures.get(name)) for edits, figures in measured]) for name in EFFICACY}


def _mean(weighted: Sequence[tuple[int, float | None]]) -> float | None:
    known = [(count, value) for count, value in weighted if value is not None]
    return sum(count * value for count, value in known) / sum(count for count, _ in known) if known else None


def _measured(stream: Stream) -> Iterator[str]:
    """Yield the metrics of a run that evaluates: those of its edits, and those along the stream alone."""
    yield from ANSWERS
    along = dict.fromkeys(name for report in stream.reports for name in report.measured(RETAINED))
    yield from (name for name in along if name not in (*ANSWERS, "edits"))


def _before_after(before: Evaluation | None, after: Evaluation | None, name: str) -> dict[str, Any] | None:
    """Return success and accuracy before and after; None when the edits have no prompts to measure it on."""
    if before is None or after is None or getattr(after, f"{name}_accuracy") is None:
        return None
    pair = {"before": before, "after": after}
    return {
        **{when: getattr(evaluation, f"{name}_success") for when, evaluation in pair.items()},
        "accuracy": {when: getattr(evaluation, f"{name}_accuracy") for when, evaluation in pair.items()},
    }


def _site_reports(session: ModelSession, weights: Mapping[Site, torch.Tensor]) -> Iterator[SiteReport]:
    for site, weight in weights.items():
        base = session.baseline(site)
        norm = float(base.norm())
        cast = session.as_saved(site, weight).float()
        yield SiteReport(
            module=site.module,
            layer=site.layer,
            ratio=ratio(float(weight.norm()), norm),
            drift=ratio(float((weight - base).norm()), norm),
            # Zeros lose nothing in any dtype.
            cast_loss=ratio(float((cast - weight).norm()), float(weight.norm())) or 0.0,
            relative_change=change_along(base, weight, device=session.device),
        )
