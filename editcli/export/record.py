"""What a result says about the run it came from: its record and its card, without this machine's paths."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from editcli.errors import EditError, FileError, ModelError
from editcli.export.recipe import FULL, LORA, PATCH
from editcli.export.report import SiteExport
from editcli.export.source import FinishedRun
from editcli.reporting import Rejection, RunReport, SiteReport
from editcli.runs.card import (
    card_body,
    counted,
    file_name,
    front_matter,
    model_card,
    public_name,
    shareable_options,
    shareable_preset,
)
from editcli.runs.output import CARD
from editcli.settings.recipe import Recipe
from editcli.storage.files import write_bytes, write_json
from editcli.storage.opening import RECORD as RECORD_KIND
from editcli.storage.opening import read_text

RECORD = "editcli/run.json"
_FILES = ("edits", "corpus", "stats", "out")
"""Settings of a recipe that are paths."""


def portable(run: FinishedRun) -> dict[str, Any]:
    """Return a run's record with the names of files and folders in place of where they are on this machine."""
    record = copy.deepcopy(dict(run.record))
    recipe, provenance = record["recipe"], record["provenance"]
    for name in _FILES:
        if recipe.get(name):
            recipe[name] = file_name(recipe[name])
    recipe["preset"] = shareable_preset(recipe.get("preset"))
    for sections in filter(None, (recipe.get("settings"), provenance.get("options"), record.get("components"))):
        for name, options in sections.items():
            sections[name] = shareable_options(options)
    base = provenance["base"]
    base["name"] = public_name(base)
    base.pop("folder", None)
    record["model"] = base["name"]
    if recipe.get("model"):
        recipe["model"] = base["name"]
    named = (*(provenance.get(name) for name in ("edits", "pilots", "reference")), record.get("preset"))
    for section in named:
        if section and section.get("file"):
            section["file"] = file_name(section["file"])
    record["out"] = file_name(record.get("out") or run.path)
    return record


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write ``editcli/run.json``: every result carries the record of its run."""
    path = folder / RECORD
    path.parent.mkdir()
    write_json(path, record)


def read_record(folder: Path) -> dict[str, Any]:
    """Read what :func:`write_record` wrote; raise :class:`ModelError` when it cannot be read."""
    path = folder / RECORD
    try:
        record = json.loads(read_text(path, RECORD_KIND, folder=folder))
        # What cannot be written now would fail after the model was.
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
        _card(FULL, record).encode()
    except FileError as error:
        raise ModelError(f"{error}, or download the patch again") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read ({error}); download or copy the patch again") from error
    return record


def write_card(folder: Path, kind: str, record: Mapping[str, Any], sites: Sequence[SiteExport] = ()) -> None:
    """Write the card of a result: how to use it, and what was edited."""
    write_bytes(folder / CARD, _card(kind, record, sites).encode())


def _card(kind: str, record: Mapping[str, Any], sites: Sequence[SiteExport] = ()) -> str:
    report, recipe, provenance = report_of(record), recipe_of(record), record["provenance"]
    if kind == FULL:
        return model_card(report, recipe, provenance, diagnostics={})
    lines = [*_front(kind, record), *_usage(kind, record), *_rendered(sites), "", "# The edits", ""]
    return "\n".join([*lines, *card_body(report, recipe, provenance, {})]) + "\n"


def _front(kind: str, record: Mapping[str, Any]) -> list[str]:
    base = record["provenance"]["base"]
    if kind == LORA:
        return front_matter(base, library="peft", tags=("lora",))
    return front_matter(base, library="editcli", tags=())


def _usage(kind: str, record: Mapping[str, Any]) -> list[str]:
    base, count = record["provenance"]["base"], record["edits"]["applied"]
    title = {LORA: "A LoRA adapter", PATCH: "A patch"}[kind]
    lines = [f"# {title} for {base['name']}: {counted(int(count))}", ""]
    if kind == LORA:
        place = (
            f'"{base["name"]}", revision="{base["commit"]}"' if base.get("commit") else f'"FOLDER OF {base["name"]}"'
        )
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
    command = f"editcli apply-patch {base['name']} THIS_FOLDER --out edited"
    return [*lines, "The changed tensors only; the base is checked before they replace its own.", "", f"    {command}"]


def _rendered(sites: Sequence[SiteExport]) -> list[str]:
    if not sites:
        return []
    head = ["", "| module | rank | relative error |", "|---|---|---|"]
    return [*head, *(f"| `{s.module}` | {s.rank} | {s.relative_error:.1e} |" for s in sites)]


def recipe_of(record: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a record; one of another version is reduced to what this version knows."""
    try:
        return Recipe.from_json(record["recipe"])
    except EditError:
        return Recipe(edits=str(record["recipe"]["edits"]))


def report_of(record: Mapping[str, Any]) -> RunReport:
    """Return the report that a record was written from."""
    return RunReport(
        status=str(record["status"]),
        model=str(record["model"]),
        editor=str(record["editor"]),
        stabilizers=tuple(record["stabilizers"]),
        read=int(record["edits"]["read"]),
        applied=int(record["edits"]["applied"]),
        rejected=tuple(Rejection(r["id"], r["reason"], r["line"], r.get("superseded_by")) for r in record["rejected"]),
        efficacy=dict(record["efficacy"]),
        generalization=record["generalization"],
        specificity=record["specificity"],
        sites=tuple(
            SiteReport(s["module"], s["layer"], s["ratio"], s["drift"], s["cast_loss"]) for s in record["sites"]
        ),
        seconds=dict(record["seconds"]),
        out=str(record["out"]),
        stopped_by=record.get("stopped_by", record.get("verdict")),
        already_true=tuple(record.get("already_true", ())),
    )
