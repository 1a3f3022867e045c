"""The record and the card of an exported result: they describe its run, without this machine's paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from editcli.errors import EditError, ModelError, StateError
from editcli.export.recipe import FULL, LORA, PATCH
from editcli.export.report import SiteExport
from editcli.export.source import FinishedRun
from editcli.formatting import plural
from editcli.records.decoding import UnreadableError
from editcli.records.record import RECORD, BaseRef, FileRef, PilotsRef, RunRecord, record_text
from editcli.records.record import read_record as read_any
from editcli.runs.card import (
    card_body,
    card_text,
    file_name,
    model_card,
    public_name,
    shareable_options,
    shareable_preset,
)
from editcli.runs.output import CARD
from editcli.settings.recipe import Recipe
from editcli.storage.files import write_bytes

F = TypeVar("F", FileRef, PilotsRef)

_FILES = ("edits", "corpus", "stats", "out")
"""Settings of a recipe that are paths."""


def portable(run: FinishedRun) -> RunRecord:
    """Return a run's record with the names of files and folders in place of where they are on this machine."""
    record, provenance = run.record, run.record.provenance
    base = replace(provenance.base, name=public_name(provenance.base), folder=None)
    preset, reference, pilots = record.preset, provenance.reference, provenance.pilots
    return replace(
        record,
        model=base.name,
        out=file_name(record.out or run.path),
        components=None if record.components is None else _shareable(record.components),
        preset=replace(preset, file=file_name(preset.file)) if preset and preset.file else preset,
        recipe=_portable_recipe(record.recipe, base),
        provenance=replace(
            provenance,
            base=base,
            edits=_named(provenance.edits),
            options=_shareable(provenance.options),
            pilots=None if pilots is None else _named(pilots),
            reference=replace(reference, file=file_name(reference.file)) if reference and reference.file else reference,
        ),
    )


def _portable_recipe(settings: Mapping[str, Any], base: BaseRef) -> dict[str, Any]:
    """Return the settings of a recorded recipe without a path of this machine."""
    # Checked as a recipe, so that every setting that is there is of its kind.
    recipe = Recipe.from_json(settings)
    named = {name: file_name(value) for name in _FILES if (value := getattr(recipe, name)) and name in settings}
    named |= {"model": base.name} if recipe.model else {}
    options = {"settings": _shareable(recipe.settings)} if recipe.settings else {}
    return {**settings, **named, **options, "preset": shareable_preset(recipe.preset)}


def _shareable(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: shareable_options(options) for name, options in sections.items()}


def _named(file: F) -> F:
    return replace(file, file=file_name(file.file)) if file.file else file


def write_record(folder: Path, record: RunRecord) -> None:
    """Write ``editcli/run.json``: every result carries the record of its run."""
    path = folder / RECORD
    path.parent.mkdir()
    try:
        write_bytes(path, record_text(record.to_json()).encode())
    except UnreadableError as error:
        raise StateError(f"the record of the run cannot be written: {error}; restore it from a backup") from error


def read_record(folder: Path) -> RunRecord:
    """Read what :func:`write_record` wrote; raise :class:`ModelError` when it cannot be read."""
    try:
        record = read_any(folder)
    except StateError as error:
        raise ModelError(f"{error}, or download or copy the patch again") from error
    if record is None or record.edits is None:
        raise ModelError(f"{folder / RECORD} is not the record of a run that ended; download or copy the patch again")
    # A record that no card can be made of would fail after the model was written.
    _card(FULL, record)
    return record


def write_card(folder: Path, kind: str, record: RunRecord, sites: Sequence[SiteExport] = ()) -> None:
    """Write the card of a result: how to use it, and what was edited."""
    write_bytes(folder / CARD, _card(kind, record, sites).encode())


def _card(kind: str, record: RunRecord, sites: Sequence[SiteExport] = ()) -> str:
    report, recipe, provenance = record.report, recipe_of(record), record.provenance
    if kind == FULL:
        return model_card(report, recipe, provenance, diagnostics={})
    edits = card_body(report, recipe, provenance, {})
    body = [*_usage(kind, record), *_rendered(sites), "", "# The edits", "", *edits]
    library, tags = ("peft", ("lora",)) if kind == LORA else ("editcli", ())
    return card_text(provenance.base, body, library=library, tags=tags)


def _usage(kind: str, record: RunRecord) -> list[str]:
    base, count = record.provenance.base, record.report.applied
    title = {LORA: "A LoRA adapter", PATCH: "A patch"}[kind]
    lines = [f"# {title} for {base.name}: {plural(count, 'edited fact')}", ""]
    if kind == LORA:
        place = f'"{base.name}", revision="{base.commit}"' if base.commit else f'"FOLDER OF {base.name}"'
        return [
            *lines,
            "```python",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f"base = AutoModelForCausalLM.from_pretrained({place})",
            'model = PeftModel.from_pretrained(base, "PATH OR ID OF THIS ADAPTER")',
            "```",
        ]
    command = f"editcli apply-patch {base.name} THIS_FOLDER --out edited"
    return [*lines, "The changed tensors only; the base is checked before they replace its own.", "", f"    {command}"]


def _rendered(sites: Sequence[SiteExport]) -> list[str]:
    if not sites:
        return []
    head = ["", "| module | rank | relative error |", "|---|---|---|"]
    return [*head, *(f"| `{s.module}` | {s.rank} | {s.relative_error:.1e} |" for s in sites)]


def recipe_of(record: RunRecord) -> Recipe:
    """Return the recipe of a record; one of another version is reduced to what this version knows."""
    try:
        return Recipe.from_json(record.recipe)
    except EditError:
        edits = record.recipe.get("edits")
        return Recipe(edits=edits if isinstance(edits, str) else record.provenance.edits.file)
