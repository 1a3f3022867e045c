"""Repeat a run from its record, and compare what came out bit by bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editcli.errors import StateError
from editcli.models.checkpoint import Checkpoint
from editcli.plugins import Plugins
from editcli.recipe import Recipe
from editcli.report import Reporter, RunReport
from editcli.runs.apply import apply
from editcli.runs.planning import located, read_requested
from editcli.runs.recorded import Recorded
from editcli.runs.state import RunFolder


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
