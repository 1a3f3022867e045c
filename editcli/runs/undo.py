"""Take back batches or single edits of a run: rebuild what came before from the base and the recorded factors.

Nothing that was optimised is optimised again unless an edit in the middle goes: what followed it depended on it. The
journal gains a line; no line is rewritten, and the segments of what was taken back stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from editcli.editing.session import PilotSource
from editcli.errors import EditError, OptionError, StateError, near_miss
from editcli.plugin.manager import Plugins
from editcli.records.journal import BatchRecord
from editcli.records.record import PilotsRef, RunRecord
from editcli.records.recovery import Recovered, recover
from editcli.records.requirements import check_resumable
from editcli.records.state import RunFolder
from editcli.reporting import Reporter, RunReport
from editcli.requests.reader import EditFile, read_edits
from editcli.requests.schema import EditRequest
from editcli.runs import planning
from editcli.runs.apply import run
from editcli.runs.context import Context, writing
from editcli.runs.opening import Job, Schedule, recover_completed
from editcli.runs.planning import Planned
from editcli.runs.store import RunStore
from editcli.runs.stream import Stream
from editcli.settings.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Undo:
    """Take back a part of the run in folder ``run``: one of the three, else the last batch."""

    run: str
    batches: int | None = None
    """The number of last batches to take back."""
    to: int | None = None
    """Undo all batches after this step; 0 is the base model."""
    edits: tuple[str, ...] = ()
    """Ids of edits to leave out; what followed them is computed again."""

    def __post_init__(self) -> None:
        if sum((self.batches is not None, self.to is not None, bool(self.edits))) > 1:
            raise OptionError("--batches, --to and --edit exclude each other; choose one")
        if self.batches is not None and self.batches < 1:
            raise OptionError("--batches must be at least 1")


@dataclass(frozen=True, slots=True)
class UndoPlan:
    """The batches and edits that an undo takes back and computes again."""

    out: str
    step: int
    """Batches that stay as they are."""
    undone: int
    """Batches that are taken back."""
    edits: tuple[str, ...]
    """Ids that are not in the model afterwards."""
    removed: dict[str, str]
    """Ids that are left out for good, with their digests."""
    redo: tuple[int, ...]
    """Journal lines of the batches that are computed again."""
    redone_edits: int
    seconds: float
    """The time that computing them took at first."""

    def to_json(self) -> dict[str, Any]:
        """Return the plan as a JSON object."""
        return {
            "out": self.out,
            "batches": {"kept": self.step, "undone": self.undone, "redone": len(self.redo)},
            "edits": {"undone": list(self.edits), "redone": self.redone_edits},
            "seconds": round(self.seconds, 3),
        }


def plan_undo(request: Undo) -> UndoPlan:
    """Return what :func:`undo` would do; loads no model and writes nothing."""
    return _plan(request, recover(_run_folder(request)))


def undo(request: Undo, plugins: Plugins, reporter: Reporter | None = None) -> RunReport:
    """Take back what ``request`` says, save and verify the model again; raises an :class:`EditError`."""
    context, folder = Context.of(plugins, reporter), _run_folder(request)
    store = RunStore(folder)
    with writing(folder.out), folder.locked():
        recovered = recover_completed(store, context)
        plan = _plan(request, recovered)
        planned, record = _planned(folder, recovered, plan, context)
        schedule = _rewind(planned, store, recovered, plan, record, context)
        return run(Job(planned, partial(planning.open_planned, planned), store, schedule, context)).report


def _rewind(
    planned: Planned,
    store: RunStore,
    recovered: Recovered,
    plan: UndoPlan,
    record: RunRecord,
    context: Context,
) -> Schedule:
    """Replay the batches that stay, and write again those of which only single edits are taken back."""

    def start(stream: Stream, mark: Callable[[], None]) -> None:
        mark()
        if not stream.rewind(recovered, plan.step, removed=plan.removed, redo=plan.redo):
            warning = "this machine rounds differently than the one that made the run; last digits may differ"
            context.reporter.warn(warning)

    return Schedule(
        recovered=recovered,
        done=_remaining(recovered, plan),
        batches=_again(store.folder, recovered, plan),
        pilots=_pilots(planned, record, context.plugins),
        start=start,
    )


def _pilots(planned: Planned, record: RunRecord, plugins: Plugins) -> PilotSource:
    """Return the edits that a run calibrated on when it began, where they can still be read."""
    edits = record.provenance.edits
    pilots = record.provenance.pilots or PilotsRef(file=edits.file, sha256=edits.sha256)
    try:
        file = read_edits(pilots.file, skip_bad=True, limit=pilots.limit, formats=plugins.formats())
        if file.sha256 == pilots.sha256:
            return planning.pilot_source(planning.usable(file, planned.gate, skip_bad=True)[0])
    except EditError:
        # The file is gone or was changed, which only matters to a component that needs it.
        pass
    lost = f"{pilots.file}, which the run calibrated on, is gone or was changed; put it back to undo"
    return PilotSource((), pilots.file, lost)


def _run_folder(request: Undo) -> RunFolder:
    folder = RunFolder(Path(request.run))
    folder.require()
    return folder


def _plan(request: Undo, recovered: Recovered) -> UndoPlan:
    live, waiting = recovered.live, recovered.waiting
    if request.edits:
        step = _first(request.edits, [*live, *waiting], request.run) - 1
    else:
        step = request.to if request.to is not None else len(live) - (request.batches or 1)
    if not 0 <= step <= len(live) or (step == len(live) and not request.edits):
        asked = f"back to {step}" if step >= 0 else f"back by {request.batches}"
        raise StateError(f"{request.run} has {len(live)} batches in force; there is no way {asked} from there")
    later = [*live[step:], *waiting] if request.edits else []
    # An undo that was killed has taken its edits out already, and is finished by asking for it again.
    digests = dict(recovered.removed)
    digests |= {r.id: r.digest for r in (*recovered.requests, *(r for batch in recovered.redo for r in batch))}
    again = [entry for entry in later if _left(entry, recovered, request.edits)]
    undone = [edit for entry in live[step:] for edit in entry.edits] if not request.edits else request.edits
    return UndoPlan(
        out=request.run,
        step=step,
        undone=len(live) - step,
        edits=tuple(undone),
        removed={edit: digests[edit] for edit in request.edits},
        redo=tuple(entry.sequence for entry in again),
        redone_edits=sum(len(_left(entry, recovered, request.edits)) for entry in again),
        seconds=sum(entry.duration or 0.0 for entry in again),
    )


def _first(edits: Sequence[str], batches: Sequence[BatchRecord], run: str) -> int:
    """Return the number, from 1, of the first batch that holds one of ``edits``; all must be in some batch."""
    places = {edit: number for number, entry in reversed([*enumerate(batches, start=1)]) for edit in entry.edits}
    for edit in edits:
        if edit not in places:
            raise StateError(f"{run} has no edit {edit!r} in force{near_miss(edit, places)}")
    return min(places[edit] for edit in edits)


def _left(entry: BatchRecord, recovered: Recovered, edits: Sequence[str]) -> list[str]:
    gone = {*edits, *recovered.removed}
    return [edit for edit in entry.edits if edit not in gone]


def _remaining(recovered: Recovered, plan: UndoPlan) -> Sequence[EditRequest]:
    return recovered.requests[: sum(len(entry.edits) for entry in recovered.live[: plan.step])]


def _again(folder: RunFolder, recovered: Recovered, plan: UndoPlan) -> list[Sequence[EditRequest]]:
    gone = {**recovered.removed, **plan.removed}
    known = {entry.sequence: entry for entry in (*recovered.live, *recovered.waiting)}
    batches = (folder.read_requests(known[sequence]) for sequence in plan.redo)
    return [[request for request in batch if gone.get(request.id) != request.digest] for batch in batches]


def _planned(folder: RunFolder, recovered: Recovered, plan: UndoPlan, context: Context) -> tuple[Planned, RunRecord]:
    """Plan with the recipe of the run, on the edits that its segments hold."""
    record = folder.read_record()
    if record is None:
        raise StateError(f"{folder.record} is gone, which says how the run was made; restore it from a backup")
    recipe, base, edits = Recipe.from_json(record.recipe), record.provenance.base, record.provenance.edits
    if recipe.model is not None and base.folder is not None and Path(base.folder).is_dir():
        recipe = replace(recipe, model=base.folder)
    recipe = replace(recipe, out=str(folder.out), resume=True, overwrite=False, parallel="data")
    again = (request for batch in _again(folder, recovered, plan) for request in batch)
    file = EditFile(edits.file, edits.sha256, (*_remaining(recovered, plan), *again), (), ())
    check_resumable(recipe.folder, context.plugins)
    recipe.check(context.plugins)
    planned = planning.check(recipe, context.plugins, context.reporter, file=file)
    return replace(planned, source=replace(planned.source, name=base.name)), record
