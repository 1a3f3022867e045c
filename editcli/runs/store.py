"""The folder of a run but for the journal of its stream: the record, the card, the outcomes and the refused edits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from editcli.evaluation.metrics import Evaluation
from editcli.records.edits import Rejections
from editcli.records.record import RUNNING, PilotsRef, Provenance, Reference, RunRecord
from editcli.records.state import RunFolder
from editcli.reporting import RunReport
from editcli.runs.card import model_card
from editcli.runs.output import CARD
from editcli.runs.planning import Planned
from editcli.runs.stream import Stream
from editcli.settings.recipe import Recipe
from editcli.statistics.moments import SecondMoments
from editcli.storage.files import write_bytes, write_lines
from editcli.storage.packing import Stored, stored_digest


@dataclass(frozen=True, slots=True)
class RunStore:
    """Where one process keeps a run: rank 0 ``writes`` the folder, and the other ranks read it.

    A run in memory is not ``kept``: its folder is only a name.
    """

    folder: RunFolder
    writes: bool = True
    kept: bool = True


@dataclass(slots=True)
class Record:
    """The record of a run, written when it starts and when it ends; its provenance grows with the run."""

    store: RunStore
    planned: Planned
    moments: SecondMoments
    rejections: Rejections
    provenance: Provenance

    def begin(self, earlier: RunRecord | None) -> None:
        """Record that the model folder is not up to date; the figures of an ``earlier`` record stay."""
        edits = self.provenance.edits
        began = PilotsRef(file=edits.file, sha256=edits.sha256, limit=self.planned.recipe.limit)
        before = earlier.provenance if earlier else None
        # An editor that keeps what it made of the reference text does not read it again.
        pilots, reference = (before.pilots, before.reference) if before else (None, None)
        self.provenance = replace(self.provenance, pilots=pilots or began, reference=reference)
        if self.store.kept:
            self._note_reference()
        if self.store.writes:
            recipe, made = portable(self.planned.recipe), self.provenance
            running = RunRecord(status=RUNNING, recipe=recipe, provenance=made)
            if earlier is not None:
                running = replace(earlier, status=RUNNING, recipe=recipe, provenance=made)
            self.store.folder.write_record(running.to_json())
            self.rejections.write()

    def note_weights(self, tensors: Mapping[str, Stored]) -> None:
        """Record the hash of every edited tensor as it is stored."""
        self.provenance = replace(self.provenance, weights={name: stored_digest(one) for name, one in tensors.items()})

    def write(self, report: RunReport) -> None:
        """Write the record of a run that ended, or that can be resumed."""
        if self.store.writes:
            self._note_reference()
            made = {"recipe": portable(self.planned.recipe), "provenance": self.provenance.to_json()}
            self.store.folder.write_record({**report.to_json(), **made})

    def complete(self, report: RunReport, stream: Stream, after: Evaluation | None) -> None:
        """Write what lies beside the weights: refused edits, outcomes, the card and, last, the record."""
        if not self.store.writes:
            return
        folder = self.store.folder
        self.rejections.write(report.rejected)
        if after is not None:
            write_lines(folder.outcomes, after.raw())
        figures = stream.reports[-1].diagnostics if stream.reports else {}
        card = model_card(report, self.planned.recipe, self.provenance, diagnostics=figures)
        write_bytes(folder.out / CARD, card.encode())
        kernels = tuple(sorted(stream.session.engine.used))
        self.provenance = replace(self.provenance, consumed=stream.position.consumed, kernels=kernels)
        self.write(report)

    def _note_reference(self) -> None:
        """Record the reference text once a component has asked for second moments, which only some do."""
        if self.moments.asked and self.provenance.reference is None:
            reference = Reference(**self.moments.record(self.planned.sites))
            self.provenance = replace(self.provenance, reference=reference)


def portable(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as JSON, with the files that an undo or a repetition needs named from the root.

    A preset is recorded by its content, which was read when the run began: its file may be tuned again.
    """
    record = recipe.to_json()
    files = {name: record[name] for name in ("edits", "corpus", "stats") if record[name]}
    return {**record, **{name: str(Path(file).absolute()) for name, file in files.items() if Path(file).is_file()}}
