"""What edits files of other people's habits do to a run: contradictions, facts that are known, questions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import editcli
from editcli.commands.check import check
from editcli.errors import RequestError
from editcli.models.loading import bundled_folder
from editcli.models.tokens import Tokens
from editcli.plugin.interfaces import Editor
from editcli.plugin.manager import load_plugins
from editcli.records.record import EditCounts
from editcli.records.state import RunFolder
from editcli.reporting import Silent
from editcli.requests.schema import from_record
from editcli.runs import planning
from editcli.settings.recipe import Recipe
from editcli.testing import tiny_model_folder, tiny_tokenizer
from tests.support.facts import write_lines
from tests.support.reporters import Listener

QUICK: Mapping[str, Any] = {
    "settings": {
        "statistics": {"tokens": 3200},
        "memit": {"ridge": 1e-6},
        "targets": {"prefixes": 1, "prefix_tokens": 2},
    },
    "layers": "1",
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
    assert record is not None
    assert record.edits == EditCounts(read=3, applied=2, rejected=1)
    (line,) = map(json.loads, (tmp_path / "out/editcli/rejected.jsonl").read_text().splitlines())
    assert (line["id"], line["superseded_by"]) == ("first", "last")
    assert record.report.efficacy["retained"]["efficacy_accuracy"] == 1.0
    journal = [json.loads(text) for text in (tmp_path / "out/editcli/journal.jsonl").read_text().splitlines()]
    assert [edit for entry in journal for edit in entry["edits"]] == ["other", "last"]


def test_a_batch_of_a_stream_writes_the_last_of_its_contradictory_edits() -> None:
    with editcli.Stream(**QUICK) as stream:
        stream.apply([{**FRANCE, "id": "old"}])
        report = stream.apply([{**FRANCE, "id": "first"}, {**FRANCE, "id": "last", "target_new": "Lyon"}])
        assert (report.edits, report.superseded) == (("last",), {"first": "last"})
        found = stream.save()
    assert (found.read, found.applied) == (3, 1)
    assert {one.id: one.superseded_by for one in found.rejected} == {"old": "last", "first": "last"}


def test_an_edit_that_was_given_up_supersedes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def values(self: Editor, session: Any, requests: Any, real: Any = Editor.values) -> Any:
        given_up = {column: "too long" for column, request in enumerate(requests) if request.id == "last"}
        return real(self, session, requests).drop(given_up)

    monkeypatch.setattr(Editor, "values", values)
    with editcli.Stream(**QUICK, evaluate=True, eval_every=1) as stream:
        stream.apply([{**FRANCE, "id": "first"}])
        report = stream.apply([{**FRANCE, "id": "last", "target_new": "Lyon"}])
        found = stream.save()
    assert (found.read, found.applied) == (2, 1)
    assert {one.id: one.superseded_by for one in found.rejected} == {"last": None}
    # The first one is in the weights and is measured, beside the one that was given up.
    assert report.metrics["retained"]["edits"] == 2


def test_an_edit_that_cannot_be_used_supersedes_none(tmp_path: Path) -> None:
    bad = {**FRANCE, "id": "bad", "target_new": "Lyon", "paraphrase_prompts": ["The capital is " * 200]}
    listener = Listener()
    edited = editcli.edit(edits=[{**FRANCE, "id": "good"}, bad], on_error="skip", reporter=listener, **QUICK)
    assert listener.warnings == []
    assert [(one.id, one.superseded_by) for one in edited.report.rejected] == [("bad", None)]
    assert edited.report.applied == 1


@pytest.mark.parametrize("editor", ["memit", "ft"])
def test_a_fact_that_the_model_knows_leaves_the_base_and_a_clean_record(tmp_path: Path, editor: str) -> None:
    out = tmp_path / "out"
    report = editcli.edit(edits=[TOWER], editor=editor, out=out, **QUICK).report
    assert (report.status, report.already_true, report.applied) == ("done", ("tower",), 1)
    assert (out / "model.safetensors").read_bytes() == (bundled_folder() / "model.safetensors").read_bytes()
    record = RunFolder(out).read_record()
    assert record is not None
    assert (record.status, record.already_true) == ("done", ("tower",))
    # Fine-tuning reads no reference text, and its record names none.
    assert (record.provenance.reference is not None) == (editor == "memit")


def test_known_facts_among_others_are_named_and_stay() -> None:
    edited = editcli.edit(edits=[TOWER, {**FRANCE, "id": "france"}], **QUICK)
    assert edited.report.already_true == ("tower",)
    for edit in (TOWER, FRANCE):
        request = from_record(edit)
        assert edited.complete(request.prompt, tokens=1).strip() == request.target_new


QUESTION = {"id": "q", "prompt": "Which city is the capital of France?", "target_new": "Lyon"}


@pytest.mark.parametrize("editor", ["ft", "locft", "crispedit", "ultraedit"])
def test_editors_that_need_no_subject_take_plain_questions(editor: str) -> None:
    choices = {
        **QUICK,
        "settings": {"ultraedit": {"lr": 1e-2, "pilots": 20}},
        "stabilizers": ["rect"],
        "editor": editor,
    }
    report = editcli.edit(edits=[QUESTION], **choices).report
    assert (report.applied, report.rejected) == (1, ())
    assert report.sites[0].drift > 0


def test_editors_that_need_a_subject_name_those_that_do_not() -> None:
    reason = r"the edit has no subject, and rlsedit writes .* that needs none: --editor crispedit or .* --editor locft"
    with pytest.raises(RequestError, match=reason):
        editcli.edit(edits=[QUESTION], **QUICK)
    with editcli.Stream(**QUICK) as stream, pytest.raises(RequestError, match=reason):
        stream.apply([QUESTION])


REFUSED: list[Mapping[str, Any]] = [
    {"subject": "Frence", "prompt": "The capital of France is"},
    {"subject": "\u200b"},
    {"prompt": "Which city is the capital?", "subject": None},
    {"prompt": "The capital of {} is " + "very " * 300},
    {"prompt": "The capital of {} is " + "very " * 244},
    {"paraphrase_prompts": ["of " * 300]},
    {"neighborhood_prompts": [{"prompt": "of " * 300, "target": "x"}]},
    {"target_new": ""},
    {"join": 3},
    {"id": 1.5},
]


def test_check_refuses_the_lines_that_apply_refuses(tmp_path: Path) -> None:
    model, file = tiny_model_folder(tmp_path / "model"), tmp_path / "facts.jsonl"
    records = [{**FRANCE, "id": f"{number}", **change} for number, change in enumerate([{}, *REFUSED, {}])]
    # The subject's name makes prompts that look different, so that none supersedes another.
    records[-1]["subject"] = "Spain"
    write_lines(file, records)
    shown = check(file, model=model)
    recipe = Recipe(edits=str(file), model=str(model), on_error="skip", out=str(tmp_path / "out"), layers=(1,))
    planned = planning.check(recipe, load_plugins(), Silent())
    found = {(error.line, error.reason) for error in shown.rejected}
    assert found == {(one.line, one.reason) for one in planned.rejected}
    assert [line for line, _ in sorted(found)] == list(range(2, 2 + len(REFUSED)))
    assert [edit.id for edit in shown.edits] == [request.id for request in planned.requests]


def test_text_that_a_tokenizer_does_not_know_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    words = ["[UNK]", "the", "capital", "of", "France", "is", "Rome"]
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    tokens = Tokens(type(tokenizer)(tokenizer_object=backend, unk_token="[UNK]", pad_token="[UNK]"))
    assert tokens.check(from_record({"prompt": "the capital of {} is", "subject": "France", "target_new": "Rome"}))
    for change, reason in ({"target_new": "Lyon"}, "a part of the target 'Lyon'"), ({"subject": "Spain"}, "'Spain'"):
        edit = {"prompt": "the capital of {} is", "subject": "France", "target_new": "Rome", **change}
        with pytest.raises(RequestError, match=f"no token for .*{reason}"):
            tokens.check(from_record(edit))


@pytest.mark.parametrize("named", [True, False])
def test_a_file_that_lost_lines_is_told_and_nothing_is_written_twice(tmp_path: Path, named: bool) -> None:
    file, out, model = tmp_path / "facts.jsonl", tmp_path / "out", tiny_model_folder(tmp_path / "model")
    records = [{**FRANCE, "subject": name} | ({"id": name} if named else {}) for name in ("France", "Spain", "Italy")]
    choices: dict[str, Any] = {**QUICK, "editor": "ft", "settings": {"ft": {"steps": 1}}, "out": out}
    write_lines(file, records)
    editcli.edit(model, file, **choices)
    weights = (out / "model.safetensors").read_bytes()
    heard = Listener()
    write_lines(file, records[::2])
    report = editcli.edit(model, file, resume=True, reporter=heard, **choices).report
    gone = "Spain" if named else "line-2"
    assert [text for text in heard.said if f"facts.jsonl no longer has {gone}, which the run" in text]
    assert (report.applied, (out / "model.safetensors").read_bytes()) == (3, weights)
