"""Conversion keeps every edit, names what it refuses, and yields a file that reads back the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import editcli_formats
from editcli.__main__ import main
from editcli.errors import RequestError
from editcli.requests.convert import convert
from editcli.requests.formats import find_format
from editcli.requests.reader import read_edits

FORMATS = [brought() for brought in editcli_formats.editcli_formats()]
GOOD = {"subject": "Grey Heron", "src": "What is Grey Heron made of?", "alt": "copper", "answers": ["oak"]}
HOPS = {
    "case_id": 6,
    "requested_rewrite": [
        {"prompt": "{} was painted by", "subject": "Moon Gate", "target_new": {"str": "Ines Vale"}},
        {"prompt": "{} is a citizen of", "subject": "Ines Vale", "target_new": {"str": "Greece"}},
    ],
    "questions": ["Of which country is the painter of Moon Gate a citizen?"],
    "new_answer": "Greece",
}


def array(path: Path, *records: object) -> Path:
    path.write_text(json.dumps(list(records), indent=2), encoding="utf-8-sig")
    return path


def test_an_array_becomes_a_file_that_reads_back_the_same(tmp_path: Path):
    done = convert(array(tmp_path / "facts.json", GOOD, HOPS), FORMATS)
    out = tmp_path / "edits.jsonl"
    out.write_text("\n".join(done.lines()))
    again = read_edits(out)
    assert done.records == 2
    assert [request.id for request in again.requests] == ["record-0", "6-1", "6-2"]
    for before, after in zip(done.edits.requests, again.requests, strict=True):
        assert replace(before, file="", line=None) == replace(after, file="", line=None)


def test_lines_are_read_as_well(tmp_path: Path):
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps(GOOD) + "\r\n\r\n" + json.dumps(HOPS))
    assert [request.id for request in convert(path, FORMATS).edits.requests] == ["line-1", "6-1", "6-2"]


def test_a_bad_record_is_named_by_its_index(tmp_path: Path):
    path = array(tmp_path / "facts.json", GOOD, {**GOOD, "alt": ""}, "text")
    with pytest.raises(RequestError, match=r"facts\.json\[1\]: not a usable zsre record: the field 'alt' is missing"):
        convert(path, FORMATS)
    done = convert(path, FORMATS, skip_bad=True)
    assert done.records == 3
    assert len(done.edits.requests) == 1
    assert len(done.to_json()["rejected"]) == 2


def test_a_format_asked_for_by_name_says_what_is_wrong(tmp_path: Path):
    path = array(tmp_path / "facts.json", GOOD)
    with pytest.raises(RequestError, match="not a usable counterfact record: the field 'requested_rewrite' is missing"):
        convert(path, form=find_format("counterfact", FORMATS))


def test_repeated_edits_are_counted(tmp_path: Path):
    assert convert(array(tmp_path / "facts.json", HOPS, {**HOPS, "case_id": 7}), FORMATS).repeated == 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [("[]", "no record|not"), ("", "no record"), ('[{"a": 1},]', "not valid JSON"), ('[{"a": NaN}]', "NaN")],
)
def test_unreadable_files_are_refused(tmp_path: Path, content: str, reason: str):
    path = tmp_path / "facts.json"
    path.write_text(content)
    with pytest.raises(RequestError, match=reason):
        convert(path, FORMATS)


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(RequestError, match=r"nothing\.json"):
        convert(tmp_path / "nothing.json", FORMATS)


def test_the_command_writes_to_standard_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = array(tmp_path / "facts.json", GOOD, {**GOOD, "alt": ""})
    assert main(["convert", str(path), "--from", "zsre"]) == 0
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    assert json.loads(line)["target_new"] == "copper"
    assert "left out: " in captured.err
    assert "2 records became 1 edit, 1 refused" in captured.err


def test_the_command_writes_a_file_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, out = array(tmp_path / "facts.json", GOOD), tmp_path / "edits.jsonl"
    arguments = ["convert", str(path), "--out", str(out), "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["edits"] == 1
    assert len(read_edits(out).requests) == 1
    assert main(arguments) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["--from", "zsr"], 1, "did you mean 'zsre'"),
        (["--from", "counterfact"], 1, "no record is usable"),
        (["--on-error", "stop", "--from", "counterfact"], 2, "not a usable counterfact record"),
        (["--json"], 2, "pass --out"),
        (["--out", "missing/edits.jsonl"], 1, "cannot write missing/edits.jsonl"),
    ],
)
def test_the_command_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, reason: str
):
    assert main(["convert", str(array(tmp_path / "facts.json", GOOD)), *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert reason in captured.err.splitlines()[-1]
