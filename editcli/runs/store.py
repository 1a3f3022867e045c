"""The folder of a run but for the journal of its stream: the record, the card, the outcomes and the refused edits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editcli.evaluation.metrics import Evaluation
from editcli.records.edits import Rejections
from editcli.records.state import RunFolder
from editcli.reporting import RunReport
from editcli.runs.card import model_card
from editcli.runs.context import RUNNING
from editcli.runs.output import CARD
from editcli.runs.planning import Planned
from editcli.runs.stream import Stream
from editcli.settings.recipe import Recipe
from editcli.statistics.moments import SecondMoments
from editcli.storage.files import write_bytes


@dataclass(frozen=True, slots=True)
class RunStore:
    """Where one process keeps a run: rank 0 ``writes`` the folder, and the other ranks read it.

    A run in memory is not ``kept``: its folder is only a name.
    """

    folder: RunFolder
    writes: bool = True
    kept: bool = True


@dataclass(frozen=True, slots=True)
class Record:
    """The record of a run, written when it starts and when it ends."""

    store: RunStore
    planned: Planned
    moments: SecondMoments
    rejections: Rejections
    provenance: dict[str, Any]

    def begin(self, earlier: Mapping[str, Any]) -> None:
        """Record that the model folder is not up to date; the figures of an ``earlier`` record stay."""
        before = earlier.get("provenance", {})
        pilots = {**self.provenance["edits"], "limit": self.planned.recipe.limit}
        self.provenance["pilots"] = before.get("pilots", pilots)
        if "reference" in before:
            # An editor that keeps what it made of the reference text does not read it again.
            self.provenance["reference"] = before["reference"]
        if self.store.kept:
            self._note_reference()
        if self.store.writes:
            self._write({**earlier, "status": RUNNING})
            self.rejections.write()

    def write(self, report: RunReport) -> None:
        """Write the record of a run that ended, or that can be resumed."""
        if self.store.writes:
            self._write(report.to_json())

    def complete(self, report: RunReport, stream: Stream, after: Evaluation | None) -> None:
        """Write what lies beside the weights: refused edits, outcomes, the card and, last, the record."""
        if not self.store.writes:
            return
        folder = self.store.folder
        self.rejections.write(report.rejected)
        if after is not None:
            write_bytes(folder.outcomes, "".join(f"{line}\n" for line in after.raw_lines()).encode())
        figures = stream.reports[-1].metrics.get("diagnostics", {}) if stream.reports else {}
        card = model_card(report, self.planned.recipe, self.provenance, diagnostics=figures)
        write_bytes(folder.out / CARD, card.encode())
        self.provenance["consumed"] = stream.position.consumed
        self.write(report)

    def _note_reference(self) -> None:
        """Record the reference text once a component has asked for second moments, which only some do."""
        if self.moments.asked and "reference" not in self.provenance:
            self.provenance["reference"] = self.moments.record(self.planned.sites)

    def _write(self, fields: Mapping[str, Any]) -> None:
        self._note_reference()
        recipe = portable(self.planned.recipe)
        self.store.folder.write_record({**fields, "recipe": recipe, "provenance": self.provenance})


def portable(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as JSON, with the files that an undo or a repetition needs named from the root.

    A preset is recorded by its content, which was read when the run began: its file may be tuned again.
    """
    record = recipe.to_json()
    files = {name: record[name] for name in ("edits", "corpus", "stats") if record[name]}
    return {**record, **{name: str(Path(file).absolute()) for name, file in files.items() if Path(file).is_file()}}
