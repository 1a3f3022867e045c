"""Repeat a run from its record, with everything that a preset decided, and compare the weights bit by bit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from editcli.errors import OptionError, StateError
from editcli.plugin.manager import Plugins
from editcli.plugin.options import merge
from editcli.records.state import RunFolder
from editcli.reporting import Reporter, RunReport
from editcli.runs.apply import apply
from editcli.runs.planning import located, read_requested
from editcli.settings.recipe import DTYPES, Recipe
from editcli.storage.checkpoint import Checkpoint
from editcli.storage.opening import RECORD, read_text

ENDED = ("done", "stopped")
"""States of a run whose weights were saved as a result."""
ENVIRONMENT = ("versions", "plugins", "device", "dtype", "threads")
"""What may make two runs of one recipe round differently."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A run as its record tells it: what was asked for, of what, and what came out."""

    file: Path
    recipe: Recipe
    """The run's own recipe, for an output folder of its own."""
    base: str
    """Fingerprint of the base model."""
    edits: str
    """sha256 of the edits file; empty when the edits came from a program."""
    consumed: str
    """Rolling hash over the edits in force."""
    weights: Mapping[str, str]
    """sha256 of every edited tensor as saved, by its name in the checkpoint."""
    environment: Mapping[str, Any]


def read_recorded(file: Path) -> Recorded:
    """Read a ``run.json``; raises :class:`StateError` where it does not tell enough to repeat the run."""
    try:
        record = json.loads(read_text(file, RECORD))
        return _recorded(file, record, record["provenance"])
    except OSError as error:
        raise StateError(f"{file} cannot be read: {error.strerror or error}; pass OUT/editcli/run.json") from error
    except KeyError as error:
        raise StateError(
            f"{file} does not record {error}, so the run cannot be repeated from it; repeat it with the editcli that "
            "wrote it"
        ) from error
    except (ValueError, TypeError, AttributeError, RecursionError, OptionError) as error:
        raise StateError(f"{file} is not the record of a run: {error}") from error


def _recorded(file: Path, record: Mapping[str, Any], provenance: Mapping[str, Any]) -> Recorded:
    if record["status"] not in ENDED:
        raise StateError(f"the run of {file} did not end; finish it with 'editcli apply' and --resume first")
    if not provenance["weights"]:
        raise StateError(f"the run of {file} holds no edit, so there is nothing to repeat")
    if provenance["pilots"]["sha256"] != provenance["edits"]["sha256"]:
        raise StateError(f"the run of {file} read several edits files, so no single recipe repeats it")
    return Recorded(
        file=file,
        recipe=_recipe(record, provenance),
        base=provenance["base"]["fingerprint"],
        edits=provenance["edits"]["sha256"],
        consumed=provenance["consumed"],
        weights=dict(provenance["weights"]),
        environment={name: provenance[name] for name in ENVIRONMENT},
    )


def _recipe(record: Mapping[str, Any], provenance: Mapping[str, Any]) -> Recipe:
    """Return the recipe with the layers, sizes and options that were in force."""
    recipe, base = Recipe.from_json(record["recipe"]), provenance["base"]
    own = {name: provenance[name] for name in ("targets", "statistics")}
    return replace(
        recipe,
        # A recorded folder is where the model was; a hub id and its commit find it elsewhere too.
        model=base["folder"] if recipe.model is not None and Path(base["folder"]).is_dir() else recipe.model,
        revision=base.get("commit") or recipe.revision,
        editor=record["editor"],
        layers=tuple(provenance["layers"]),
        batch_size=provenance["batch_size"],
        dtype=provenance["dtype"] if provenance["dtype"] in DTYPES else recipe.dtype,
        settings=merge(recipe.settings, provenance["options"], own),
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
    """What was different about the machine, in words."""

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
    found = RunFolder(recipe.folder).read_record()["provenance"]
    weights = found.get("weights", {})
    names = {*recorded.weights, *weights}
    return Repetition(
        report=report,
        of=str(recorded.file),
        tensors=len(names),
        differ=tuple(sorted(name for name in names if recorded.weights.get(name) != weights.get(name))),
        same_edits=recorded.consumed == found.get("consumed"),
        environment=tuple(_differences(recorded.environment, found)),
    )


def _check_edits(recorded: Recorded, recipe: Recipe, plugins: Plugins) -> None:
    """Raise :class:`StateError` when the edits file is not the one that was read."""
    if recipe.edits != "-" and not Path(recipe.edits).is_file():
        raise StateError(
            f"the edits file {recipe.edits} of {recorded.file} is not there; say where it is: "
            "editcli apply EDITS.jsonl --recipe ..."
        )
    # The input can be read only once, and edits that a program made have no file; the result tells in both cases.
    if recipe.edits == "-" or not recorded.edits:
        return
    if read_requested(recipe, plugins).sha256 != recorded.edits:
        raise StateError(f"{recipe.edits} is not the file that {recorded.file} records; put the original back")


def _check_base(recorded: Recorded, recipe: Recipe) -> None:
    source = located(recipe)
    if Checkpoint(source.folder).fingerprint() != recorded.base:
        raise StateError(f"{source.name} is not the base that {recorded.file} records; pass the original as --model")


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield what differs, for instance ``torch 2.12.0 then, 2.13.0 now``."""
    for name, old in then.items():
        new = now.get(name)
        if name == "plugins":
            old, new = ({part["name"]: part["version"] for part in parts or ()} for parts in (old, new))
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new)
        elif old != new:
            yield f"{name} {old} then, {new} now"
