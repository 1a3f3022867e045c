"""What a run folder tells about the run: its base, its batches, its edits and how much each of them wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from editcli.errors import EditError, StateError
from editcli.records.recovery import live_batches
from editcli.records.state import Entry, RunFolder
from editcli.storage.checkpoint import opened_tensors, read_raw_header
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
class Batch:
    """One batch of a run, as its journal line tells it."""

    step: int
    edits: tuple[str, ...]
    sites: Mapping[str, Mapping[str, Any]]
    """``{module: {"layer", "ratio", "drift", "update_norm"}}`` after the batch."""
    dropped: Mapping[str, str]
    """Ids of edits that a stabilizer gave up, with the reason."""
    metrics: Mapping[str, Any]
    """``immediate`` and ``retained`` efficacies, where they were measured."""
    diagnostics: Mapping[str, float]
    seconds: float | None
    entry: Entry


@dataclass(frozen=True, slots=True)
class History:
    """The record and the batches of one run folder; ``problem`` says what of it could not be read."""

    folder: RunFolder
    record: Mapping[str, Any]
    batches: tuple[Batch, ...]
    problem: str | None = None

    @property
    def bases(self) -> tuple[str, ...]:
        """Where the model that was edited may be: the folder it was read from, then the name it was given."""
        base = self.record.get("provenance", {}).get("base", {})
        name, commit = base.get("name"), base.get("commit")
        known = (base.get("folder"), f"{name}@{commit}" if commit else name)
        return tuple(dict.fromkeys(str(place) for place in known if place))

    @property
    def sites(self) -> Mapping[str, int]:
        """The edited modules with their layers, in the order in which they are written."""
        recorded = [
            *(self.record.get("sites") or ()),
            *(site for batch in self.batches for site in batch.sites.values()),
        ]
        return {str(site["module"]): int(site["layer"]) for site in recorded}

    @property
    def layers(self) -> tuple[int, ...]:
        """The edited layers, ascending; empty when the record does not tell."""
        return tuple(sorted(set(self.sites.values())))

    def series(self, module: str, figure: str) -> list[float | None]:
        """Return a site's ``ratio``, ``drift`` or ``update_norm`` after each batch; None where it was not written."""
        return [batch.sites.get(module, {}).get(figure) for batch in self.batches]

    def recorded_ratio(self, module: str) -> float | None:
        """Return a site's R_n as the finished run recorded it."""
        for site in self.record.get("sites") or ():
            if site.get("module") == module:
                return site.get("ratio")
        return None

    def requests(self) -> dict[str, dict[str, Any]]:
        """Return the edits by id as the segments record them, in order; unreadable segments are left out."""
        found: dict[str, dict[str, Any]] = {}
        for batch in self.batches:
            for record in self._records(batch):
                found[str(record.get("id"))] = record
        return found

    def top_edits(self, count: int | None = 10) -> tuple[TopEdit, ...]:
        """Return the ``count`` edits that wrote most (None: all), where one column of the factors is one edit."""
        found = [edit for batch in self.batches for edit in self._norms(batch)]
        return tuple(sorted(found, key=lambda edit: -edit.norm)[:count])

    def _norms(self, batch: Batch) -> Iterator[TopEdit]:
        records = self._records(batch)
        squares = self._squares(batch, len(records))
        if squares is None:
            return
        for record, square in zip(records, squares.tolist(), strict=True):
            prompt = str(record.get("prompt", "")).replace("{}", str(record.get("subject", "")), 1)
            yield TopEdit(str(record["id"]), batch.step, square**0.5, prompt, str(record.get("target_new", "")))

    def _squares(self, batch: Batch, edits: int) -> Tensor | None:
        """Return each edit's ||D||_F^2 over all sites; None where the factors have no column per edit."""
        total: Tensor | None = None
        path = self._segment(batch)
        if path is None:
            return None
        try:
            with opened_tensors(path, folder=self.folder.out) as file:
                for name in file.keys():  # noqa: SIM118 - the file is no mapping.
                    if not name.endswith(".left"):
                        continue
                    left = file.get_tensor(name).double()
                    right = file.get_tensor(f"{name.removesuffix('.left')}.right").double()
                    if left.shape[1] != edits:
                        return None
                    square = left.square().sum(0) * right.square().sum(0)
                    total = square if total is None else total + square
        except (SafetensorError, OSError, EditError):  # A lost segment costs its rows of the table, not the whole view.
            return None
        return total

    def _records(self, batch: Batch) -> list[dict[str, Any]]:
        path = self._segment(batch)
        if path is None:
            return []
        try:
            metadata = read_raw_header(path, folder=self.folder.out)[0].get("__metadata__", {})
            return list(json.loads(metadata.get("edits", "[]")))
        except (EditError, ValueError):  # As above.
            return []

    def _segment(self, batch: Batch) -> Path | None:
        path = self.folder.updates / str(batch.entry.segment)
        return path if batch.entry.segment and is_there(path) else None


@dataclass(frozen=True, slots=True)
class _Journal:
    batches: tuple[Batch, ...] = ()
    problem: str | None = None


def read_history(folder: Path) -> History | None:
    """Read the run recorded in an output folder; None when the folder is no run of ours."""
    run = RunFolder(folder)
    if not run.is_run:
        return None
    try:
        record = run.read_record()
    except StateError as error:
        return History(run, {}, (), str(error))
    journal = _read_journal(run)
    return History(run, record, journal.batches, journal.problem)


def _read_journal(run: RunFolder) -> _Journal:
    try:
        return _Journal(tuple(_batches([entry for entry, _ in run.read_journal()])))
    except StateError as error:
        return _Journal(problem=str(error))


def _batches(entries: list[Entry]) -> Iterator[Batch]:
    """Yield the batches that are still in the weights."""
    for entry in live_batches(entries):
        body, metrics = entry.body, dict(entry.body.get("metrics") or {})
        seconds = body.get("seconds") or {}
        yield Batch(
            step=entry.step,
            edits=entry.edits,
            sites={site["module"]: site for site in body.get("sites") or ()},
            dropped=body.get("dropped") or {},
            diagnostics=metrics.pop("diagnostics", {}),
            metrics=metrics,
            seconds=float(sum(seconds.values())) if seconds else None,
            entry=entry,
        )
