"""The history of a run, read from its folder: base, batches, edits and how much each edit wrote."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from torch import Tensor

from editcli.errors import EditError, StateError
from editcli.records.decoding import UnreadableError
from editcli.records.journal import BatchRecord, live_batches
from editcli.records.record import RecordedSite, RunRecord
from editcli.records.state import RunFolder, requests_of
from editcli.requests.schema import EditRequest
from editcli.requests.superseding import Superseded, supersede
from editcli.storage.checkpoint import opened_tensors
from editcli.storage.files import read_metadata
from editcli.storage.opening import is_there


@dataclass(frozen=True, slots=True)
class TopEdit:
    """One edit with the Frobenius norm of what it wrote, over all sites; ``prompt`` and ``target`` as far as known."""

    id: str
    step: int
    norm: float
    prompt: str = ""
    target: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the documented JSON object."""
        return {"id": self.id, "step": self.step, "norm": self.norm, "prompt": self.prompt, "target": self.target}


@dataclass(frozen=True, slots=True)
class History:
    """The record and the batches of one run folder; ``problem`` names the part that could not be read."""

    folder: RunFolder
    record: RunRecord | None
    batches: tuple[BatchRecord, ...]
    problem: str | None = None

    @property
    def bases(self) -> tuple[str, ...]:
        """Where the model that was edited may be: the folder it was read from, then the name it was given."""
        return self.record.provenance.base.places if self.record else ()

    @property
    def converts(self) -> bool:
        """Whether the user let the base be converted from pickle files."""
        return self.record is not None and self.record.recipe.get("convert_bin") is True

    @property
    def saved_sites(self) -> tuple[RecordedSite, ...]:
        """The edited matrices as the finished run recorded them."""
        return (self.record and self.record.sites) or ()

    @property
    def sites(self) -> Mapping[str, int]:
        """The edited modules with their layers, in the order in which they are written."""
        recorded = [*self.saved_sites, *(site for batch in self.batches for site in batch.sites)]
        return {site.module: site.layer for site in recorded}

    @property
    def layers(self) -> tuple[int, ...]:
        """The edited layers, ascending; empty when the record does not tell."""
        return tuple(sorted(set(self.sites.values())))

    def series(self, module: str, figure: Literal["ratio", "drift", "update_norm"]) -> list[float | None]:
        """Return a site's figure after each batch; None where it was not written."""
        sites = [batch.site(module) for batch in self.batches]
        return [None if site is None else getattr(site, figure) for site in sites]

    def recorded_ratio(self, module: str) -> float | None:
        """Return a site's R_n as the finished run recorded it."""
        return next((site.ratio for site in self.saved_sites if site.module == module), None)

    def requests(self) -> dict[str, EditRequest]:
        """Return the edits by id as the segments record them, in order; unreadable segments are left out."""
        return {request.id: request for batch in self.batches for request in self._requests(batch)}

    def superseded(self) -> list[Superseded]:
        """Return the edits in force that a later one contradicts, each with that one."""
        given_up = {edit for batch in self.batches for edit in batch.dropped}
        return supersede(self.requests().values(), given_up=given_up)[1]

    def top_edits(self, count: int | None = 10) -> tuple[TopEdit, ...]:
        """Return the ``count`` edits that wrote most (None: all), where one column of the factors is one edit."""
        edits = [edit for batch in self.batches for edit in self._norms(batch)]
        return tuple(sorted(edits, key=lambda edit: -edit.norm)[:count])

    def _norms(self, batch: BatchRecord) -> Iterator[TopEdit]:
        requests = self._requests(batch)
        squares = self._squares(batch, len(requests))
        if squares is None:
            return
        for request, square in zip(requests, squares.tolist(), strict=True):
            yield TopEdit(request.id, batch.step, square**0.5, request.prompt, request.target_new)

    def _squares(self, batch: BatchRecord, edits: int) -> Tensor | None:
        """Return each edit's ||D||_F^2 over all sites; None for an update without one column per edit."""
        total: Tensor | None = None
        path = self._segment(batch)
        if path is None:
            return None
        try:
            with opened_tensors(path, folder=self.folder.out) as file:
                for name in file.keys():  # noqa: SIM118 - the file is no mapping.
                    if name.endswith(".dense"):
                        return None
                    if not name.endswith(".left"):
                        continue
                    left, right = (file.get_tensor(f"{name.removesuffix('left')}{side}") for side in ("left", "right"))
                    if any(side.ndim != 2 or side.shape[1] != edits for side in (left, right)):
                        return None
                    square = left.double().square().sum(0) * right.double().square().sum(0)
                    total = square if total is None else total + square
        except (SafetensorError, OSError, EditError):  # A lost segment costs its rows of the table, not the whole view.
            return None
        return total if total is not None and bool(total.isfinite().all()) else None

    def _requests(self, batch: BatchRecord) -> tuple[EditRequest, ...]:
        path = self._segment(batch)
        if path is None:
            return ()
        try:
            return requests_of(read_metadata(path, folder=self.folder.out))
        except (SafetensorError, OSError, UnreadableError, EditError):  # As above.
            return ()

    def _segment(self, batch: BatchRecord) -> Path | None:
        path = self.folder.updates / batch.segment
        return path if batch.segment and is_there(path) else None


def read_history(folder: Path) -> History | None:
    """Read the run recorded in an output folder; None when the folder holds no run of editcli."""
    run = RunFolder(folder)
    if not run.is_run:
        return None
    record = None
    try:
        record = run.read_record()
        batches = live_batches([entry for entry, _ in run.read_journal()])
    except StateError as error:
        return History(run, record, (), str(error))
    return History(run, record, tuple(batches))
