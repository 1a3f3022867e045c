"""A stream of batches into one model, journaled batch by batch and resumable from its last snapshot.

The order of writes for batch n is: segment, then (when due) snapshot, then journal line. A crash between any two leaves
a state that :meth:`Stream.resume` recognises: what the journal does not name did not happen, and what the snapshot does
not hold is done again, with the same result. :class:`Stack` holds the components of a run: calibrated together, saved
together, given back together.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from editcli.distributed.team import Team
from editcli.editing import feedback
from editcli.editing.pipeline import Written, commit, edit_batch, lost_again
from editcli.editing.session import ModelSession
from editcli.errors import PluginError, StateError
from editcli.formatting import finite
from editcli.heap import give_back
from editcli.linalg.ratios import jump, ratio
from editcli.plugin.interfaces import (
    Component,
    Diagnostic,
    Editor,
    Problem,
    Site,
    Stabilizer,
    State,
    Update,
    update_of,
)
from editcli.plugin.plain import plain
from editcli.records.journal import START, BatchRecord, SiteFigures, UndoRecord, consume, journal_line
from editcli.records.recovery import Recovered, recover
from editcli.records.state import RunFolder, Segment, Snapshot, weights_digest
from editcli.requests.schema import EditRequest
from editcli.requests.superseding import supersede
from editcli.runs.remembered import RememberedKeys
from editcli.settings.guards import Guard, refuse_nonfinite, with_default


@dataclass(frozen=True, slots=True)
class Stack:
    """The components of a run, in the order in which they act."""

    editor: Editor
    stabilizers: tuple[Stabilizer, ...] = ()
    diagnostics: tuple[Diagnostic, ...] = ()

    @property
    def parts(self) -> Mapping[str, Component]:
        """All components, by the name under which their state is saved."""
        steering = (self.editor, *self.stabilizers)
        named: dict[str, Component] = {f"component/{part.name}": part for part in steering}
        return {**named, **{f"diagnostic/{part.name}": part for part in self.diagnostics}}

    @property
    def remembering(self) -> tuple[Stabilizer, ...]:
        """The stabilizers whose state advances with every batch."""
        return tuple(part for part in self.stabilizers if part.remembers)

    @property
    def watching(self) -> tuple[Diagnostic, ...]:
        """The diagnostics whose figures depend on earlier batches."""
        return tuple(part for part in self.diagnostics if part.remembers)

    @property
    def rebuilt(self) -> tuple[Component, ...]:
        """The components whose state an undo rebuilds batch by batch, from that of the unedited model."""
        return (self.editor, *self.remembering, *self.watching)

    def prepare(self, session: ModelSession) -> None:
        """Let every component measure the unedited model."""
        for part in self.parts.values():
            part.prepare(session)
        self.settle(session)
        session.forget_moments()

    def settle(self, session: ModelSession) -> None:
        """Have every component hold its state in the layout in which a resumed run will find it.

        Kernels round differently on a transposed matrix, so a stream that is resumed would part from one that was not.
        """
        for part in self.parts.values():
            tensors, json = part.state()
            if not all(tensor.is_contiguous() for tensor in tensors.values()):
                part.load_state(session, State({key: tensor.contiguous() for key, tensor in tensors.items()}, json))

    def state(self) -> State:
        """Return the state of all components: tensors by ``<component>/<key>``, JSON values by component."""
        states = {name: part.state() for name, part in self.parts.items()}
        tensors = {f"{name}/{key}": tensor for name, state in states.items() for key, tensor in state.tensors.items()}
        faults: list[str] = []
        json = plain({name: dict(state.json) for name, state in states.items() if state.json}, faults)
        if faults:
            raise PluginError(f"the state of a component cannot be saved, because JSON cannot hold it: {faults[0]}")
        return State(tensors, json)

    def load_state(self, session: ModelSession, saved: State, *, afresh: Sequence[Component] = ()) -> None:
        """Give every component its state back, on the unedited model; those in ``afresh`` are prepared instead."""
        for name, part in self.parts.items():
            prefix = f"{name}/"
            tensors = {key[len(prefix) :]: value for key, value in saved.tensors.items() if key.startswith(prefix)}
            state = State(tensors, saved.json.get(name, {}))
            # A diagnostic that was installed after the snapshot has no state in it.
            if part in afresh or (isinstance(part, Diagnostic) and not any(state)):
                part.prepare(session)
                continue
            try:
                part.load_state(session, state)
            except UNFIT as error:
                raise StateError(
                    f"{name} cannot take its state from the snapshot ({error}); restore it from a backup"
                ) from error
        self.settle(session)
        session.forget_moments()


UNFIT = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError)
"""What a component may raise at a state that is not the one that it saved, besides :class:`StateError`."""
CHECKPOINT_SHARE = 0.05
"""Largest share of a run's time that snapshots may take when their spacing is left to the program."""

_REPLACED: Mapping[str, str] = {
    "base": "from a base model whose files have changed since",
    "tokenizer": "with a tokenizer that has changed since",
    "reference": "with other reference text or statistics",
}
"""Descriptions of settings that are hashes."""

_CHOSEN = ("editor", "stabilizers", "options")
"""Settings that others follow from: an editor brings its options and its layers. They are compared first."""

Measure = Callable[[Sequence[EditRequest]], Mapping[str, float | None]]


@dataclass(slots=True)
class Position:
    """The progress of a stream."""

    step: int = 0
    sequence: int = 0
    consumed: str = START
    line: str = ""
    requests: list[EditRequest] = field(default_factory=list)


class Stream:
    """Applies batches to a session and records them in a run folder, in the process that ``writes``.

    ``settings`` must be the same when the stream is resumed. ``measure`` returns the figures of a batch after it was
    written (its immediate efficacy), and ``retained``, every ``retained_every`` batches, those of all edits in force;
    both may be None. Every rank of ``team`` applies the same batches, and no batch is recorded unless all of them came
    to the same weights.
    """

    def __init__(
        self,
        session: ModelSession,
        stack: Stack,
        folder: RunFolder,
        *,
        settings: Mapping[str, Any],
        writes: bool = True,
        guards: Sequence[Guard] = (),
        measure: Measure | None = None,
        retained: Measure | None = None,
        retained_every: int = 1,
        checkpoint_every: int | None = None,
        team: Team | None = None,
    ):
        self.team = team or Team()
        self.session, self.stack, self.folder, self.writes = session, stack, folder, writes
        # As they will be read back, so that a tuple does not differ from the list that JSON makes of it.
        self.settings, self.guards = json.loads(json.dumps(dict(settings))), tuple(guards)
        self.measure, self.retained, self.retained_every = measure, retained, retained_every
        self.checkpoint_every = checkpoint_every
        self.position = Position()
        self.reports: list[BatchRecord] = []
        self._ids: set[str] = set()
        self._keys = RememberedKeys(folder, session.sites, self.team, writes=writes)
        self._base_norms = {site: float(session.baseline(site).norm()) for site in session.sites}
        self.whole = True
        """False once a batch failed half-way: memory and folder then differ, and the folder is right."""
        self._saved_step = -1
        self._saved_at = time.monotonic()
        self._save_cost = 0.0

    @property
    def taken(self) -> int:
        """How many edits the batches in force were given, with those that were superseded inside their batch."""
        return len(self.position.requests) + sum(len(report.superseded or {}) for report in self.reports)

    @property
    def dropped(self) -> dict[str, str]:
        """The edits in force that a stabilizer gave up, with the reasons: nothing was written for them."""
        return {edit: why for report in self.reports for edit, why in report.dropped.items()}

    @property
    def in_force(self) -> Sequence[EditRequest]:
        """The edits that were written and that no later one contradicts."""
        return self._in_force((), {})

    @property
    def idle(self) -> bool:
        """Whether no batch asked for anything that the model did not do already: the weights are the base's."""
        return all(report.idle for report in self.reports)

    def prepare(self) -> None:
        """Calibrate every component on the unedited model."""
        # A component may draw here too, and every rank and every repetition must draw the same.
        with self._seeded(0):
            self.stack.prepare(self.session)

    def begin(self) -> None:
        """Write the first snapshot of a prepared stream."""
        if self.writes:
            self.folder.create()
        self.save()

    def apply(self, requests: Sequence[EditRequest]) -> BatchRecord:
        """Write one batch, record it and return what happened; raises :class:`GuardError` before anything is recorded.

        Of edits that contradict each other only the last one is written.
        """
        if not requests:
            raise StateError("there is no edit in this batch")
        self._refuse(requests)
        requests, replaced = supersede(requests)
        for one in replaced:
            self.session.reporter.warn(f"{one.request.place}: the edit {one.request.id!r} is {one.reason}")
        before = self.session.masters()
        step = self.position.step + 1
        reports: dict[Site, SiteFigures] = {}

        def check(site: Site, update: Update) -> None:
            where = _where(site.module, requests)
            reports[site] = self._site_report(site, update, where=where)
            self._guard_site(site, reports[site], before[site], where=where)

        with self._seeded(step):
            outdated = self._keys.outdated(requests) if self.stack.editor.releases else ()
            written = edit_batch(
                self.session, self.stack.editor, self.stack.stabilizers, requests, check, outdated=outdated
            )
            try:
                metrics = self._measure(requests, written)
                # From here on a failure leaves components and journal apart; what is on disk stays whole.
                self.whole = False
                commit(self.session, self.stack.editor, self.stack.stabilizers, requests, written)
                self.stack.settle(self.session)
                # An evaluation or a snapshot may come next, and has better use for the memory.
                self.session.forget_reads()
                give_back()
                report = BatchRecord(
                    sequence=self.position.sequence + 1,
                    step=step,
                    edits=tuple(request.id for request in requests),
                    sites=tuple(reports.values()),
                    metrics=finite({**metrics, **self._observe(written)}),
                    superseded={one.request.id: one.by.id for one in replaced} or None,
                    **_outcome(written),
                )
                report = self._record(requests, written, report)
            except BaseException:
                self.session.restore(before)
                raise
        self.whole = True
        return report

    def save(self) -> None:
        """Write a snapshot of the stream as it stands."""
        self._refuse(())
        if self._saved_step != self.position.step:
            self._snapshot(self.position)

    def resume(self, recovered: Recovered | None = None) -> int:
        """Go on from the last snapshot; return how many batches of the journal it does not hold and are cut.

        Raises :class:`StateError` when snapshot, journal and this stream's settings do not fit together.
        """
        recovered = recovered or recover(self.folder)
        snapshot = recovered.snapshot
        self._check_settings(snapshot.settings)
        self._settle(recovered)
        # Components may measure the unedited model again, so the weights come last.
        self.stack.load_state(self.session, State(snapshot.tensors, snapshot.json))
        for site in self.session.sites:
            weight = self.session.weight(site)
            master = snapshot.master(site.module, weight.shape).to(weight.device)
            # A weight that was never written stays as it was loaded, not as it would be saved.
            if not torch.equal(master, weight):
                self.session.set_weight(site, master)
        self._take(recovered.live, recovered.requests)
        self.position = Position(
            snapshot.step, snapshot.sequence, snapshot.consumed, snapshot.line, list(recovered.requests)
        )
        self._saved_step = snapshot.step
        return recovered.lost

    def rewind(self, recovered: Recovered, step: int, *, removed: Mapping[str, str], redo: Sequence[int]) -> bool:
        """Rebuild the stream as it was after ``step`` batches, from the base and the recorded factors, and record it.

        ``removed`` (id to digest) is never to be written again, ``redo`` (journal sequences) is to be written
        again by the run that continues. Returns False when this machine rounds differently from the one of the run.
        """
        self._check_settings(recovered.snapshot.settings)
        self._settle(recovered)
        with self._seeded(0):
            saved = State(recovered.snapshot.tensors, recovered.snapshot.json)
            self.stack.load_state(self.session, saved, afresh=self.stack.rebuilt)
        live, exact = recovered.live[:step], True
        requests: list[EditRequest] = []
        with self.session.reporter.phase("Replaying", len(live), "batches") as advance:
            for entry in live:
                segment = self.folder.read_segment(entry)
                self._replay(entry.step, segment)
                exact &= entry.weights == weights_digest(self.session.masters().values())
                requests += segment.requests
                advance(1)
        sequence, consumed = recovered.snapshot.sequence + 1, consume(START, requests)
        entry = UndoRecord(
            sequence=sequence,
            step=step,
            edits=tuple(removed),
            consumed=consumed,
            removed=removed,
            redo=tuple(redo),
            undone=len(recovered.live) - step,
        )
        line = journal_line(entry, recovered.snapshot.line)
        self.position = Position(step, sequence, consumed, line, requests)
        self._take(live, requests)
        self._snapshot(self.position)
        self._append(line)
        return exact

    def _replay(self, step: int, segment: Segment) -> None:
        """Write a recorded batch again, with the same operations on the same numbers as the first time."""
        editor, session, requests = self.stack.editor, self.session, segment.requests
        problems: list[Problem] = []
        updates: dict[Site, Update] = {}
        lost: dict[Site, feedback.Lost] = {}
        fed_back = any(stabilizer.feeds_back for stabilizer in self.stack.stabilizers)
        with self._seeded(step):
            if (editor.remembers or fed_back) and not editor.needs_values:
                # Such an editor remembers its measurement of the batch, or solves from it again.
                editor.begin(session, requests)
            for site in session.sites:
                shape, device = session.weight(site).shape, session.weight(site).device
                parts = segment.update(site.module, shape).parts
                updates[site] = update_of({name: tensor.to(device) for name, tensor in parts.items()})
                problem = None
                # Earlier versions recorded the change of an editor without target values as a problem too.
                if editor.needs_values:
                    problem = segment.problem(site, shape).mapped(lambda part, device=device: part.to(device))
                    problems.append(problem)
                lost |= lost_again(session, editor, self.stack.stabilizers, site, problem, updates[site])
                session.write(site, updates[site])
            if editor.remembers:
                editor.remember(session, requests, problems)
            for stabilizer in self.stack.remembering:
                stabilizer.remember(session, problems, updates)
            feedback.keep(self.stack.stabilizers, lost)
            for diagnostic in self.stack.watching:
                diagnostic.observe(session, updates)
            self.stack.settle(session)

    @contextmanager
    def _seeded(self, step: int) -> Iterator[None]:
        """Seed each step, calibration being step 0, and restore the caller's generator afterwards."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((self.session.seed * 1_000_003 + step) % 2**63)
            yield

    def _refuse(self, requests: Sequence[EditRequest]) -> None:
        if not self.whole:
            remedy = "open it again and resume" if self.folder.is_run else "its weights are as before; open another"
            raise StateError(f"a batch of the stream in {self.folder.out} failed half-way; {remedy}")
        seen: set[str] = set()
        for request in requests:
            if request.id in self._ids or request.id in seen:
                raise request.refusal(f"the id {request.id!r} is in the stream already; give every edit its own")
            seen.add(request.id)

    def _settle(self, recovered: Recovered) -> None:
        """Make the folder hold what was recovered and nothing else."""
        if not self.writes:
            return
        self.folder.create()
        self.folder.cut_journal(recovered.lines)
        self.folder.drop_unnamed_segments(entry.segment or "" for entry in recovered.entries)

    def _take(self, live: Sequence[BatchRecord], requests: Sequence[EditRequest]) -> None:
        self.reports = list(live)
        self._ids = {request.id for request in requests}
        self._keys.take(live, requests)

    def _check_settings(self, saved: Mapping[str, Any]) -> None:
        # A setting that was not saved did not exist then.
        for name in sorted(saved, key=lambda name: (_CHOSEN.index(name) if name in _CHOSEN else len(_CHOSEN), name)):
            mine, theirs = self.settings.get(name), saved[name]
            if mine == theirs:
                continue
            if name in _REPLACED:
                raise StateError(f"{self.folder.out} was made {_REPLACED[name]}; put it back, or start a new run")
            raise StateError(
                f"{self.folder.out} was made with {name} = {_difference(theirs, mine)}, not "
                f"{_difference(mine, theirs)}; resume with the same, or start a new run in another --out"
            )

    def _measure(self, requests: Sequence[EditRequest], written: Written) -> dict[str, Any]:
        metrics: dict[str, Any] = {}
        if self.measure is not None:
            metrics["immediate"] = dict(self.measure(requests))
            self._guard("efficacy", metrics["immediate"].get("efficacy_success"), requests)
        if self.retained is not None and (self.position.step + 1) % self.retained_every == 0:
            metrics["retained"] = dict(self.retained(self._in_force(requests, written.dropped)))
            self._guard("retained", metrics["retained"].get("efficacy_success"), requests)
        return metrics

    def _in_force(self, batch: Sequence[EditRequest], dropped: Mapping[str, str]) -> Sequence[EditRequest]:
        """Return the edits in force once ``batch`` is written, but for those that are ``dropped``."""
        return supersede([*self.position.requests, *batch], given_up={**self.dropped, **dropped})[0]

    def _guard(self, figure: str, value: float | None, requests: Sequence[EditRequest]) -> None:
        for guard in self.guards:
            if value is not None:
                guard.check(figure, value, where=f"after {_named(requests)}")

    def _observe(self, written: Written) -> dict[str, Any]:
        figures: dict[str, float] = {}
        for diagnostic in self.stack.diagnostics:
            figures.update(diagnostic.observe(self.session, written.updates))
        return {"diagnostics": figures} if figures else {}

    def _guard_site(self, site: Site, report: SiteFigures, before: torch.Tensor, *, where: str) -> None:
        """Raise :class:`GuardError` where a site's figures with the update break a guard."""
        earlier = ratio(float(before.norm()), self._base_norms[site])
        figures = {"ratio": report.ratio, "drift": report.drift, "jump": jump(earlier, report.ratio)}
        for guard in with_default(self.guards, self.stack.editor.largest_jump(site)):
            for figure, value in figures.items():
                if value is not None:
                    guard.check(figure, value, where=where, remedy=self.stack.editor.tempered_by)

    def _site_report(self, site: Site, update: Update, *, where: str) -> SiteFigures:
        """Return what a site's figures will be once ``update`` is written; raises when a weight is not finite."""
        weight = self.session.weight(site)
        weight = update.added_to(weight)
        # As it would be saved: half precision overflows long before a master does.
        refuse_nonfinite("the weight", [weight.to(self.session.save_dtype(site))], where=where)
        change = weight - self.session.baseline(site)
        base = self._base_norms[site]
        return SiteFigures(
            module=site.module,
            layer=site.layer,
            ratio=ratio(float(weight.norm()), base),
            drift=ratio(float(change.norm()), base),
            update_norm=update.norm(),
        )

    def _record(self, requests: Sequence[EditRequest], written: Written, report: BatchRecord) -> BatchRecord:
        """Make one batch durable; return it as its journal line holds it."""
        weights = weights_digest(self.session.masters().values())
        self.team.agree(
            f"after batch {report.step}, the edited weights",
            weights,
            remedy="the state before it is kept; use devices and versions of one kind and continue with --resume",
        )
        segment, digest = "", ""
        if self.writes:
            segment, digest = self.folder.write_segment(report.sequence, requests, written.problems, written.updates)
        consumed = consume(self.position.consumed, requests)
        entry = replace(report, segment=segment, sha256=digest, consumed=consumed, weights=weights)
        line = journal_line(entry, self.position.line)
        if self.writes:
            self.folder.refuse_full(line)
        position = Position(entry.step, entry.sequence, consumed, line, [*self.position.requests, *requests])
        if self._due(report.step):
            self._snapshot(position)
        self._append(line)
        self.position = position
        self.reports.append(entry)
        self._ids.update(entry.edits)
        if self.stack.editor.releases:
            self._keys.add(entry, requests, written.problems)
        return entry

    def _due(self, step: int) -> bool:
        if self.checkpoint_every is not None:
            return step % self.checkpoint_every == 0
        return self._save_cost <= CHECKPOINT_SHARE * (time.monotonic() - self._saved_at)

    def _snapshot(self, position: Position) -> None:
        started = time.monotonic()
        if self.writes:
            state = self.stack.state()
            tensors = {f"master/{site.module}": weight for site, weight in self.session.masters().items()}
            tensors |= state.tensors
            self.folder.write_snapshot(
                Snapshot(
                    position.step,
                    position.sequence,
                    position.consumed,
                    tensors,
                    self.settings,
                    position.line,
                    state.json,
                )
            )
        self._saved_step, self._saved_at = position.step, time.monotonic()
        self._save_cost = self._saved_at - started

    def _append(self, line: str) -> None:
        if self.writes:
            self.folder.append(line)


def _outcome(written: Written) -> dict[str, Any]:
    """Return the fields of a journal line that say how writing a batch went."""
    return {
        "dropped": written.dropped,
        "seconds": {name: round(seconds, 6) for name, seconds in written.seconds.items()},
        "targets": written.targets,
        "released": written.released or None,
        "already_true": written.already_true or None,
    }


def _where(module: str, requests: Sequence[EditRequest]) -> str:
    return f"at {module} with {_named(requests)}"


def _named(requests: Sequence[EditRequest]) -> str:
    ids = [request.id for request in requests]
    return f"edit {ids[0]}" if len(ids) == 1 else f"edits {ids[0]} to {ids[-1]}"


def _difference(value: Any, other: Any) -> str:
    """Return a setting in short; of nested ones only what differs."""
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        value = {key: item for key, item in value.items() if key not in other or other[key] != item}
        if len(value) == 1:
            (key,) = value
            return f"{key}: {_difference(value[key], other.get(key))}"
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
