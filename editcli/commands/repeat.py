"""Repeat a run from its record, with everything that a preset decided, and compare the weights bit by bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from editcli.errors import OptionError, StateError
from editcli.plugin.manager import Plugins
from editcli.plugin.options import merge
from editcli.records.decoding import UnreadableError, read_json
from editcli.records.record import ENDED, Provenance, RunRecord, read_record
from editcli.reporting import Reporter, RunReport
from editcli.runs.apply import apply
from editcli.runs.planning import located, read_requested
from editcli.settings.recipe import DTYPES, Recipe


@dataclass(frozen=True, slots=True)
class Recorded:
    """A run read from its record: its recipe, its sources and the hashes of its results."""

    file: Path
    recipe: Recipe
    """The run's own recipe, for an output folder of its own."""
    provenance: Provenance
    """The sources of the run, and the hashes of its results."""


def read_recorded(file: Path) -> Recorded:
    """Read a ``run.json``; raises :class:`StateError` where it does not tell enough to repeat the run."""
    try:
        record = RunRecord.from_json(read_json(file))
        if record.status not in ENDED:
            raise StateError(f"the run of {file} did not end; finish it with 'editcli apply' and --resume first")
        return Recorded(file, _recipe(record), _repeatable(file, record))
    except OSError as error:
        raise StateError(f"{file} cannot be read: {error.strerror or error}; pass OUT/editcli/run.json") from error
    except (UnreadableError, OptionError) as error:
        raise StateError(f"{file} is not the record of a run that this editcli can repeat: {error}") from error


def _repeatable(file: Path, record: RunRecord) -> Provenance:
    """Return the provenance of a run; raise :class:`StateError` unless one recipe repeats it."""
    provenance = record.provenance
    if not provenance.weights:
        raise StateError(f"the run of {file} holds no edit, so there is nothing to repeat")
    if provenance.pilots is None or provenance.pilots.sha256 != provenance.edits.sha256:
        raise StateError(f"the run of {file} read several edits files, so no single recipe repeats it")
    return provenance


def _recipe(record: RunRecord) -> Recipe:
    """Return the recipe with the layers, sizes and options that were in force."""
    recipe, provenance = Recipe.from_json(record.recipe), record.provenance
    base = provenance.base
    core = {"targets": provenance.targets, "statistics": provenance.statistics}
    return replace(
        recipe,
        # A recorded folder is where the model was; a hub id and its commit find it elsewhere too.
        model=base.folder if recipe.model is not None and base.folder and Path(base.folder).is_dir() else recipe.model,
        revision=base.commit or recipe.revision,
        editor=record.editor,
        layers=provenance.layers or recipe.layers,
        batch_size=provenance.batch_size,
        dtype=provenance.dtype if provenance.dtype in DTYPES else recipe.dtype,
        settings=merge(recipe.settings, provenance.options, core),
        out=f"{recipe.folder.name}-repeated",
        resume=False,
        overwrite=False,
        # A record may come from a stranger, and whether a model's own code may run is not for it to say.
        trust_remote_code=False,
    )


@dataclass(frozen=True, slots=True)
class Repetition:
    """A run that was repeated, against the record of the first one."""

    report: RunReport
    of: str
    """The record that was repeated."""
    tensors: int
    """Edited tensors that were compared."""
    differ: tuple[str, ...]
    """Tensors whose bytes differ."""
    same_edits: bool
    """Whether the same edits are in force in both."""
    environment: tuple[str, ...]
    """The differences of the machine, in words."""

    @property
    def identical(self) -> bool:
        """Whether the weights are the same bit by bit."""
        return not self.differ

    def to_json(self) -> dict[str, Any]:
        """Return the run's JSON object, with the comparison under ``repeats``."""
        comparison = {
            "run": self.of,
            "identical": self.identical,
            "tensors": self.tensors,
            "differ": list(self.differ),
            "same_edits": self.same_edits,
            "environment": list(self.environment),
        }
        return {**self.report.to_json(), "repeats": comparison}


def repeat(recorded: Recorded, recipe: Recipe, plugins: Plugins, reporter: Reporter | None = None) -> Repetition:
    """Run ``recipe``, the recorded one with another place for files; refuses another base or other edits."""
    _check_edits(recorded, recipe, plugins)
    _check_base(recorded, recipe)
    report = apply(recipe, plugins, reporter)
    made = read_record(recipe.folder)
    assert made is not None, "the run has just written it"
    before, after = recorded.provenance, made.provenance
    old, new = before.weights or {}, after.weights or {}
    names = {*old, *new}
    return Repetition(
        report=report,
        of=str(recorded.file),
        tensors=len(names),
        differ=tuple(sorted(name for name in names if old.get(name) != new.get(name))),
        same_edits=before.consumed == after.consumed,
        environment=tuple(_differences(_environment(before), _environment(after))),
    )


def _check_edits(recorded: Recorded, recipe: Recipe, plugins: Plugins) -> None:
    """Raise :class:`StateError` when the edits file is not the one that was read."""
    if recipe.edits != "-" and not Path(recipe.edits).is_file():
        raise StateError(
            f"the edits file {recipe.edits} of {recorded.file} is not there; say where it is: "
            "editcli apply EDITS.jsonl --repeat ..."
        )
    # The input can be read only once, and edits that a program made have no file; the result tells in both cases.
    digest = recorded.provenance.edits.sha256
    if recipe.edits == "-" or not digest:
        return
    if read_requested(recipe, plugins).sha256 != digest:
        raise StateError(f"{recipe.edits} is not the file that {recorded.file} records; put the original back")


def _check_base(recorded: Recorded, recipe: Recipe) -> None:
    source = located(recipe)
    if source.checkpoint.fingerprint() != recorded.provenance.base.fingerprint:
        raise StateError(f"{source.name} is not the base that {recorded.file} records; pass the original as --model")


def _environment(provenance: Provenance) -> dict[str, Any]:
    """Return what may make two runs of one recipe round differently."""
    plugins = {part.name: part.version for part in provenance.plugins}
    machine = {"device": provenance.device, "dtype": provenance.dtype, "threads": provenance.threads}
    return {**provenance.versions, **plugins, **machine}


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield what differs, for instance ``torch 2.12.0 then, 2.13.0 now``."""
    for name, old in then.items():
        if old != now.get(name):
            yield f"{name} {old} then, {now.get(name)} now"
