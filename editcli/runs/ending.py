"""End a run: measure and save the model as it is read out, verify it, and write the record and the card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from editcli.errors import StateError
from editcli.evaluation.metrics import Evaluation
from editcli.plugin.interfaces import Site
from editcli.records.record import DONE, INTERRUPTED
from editcli.reporting import RunReport
from editcli.runs.context import writing
from editcli.runs.opening import Opened
from editcli.runs.outcome import Ending, report_run
from editcli.runs.output import Verified, stored_tensors, write_model, write_verified
from editcli.runs.remarks import tell_result
from editcli.runs.routing import routing_drift
from editcli.storage.folders import new_folder


@dataclass(frozen=True, slots=True)
class Finished:
    """A run that ended, with its model still in memory."""

    opened: Opened
    report: RunReport
    weights: Mapping[Site, Tensor]
    """The edited weights as they are read out; empty where no model was saved."""

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
            write_verified(loaded.checkpoint, partial, tensors, idle=self.opened.stream.idle, trust_remote_code=trusted)


def finish(
    opened: Opened,
    *,
    read: int,
    before: Evaluation | None = None,
    status: str = DONE,
    stopped_by: str | None = None,
) -> Finished:
    """Save the model as it is read out, verify the folder, write the record and the card.

    ``read`` counts the edits that were read. An interrupted run that can be resumed is only recorded: its model folder
    is written once it is resumed and done.
    """
    planned, store, context = opened.job.planned, opened.job.store, opened.job.context
    stream = opened.stream

    def report(
        weights: Mapping[Site, Tensor], after: Evaluation | None, routing: Mapping[str, Any] | None = None
    ) -> RunReport:
        rejected, out = opened.record.rejections.all, str(store.folder.out) if store.kept else ""
        seconds = context.clock.rounded()
        return report_run(
            planned, stream, Ending(status, stopped_by, before, after, weights, seconds, out, read, rejected, routing)
        )

    if status == INTERRUPTED and store.kept:
        result = report(stream.session.masters(), None)
        opened.record.write(result)
        context.reporter.note(
            f"Interrupted after {stream.position.step} batches; 'editcli apply' with --resume continues"
        )
        return Finished(opened, result, {})
    with stream.session.read_out(planned.stabilizers) as weights:
        in_force = stream.in_force
        after = opened.base.measuring.evaluate(in_force) if in_force else None
        with context.clock.spent("eval"):
            routing = routing_drift(stream.session, in_force) if after is not None else None
        with context.clock.spent("save"):
            verified = _save(opened, weights) if store.writes else None
        result = report(weights, after, routing)
    tell_result(result, planned, verified, context.reporter)
    opened.record.complete(result, stream, after)
    if stopped_by:
        context.reporter.warn(stopped_by)
    return Finished(opened, result, weights if stream.position.requests else {})


def _save(opened: Opened, weights: Mapping[Site, Tensor]) -> Verified | None:
    """Write and verify the model folder; None where it is the base's."""
    job, base, out = opened.job, opened.base.loaded.checkpoint, opened.job.store.folder.out
    if opened.stream.position.requests:
        tensors, trusted = stored_tensors(opened.stream.session, weights), job.planned.recipe.trust_remote_code
        opened.record.note_weights(tensors)
        idle, reporter = opened.stream.idle, job.context.reporter
        return write_verified(base, out, tensors, idle=idle, trust_remote_code=trusted, reporter=reporter)
    # An undo took everything back. A run that never saved a model gets none.
    if all((out / name).is_file() for name in base.saved_files):
        write_model(base, out, {})
    return None
