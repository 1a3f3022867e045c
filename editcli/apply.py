"""The main job: read edits, edit a model, save and verify it. Needs nothing but a recipe and the loaded plugins."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from editcli import planning
from editcli.card import model_card
from editcli.checkpoint import Checkpoint
from editcli.edits import EditRequest
from editcli.errors import GuardError, ModelError, StateError
from editcli.evaluation import Evaluation, evaluate
from editcli.files import write_bytes
from editcli.guards import needs_retained
from editcli.interfaces import Site
from editcli.interrupts import Interrupts
from editcli.model import LoadedModel, open_model
from editcli.outcome import Ending, efficacy, provenance, report_run
from editcli.output import CARD, Verified, to_stored, verify, write_model
from editcli.planning import Plan, Planned
from editcli.plugins import Plugins
from editcli.recipe import Recipe
from editcli.report import Rejection, Reporter, RunReport, Silent
from editcli.session import ModelSession
from editcli.state import RunFolder
from editcli.statistics import SecondMoments
from editcli.stream import Stack, Stream, remaining

PHASES = ("load", "prepare", "targets", "solve", "eval", "save", "total")

DONE, STOPPED, INTERRUPTED = "done", "stopped", "interrupted"
TRIAL_EDITS = 16
"""Edits whose targets a dry run optimises to estimate the time."""


@dataclass(slots=True)
class Clock:
    """Seconds spent in each phase of a run."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def spent(self, phase: str) -> Iterator[None]:
        """Add the time of a ``with`` block to ``phase``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - started

    def rounded(self) -> dict[str, float]:
        """Return all phases and the total so far."""
        total = time.perf_counter() - self.started
        return {phase: round(spent, 3) for phase, spent in {**self.seconds, "total": total}.items()}


def apply(recipe: Recipe, plugins: Plugins, reporter: Reporter | None = None) -> RunReport:
    """Run ``recipe`` from the edits file to the saved, verified folder; raises an :class:`EditError`."""
    reporter = reporter or Silent()
    clock = Clock()
    with clock.spent("load"):
        planned = planning.check(recipe, plugins, reporter)
    folder = RunFolder(recipe.folder)
    with _writing(recipe), _tidy(folder), folder.locked():
        return _Run(planned, folder, plugins, reporter, clock).go()


def plan(recipe: Recipe, plugins: Plugins, reporter: Reporter | None = None) -> Plan:
    """Return what :func:`apply` would do; writes nothing. One small batch of targets is timed for the estimate."""
    reporter = reporter or Silent()
    planned = planning.check(recipe, plugins, reporter)
    seconds = _measured_seconds(planned, reporter) if planned.editor.needs_values else None
    statistics = sum(8 * columns * columns for _, columns in planned.shapes)
    return Plan(
        model=planned.source.name,
        preset=planned.preset.name,
        label=planned.preset.label,
        editor=planned.editor.name,
        stabilizers=tuple(part.name for part in planned.stabilizers),
        edits=len(planned.requests),
        rejected=planned.rejected,
        batches=math.ceil(len(planned.requests) / planned.batch_size),
        batch_size=planned.batch_size,
        sites=tuple(
            {"module": site.module, "layer": site.layer, "shape": list(shape)}
            for site, shape in zip(planned.sites, planned.shapes, strict=True)
        ),
        tokens=planned.target_tokens,
        bytes={
            "model": planned.model_bytes,
            "masters": planned.state_bytes,
            "statistics": statistics,
            "disk": planned.model_bytes + planned.state_bytes,
        },
        seconds=seconds,
        out=str(recipe.folder),
        warnings=planned.file.warnings,
    )


def _measured_seconds(planned: Planned, reporter: Reporter) -> float:
    loaded = _open(planned)
    session = ModelSession(loaded, planned.layers, options=planned.targets, reporter=reporter, seed=planned.recipe.seed)
    sample = planned.requests[:TRIAL_EDITS]
    started = time.perf_counter()
    session.values(sample)
    return (time.perf_counter() - started) * len(planned.requests) / len(sample)


def _open(planned: Planned) -> LoadedModel:
    recipe = planned.recipe
    return open_model(
        planned.source,
        device=recipe.device,
        dtype=recipe.dtype,
        device_map=recipe.device_map,
        families=planned.families,
        chat_template=recipe.chat_template,
        trust_remote_code=recipe.trust_remote_code,
    )


@contextmanager
def _writing(recipe: Recipe) -> Iterator[None]:
    """Turn a full disk or a missing permission into one sentence."""
    try:
        yield
    except OSError as error:
        place, reason = error.filename or recipe.folder, error.strerror or str(error)
        raise StateError(f"cannot write {place}: {reason}; free some space or choose another --out") from error


@contextmanager
def _tidy(folder: RunFolder) -> Iterator[None]:
    """Leave no output folder behind when a new run fails before its first batch."""
    existed = folder.out.exists()
    try:
        yield
    except BaseException:
        if not existed and not folder.journal.exists():
            shutil.rmtree(folder.out, ignore_errors=True)
        raise


class _Run:
    """One run of ``apply``, in the order of its methods."""

    def __init__(self, planned: Planned, folder: RunFolder, plugins: Plugins, reporter: Reporter, clock: Clock):
        self.planned, self.folder, self.plugins = planned, folder, plugins
        self.recipe, self.reporter, self.clock = planned.recipe, reporter, clock
        self.status, self.verdict = DONE, None

    def go(self) -> RunReport:
        """Load, edit, save, report."""
        self._announce()
        with self.clock.spent("load"):
            self.loaded = _open(self.planned)
            fingerprint = self.loaded.checkpoint.fingerprint()
            self.provenance = provenance(self.planned, self.plugins, fingerprint, self.loaded.input_device)
        before = self._evaluate(self.planned.requests)
        with self.clock.spent("prepare"):
            stream = self._stream()
            requests = self._begin(stream)
        with Interrupts(self.reporter) as interrupts:
            self._edit(stream, requests, interrupts)
        stream.save()
        if self.status == INTERRUPTED:
            report = self._report(stream, before, None, stream.session.masters())
            self._write_record(report)
            step = stream.position.step
            self.reporter.note(f"Interrupted after {step} batches; add --resume to the same command to go on")
            return report
        return self._finish(stream, before)

    def _announce(self) -> None:
        planned = self.planned
        if self.recipe.model is None:
            self.reporter.note("No --model given: editing the small model that ships with editcli")
        if planned.preset.label == "guessed":
            layers = ", ".join(map(str, planned.layers))
            self.reporter.warn(f"no preset for this model ({planned.preset.name}): layers {layers} are a guess")
        for part in planned.stabilizers:
            if part.acts_on_values_alone() and not planned.editor.needs_values:
                self.reporter.warn(
                    f"{part.name} acts on target values, and {planned.editor.name} has none: it changes nothing here"
                )

    def _stream(self) -> Stream:
        recipe, planned = self.recipe, self.planned
        moments = SecondMoments(
            self.loaded,
            options=planned.statistics,
            corpus=recipe.corpus,
            file=None if recipe.stats is None else _statistics_file(recipe.stats),
            reporter=self.reporter,
            seed=recipe.seed,
        )
        moments.plan(planned.sites)
        session = ModelSession(
            self.loaded,
            planned.layers,
            options=planned.targets,
            prefixes=self.folder.read_snapshot().settings["prefixes"] if recipe.resume else None,
            second_moment=moments,
            pilots=planning.pilot_source(planned.requests),
            save_dtype=None if recipe.save_dtype == "auto" else getattr(torch, recipe.save_dtype),
            reporter=self.reporter,
            seed=recipe.seed,
        )
        names = self.plugins.all("diagnostic")
        diagnostics = [planning.component(self.plugins, "diagnostic", name, recipe.settings) for name in names]
        return Stream(
            session,
            Stack(planned.editor, planned.stabilizers, tuple(diagnostics)),
            self.folder,
            settings=self._settings(session),
            guards=planned.guards,
            measure=self._efficacy if recipe.evaluate else None,
            retained=self._efficacy if recipe.evaluate and needs_retained(planned.guards) else None,
            checkpoint_every=recipe.checkpoint_every,
        )

    def _settings(self, session: ModelSession) -> dict[str, Any]:
        """Return what must be the same for a resumed stream to be the same stream."""
        planned = self.planned
        return {
            "base": self.provenance["base"]["fingerprint"],
            "editor": planned.editor.name,
            "stabilizers": [part.name for part in planned.stabilizers],
            "options": self.provenance["options"],
            "targets": self.provenance["targets"],
            "layers": list(planned.layers),
            "seed": self.recipe.seed,
            "dtype": str(next(self.loaded.model.parameters()).dtype),
            "chat_template": self.recipe.chat_template,
            "prefixes": list(session.prefixes),
        }

    def _begin(self, stream: Stream) -> Sequence[EditRequest]:
        """Start or resume the stream; return the edits that are still to be applied."""
        if self.recipe.resume:
            stream.resume()
            return remaining(stream, self.planned.requests)
        if self.recipe.overwrite:
            _remove_old(self.folder)
        stream.start()
        record = {"status": "running", "recipe": self.recipe.to_json(), "provenance": self.provenance}
        self.folder.write_record(record)
        return self.planned.requests

    def _edit(self, stream: Stream, requests: Sequence[EditRequest], interrupts: Interrupts) -> None:
        size = self.planned.batch_size
        with self.reporter.phase("Editing", len(requests), "edits") as advance:
            for start in range(0, len(requests), size):
                if interrupts.asked:
                    self.status = INTERRUPTED
                    return
                batch = requests[start : start + size]
                try:
                    report = stream.apply(batch)
                except GuardError as error:
                    self.status, self.verdict = STOPPED, str(error)
                    return
                for phase, seconds in report.seconds.items():
                    self.clock.seconds[phase] += seconds
                advance(len(batch))

    def _finish(self, stream: Stream, before: Evaluation | None) -> RunReport:
        """Save the model as it is read out, verify the folder, write the record and the card."""
        applied = stream.position.requests
        with stream.session.read_out(self.planned.stabilizers) as weights:
            after = self._evaluate(applied) if applied else None
            with self.clock.spent("save"):
                verified = self._save(stream.session, weights) if applied else None
            report = self._report(stream, before, after, weights)
        for name in verified.unchanged if verified else ():
            self.reporter.warn(f"{name} did not change: its update is smaller than the saved dtype can hold")
        self._write_rejected(report.rejected)
        write_bytes(self.folder.out / CARD, model_card(report, self.recipe, self.provenance).encode())
        self._write_record(report)
        if self.verdict:
            self.reporter.warn(self.verdict)
        return report

    def _save(self, session: ModelSession, weights: Mapping[Site, torch.Tensor]) -> Verified:
        base = self.loaded.checkpoint
        tensors = {}
        for site, weight in weights.items():
            entry = base.entries[session.stored_name(site)]
            tensors[entry.name] = to_stored(weight, entry, session.save_dtype(site), transposed=site.transposed)
        with self.reporter.phase("Saving", 2, "steps") as advance:
            write_model(base, self.folder.out, tensors)
            advance(1)
            verified = verify(Checkpoint(self.planned.source.folder), self.folder.out, tensors)
            advance(1)
        return verified

    def _evaluate(self, requests: Sequence[EditRequest]) -> Evaluation | None:
        if not self.recipe.evaluate:
            return None
        with self.clock.spent("eval"):
            return evaluate(self.loaded, requests, metrics=("counterfact",), reporter=self.reporter)

    def _efficacy(self, requests: Sequence[EditRequest]) -> Mapping[str, float | None]:
        """Measure efficacy alone: what is asked after every batch must be cheap."""
        bare = [replace(r, paraphrase_prompts=(), neighborhood_prompts=(), generation_prompts=()) for r in requests]
        found = self._evaluate(bare)
        return {} if found is None else efficacy(found)

    def _report(
        self, stream: Stream, before: Evaluation | None, after: Evaluation | None, weights: Mapping[Site, torch.Tensor]
    ) -> RunReport:
        seconds, out = self.clock.rounded(), str(self.folder.out)
        ending = Ending(self.status, self.verdict, before, after, weights, seconds, out)
        return report_run(self.planned, stream, ending)

    def _write_record(self, report: RunReport) -> None:
        record = {**report.to_json(), "recipe": self.recipe.to_json(), "provenance": self.provenance}
        self.folder.write_record(record)

    def _write_rejected(self, rejected: Sequence[Rejection]) -> None:
        lines = [json.dumps({"id": r.id, "line": r.line, "reason": r.reason}, ensure_ascii=False) for r in rejected]
        write_bytes(self.folder.rejected, "".join(f"{line}\n" for line in lines).encode())


def _remove_old(folder: RunFolder) -> None:
    """Remove an old run's files; the lock stays, since this process holds it."""
    for path in folder.out.iterdir():
        if path.is_dir() and path != folder.folder:
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()
    for path in (folder.journal, folder.state, folder.record, folder.rejected):
        path.unlink(missing_ok=True)
    shutil.rmtree(folder.updates, ignore_errors=True)


def _statistics_file(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_file():
        raise ModelError(f"there is no statistics file {text}; make one with: editcli stats compute")
    return path
