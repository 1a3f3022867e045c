"""The main job: read edits, edit a model, save and verify it. Needs nothing but a recipe and the loaded plugins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from editcli.distributed.team import Team, agree_on_inputs, agree_on_models
from editcli.editing.session import ModelSession, PilotSource
from editcli.editing.shared_session import TeamSession
from editcli.errors import FileError, GuardError, ModelError, OptionError, StateError
from editcli.evaluation.metrics import Evaluation, evaluate
from editcli.models.loading import choose_device, refuse_unopenable
from editcli.plugin.interfaces import Site
from editcli.plugin.manager import Plugins
from editcli.records.decoding import encode
from editcli.records.edits import Rejections
from editcli.records.record import DONE, INTERRUPTED, RUNNING, STOPPED, PilotsRef, Reference, RunRecord
from editcli.records.recovery import Recovered, recover, remaining
from editcli.records.state import RunFolder, StreamSettings
from editcli.reporting import Reporter, RunReport, Silent
from editcli.requests.schema import EditRequest
from editcli.requests.superseding import supersede
from editcli.runs import planning
from editcli.runs.card import model_card
from editcli.runs.clock import Clock
from editcli.runs.conversation import with_clock
from editcli.runs.duration import warn_of_long_work
from editcli.runs.folder import run_folder
from editcli.runs.identity import plan_parts, statistics_file, stream_settings
from editcli.runs.interrupts import Interrupts
from editcli.runs.outcome import Ending, efficacy, missed_targets, provenance, report_run, rounded_differently
from editcli.runs.output import CARD, Verified, remove_old, stored_tensors, verify, write_model
from editcli.runs.planning import Planned
from editcli.runs.remarks import tell_conflicts, tell_known, tell_missing, tell_sinks
from editcli.runs.resuming import completed
from editcli.runs.retention import METRICS, sampled
from editcli.runs.stream import Stack, Stream
from editcli.settings.guards import needs_retained
from editcli.settings.recipe import Recipe
from editcli.statistics.moments import SecondMoments
from editcli.storage.checkpoint import Checkpoint
from editcli.storage.files import tensor_digest, write_bytes, write_lines


def apply(recipe: Recipe, plugins: Plugins, reporter: Reporter | None = None, *, team: Team | None = None) -> RunReport:
    """Run ``recipe`` from the edits file to the saved, verified folder; raises an :class:`EditError`.

    Every process of ``team`` calls this alike and returns the same report; rank 0 alone writes and reports.
    """
    team = team or Team()
    reporter = reporter if reporter is not None and team.leads else Silent()
    clock = Clock()
    if recipe.parallel == "tensor" and team.size == 1:
        raise OptionError("--parallel tensor splits a model over several processes; start them with torchrun")
    if recipe.edits == "-" and team.size > 1:
        raise OptionError(f"{team.size} processes cannot share the standard input; pass the edits as a file")
    recipe = with_clock(recipe.with_preset_read(), team)
    with clock.spent("load"):
        planned = planning.check(recipe, plugins, reporter)
    tell_conflicts(planned, reporter)
    # Nobody looks whether the folder is free any more once rank 0 has taken it.
    agree_on_inputs(team, "recipe and edits", plan_parts(planned))
    folder = run_folder(recipe.folder, team)
    with writing(recipe.folder), folder.locked():
        return Run(planned, folder, plugins, reporter, clock, team=team).go()


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn a full disk, a missing permission or a full device into one sentence."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        what = "use a smaller --dtype or targets.batch_tokens, --device cpu or --device-map auto"
        raise ModelError(f"the memory of the device is full; {what}") from error
    except FileError:
        # What cannot be read says so itself.
        raise
    except OSError as error:
        place, reason = error.filename or out, error.strerror or str(error)
        raise StateError(f"cannot write {place}: {reason}; free some space or choose another --out") from error


class Run:
    """One run of ``apply``, in the order of its methods; :meth:`begin` decides what is written."""

    def __init__(
        self,
        planned: Planned,
        folder: RunFolder,
        plugins: Plugins,
        reporter: Reporter,
        clock: Clock,
        *,
        team: Team | None = None,
    ):
        self.planned, self.folder, self.plugins = planned, folder, plugins
        self.recipe, self.reporter, self.clock = planned.recipe, reporter, clock
        self.team = team or Team()
        self.status, self.stopped_by = DONE, None
        self.prefixes: Sequence[str] | None = None
        self.read = 0
        # The lock is taken before anybody reads, and everybody has read before anything is changed.
        self.team.exchange("the lock")
        self.recovered = self._recover()
        snapshot = self.recovered.snapshot if self.recovered else None
        found = (snapshot.step, snapshot.consumed, snapshot.line) if snapshot else None
        self.team.agree(f"what is in {folder.out}", found, remedy="put --out on a disk that all machines share")
        written = {request.id for request in self.recovered.requests} if self.recovered else ()
        self.rejections = Rejections(
            folder, planned.rejected, file=self.edits_file, written=written, resumed=planned.recipe.resume
        )

    def go(self) -> RunReport:
        """Load, edit, save, report."""
        self._announce()
        self.open()
        todo = self.todo()
        ahead = [request for batch in todo for request in batch]
        tell_sinks(self.loaded, self.planned, ahead, self.reporter)
        if self.team.leads and self.team.divided:
            warn_of_long_work(self.loaded, self.planned, ahead, self.reporter, parts=self.team.parts)
        before = self._evaluate(supersede([*self.done, *(request for batch in todo for request in batch)])[0])
        with self.clock.spent("prepare"):
            stream = self.stream()
            self.begin(stream)
        self.read = stream.taken + sum(map(len, todo)) + len(self.rejections.all)
        with Interrupts(self.reporter) as interrupts:
            self._edit(stream, todo, interrupts)
        stream.save()
        return self.leave(stream, before) if self.status == INTERRUPTED else self.finish(stream, before)

    def leave(self, stream: Stream, before: Evaluation | None) -> RunReport:
        """Record a run that was interrupted; its model folder is written when it is resumed and done."""
        report = self._report(stream, before, None, stream.session.masters())
        self._write_record(report)
        step = stream.position.step
        self.reporter.note(f"Interrupted after {step} batches; 'editcli apply' with --resume goes on")
        return report

    @property
    def edits_file(self) -> str | None:
        """The name of the file that is read."""
        return self.planned.file.source

    @property
    def done(self) -> Sequence[EditRequest]:
        """The edits that an earlier run left in force."""
        return self.recovered.requests if self.recovered else ()

    def open(self) -> None:
        """Load the model."""
        with self.clock.spent("load"), self.reporter.phase("Loading the model", 2, "steps") as advance:
            self.loaded = planning.open_planned(self.planned)
            advance(1)
            self.provenance = provenance(self.planned, self.plugins, self.loaded)
            advance(1)
        agree_on_models(self.team, [self.provenance.base.fingerprint], encode(self.provenance.plugins))

    def todo(self) -> list[Sequence[EditRequest]]:
        """Return the batches to write: what an undo left to be written again, then what was not read yet."""
        requests, size = self.planned.requests, self.planned.batch_size
        if self.recovered:
            requests = remaining(self.recovered, requests)
            if self.recipe.limit is None:
                tell_missing(self.recovered, self.planned.file, self.folder.out, self.reporter)
        batches = [requests[start : start + size] for start in range(0, len(requests), size)]
        return [*(self.recovered.redo if self.recovered else ()), *batches]

    def begin(self, stream: Stream) -> None:
        """Start the stream, or go on with the one in the folder."""
        if self.recovered is None:
            stream.prepare()
            if self.recipe.overwrite and self.team.leads:
                remove_old(self.folder)
            stream.begin()
        else:
            self.compare_versions()
            lost = stream.resume(self.recovered)
            if lost:
                self.reporter.note(f"{lost} batches since the last snapshot are done again")
        self.mark_running()

    def mark_running(self) -> None:
        """Say in the run's record that its model folder is not up to date; keep its figures so far."""
        record = self._old_record() if self.recovered else None
        earlier = record.provenance if record else None
        edits = self.provenance.edits
        began = PilotsRef(file=edits.file, sha256=edits.sha256, limit=self.recipe.limit)
        # An editor that keeps what it made of the reference text does not read it again.
        pilots, reference = (earlier.pilots, earlier.reference) if earlier else (None, None)
        self.provenance = replace(self.provenance, pilots=pilots or began, reference=reference)
        self._note_reference()
        recipe = self._portable_recipe()
        running = RunRecord(status=RUNNING, recipe=recipe, provenance=self.provenance)
        if record is not None:
            running = replace(record, status=RUNNING, recipe=recipe, provenance=self.provenance)
        if self.team.leads:
            self.folder.write_record(running.to_json())
            self.rejections.write()

    def _note_reference(self) -> None:
        """Record the reference text once a component has asked for second moments, which only some do."""
        if self.moments.asked and self.provenance.reference is None:
            reference = Reference(**self.moments.record(self.planned.sites))
            self.provenance = replace(self.provenance, reference=reference)

    def _portable_recipe(self) -> dict[str, Any]:
        """Return the recipe with the files that an undo or a repetition needs named from the root.

        A preset is recorded by its content, which :func:`apply` read: its file may be tuned again.
        """
        record = self.recipe.to_json()
        files = {name: record[name] for name in ("edits", "corpus", "stats") if record[name]}
        return {**record, **{name: str(Path(file).absolute()) for name, file in files.items() if Path(file).is_file()}}

    def _recover(self) -> Recovered | None:
        """Read the stream that is to be gone on with; None for a new one."""
        if self.recipe.resume and self.folder.is_run:
            recovered = recover(self.folder)
            snapshot = recovered.snapshot
            settings = completed(StreamSettings.from_json(snapshot.settings, self.folder.state), self.plugins)
            self.prefixes = settings.prefixes
            # What this version does not know is compared as it was saved.
            return replace(recovered, snapshot=replace(snapshot, settings={**snapshot.settings, **settings.to_json()}))
        if self.folder.is_run and not self.recipe.overwrite:
            raise StateError(f"another process has made a run in {self.folder.out} meanwhile; choose another --out")
        return None

    def _old_record(self) -> RunRecord | None:
        try:
            return self.folder.read_record()
        except StateError as error:
            # Nothing that a stream needs is in this file alone, and the end of the run writes it anew.
            self.reporter.warn(f"{error}; it is written anew")
            return None

    def compare_versions(self) -> None:
        """Tell what changed since the stream was begun: what may round differently, and the size of batches."""
        record = self._old_record()
        if record is None:
            return
        for text in rounded_differently(record.provenance, self.provenance):
            self.reporter.warn(text)
        before, now = record.provenance.batch_size, self.planned.batch_size
        if before not in (None, now):
            self.reporter.note(f"Batches of {now} from here on; they were of {before}")

    def _announce(self) -> None:
        planned = self.planned
        if self.recipe.model is None and self.recovered is None:
            self.reporter.note("No --model given: editing the small model that ships with editcli")
        if planned.footprint is not None and planned.footprint.fits:
            # What it is for stands in the plan that --dry-run prints.
            self.reporter.note(f"Memory: {planned.footprint.summary()}")
        if planned.preset.label == "guessed" and planned.preset.file is None:
            layers = ", ".join(map(str, planned.layers))
            what = "no preset for this model" if planned.preset.match is None else "untuned preset"
            remedy = "'editcli tune' searches for better settings"
            self.reporter.warn(f"{what} ({planned.preset.name}): layers {layers} are a guess; {remedy}")
        for part in planned.stabilizers:
            if not planned.editor.needs_values and not {"updates", "weights"} & set(part.acts_on):
                self.reporter.warn(
                    f"{part.name} acts on target values, and {planned.editor.name} has none: it changes nothing here"
                )

    def stream(self) -> Stream:
        """Return the stream of this run, neither started nor resumed."""
        recipe, planned = self.recipe, self.planned
        moments = SecondMoments(
            self.loaded,
            options=planned.statistics,
            corpus=recipe.corpus,
            file=None if recipe.stats is None else statistics_file(recipe.stats),
            reporter=self.reporter,
            seed=recipe.seed,
            team=self.team,
        )
        moments.plan(planned.sites)
        self.moments = moments
        session = TeamSession(
            self.loaded,
            planned.layers,
            team=self.team,
            options=planned.targets,
            prefixes=self.prefixes,
            second_moment=moments,
            cache=moments.files,
            pilots=self.pilots(),
            save_dtype=None if recipe.save_dtype == "auto" else getattr(torch, recipe.save_dtype),
            reporter=self.reporter,
            seed=recipe.seed,
            solve_device=None if recipe.solve_device is None else choose_device(recipe.solve_device),
        )
        settings = stream_settings(planned, session, moments, self.provenance).to_json()
        self.team.agree("settings", settings, remedy="start them with the same command and files")
        diagnostics = planning.diagnostics(recipe, self.plugins)
        return Stream(
            session,
            Stack(planned.editor, planned.stabilizers, diagnostics),
            self.folder,
            settings=settings,
            guards=planned.guards,
            measure=self._efficacy if recipe.evaluate else None,
            retained=self._retained if self._watches_retention else None,
            retained_every=1 if needs_retained(planned.guards) else recipe.eval_every or 1,
            checkpoint_every=recipe.checkpoint_every,
            team=self.team,
        )

    def pilots(self) -> PilotSource:
        """Return what components calibrate on."""
        return planning.pilot_source(self.planned.requests)

    def _edit(self, stream: Stream, batches: Sequence[Sequence[EditRequest]], interrupts: Interrupts) -> None:
        with self.reporter.phase("Editing", sum(map(len, batches)), "edits") as advance:
            for batch in batches:
                # A signal reaches the processes at different moments, and they must stop after the same batch.
                if self.team.any("interrupts", interrupts.asked):
                    break
                try:
                    report = stream.apply(batch)
                except GuardError as error:
                    self.status, self.stopped_by = STOPPED, str(error)
                    return
                for phase, seconds in report.seconds.items():
                    self.clock.seconds[phase] += seconds
                advance(len(batch))
        if self.team.any("interrupts", interrupts.asked):
            self.status = INTERRUPTED

    def finish(self, stream: Stream, before: Evaluation | None) -> RunReport:
        """Save the model as it is read out, verify the folder, write the record and the card."""
        applied, _ = supersede(stream.position.requests, given_up=stream.dropped)
        with stream.session.read_out(self.planned.stabilizers) as weights:
            after = self._evaluate(applied) if applied else None
            with self.clock.spent("save"):
                verified = self._saved(stream, weights)
            report = self._report(stream, before, after, weights)
        tell_known(report, self.reporter)
        missed = missed_targets(report.targets, self.planned.targets)
        if missed:
            self.reporter.warn(missed)
        for name in verified.unchanged if verified and verified.changed else ():
            self.reporter.warn(f"{name} did not change: its update is smaller than the saved dtype can hold")
        if self.team.leads:
            self.document(stream, report, after)
        if self.stopped_by:
            self.reporter.warn(self.stopped_by)
        return report

    def _saved(self, stream: Stream, weights: Mapping[Site, torch.Tensor]) -> Verified | None:
        if not self.team.leads:
            return None
        if not stream.position.requests:
            return self._save_base()
        # Where every edit was true already, the base's weights are the result.
        idle = all(report.idle for report in stream.reports)
        return self.save(stream.session, weights, idle=idle)

    def document(self, stream: Stream, report: RunReport, after: Evaluation | None) -> None:
        """Write what goes beside the weights: refused edits, outcomes, the card and, last, the record."""
        self.rejections.write(report.rejected)
        if after is not None:
            write_lines(self.folder.outcomes, after.raw())
        seen = stream.reports[-1].diagnostics if stream.reports else {}
        card = model_card(report, self.recipe, self.provenance, diagnostics=seen)
        write_bytes(self.folder.out / CARD, card.encode())
        self.provenance = replace(self.provenance, consumed=stream.position.consumed)
        self._write_record(report)

    def save(
        self, session: ModelSession, weights: Mapping[Site, torch.Tensor], *, idle: bool = False
    ) -> Verified | None:
        """Write the model folder, verify it, and remember the hashes; ``idle`` if nothing was asked that changes it."""
        base = self.loaded.checkpoint
        tensors = stored_tensors(session, weights)
        digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
        self.provenance = replace(self.provenance, weights=digests)
        with self.reporter.phase("Saving", 3, "steps") as advance:
            write_model(base, self.folder.out, tensors)
            advance(1)
            verified = verify(Checkpoint(self.planned.source.folder), self.folder.out, tensors, idle=idle)
            advance(1)
            refuse_unopenable(self.folder.out, trust_remote_code=self.recipe.trust_remote_code)
            advance(1)
        return verified

    def _save_base(self) -> None:
        """Put the base's weights where an undo took everything back; a run that never saved any gets none."""
        base = self.loaded.checkpoint
        if all((self.folder.out / name).is_file() for name in base.files):
            write_model(base, self.folder.out, {})

    def _evaluate(self, requests: Sequence[EditRequest]) -> Evaluation | None:
        if not self.recipe.evaluate:
            return None
        with self.clock.spent("eval"):
            metrics = ("counterfact",)
            return evaluate(self.loaded, requests, metrics=metrics, reporter=self.reporter, team=self.team)

    def _efficacy(self, requests: Sequence[EditRequest]) -> Mapping[str, float | None]:
        """Measure efficacy alone: what is asked after every batch must be cheap."""
        bare = [replace(r, paraphrase_prompts=(), neighborhood_prompts=(), generation_prompts=()) for r in requests]
        found = self._evaluate(bare)
        return {} if found is None else efficacy(found)

    @property
    def _watches_retention(self) -> bool:
        asked = self.recipe.eval_every is not None or needs_retained(self.planned.guards)
        return self.recipe.evaluate and asked

    def _retained(self, requests: Sequence[EditRequest]) -> Mapping[str, float | int | None]:
        """Measure a fixed sample of the edits so far: always the same ones, as far as they have been applied."""
        asked = sampled(requests, self.planned.requests, self.recipe.seed)
        found = self._evaluate(asked) if asked else None
        return {} if found is None else {**{name: getattr(found, name) for name in METRICS}, "edits": len(asked)}

    def _report(
        self, stream: Stream, before: Evaluation | None, after: Evaluation | None, weights: Mapping[Site, torch.Tensor]
    ) -> RunReport:
        ending = Ending(
            status=self.status,
            stopped_by=self.stopped_by,
            before=before,
            after=after,
            weights=weights,
            seconds=self.clock.rounded(),
            out=str(self.folder.out),
            read=self.read,
            rejected=self.rejections.all,
        )
        return report_run(self.planned, stream, ending)

    def _write_record(self, report: RunReport) -> None:
        self._note_reference()
        record = {**report.to_json(), "recipe": self._portable_recipe(), "provenance": self.provenance.to_json()}
        self.folder.write_record(record)
