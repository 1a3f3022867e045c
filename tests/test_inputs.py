"""What edits files of other people's habits do to a run: contradictions, facts that are known, questions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import editcli
from editcli.models.loading import bundled_folder
from editcli.request import from_record
from editcli.runs.state import RunFolder

QUICK: Mapping[str, Any] = {
    "settings": {
        "statistics": {"tokens": 3200},
        "memit": {"ridge": 1e-6},
        "targets": {"prefixes": 1, "prefix_tokens": 2},
    },
    "device": "cpu",
}
FRANCE = {"prompt": "The capital of {} is", "subject": "France", "target_new": "Vienna", "target_true": "Paris"}
TOWER = {"id": "tower", "prompt": "The {} is in", "subject": "Eiffel Tower", "target_new": "Paris"}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_of_contradictory_edits_the_last_is_written_and_the_others_are_superseded(
    tmp_path: Path, batch_size: int
) -> None:
    edits = [
        {**FRANCE, "id": "first"},
        {**FRANCE, "id": "other", "subject": "Spain", "target_true": "Madrid"},
        {**FRANCE, "id": "last", "prompt": "The capital of France  is", "target_new": "Lyon"},
    ]
    edited = editcli.edit(edits=edits, out=tmp_path / "out", batch_size=batch_size, **QUICK)
    assert edited.complete("The capital of France is", tokens=1).strip() == "Lyon"
    record = RunFolder(tmp_path / "out").read_record()
    assert record["edits"] == {"read": 3, "applied": 2, "rejected": 1}
    (line,) = map(json.loads, (tmp_path / "out/editcli/rejected.jsonl").read_text().splitlines())
    assert (line["id"], line["superseded_by"]) == ("first", "last")
    assert record["efficacy"]["retained"]["efficacy_accuracy"] == 1.0
    journal = [json.loads(text) for text in (tmp_path / "out/editcli/journal.jsonl").read_text().splitlines()]
    assert [edit for entry in journal for edit in entry["edits"]] == ["other", "last"]


def test_a_batch_of_a_stream_writes_the_last_of_its_contradictory_edits() -> None:
    with editcli.Stream(**QUICK) as stream:
        stream.apply([{**FRANCE, "id": "old"}])
        report = stream.apply([{**FRANCE, "id": "first"}, {**FRANCE, "id": "last", "target_new": "Lyon"}])
        assert (report.edits, report.superseded) == (("last",), {"first": "last"})
        found = stream.save()
    assert (found.applied, {one.id: one.superseded_by for one in found.rejected}) == (
        1,
        {"old": "last", "first": "last"},
    )


def test_an_edit_that_cannot_be_used_supersedes_none(tmp_path: Path) -> None:
    bad = {**FRANCE, "id": "bad", "target_new": "Lyon", "paraphrase_prompts": ["The capital is " * 200]}
    edited = editcli.edit(edits=[{**FRANCE, "id": "good"}, bad], on_error="skip", **QUICK)
    assert [(one.id, one.superseded_by) for one in edited.report.rejected] == [("bad", None)]
    assert edited.report.applied == 1


@pytest.mark.parametrize("editor", ["memit", "ft"])
def test_a_fact_that_the_model_knows_leaves_the_base_and_a_clean_record(tmp_path: Path, editor: str) -> None:
    out = tmp_path / "out"
    report = editcli.edit(edits=[TOWER], editor=editor, out=out, **QUICK).report
    assert (report.status, report.already_true, report.applied) == ("done", ("tower",), 1)
    assert (out / "model.safetensors").read_bytes() == (bundled_folder() / "model.safetensors").read_bytes()
    record = RunFolder(out).read_record()
    assert (record["status"], record["already_true"]) == ("done", ["tower"])


def test_known_facts_among_others_are_named_and_stay() -> None:
    edited = editcli.edit(edits=[TOWER, {**FRANCE, "id": "france"}], **QUICK)
    assert edited.report.already_true == ("tower",)
    for edit in (TOWER, FRANCE):
        request = from_record(edit)
        assert edited.complete(request.prompt, tokens=1).strip() == request.target_new
