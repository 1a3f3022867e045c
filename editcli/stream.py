"""A stream of batches into one model, journaled batch by batch and resumable from its last snapshot.

The order of writes for batch n is: segment, then (when due) snapshot, then journal line. A crash between any two leaves
a state that :meth:`Stream.resume` recognises: what the journal does not name did not happen, and what the snapshot does
not hold is done again, with the same result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from editcli.edits import EditRequest
from editcli.errors import StateError
from editcli.guards import Guard
from editcli.interfaces import Component, Diagnostic, Editor, Site, Stabilizer, Update
from editcli.pipeline import Written, commit, edit_batch, refuse_nonfinite
from editcli.report import SiteReport
from editcli.session import ModelSession
from editcli.state import START, Entry, RunFolder, Snapshot, consume, journal_line

CHECKPOINT_SHARE = 0.05
"""Largest share of a run's time that snapshots may take when their spacing is left to the program."""

Measure = Callable[[Sequence[EditRequest]], Mapping[str, float | None]]


@dataclass(frozen=True, slots=True)
class Stack:
    """The components of a run, in the order in which they act."""

    editor: Editor
    stabilizers: tuple[Stabilizer, ...] = ()
    diagnostics: tuple[Diagnostic, ...] = ()

    @property
    def stateful(self) -> Mapping[str, Component]:
        """The components whose state is saved, by name."""
        return {part.name: part for part in (self.editor, *self.stabilizers)}

    def prepare(self, session: ModelSession) -> None:
        """Let every component measure the unedited model."""
        for part in (self.editor, *self.stabilizers, *self.diagnostics):
            part.prepare(session)
        session.forget_moments()


@dataclass(frozen=True, slots=True)
class BatchReport:
    """One batch that was kept."""

    step: int
    edits: tuple[str, ...]
    dropped: Mapping[str, str]
    sites: tuple[SiteReport, ...]
    metrics: Mapping[str, Any]
    seconds: Mapping[str, float]


@dataclass(slots=True)
class Position:
    """How far a stream has come."""

    step: int = 0
    sequence: int = 0
    consumed: str = START
    line: str = ""
    requests: list[EditRequest] = field(default_factory=list)


class Stream:
    """Applies batches to a session and records them in a run folder.

    ``settings`` is what must be the same when the stream is resumed. ``measure`` gives the figures of a batch after it
    was written (its immediate efficacy), ``retained`` those of all edits so far; both may be None.
    """

    def __init__(
        self,
        session: ModelSession,
        stack: Stack,
        folder: RunFolder,
        *,
        settings: Mapping[str, Any],
        guards: Sequence[Guard] = (),
        measure: Measure | None = None,
        retained: Measure | None = None,
        checkpoint_every: int | None = None,
    ):
        self.session, self.stack, self.folder = session, stack, folder
        self.settings, self.guards = dict(settings), tuple(guards)
        self.measure, self.retained, self.checkpoint_every = measure, retained, checkpoint_every
        self.position = Position()
        self.reports: list[BatchReport] = []
        self._base_norms = {site: float(session.baseline(site).norm()) for site in session.sites}
        self._saved_step = -1
        self._saved_at = time.monotonic()
        self._save_cost = 0.0

    def start(self) -> None:
        """Calibrate every component on the unedited model and write the first snapshot."""
        self.stack.prepare(self.session)
        self.folder.create()
        self.save()

    def apply(self, requests: Sequence[EditRequest]) -> BatchReport:
        """Write one batch, record it and return what happened; raises :class:`GuardError` before anything is kept."""
        before = self.session.masters()
        step = self.position.step + 1
        reports: dict[Site, SiteReport] = {}

        def check(site: Site, update: Update) -> None:
            refuse_nonfinite(site, update)
            reports[site] = self._site_report(site, update)
            for guard in self.guards:
                for figure in ("ratio", "drift"):
                    guard.check(figure, getattr(reports[site], figure), where=_where(site.module, requests))

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.session.seed * 1_000_003 + step)
            written = edit_batch(self.session, self.stack.editor, self.stack.stabilizers, requests, check)
            try:
                metrics = self._measure(requests)
                commit(self.session, self.stack.editor, requests, written)
            except BaseException:
                self.session.restore(before)
                raise
        report = BatchReport(
            step=step,
            edits=tuple(request.id for request in requests),
            dropped=written.dropped,
            sites=tuple(reports.values()),
            metrics={**metrics, **self._observe(written)},
            seconds=written.seconds,
        )
        self._record(requests, written, report)
        return report

    def save(self) -> None:
        """Write a snapshot of the stream as it stands."""
        if self._saved_step == self.position.step:
            return
        self._snapshot(self.position)

    def resume(self) -> list[str]:
        """Go on from the last snapshot; return the journal lines that had to be cut because no snapshot holds them.

        Raises :class:`StateError` when snapshot, journal and this stream's settings do not fit together.
        """
        snapshot = self.folder.read_snapshot()
        self._check_settings(snapshot.settings)
        lines = self.folder.read_journal()
        kept = [(entry, line) for entry, line in lines if entry.sequence <= snapshot.sequence]
        cut = [line for entry, line in lines if entry.sequence > snapshot.sequence]
        texts = [line for _, line in kept]
        if snapshot.line and (not texts or texts[-1] != snapshot.line):
            # The crash came after the snapshot and before its journal line, which the snapshot carries.
            texts.append(snapshot.line)
        self.folder.create()
        self.folder.cut_journal(texts)
        entries = [entry for entry, _ in self.folder.read_journal()]
        if (entries[-1].sequence if entries else 0) != snapshot.sequence:
            raise StateError(f"{self.folder.journal} lacks lines that the snapshot has; restore it from a backup")
        self.folder.drop_unnamed_segments([str(entry.segment) for entry in entries])
        self._restore(snapshot, live_batches(entries))
        return cut

    def _restore(self, snapshot: Snapshot, batches: Sequence[Entry]) -> None:
        tensors = snapshot.tensors
        for site in self.session.sites:
            self.session.set_weight(site, tensors[f"master/{site.module}"])
        for name, part in self.stack.stateful.items():
            prefix = f"component/{name}/"
            state = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
            part.load_state_dict(state, self.session)
        requests = [request for entry in batches for request in self.folder.read_segment(entry)[0]]
        if consume(START, requests) != snapshot.consumed:
            raise StateError(f"{self.folder.updates} does not hold the edits that the snapshot counts; restore it")
        self.position = Position(snapshot.step, snapshot.sequence, snapshot.consumed, snapshot.line, requests)
        self.reports = [_report_of(entry) for entry in batches]
        self._saved_step = snapshot.step

    def _check_settings(self, saved: Mapping[str, Any]) -> None:
        for name in sorted({*saved, *self.settings}):
            if saved.get(name) != self.settings.get(name):
                raise StateError(
                    f"{self.folder.out} was made with {name} = {_short(saved.get(name))}, not "
                    f"{_short(self.settings.get(name))}; resume with the same, or start a new run in another --out"
                )

    def _measure(self, requests: Sequence[EditRequest]) -> dict[str, Any]:
        metrics: dict[str, Any] = {}
        if self.measure is not None:
            metrics["immediate"] = dict(self.measure(requests))
            self._guard("efficacy", metrics["immediate"].get("efficacy_success"), requests)
        if self.retained is not None:
            metrics["retained"] = dict(self.retained([*self.position.requests, *requests]))
            self._guard("retained", metrics["retained"].get("efficacy_success"), requests)
        return metrics

    def _guard(self, figure: str, value: float | None, requests: Sequence[EditRequest]) -> None:
        for guard in self.guards:
            if value is not None:
                guard.check(figure, value, where=f"after {_named(requests)}")

    def _observe(self, written: Written) -> dict[str, Any]:
        figures: dict[str, float] = {}
        for diagnostic in self.stack.diagnostics:
            figures.update(diagnostic.observe(self.session, written.updates))
        return {"diagnostics": figures} if figures else {}

    def _site_report(self, site: Site, update: Update) -> SiteReport:
        """Return what a site's figures will be once ``update`` is written."""
        weight = torch.addmm(self.session.weight(site), update.left.to(self.session.weight(site)), update.right.T)
        change = weight - self.session.baseline(site)
        base = self._base_norms[site]
        return SiteReport(
            module=site.module,
            layer=site.layer,
            ratio=float(weight.norm()) / base,
            drift=float(change.norm()) / base,
            update_norm=update.norm(),
        )

    def _record(self, requests: Sequence[EditRequest], written: Written, report: BatchReport) -> None:
        sequence = self.position.sequence + 1
        segment, digest = self.folder.write_segment(sequence, requests, written.problems, written.updates)
        consumed = consume(self.position.consumed, requests)
        entry = Entry(sequence, "batch", report.step, report.edits, segment, digest, consumed, _body(report))
        line = journal_line(entry, self.position.line)
        position = Position(report.step, sequence, consumed, line, [*self.position.requests, *requests])
        if self._due(report.step):
            self._snapshot(position)
        self.folder.append(line)
        self.position = position
        self.reports.append(report)

    def _due(self, step: int) -> bool:
        if self.checkpoint_every is not None:
            return step % self.checkpoint_every == 0
        return self._save_cost <= CHECKPOINT_SHARE * (time.monotonic() - self._saved_at)

    def _snapshot(self, position: Position) -> None:
        started = time.monotonic()
        tensors = {f"master/{site.module}": weight for site, weight in self.session.masters().items()}
        for name, part in self.stack.stateful.items():
            tensors |= {f"component/{name}/{key}": value for key, value in part.state_dict().items()}
        self.folder.write_snapshot(
            Snapshot(position.step, position.sequence, position.consumed, tensors, self.settings, position.line)
        )
        self._saved_step, self._saved_at = position.step, time.monotonic()
        self._save_cost = self._saved_at - started


def live_batches(entries: Sequence[Entry]) -> list[Entry]:
    """Return the batches that are in force: an undo line takes back what came after its step."""
    live: list[Entry] = []
    for entry in entries:
        if entry.kind == "batch":
            live.append(entry)
        elif entry.kind == "undo":
            live = [batch for batch in live if batch.step <= entry.step]
    return live


def remaining(stream: Stream, requests: Sequence[EditRequest]) -> Sequence[EditRequest]:
    """Return the edits that a resumed stream has not applied yet.

    A file that starts with what was applied goes on after it; any other file is appended whole, unless it repeats
    edits of the stream, which is a mistake that would go unnoticed.
    """
    done = stream.position.requests
    if consume(START, requests[: len(done)]) == stream.position.consumed:
        return requests[len(done) :]
    known = {request.id for request in done}
    repeated = next((request for request in requests if request.id in known), None)
    if repeated is not None:
        raise StateError(
            f"{repeated.file}:{repeated.line}: the edit {repeated.id!r} is in the stream already, but this file does "
            "not start with what was applied; resume with the original file, or give new edits ids of their own"
        )
    return requests


def _body(report: BatchReport) -> dict[str, Any]:
    sites = [
        {"module": s.module, "layer": s.layer, "ratio": s.ratio, "drift": s.drift, "update_norm": s.update_norm}
        for s in report.sites
    ]
    body = {"sites": sites, "metrics": report.metrics, "dropped": report.dropped}
    return {**body, "seconds": {name: round(value, 6) for name, value in report.seconds.items()}}


def _report_of(entry: Entry) -> BatchReport:
    body = entry.body
    sites = tuple(SiteReport(**site) for site in body.get("sites", ()))
    return BatchReport(
        step=entry.step,
        edits=entry.edits,
        dropped=body.get("dropped", {}),
        sites=sites,
        metrics=body.get("metrics", {}),
        seconds=body.get("seconds", {}),
    )


def _where(module: str, requests: Sequence[EditRequest]) -> str:
    return f"at {module} with {_named(requests)}"


def _named(requests: Sequence[EditRequest]) -> str:
    ids = [request.id for request in requests]
    return f"edit {ids[0]}" if len(ids) == 1 else f"edits {ids[0]} to {ids[-1]}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
