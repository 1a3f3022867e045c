"""``check`` shows where an edit sits in its tokens, and refuses what ``apply`` would refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from editcli.__main__ import main
from editcli.commands.check import CheckedEdit, check
from editcli.errors import ModelError, RequestError
from editcli.testing import tiny_model_folder

EDIT: dict[str, Any] = {
    "id": "a",
    "prompt": "The capital of {} is",
    "subject": "Italy France",
    "target_new": "Rome Berlin",
    "target_true": "Paris",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model") / "tiny", "gpt2")


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def write(*changes: dict[str, Any]) -> Path:
        path = tmp_path / "edits.jsonl"
        path.write_text("".join(json.dumps({**EDIT, "id": str(n), **c}) + "\n" for n, c in enumerate(changes)))
        return path

    return write


def one(path: Path, model: Path) -> CheckedEdit:
    (edit,) = check(path, model=model).edits
    return edit


def test_shows_the_lookup_token_and_the_targets_tokens(file: Any, model: Path):
    edit = one(file({}), model)
    # The tiny GPT-2's tokens: T, h, e, capital, of, Italy, France, is; no begin-of-sequence token before them.
    assert (edit.lookup, edit.position) == (" France", 6)
    assert edit.target == (" Rome", " Berlin")
    assert edit.length == 10
    assert edit.warnings == ()
    assert edit.line == 1


def test_weights_are_not_needed(file: Any, tmp_path: Path):
    folder = tiny_model_folder(tmp_path / "model")
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    assert len(check(file({}), model=folder).edits) == 1


def test_bad_edits_are_collected_with_their_line(file: Any, model: Path):
    long = "of " * 300
    path = file({"subject": "Spain", "prompt": "Rome is"}, {}, {"prompt": long + "{}"}, {"paraphrase_prompts": [long]})
    report = check(path, model=model)
    assert [edit.id for edit in report.edits] == ["1"]
    assert [error.line for error in report.rejected] == [1, 3, 4]
    assert "context of 256" in str(report.rejected[1])
    assert "the model reads 256" in str(report.rejected[2])
    assert report.to_json()["usable"] == 1


@pytest.mark.parametrize(
    ("change", "doubt"),
    [
        ({"target_true": "Rome Berlin"}, "nothing to change"),
        ({"prompt": "The capital of {} is "}, "white space"),
        ({"target_true": None, "neighborhood_prompts": ["The capital of Spain is"]}, "not measured"),
        ({"neighborhood_prompts": ["The language of Italy France is"]}, "about the edited subject itself"),
        ({"paraphrase_prompt": ["It is"]}, "did you mean 'paraphrase_prompts'"),
        ({"subject": "Ital", "prompt": "The capital of Italy is"}, "reaches beyond the subject"),
    ],
)
def test_doubtful_edits_are_usable_with_a_warning(file: Any, model: Path, change: dict[str, Any], doubt: str):
    (warning,) = one(file(change), model).warnings
    assert doubt in warning


def test_fields_of_other_names_are_no_doubt(file: Any, model: Path):
    assert one(file({"relation_id": "P36", "note": "x", "reference_texts": ["a"]}), model).warnings == ()


def test_different_targets_for_one_prompt_are_a_warning(file: Any, model: Path):
    report = check(file({}, {"target_new": "London"}), model=model)
    assert len(report.edits) == 2
    (warning,) = report.warnings
    assert ":2: " in warning


@pytest.mark.parametrize(("merge", "outcome"), [(True, "share one target"), (False, "few of them will hold")])
def test_several_facts_of_one_subject_in_a_batch_are_a_warning(file: Any, model: Path, merge: bool, outcome: str):
    river = {"prompt": "The river of {} is", "subject": "France", "target_new": "London"}
    facts = ({"prompt": "The capital of {} is", "subject": "France"}, river, {**river, "subject": "Italy"})
    path, settings = file(*facts), {"targets": {"merge": merge}}
    (warning,) = check(path, model=model, settings=settings).warnings
    assert outcome in warning
    assert "'France' (line 1, line 2)" in warning
    assert check(path, model=model, settings=settings, editor="ultraedit").warnings == ()


def test_long_targets_and_plain_questions_are_refused_with_the_editors_that_take_them(file: Any, model: Path):
    lines = "\n".join(["Rome is in Italy and Paris is in France"] * 9)
    path = file({"target_new": lines}, {"prompt": "The capital is", "subject": None})
    long, plain = check(path, model=model).rejected
    assert "targets.longest=100" in str(long)
    for error, named in ((long, "optimises no targets"), (plain, "needs none")):
        assert f"{named}: " in str(error)
        assert all(f"--editor {name}" in str(error) for name in ("ft", "ultraedit"))
    assert check(path, model=model, editor="ft").rejected == ()
    assert len(check(path, model=model, settings={"targets": {"longest": None}}).rejected) == 1


def test_a_missing_file_or_model_is_refused(file: Any, model: Path, tmp_path: Path):
    with pytest.raises(RequestError, match=r"none\.jsonl"):
        check(tmp_path / "none.jsonl", model=model)
    with pytest.raises(ModelError):
        check(file({}), model=tmp_path / "nowhere")


def test_the_command_shows_rows_and_exits_with_2_when_one_is_refused(
    file: Any, model: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["check", str(file({})), "--model", str(model)]) == 0
    assert "' France'" in capsys.readouterr().out
    path = file({}, {"target_new": " "})
    assert main(["check", str(path), "--model", str(model)]) == 2
    assert "field 'target_new' is empty" in " ".join(capsys.readouterr().out.split())


def test_a_preset_decides_as_it_does_for_apply(
    file: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The editor of a preset may write edits without a subject; long prefixes leave less room for a prompt."""
    monkeypatch.chdir(tmp_path)
    Path("ft.toml").write_text('layers = [1]\neditor = "ft"\n')
    Path("long.toml").write_text("layers = [1]\n[targets]\nprefix_tokens = 250\n")
    bare = tmp_path / "bare.jsonl"
    bare.write_text(json.dumps({"prompt": "The capital of Italy is", "target_new": "Rome"}))
    command = ["check", str(bare), "--model", str(model)]
    assert main(command) == 2
    assert main([*command, "--preset", "ft.toml"]) == 0
    assert main([*command, "--preset", "ft.toml", "--editor", "memit"]) == 2
    Path("editcli.toml").write_text('preset = "ft.toml"\n')
    assert main(command) == 0
    Path("editcli.toml").unlink()
    command = ["check", str(file({})), "--model", str(model)]
    for given, code in (
        ((), 0),
        (("--preset", "long.toml"), 2),
        (("-o", "targets.prefix_tokens=250"), 2),
        (("--preset", "long.toml", "-o", "targets.prefix_tokens=5"), 0),
    ):
        assert main([*command, *given]) == code
    capsys.readouterr()
    assert main([*command, "--preset", "none.toml"]) == 1
    assert "none.toml" in capsys.readouterr().err


def test_the_command_prints_one_json_document(file: Any, model: Path, capsys: pytest.CaptureFixture[str]):
    path = file({}, {"target_new": 3})
    assert main(["check", str(path), "--model", str(model), "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["edits"][0]["lookup"] == " France"
    assert report["rejected"][0]["line"] == 2
