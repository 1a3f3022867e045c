"""The main job: read edits, edit a model, save and verify it. Needs nothing but a recipe and the loaded plugins."""

from __future__ import annotations

import math
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import torch
import transformers

from editcli import planning
from editcli.card import model_card
from editcli.checkpoint import Checkpoint
from editcli.edits import EditRequest
from editcli.errors import GuardError, ModelError, StateError
from editcli.evaluation import Evaluation, evaluate
from editcli.files import write_bytes
from editcli.guards import needs_retained
from editcli.interrupts import Interrupts
from editcli.model import LoadedModel, open_model
from editcli.output import CARD, Verified, to_stored, verify, write_model
from editcli.planning import Plan, Planned
from editcli.plugins import Plugins
from editcli.recipe import Recipe
from editcli.report import Rejection, Reporter, RunReport, Silent, SiteReport
from editcli.session import ModelSession
from editcli.state import START, RunFolder, consume
from editcli.statistics import SecondMoments
from editcli.stream import Stack, Stream

DONE, STOPPED, INTERRUPTED = "done", "stopped", "interrupted"
TRIAL_EDITS = 16
"""Edits whose targets a dry run optimises to estimate the time."""


@dataclass(slots=True)
class Clock:
    """Seconds spent in each phase of a run."""

    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("load", "prepare", "targets", "solve", "eval", "save", "total"), 0.0)
    )
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
        return {**{k: round(v, 3) for k, v in self.seconds.items()}, "total": round(time.perf_counter() - self.started, 3)}


def apply(recipe: Recipe, plugins: Plugins, reporter: Reporter | None = None) -> RunReport:
    """Run ``recipe`` from the edits file to the saved, verified folder; raises an :class:`EditError` in one sentence."""
    reporter = reporter or Silent()
    clock = Clock()
    with clock.spent("load"):
        planned = planning.check(recipe, plugins, reporter)
    folder = RunFolder(recipe.folder)
    with _writing(recipe), _tidy(folder), folder.locked():
        return _Run(planned, folder, plugins, reporter, clock).go()


def plan(recipe: Recipe, plugins: Plugins, reporter: Reporter | None = None) -> Plan:
    """Return what :func:`apply` would do; writes nothing. One small batch of targets is measured to estimate the time."""
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
        reason = error.strerror or str(error)
        raise StateError(f"cannot write {error.filename or recipe.folder}: {reason}; free some space or choose another --out") from error


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
            self.base_fingerprint = self.loaded.checkpoint.fingerprint()
        before = self._evaluate(self.planned.requests)
        with self.clock.spent("prepare"):
            stream = self._stream()
            requests = self._begin(stream)
        with Interrupts(self.reporter) as interrupts:
            self._edit(stream, requests, interrupts)
        stream.save()
        if self.status == INTERRUPTED:
            report = self._report(stream, before, None, None)
            self.folder.write_record(self._record(report))
            self.reporter.note(f"Interrupted after {stream.position.step} batches; continue with --resume --out {self.folder.out}")
            return report
        return self._finish(stream, before)

    def _announce(self) -> None:
        planned = self.planned
        if self.recipe.model is None:
            self.reporter.note("No --model given: editing the small model that ships with editcli")
        if planned.preset.label == "guessed":
            self.reporter.warn(
                f"no preset for this model ({planned.preset.name}): layers {_span(planned.layers)} and the weights are guessed"
            )
        for part in planned.stabilizers:
            acts_on_values = type(part).stabilize_values is not type(part).__mro__[1].__dict__.get("stabilize_values")
            if not planned.editor.needs_values and acts_on_values and _only_values(part):
                self.reporter.warn(
                    f"{part.name} stabilises target values, and {planned.editor.name} computes none: it changes nothing here"
                )

    def _stream(self) -> Stream:
        recipe, planned = self.recipe, self.planned
        moments = SecondMoments(
            self.loaded,
            options=planned.statistics,
            corpus=recipe.corpus,
            file=None if recipe.stats is None else _path(recipe.stats),
            reporter=self.reporter,
            seed=recipe.seed,
        )
        moments.plan(planned.sites)
        prefixes = self.folder.read_snapshot().settings["prefixes"] if recipe.resume else None
        save_dtype = None if recipe.save_dtype == "auto" else getattr(torch, recipe.save_dtype)
        session = ModelSession(
            self.loaded,
            planned.layers,
            options=planned.targets,
            prefixes=prefixes,
            second_moment=moments,
            pilots=planning.pilot_source(planned.requests),
            save_dtype=save_dtype,
            reporter=self.reporter,
            seed=recipe.seed,
        )
        diagnostics = tuple(
            planning.component(self.plugins, "diagnostic", name, recipe.settings) for name in self.plugins.all("diagnostic")
        )
        return Stream(
            session,
            Stack(planned.editor, planned.stabilizers, diagnostics),
            self.folder,
            settings=self._settings(session),
            guards=planned.guards,
            measure=self._immediate if recipe.evaluate else None,
            retained=self._retained if recipe.evaluate and needs_retained(planned.guards) else None,
            checkpoint_every=recipe.checkpoint_every,
        )

    def _settings(self, session: ModelSession) -> dict[str, Any]:
        """Return what must be the same for a resumed stream to be the same stream."""
        planned = self.planned
        return {
            "base": self.base_fingerprint,
            "editor": planned.editor.name,
            "stabilizers": [part.name for part in planned.stabilizers],
            "options": {part.name: _options(part) for part in planned.components},
            "targets": _options_of(planned.targets),
            "layers": list(planned.layers),
            "seed": self.recipe.seed,
            "dtype": str(next(self.loaded.model.parameters()).dtype),
            "chat_template": self.recipe.chat_template,
            "prefixes": list(session.prefixes),
        }

    def _begin(self, stream: Stream) -> Sequence[EditRequest]:
        """Start or resume the stream; return the edits that are still to be applied."""
        if not self.recipe.resume:
            if self.recipe.overwrite:
                _remove_old(self.folder)
            stream.start()
            self.folder.write_record({"status": "running", "recipe": self.recipe.to_json(), "provenance": self._provenance()})
            return self.planned.requests
        stream.resume()
        return remaining(stream, self.planned.requests)

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
                    self.clock.seconds[phase] = self.clock.seconds.get(phase, 0.0) + seconds
                advance(len(batch))

    def _finish(self, stream: Stream, before: Evaluation | None) -> RunReport:
        """Save the model as it is read out, verify the folder, write the record and the card."""
        applied = stream.position.requests
        with stream.session.read_out(self.planned.stabilizers) as weights:
            after = self._evaluate(applied) if applied else None
            with self.clock.spent("save"):
                verified = self._save(stream, weights) if applied else None
            report = self._report(stream, before, after, weights)
        if verified is not None:
            for name in verified.unchanged:
                self.reporter.warn(f"{name} did not change: its update is smaller than the saved dtype can hold")
        self._write_rejected(report.rejected)
        write_bytes(self.folder.out / CARD, model_card(report, self.recipe, self._provenance()).encode())
        self.folder.write_record(self._record(report))
        if self.verdict:
            self.reporter.warn(self.verdict)
        return report

    def _save(self, stream: Stream, weights: Mapping[Any, torch.Tensor]) -> Verified:
        session, base = stream.session, self.loaded.checkpoint
        tensors = {}
        for site, weight in weights.items():
            name = session.stored_name(site)
            stored = to_stored(weight, base.entries[name], session.save_dtype(site), transposed=site.transposed)
            tensors[name] = stored
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

    def _immediate(self, requests: Sequence[EditRequest]) -> Mapping[str, float | None]:
        found = self._evaluate([_prompt_only(request) for request in requests])
        return {} if found is None else _efficacy(found)

    def _retained(self, requests: Sequence[EditRequest]) -> Mapping[str, float | None]:
        return self._immediate(requests)

    def _write_rejected(self, rejected: Sequence[Rejection]) -> None:
        import json

        lines = [json.dumps({"id": r.id, "line": r.line, "reason": r.reason}, ensure_ascii=False) for r in rejected]
        write_bytes(self.folder.rejected, "".join(f"{line}\n" for line in lines).encode())

    def _report(
        self, stream: Stream, before: Evaluation | None, after: Evaluation | None, weights: Mapping[Any, Any] | None
    ) -> RunReport:
        dropped = {edit: why for report in stream.reports for edit, why in report.dropped.items()}
        lines = {request.id: request.line for request in stream.position.requests}
        rejected = [*self.planned.rejected, *(Rejection(e, why, lines.get(e)) for e, why in dropped.items())]
        efficacy = {
            "before": None if before is None else _efficacy(before),
            "immediate": _immediate_mean(stream),
            "retained": None if after is None else _efficacy(after),
        }
        return RunReport(
            status=self.status,
            model=self.planned.source.name,
            editor=self.planned.editor.name,
            stabilizers=tuple(part.name for part in self.planned.stabilizers),
            read=len(self.planned.file.requests) + len(self.planned.file.rejected),
            applied=len(stream.position.requests) - len(dropped),
            rejected=tuple(rejected),
            efficacy=efficacy,
            generalization=_before_after(before, after, "generalization"),
            specificity=_before_after(before, after, "specificity"),
            sites=tuple(_site_reports(stream.session, weights)),
            seconds=self.clock.rounded(),
            out=str(self.folder.out),
            verdict=self.verdict,
            extra={"components": {p.name: p.record() for p in self.planned.components}, "preset": self._preset()},
        )

    def _preset(self) -> dict[str, Any]:
        preset = self.planned.preset
        return {"name": preset.name, "label": preset.label, "layers": list(self.planned.layers)}

    def _record(self, report: RunReport) -> dict[str, Any]:
        return {**report.to_json(), "recipe": self.recipe.to_json(), "provenance": self._provenance()}

    def _provenance(self) -> dict[str, Any]:
        planned = self.planned
        brought = [self.plugins.find("editor", planned.editor.name)]
        brought += [self.plugins.find("stabilizer", part.name) for part in planned.stabilizers]
        return {
            "base": {
                "name": planned.source.name,
                "folder": str(planned.source.folder),
                "revision": planned.source.revision,
                "fingerprint": self.base_fingerprint,
            },
            "edits": {"file": planned.file.source, "sha256": planned.file.sha256},
            "plugins": [{"name": b.name, "distribution": b.distribution, "version": b.version} for b in brought],
            "options": {part.name: _options(part) for part in planned.components},
            "targets": _options_of(planned.targets),
            "versions": {
                "editcli": version("editcli"),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "device": str(self.loaded.input_device),
            "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }


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
            f"{repeated.file}:{repeated.line}: the edit {repeated.id!r} is in the stream already, but this file does not "
            "start with what was applied; resume with the original file, or give a file of new edits with ids of their own"
        )
    return requests


def _only_values(part: Any) -> bool:
    from editcli.interfaces import Stabilizer

    kind = type(part)
    same_update = kind.stabilize_update is Stabilizer.stabilize_update
    return same_update and kind.stabilize_weight is Stabilizer.stabilize_weight


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


def _prompt_only(request: EditRequest) -> EditRequest:
    return replace(request, paraphrase_prompts=(), neighborhood_prompts=(), generation_prompts=())


def _efficacy(evaluation: Evaluation) -> dict[str, float | None]:
    return {
        "efficacy_accuracy": evaluation.efficacy_accuracy,
        "efficacy_success": evaluation.efficacy_success,
    }


def _immediate_mean(stream: Stream) -> dict[str, float | None] | None:
    """Return the mean over edits of what was measured right after each edit's own batch."""
    measured = [(len(r.edits), r.metrics["immediate"]) for r in stream.reports if "immediate" in r.metrics]
    if not measured:
        return None
    means = {}
    for name in ("efficacy_accuracy", "efficacy_success"):
        known = [(count, figures[name]) for count, figures in measured if figures.get(name) is not None]
        means[name] = sum(c * v for c, v in known) / sum(c for c, _ in known) if known else None
    return means


def _before_after(before: Evaluation | None, after: Evaluation | None, name: str) -> dict[str, Any] | None:
    """Return success and accuracy before and after; None when the edits have no prompts to measure it on."""
    if before is None or after is None or getattr(after, f"{name}_accuracy") is None:
        return None
    pair = {"before": before, "after": after}
    return {
        **{when: getattr(e, f"{name}_success") for when, e in pair.items()},
        "accuracy": {when: getattr(e, f"{name}_accuracy") for when, e in pair.items()},
    }


def _site_reports(session: ModelSession, weights: Mapping[Any, torch.Tensor] | None) -> Iterator[SiteReport]:
    for site, weight in (weights or session.masters()).items():
        base = session.baseline(site)
        norm = float(base.norm())
        cast = weight.to(session.save_dtype(site)).float()
        yield SiteReport(
            module=site.module,
            layer=site.layer,
            ratio=float(weight.norm()) / norm,
            drift=float((weight - base).norm()) / norm,
            cast_loss=float((cast - weight).norm() / weight.norm()),
        )


def _options(part: Any) -> dict[str, Any]:
    return _options_of(part.options)


def _options_of(options: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(options)


def _span(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def _path(text: str) -> Any:
    from pathlib import Path

    path = Path(text).expanduser()
    if not path.is_file():
        raise ModelError(f"there is no statistics file {text}; make one with: editcli stats compute")
    return path
