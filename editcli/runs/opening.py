"""Open a run: where its model comes from, what it replays, and its stream as it stands before the first batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from editcli.distributed.team import agree_on_models
from editcli.editing.session import PilotSource
from editcli.editing.shared_session import TeamSession
from editcli.errors import StateError
from editcli.models.loading import LoadedModel, choose_device
from editcli.records.edits import Rejections
from editcli.records.recovery import Recovered, recover, remaining
from editcli.records.state import RunFolder
from editcli.requests.schema import EditRequest
from editcli.runs import planning
from editcli.runs.context import Context, writing
from editcli.runs.identity import statistics_file, stream_settings
from editcli.runs.measuring import Measuring
from editcli.runs.outcome import provenance
from editcli.runs.output import write_verified
from editcli.runs.planning import Planned
from editcli.runs.remarks import tell_differences, tell_missing
from editcli.runs.resuming import completed
from editcli.runs.store import Record, RunStore
from editcli.runs.stream import Stack, Stream
from editcli.statistics.moments import SecondMoments
from editcli.storage.checkpoint import Checkpoint

Batches = Sequence[Sequence[EditRequest]]


class ModelProvider(Protocol):
    """Where the model of a run comes from."""

    def open(self) -> LoadedModel:
        """Return the unedited model."""
        ...

    def write(self, folder: Path, tensors: Mapping[str, Tensor], *, idle: bool) -> None:
        """Write the edited model as a plain folder; ``tensors`` are the edited ones by their stored names."""
        ...


@dataclass(frozen=True, slots=True)
class FromFiles:
    """The model of a plan, loaded from its folder."""

    planned: Planned

    def open(self) -> LoadedModel:
        """Load the model."""
        return planning.open_planned(self.planned)

    def write(self, folder: Path, tensors: Mapping[str, Tensor], *, idle: bool) -> None:
        """Copy the base's files with the edited tensors replaced, and verify the copy."""
        trusted = self.planned.recipe.trust_remote_code
        write_verified(Checkpoint(self.planned.source.folder), folder, tensors, idle=idle, trust_remote_code=trusted)


class Schedule(Protocol):
    """What a run replays before its first batch, and what it writes."""

    @property
    def recovered(self) -> Recovered | None:
        """The stream in the folder; None for a new one."""
        ...

    @property
    def file(self) -> str | None:
        """The edits file that is read; None where none is."""
        ...

    @property
    def done(self) -> Sequence[EditRequest]:
        """The edits in force before the first batch."""
        ...

    def batches(self) -> Batches:
        """Return the batches to write."""
        ...

    def pilots(self) -> PilotSource:
        """Return the edits that components calibrate on."""
        ...

    def begin(self, stream: Stream, mark: Callable[[], None]) -> None:
        """Bring the stream to where the first batch follows; ``mark`` records that the run is under way."""
        ...


@dataclass(frozen=True, slots=True)
class New:
    """A run that starts from the base and writes all edits of its plan."""

    planned: Planned
    store: RunStore
    recovered: None = None
    done: Sequence[EditRequest] = ()

    @property
    def file(self) -> str:
        """The plan's edits file."""
        return self.planned.file.source

    def batches(self) -> Batches:
        """Return all edits, batch by batch."""
        return batched(self.planned, self.planned.requests)

    def pilots(self) -> PilotSource:
        """Return the plan's edits and the bundled ones."""
        return planning.pilot_source(self.planned.requests)

    def begin(self, stream: Stream, mark: Callable[[], None]) -> None:
        """Calibrate on the base, then replace what is in the folder."""
        stream.prepare()
        if self.planned.recipe.overwrite:
            self.store.clear()
        stream.begin()
        mark()


@dataclass(frozen=True, slots=True)
class Resume:
    """A run that continues the stream in its folder."""

    planned: Planned
    store: RunStore
    context: Context
    recovered: Recovered

    @property
    def file(self) -> str:
        """The plan's edits file."""
        return self.planned.file.source

    @property
    def done(self) -> Sequence[EditRequest]:
        """The edits that the earlier run left in force."""
        return self.recovered.requests

    def batches(self) -> Batches:
        """Return the batches that an undo left to be written again, then the edits that were not read yet."""
        requests = remaining(self.recovered, self.planned.requests)
        if self.planned.recipe.limit is None:
            tell_missing(self.recovered, self.planned.file, self.store.folder.out, self.context.reporter)
        return [*self.recovered.redo, *batched(self.planned, requests)]

    def pilots(self) -> PilotSource:
        """Return the plan's edits and the bundled ones."""
        return planning.pilot_source(self.planned.requests)

    def begin(self, stream: Stream, mark: Callable[[], None]) -> None:
        """Restore the last snapshot."""
        lost = stream.resume(self.recovered)
        if lost:
            self.context.reporter.note(f"{lost} batches since the last snapshot are done again")
        mark()


def batched(planned: Planned, requests: Sequence[EditRequest]) -> Batches:
    """Cut edits into batches of the plan's size."""
    size = planned.batch_size
    return [requests[start : start + size] for start in range(0, len(requests), size)]


def schedule(planned: Planned, store: RunStore, context: Context) -> Schedule:
    """Return whether a run starts or continues, after the lock was taken; all ranks must see the same stream."""
    # The lock is taken before any rank reads, and all ranks have read before anything is changed.
    context.team.exchange("the lock")
    recovered = None
    if store.folder.is_run:
        if planned.recipe.resume:
            recovered = recover_completed(store, context)
        elif not planned.recipe.overwrite:
            raise StateError(f"another process has made a run in {store.folder.out} meanwhile; choose another --out")
    at = recovered and (recovered.snapshot.step, recovered.snapshot.consumed, recovered.snapshot.line)
    where = f"what is in {store.folder.out}"
    context.team.agree(where, at, remedy="put --out on a disk that all machines share")
    return New(planned, store) if recovered is None else Resume(planned, store, context, recovered)


def recover_completed(store: RunStore, context: Context) -> Recovered:
    """Read the stream in a folder, with the options that were added since it was begun."""
    recovered = recover(store.folder)
    settings = completed(recovered.snapshot.settings, context.plugins)
    return replace(recovered, snapshot=replace(recovered.snapshot, settings=settings))


@dataclass(frozen=True, slots=True)
class Job:
    """A run that is ready to start: its plan, its model, where it is kept and what it replays."""

    planned: Planned
    model: ModelProvider
    store: RunStore
    schedule: Schedule
    context: Context


@dataclass(frozen=True, slots=True)
class Base:
    """The unedited model of a run, and what is recorded of where it comes from."""

    loaded: LoadedModel
    provenance: dict[str, Any]
    measuring: Measuring


@dataclass(frozen=True, slots=True)
class Opened:
    """A run whose stream takes batches."""

    job: Job
    base: Base
    stream: Stream
    record: Record


@contextmanager
def claimed(planned: Planned, context: Context) -> Iterator[Job]:
    """Hold the folder of a plan, which rank 0 alone writes, and yield the run that starts or continues there."""
    store = RunStore(RunFolder(planned.recipe.folder), writes=context.team.leads)
    with writing(planned.recipe.folder), store.locked():
        yield Job(planned, FromFiles(planned), store, schedule(planned, store, context), context)


def load(job: Job) -> Base:
    """Load the model of a run."""
    context = job.context
    with context.clock.spent("load"), context.reporter.phase("Loading the model", 2, "steps") as advance:
        loaded = job.model.open()
        advance(1)
        origin = provenance(job.planned, context.plugins, loaded)
        advance(1)
    agree_on_models(context.team, [origin["base"]["fingerprint"]], origin["plugins"])
    return Base(loaded, origin, Measuring(job.planned, loaded, context))


def begin(job: Job, base: Base) -> Opened:
    """Start the stream of a run, or restore the one that it continues."""
    planned, store, schedule = job.planned, job.store, job.schedule
    with job.context.clock.spent("prepare"):
        stream, moments = _stream(job, base)
        rejections = Rejections(
            store.folder,
            planned.rejected,
            file=schedule.file,
            written=[request.id for request in schedule.recovered.requests] if schedule.recovered else (),
            resumed=planned.recipe.resume,
        )
        record = Record(store, planned, moments, rejections, base.provenance)
        earlier: dict[str, Any] = {}
        if schedule.recovered:
            earlier = _earlier_record(job)
            tell_differences(earlier.get("provenance", {}), base.provenance, job.context.reporter)
        schedule.begin(stream, lambda: record.begin(earlier))
    return Opened(job, base, stream, record)


def _earlier_record(job: Job) -> dict[str, Any]:
    try:
        return job.store.folder.read_record()
    except StateError as error:
        # The stream needs nothing that is in this file alone, and the end of the run writes it anew.
        job.context.reporter.warn(f"{error}; it is written anew")
        return {}


def _stream(job: Job, base: Base) -> tuple[Stream, SecondMoments]:
    """Return the stream of a run, neither started nor resumed, and its second moments."""
    planned, context, store = job.planned, job.context, job.store
    recipe, measuring = planned.recipe, base.measuring
    moments = _moments(job, base)
    session = _session(job, base, moments)
    settings = stream_settings(planned, session, moments, base.provenance)
    context.team.agree("settings", settings, remedy="start them with the same command and files")
    stream = Stream(
        session,
        Stack(planned.editor, planned.stabilizers, planning.diagnostics(recipe, context.plugins)),
        store.folder,
        settings=settings,
        writes=store.writes,
        guards=planned.guards,
        measure=measuring.efficacy if recipe.evaluate else None,
        retained=measuring.retained if measuring.retained_every else None,
        retained_every=measuring.retained_every or 1,
        checkpoint_every=recipe.checkpoint_every,
        team=context.team,
    )
    return stream, moments


def _moments(job: Job, base: Base) -> SecondMoments:
    planned, context, recipe = job.planned, job.context, job.planned.recipe
    moments = SecondMoments(
        base.loaded,
        options=planned.statistics,
        corpus=recipe.corpus,
        file=None if recipe.stats is None else statistics_file(recipe.stats),
        reporter=context.reporter,
        seed=recipe.seed,
        team=context.team,
    )
    moments.plan(planned.sites)
    return moments


def _session(job: Job, base: Base, moments: SecondMoments) -> TeamSession:
    planned, recipe, recovered = job.planned, job.planned.recipe, job.schedule.recovered
    return TeamSession(
        base.loaded,
        planned.layers,
        team=job.context.team,
        options=planned.targets,
        prefixes=recovered.snapshot.settings["prefixes"] if recovered else None,
        second_moment=moments,
        cache=moments.files,
        pilots=job.schedule.pilots(),
        save_dtype=None if recipe.save_dtype == "auto" else getattr(torch, recipe.save_dtype),
        reporter=job.context.reporter,
        seed=recipe.seed,
        solve_device=None if recipe.solve_device is None else choose_device(recipe.solve_device),
    )
