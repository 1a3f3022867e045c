"""Open a run: claim its folder, load its model, and bring its stream to where the first batch follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

from editcli.distributed.team import agree_on_models
from editcli.editing.curvature import GradientMoments
from editcli.editing.session import PilotSource
from editcli.editing.shared_session import TeamSession
from editcli.errors import StateError
from editcli.models.loading import LoadedModel, choose_device
from editcli.records.decoding import encode
from editcli.records.edits import Rejections
from editcli.records.faults import table_faults
from editcli.records.record import Provenance, record_to_resume
from editcli.records.recovery import Recovered, recover, remaining
from editcli.records.state import RunFolder, StreamSettings
from editcli.reporting import Reporter
from editcli.requests.schema import EditRequest
from editcli.runs import planning
from editcli.runs.context import Context, writing
from editcli.runs.identity import statistics_file, stream_settings
from editcli.runs.measuring import Measuring
from editcli.runs.outcome import provenance
from editcli.runs.output import remove_old
from editcli.runs.planning import Planned
from editcli.runs.remarks import tell_differences, tell_missing
from editcli.runs.resuming import completed
from editcli.runs.store import Record, RunStore
from editcli.runs.stream import Stack, Stream
from editcli.statistics.moments import SecondMoments

Batches = Sequence[Sequence[EditRequest]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The batches of a run, and how its stream gets to where the first of them follows."""

    recovered: Recovered | None = None
    """The stream in the folder; None for a new one."""
    file: str | None = None
    """The edits file that is read; None keeps all refused edits that are recorded."""
    done: Sequence[EditRequest] = ()
    """The edits in force before the first batch."""
    batches: Batches
    pilots: PilotSource
    """The edits that components calibrate on."""
    start: Callable[[Stream, Callable[[], None]], None]
    """Brings a stream to where the first batch follows, and calls its second argument to mark the run as running."""


def new(planned: Planned, store: RunStore) -> Schedule:
    """Calibrate on the base, replace what is in the folder, and write all edits of the plan."""

    def start(stream: Stream, mark: Callable[[], None]) -> None:
        stream.prepare()
        if planned.recipe.overwrite and store.writes:
            remove_old(store.folder)
        stream.begin()
        mark()

    pilots = planning.pilot_source(planned.requests)
    return Schedule(file=planned.file.source, batches=_batched(planned, planned.requests), pilots=pilots, start=start)


def resume(planned: Planned, recovered: Recovered, reporter: Reporter) -> Schedule:
    """Restore the last snapshot; write what an undo left to be written again, then the edits that were not read yet."""

    def start(stream: Stream, mark: Callable[[], None]) -> None:
        lost = stream.resume(recovered)
        if lost:
            reporter.note(f"{lost} batches since the last snapshot are done again")
        mark()

    requests = remaining(recovered, planned.requests)
    if planned.recipe.limit is None:
        tell_missing(recovered, planned.file, planned.recipe.folder, reporter)
    return Schedule(
        recovered=recovered,
        file=planned.file.source,
        done=recovered.requests,
        batches=[*recovered.redo, *_batched(planned, requests)],
        pilots=planning.pilot_source(planned.requests),
        start=start,
    )


def _batched(planned: Planned, requests: Sequence[EditRequest]) -> Batches:
    size = planned.batch_size
    return [requests[start : start + size] for start in range(0, len(requests), size)]


def new_or_resumed(planned: Planned, store: RunStore, context: Context) -> Schedule:
    """Return whether a run starts or continues, after the lock was taken; all ranks must see the same stream."""
    # The lock is taken before any rank reads, and all ranks have read before anything is changed.
    context.team.exchange("the lock")
    recovered, out = None, store.folder.out
    if store.folder.is_run and planned.recipe.resume:
        recovered = recover_completed(store, context)
    elif store.folder.is_run and not planned.recipe.overwrite:
        raise StateError(f"another process has made a run in {out} meanwhile; choose another --out")
    at = recovered and (recovered.snapshot.step, recovered.snapshot.consumed, recovered.snapshot.line)
    context.team.agree(f"what is in {out}", at, remedy="put --out on a disk that all machines share")
    return new(planned, store) if recovered is None else resume(planned, recovered, context.reporter)


def recover_completed(store: RunStore, context: Context) -> Recovered:
    """Read the stream in a folder, with the options that were added since it was begun."""
    recovered = recover(store.folder)
    snapshot = recovered.snapshot
    settings = completed(_settings(recovered, store), context.plugins)
    # A setting that this version does not know is compared as it was saved.
    return replace(recovered, snapshot=replace(snapshot, settings={**snapshot.settings, **settings.to_json()}))


def _settings(recovered: Recovered, store: RunStore) -> StreamSettings:
    return StreamSettings.from_json(recovered.snapshot.settings, store.folder.state)


@dataclass(frozen=True, slots=True)
class Job:
    """A run that is ready to start: its plan, its model, its folder and its schedule."""

    planned: Planned
    open: Callable[[], LoadedModel]
    store: RunStore
    schedule: Schedule
    context: Context


@dataclass(frozen=True, slots=True)
class Base:
    """The unedited model of a run, and what is recorded of where it comes from."""

    loaded: LoadedModel
    provenance: Provenance
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
    with writing(planned.recipe.folder), store.folder.locked() if store.writes else nullcontext():
        open_model = partial(planning.open_planned, planned)
        yield Job(planned, open_model, store, new_or_resumed(planned, store, context), context)


def load(job: Job) -> Base:
    """Load the model of a run."""
    context = job.context
    with context.clock.spent("load"), context.reporter.phase("Loading the model", 2, "steps") as advance:
        loaded = job.planned.focused(job.open())
        advance(1)
        origin = provenance(job.planned, context.plugins, loaded)
        advance(1)
    agree_on_models(context.team, [origin.base.fingerprint], encode(origin.plugins))
    return Base(loaded, origin, Measuring.of(job.planned, loaded, context))


def begin(job: Job, base: Base) -> Opened:
    """Start the stream of a run, or restore the one that it continues."""
    planned, store, schedule = job.planned, job.store, job.schedule
    with job.context.clock.spent("prepare"):
        stream, moments = _stream(job, base)
        recovered, earlier = schedule.recovered, None
        written = [request.id for request in recovered.requests] if recovered else ()
        rejections = Rejections(
            store.folder, planned.rejected, file=schedule.file, written=written, resumed=planned.recipe.resume
        )
        record = Record(store, planned, moments, rejections, base.provenance)
        if recovered:
            earlier = record_to_resume(store.folder.out)
            for fault in table_faults(rejections.earlier):
                job.context.reporter.warn(fault)
            if earlier is not None:
                tell_differences(earlier.provenance, base.provenance, job.context.reporter)
        schedule.start(stream, lambda: record.begin(earlier))
    return Opened(job, base, stream, record)


def _stream(job: Job, base: Base) -> tuple[Stream, SecondMoments]:
    """Return the stream of a run, neither started nor resumed, and its second moments."""
    planned, context, store = job.planned, job.context, job.store
    recipe, measuring = planned.recipe, base.measuring
    moments = _moments(job, base)
    session = _session(job, base, moments)
    settings = stream_settings(planned, session, moments, base.provenance).to_json()
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
        prefixes=_settings(recovered, job.store).prefixes if recovered else None,
        second_moment=moments,
        gradient_moment=GradientMoments(base.loaded, planned.sites, moments, team=job.context.team),
        cache=moments.files,
        pilots=job.schedule.pilots,
        save_dtype=planning.save_dtype(recipe),
        reporter=job.context.reporter,
        seed=recipe.seed,
        solve_device=None if recipe.solve_device is None else choose_device(recipe.solve_device),
    )
