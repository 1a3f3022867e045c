"""End a run: measure and save the model as it is read out, verify it, and write the record and the card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from editcli.errors import StateError
from editcli.evaluation.metrics import Evaluation
from editcli.plugin.interfaces import Site
from editcli.reporting import RunReport
from editcli.runs.context import DONE, INTERRUPTED, writing
from editcli.runs.opening import Opened
from editcli.runs.outcome import Ending, report_run
from editcli.runs.output import stored_tensors, write_verified
from editcli.runs.remarks import tell_result
from editcli.storage.files import tensor_digest
from editcli.storage.folders import new_folder


@dataclass(frozen=True, slots=True)
class Finished:
    """A run that ended, with its model still in memory."""

    opened: Opened
    report: RunReport
    weights: Mapping[Site, Tensor]
    """The edited weights as they are read out; empty where no model was saved."""
    idle: bool = False
    """Whether every edit was true already, so that those weights are the base's."""

    def read_out(self) -> None:
        """Give the model in memory the weights as they are read out."""
        self.opened.stream.session.restore(self.weights)

    def export(self, folder: Path) -> None:
        """Write the model as it is read out into a new folder; one that came from no files writes itself."""
        if not self.weights:
            raise StateError("there is no edit in this model, so there is nothing to save")
        loaded, recipe = self.opened.base.loaded, self.opened.job.planned.recipe
        with writing(folder), new_folder(folder) as partial:
            if loaded.weights is not None:
                loaded.model.save_pretrained(partial)
                loaded.tokens.tokenizer.save_pretrained(partial)
                return
            tensors, trusted = stored_tensors(self.opened.stream.session, self.weights), recipe.trust_remote_code
            write_verified(loaded.checkpoint, partial, tensors, idle=self.idle, trust_remote_code=trusted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far the edits of a run came."""

    read: int
    """Edits that were read, whatever became of them."""
    before: Evaluation | None = None
    """The edits measured on the unedited model."""
    status: str = DONE
    stopped_by: str | None = None


def finish(opened: Opened, progress: Progress) -> Finished:
    """Save the model as it is read out, verify the folder, write the record and the card."""
    planned, store, context = opened.job.planned, opened.job.store, opened.job.context
    stream, trusted = opened.stream, planned.recipe.trust_remote_code
    idle = all(report.idle for report in stream.reports)
    with stream.session.read_out(planned.stabilizers) as weights:
        in_force = stream.in_force
        after = opened.base.measuring.evaluate(in_force) if in_force else None
        with context.clock.spent("save"):
            tensors = stored_tensors(stream.session, weights) if stream.position.requests and store.writes else {}
            if tensors:
                opened.record.provenance["weights"] = {name: tensor_digest(one) for name, one in tensors.items()}
            loaded, reporter = opened.base.loaded, context.reporter
            verified = store.save(loaded, tensors, idle=idle, trusted=trusted, reporter=reporter)
        report = _report(opened, progress, weights, after)
    tell_result(report, planned, verified, reporter)
    opened.record.complete(report, stream, after)
    if progress.stopped_by:
        reporter.warn(progress.stopped_by)
    return Finished(opened, report, weights if stream.position.requests else {}, idle)


def leave(opened: Opened, progress: Progress) -> Finished:
    """Record a run that was interrupted; its model folder is written once it is resumed and done."""
    report = _report(opened, progress, opened.stream.session.masters(), None)
    opened.record.write(report)
    step = opened.stream.position.step
    opened.job.context.reporter.note(f"Interrupted after {step} batches; 'editcli apply' with --resume continues")
    return Finished(opened, report, {})


def end(opened: Opened, progress: Progress) -> Finished:
    """Leave a run that can be resumed, and finish any other."""
    resumable = progress.status == INTERRUPTED and opened.job.store.kept
    return leave(opened, progress) if resumable else finish(opened, progress)


def _report(opened: Opened, progress: Progress, weights: Mapping[Site, Tensor], after: Evaluation | None) -> RunReport:
    store = opened.job.store
    ending = Ending(
        status=progress.status,
        stopped_by=progress.stopped_by,
        before=progress.before,
        after=after,
        weights=weights,
        seconds=opened.job.context.clock.rounded(),
        out=str(store.folder.out) if store.kept else "",
        read=progress.read,
        rejected=opened.record.rejections.all,
    )
    return report_run(opened.job.planned, opened.stream, ending)
