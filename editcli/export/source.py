"""A finished run to export: its record, its base, the tensors in which both differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from editcli.errors import ModelError, StateError
from editcli.models.architectures import Architecture, Family, resolve, skeleton
from editcli.models.loading import ModelSource, first_model, load_config, model_in, resolve_model
from editcli.records.history import History, read_history
from editcli.records.record import ENDED, RunRecord
from editcli.records.state import RunFolder
from editcli.reporting import Reporter
from editcli.runs.output import same_bytes
from editcli.storage.checkpoint import Checkpoint
from editcli.storage.opening import is_own


@dataclass(frozen=True)
class FinishedRun:
    """A run whose model folder holds what its record says."""

    path: str
    """The name that the user gave it."""
    history: History

    @property
    def record(self) -> RunRecord:
        """The record in its ``run.json``."""
        assert self.history.record is not None, "it was opened"
        return self.history.record

    @property
    def status(self) -> str:
        """The status of the run at its end."""
        return self.record.status

    @cached_property
    def after(self) -> Checkpoint:
        """The edited weights."""
        return model_in(self.history.folder.out).checkpoint

    @cached_property
    def segments(self) -> tuple[Path, ...]:
        """The files of factors of the batches in force; empty where they are not all there."""
        paths = tuple(self.history.folder.updates / batch.segment for batch in self.history.batches)
        return paths if all(path.is_file() and is_own(path, self.history.folder.out) for path in paths) else ()

    def refuse_changed(self) -> None:
        """Raise :class:`StateError` when another process has continued the run since it was opened."""
        if self.history.folder.read_record() != self.record:
            raise StateError(f"{self.path} was changed by another process meanwhile; export it again")


@dataclass(frozen=True)
class Edited:
    """A finished run with its base at hand."""

    run: FinishedRun
    source: ModelSource
    changed: tuple[str, ...]
    """Tensors that differ from the base's, by stored name, in the order of the file."""
    architecture: Architecture
    """The module tree, without weights."""

    @cached_property
    def before(self) -> Checkpoint:
        """The unedited weights."""
        return self.source.checkpoint

    @property
    def name(self) -> str:
        """The base's name as the run has it."""
        return self.run.record.provenance.base.name


def open_run(path: str) -> FinishedRun:
    """Read a run's record; raise :class:`StateError` unless its model folder is the run's result."""
    RunFolder(Path(path)).require()
    history = read_history(Path(path))
    assert history is not None, "it is a run"
    record = history.record
    if history.problem is not None and record is None:
        raise StateError(history.problem)
    if record is None or record.status not in ENDED:
        raise StateError(
            f"the run in {path} is {record.status if record else 'not finished'}, so its model folder is not its "
            "result yet; finish it with 'editcli apply --resume'"
        )
    if not (record.ended and record.provenance.base.name and "edits" in record.recipe):
        raise StateError(f"{history.folder.record} does not say how the run was made; restore it from a backup")
    run = FinishedRun(path, history)
    _refuse_other_weights(run)
    return run


def with_base(
    run: FinishedRun,
    base: str | None,
    reporter: Reporter,
    *,
    families: tuple[Family, ...] = (),
    trust_remote_code: bool = False,
) -> Edited:
    """Find the base of a run and what was changed; raise an :class:`EditError` when it is not the run's base."""
    source = _find(run, base, code=trust_remote_code)
    before = source.checkpoint
    with reporter.phase("Checking the base", 1) as advance:
        if before.fingerprint() != run.record.provenance.base.fingerprint:
            raise StateError(
                f"{source.name} in {source.folder} is not the model that {run.path} was made from: its files have "
                "changed; pass the right one as --base MODEL"
            )
        advance(1)
    config = load_config(source, trust_remote_code=trust_remote_code)
    architecture = resolve(skeleton(config, trust_remote_code), families).recorded(run.history.sites)
    changed = tuple(_changed(before, run.after, reporter))
    _refuse_foreign(run, before, architecture, changed)
    return Edited(run, source, changed, architecture)


def _refuse_other_weights(run: FinishedRun) -> None:
    """Raise :class:`StateError` when an edited tensor is not the one that the run wrote."""
    for name, digest in (run.record.provenance.weights or {}).items():
        if not run.after.holds(name) or run.after.stored_digest(name) != digest:
            raise StateError(
                f"{name} in {run.path} is not what the run wrote: the folder was changed since; restore it, or publish "
                "it as it stands"
            )


def _find(run: FinishedRun, base: str | None, *, code: bool) -> ModelSource:
    if base is not None:
        return resolve_model(base, code=code)
    source = first_model(run.history.bases, code=code, convert=run.history.converts)
    if source is not None:
        return source
    known = ", ".join(run.history.bases)
    raise ModelError(f"the base of {run.path} is not where it was ({known}); pass it as --base MODEL")


def _changed(before: Checkpoint, after: Checkpoint, reporter: Reporter) -> Iterator[str]:
    """Yield the tensors that differ; raise when one of the models has tensors that the other lacks."""
    if set(before.names()) != set(after.names()):
        raise StateError(f"{after.folder} and its base do not have the same tensors; export the run as it was written")
    with reporter.phase("Comparing", len(before.entries), "tensors") as advance:
        for name, entry in before.entries.items():
            if not same_bytes(before.folder, entry, after.folder, after.entries[name]):
                yield name
            advance(1)


def _refuse_foreign(run: FinishedRun, before: Checkpoint, architecture: Architecture, changed: tuple[str, ...]) -> None:
    """Raise when nothing was changed, or something that the run did not edit."""
    if not changed:
        raise StateError(f"nothing in {run.path} differs from its base, so there is nothing to export")
    edited = before.tensors_of(before.weight_of(architecture.site(layer).module) for layer in run.history.layers)
    foreign = [name for name in changed if name not in edited]
    if foreign:
        raise StateError(
            f"{foreign[0]} in {run.path} differs from the base, though the run did not edit it: the folder was changed "
            "since; restore it, or publish it as it stands"
        )
