"""Reading edits: every refusal names the file, the line and the reason; nothing else ever escapes."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from editcli.errors import RequestError
from editcli.plugin.manager import load_plugins
from editcli.requests.reader import EditFile, read_edits
from editcli.requests.schema import Neighbor, from_record
from editcli.requests.superseding import supersede
from editcli.requests.texts import trimmed
from editcli.storage.lines import MAX_LINE_BYTES

EDIT: dict[str, Any] = {"prompt": "The capital of {} is", "subject": "France", "target_new": "Lyon"}


def line(**fields: Any) -> str:
    """Return one line of an edits file; a field set to ``...`` is left out."""
    return json.dumps({name: value for name, value in {**EDIT, **fields}.items() if value is not ...})


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Write an edits file and return its path."""

    def write(content: str | bytes) -> Path:
        path = tmp_path / "edits.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def refusal(path: Path) -> RequestError:
    with pytest.raises(RequestError) as caught:
        read_edits(path)
    error = caught.value
    assert error.exit_code == 2
    assert str(error).startswith(f"{path}:")
    assert "\n" not in str(error)
    return error


def test_the_required_fields_are_enough(write: Any) -> None:
    (request,) = read_edits(write(line() + "\n")).requests
    assert (request.prompt, request.subject, request.target_new) == ("The capital of France is", "France", "Lyon")
    assert request.prompt[: request.subject_end].endswith("France")
    assert (request.id, request.line) == ("line-1", 1)


def test_every_optional_field_is_read_and_unknown_ones_are_kept(write: Any) -> None:
    optional = {
        "id": 7,
        "target_true": "Paris",
        "paraphrase_prompts": ["France's capital is"],
        "neighborhood_prompts": ["The capital of Italy is", {"prompt": "Rome is in", "target": "Italy"}],
        "generation_prompts": ["France is"],
        "locality": [{"prompt": "Two and two is", "target": "four"}],
        "portability": [{"prompt": "Lyon is", "target": "a capital", "axis": "reasoning"}],
        "relation_id": "P36",
    }
    (request,) = read_edits(write(line(**optional))).requests
    assert (request.id, request.target_true) == ("7", "Paris")
    assert request.paraphrase_prompts == ("France's capital is",)
    assert request.neighborhood_prompts[0] == Neighbor("The capital of Italy is", "Paris")
    assert request.neighborhood_prompts[1] == Neighbor("Rome is in", "Italy")
    assert request.generation_prompts == ("France is",)
    assert request.extra == {"relation_id": "P36"}
    assert from_record(request.to_json(), line=1, file=request.file) == request


@pytest.mark.parametrize(
    ("prompt", "subject", "filled"),
    [
        ("The capital of France is", "France", "The capital of France is"),
        ("{} is in", "The Louvre", "The Louvre is in"),
        ("In {x} and {0}, {} is", "Rome", "In {x} and {0}, Rome is"),
        ("{{}} is", "Rome", "{Rome} is"),
        ("The set { } of Rome", "Rome", "The set { } of Rome"),
        ("In Paris, {} is loved by Paul", "Paul", "In Paris, Paul is loved by Paul"),
        ("東京 is", "東京", "東京 is"),
    ],
)
def test_the_subject_stands_where_the_braces_or_it_itself_are(
    write: Any, prompt: str, subject: str, filled: str
) -> None:
    (request,) = read_edits(write(line(prompt=prompt, subject=subject))).requests
    assert request.prompt == filled
    assert request.prompt[: request.subject_end].endswith(subject)


BAD_LINES: list[tuple[str, str]] = [
    ("{", "not valid JSON"),
    ("{'prompt': 1}", "not valid JSON"),
    (line() + ",", "not valid JSON: Extra data"),
    ('{"prompt": NaN}', "NaN is not a JSON value"),
    ('{"prompt": -Infinity}', "-Infinity is not a JSON value"),
    ('{"x": ' + "1" * 5000 + "}", "not valid JSON"),
    ('{"x": ' + "[" * 200_000 + "}", "not valid JSON"),
    ("null", "an edit is a JSON object, not null"),
    ("[1]", "an edit is a JSON object, not a list"),
    ('"text"', "an edit is a JSON object, not a text"),
    ("3", "an edit is a JSON object, not a number"),
    ("true", "an edit is a JSON object, not a truth value"),
    *((line(**{name: ...}), f"the field '{name}' is missing") for name in EDIT),
    *((line(**{name: ""}), f"the field '{name}' is empty") for name in EDIT),
    *((line(**{name: " \t "}), f"the field '{name}' is empty") for name in EDIT),
    *((line(**{name: 3}), f"the field '{name}' must be a text, not a number") for name in EDIT),
    *((line(**{name: None}), f"the field '{name}' must be a text, not null") for name in EDIT),
    *((line(**{name: ["x"]}), f"the field '{name}' must be a text, not a list") for name in EDIT),
    *((line(**{name: "a\0b"}), f"the field '{name}' contains a NUL character") for name in EDIT),
    *((line(**{name: "a\ud800"}), f"the field '{name}' contains half of a surrogate pair") for name in EDIT),
    (line(target_true=""), "the field 'target_true' is empty"),
    (line(target_true=5), "the field 'target_true' must be a text"),
    (line(prompt="The capital is"), "the subject 'France' is not in the prompt"),
    (line(prompt="the capital of france is"), "the subject 'France' is not in the prompt"),
    (line(prompt="{} and {} are"), "more than one {}"),
    (line(prompt="France and France are"), "the subject 'France' is in the prompt 2 times"),
    (line(id=[1]), "the field 'id' must be a text or a whole number, not a list"),
    (line(id=True), "the field 'id' must be a text or a whole number, not a truth value"),
    (line(id=1.5), "the field 'id' must be a text or a whole number, not 1.5"),
    (line(id=" "), "the field 'id' is empty; leave it out"),
    (line(id="a\0"), "the field 'id' contains a NUL character"),
    *(
        (line(**{name: "x"}), f"the field '{name}' must be a list, not a text")
        for name in ("paraphrase_prompts", "neighborhood_prompts", "generation_prompts", "locality", "portability")
    ),
    (line(paraphrase_prompts=["x", 3]), "every entry of 'paraphrase_prompts' must be a text"),
    (line(paraphrase_prompts=[""]), "an entry of 'paraphrase_prompts' is empty; write"),
    (line(paraphrase_prompts=["a\0"]), "the field 'paraphrase_prompts' contains a NUL"),
    (line(neighborhood_prompts=[3]), "every entry of 'neighborhood_prompts'"),
    (line(neighborhood_prompts=[{"target": "x"}]), "every entry of 'neighborhood_prompts'"),
    (line(neighborhood_prompts=[{"prompt": "x", "target": 3}]), "every entry of 'neighborhood_prompts'"),
    (line(generation_prompts=[None]), "every entry of 'generation_prompts'"),
    (line(locality=["x"]), "every entry of 'locality' must be an object"),
    (line(portability=[{"prompt": "x"}]), "every entry of 'portability'"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_LINES, ids=[f"{n}-{r[:40]}" for n, (_, r) in enumerate(BAD_LINES)])
def test_a_bad_line_is_refused_with_its_place_and_the_reason(write: Any, bad: str, reason: str) -> None:
    error = refusal(write(line() + "\n\n" + bad + "\n"))
    assert error.line == 3
    assert reason in error.reason


def test_json_errors_name_the_column(write: Any) -> None:
    error = refusal(write('{"prompt": oops}\n'))
    assert (error.line, error.column) == (1, 12)
    assert ":1:12: " in str(error)


def test_text_that_is_not_utf8_names_the_column(write: Any) -> None:
    error = refusal(write(line().encode() + b'\n{"prompt": "\xff"}\n'))
    assert (error.line, error.column) == (2, 13)
    assert "save the file as UTF-8" in error.reason


def test_utf16_is_refused(write: Any) -> None:
    assert "not UTF-8" in refusal(write(line().encode("utf-16"))).reason


def test_a_line_that_is_too_long_is_refused_before_it_is_parsed(write: Any) -> None:
    assert "longer than" in refusal(write(line(note="x" * MAX_LINE_BYTES))).reason


@pytest.mark.parametrize("content", ["", "\n\n", "\r\n", " \n\t\n", "\ufeff"])
def test_a_file_without_edits_is_refused(write: Any, content: str) -> None:
    assert "there is no edit in this file" in refusal(write(content)).reason


def test_a_json_array_is_refused_with_what_to_do(write: Any) -> None:
    assert "editcli convert" in refusal(write(f"[{line()}]")).reason


def test_a_file_that_is_not_there_or_a_folder_is_refused(tmp_path: Path) -> None:
    assert "there is no such file" in refusal(tmp_path / "none.jsonl").reason
    assert "it is a folder" in refusal(tmp_path).reason


@pytest.mark.parametrize("ids", [("a", "a"), (1, "1"), (..., "line-1")])
def test_an_id_is_taken_once(write: Any, ids: tuple[Any, Any]) -> None:
    first, second = line(id=ids[0]), line(id=ids[1], subject="Spain")
    error = refusal(write(f"{first}\n{second}\n"))
    assert error.line == 2
    assert "was already used on line 1" in error.reason


def test_byte_order_mark_crlf_and_blank_lines_are_tolerated(write: Any) -> None:
    content = "\ufeff" + line() + "\r\n\r\n   \r\n" + line(subject="東京") + "\r\n"
    requests = read_edits(write(content)).requests
    assert [(r.line, r.subject) for r in requests] == [(1, "France"), (4, "東京")]


def test_the_last_line_needs_no_newline_and_a_separator_in_a_text_ends_no_line(write: Any) -> None:
    content = json.dumps({**EDIT, "target_new": "Lyon\u2028\x85"}, ensure_ascii=False)
    (request,) = read_edits(write(content)).requests
    assert request.target_new == "Lyon\u2028\x85"


def test_a_dash_reads_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.TextIOWrapper(io.BytesIO((line() + "\n{").encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(RequestError, match=r"^<stdin>:2:2: not valid JSON"):
        read_edits("-")


def test_bad_lines_can_be_collected_instead(write: Any) -> None:
    found = read_edits(write("\n".join([line(id="a"), "{", line(id="a"), line(id="b")])), skip_bad=True)
    assert [request.id for request in found.requests] == ["a", "b"]
    assert [error.line for error in found.rejected] == [2, 3]


def test_a_limit_counts_edits_and_reads_no_further(write: Any) -> None:
    found = read_edits(write("\n".join([line(id="a"), line(id="b"), "{"])), limit=2)
    assert [request.id for request in found.requests] == ["a", "b"]


def test_two_targets_for_one_prompt_are_a_warning(write: Any) -> None:
    found = read_edits(
        write("\n".join([line(), line(target_new="Nice"), line(subject="Spain"), line(target_new="Nice")]))
    )
    assert len(found.requests) == 4
    (warning,) = found.warnings
    assert ":2: " in warning
    assert "'Lyon' on line 1; the later one wins" in warning


@pytest.mark.parametrize(
    "prompt",
    ["The  capital of {} is", "The capital of {}\u00a0is", "The capital of {} is\u200b", "The capital of France is "],
)
def test_prompts_that_look_the_same_contradict_each_other(prompt: str) -> None:
    first, last = from_record(EDIT, line=1), from_record({**EDIT, "prompt": prompt, "target_new": "Nice"}, line=2)
    kept, replaced = supersede([first, last])
    assert kept == [last]
    assert [(one.request, one.by) for one in replaced] == [(first, last)]
    assert replaced[0].reason.startswith("superseded by the edit 'line-2' on line 2")


def test_the_last_of_several_targets_holds_wherever_it_was_asked_for_before() -> None:
    targets = ["Nice", "Lyon", "Metz", "Nice", "Nice"]
    edits = [from_record({**EDIT, "target_new": target}, line=line) for line, target in enumerate(targets, 1)]
    other = from_record({**EDIT, "prompt": "The capital of {} was"}, line=9)
    kept, replaced = supersede([*edits[:2], other, *edits[2:]])
    assert [request.line for request in kept] == [1, 9, 4, 5]
    assert [(one.request.line, one.by.line) for one in replaced] == [(2, 4), (3, 4)]


def test_an_edit_that_was_given_up_contradicts_none_and_is_itself_superseded() -> None:
    targets = ("Nice", "Lyon", "Metz", "Lyon")
    edits = [from_record({**EDIT, "id": str(n), "target_new": target}) for n, target in enumerate(targets)]
    kept, replaced = supersede(edits, given_up={"0", "3"})
    assert [request.id for request in kept] == ["2", "3"]
    assert [(one.request.id, one.by.id) for one in replaced] == [("0", "2"), ("1", "2")]
    assert supersede(edits[2:], given_up={"3"}) == (edits[2:], [])


@pytest.mark.parametrize(
    ("subject", "prompt", "filled", "kind"),
    [
        ("France ", "The capital of {} is", "The capital of France is", "a blank after"),
        ("\u200bFrance", "The capital of {} is", "The capital of France is", "an invisible character before"),
        ("France\ufeff", "The capital of France\ufeff is", "The capital of France\ufeff is", "an invisible character"),
        ("France ", "The capital of {}is", "The capital of France is", "a blank after"),
        ("France ", "The capital of France is", "The capital of France is", "a blank after"),
    ],
)
def test_what_cannot_be_seen_around_a_subject_is_no_part_of_it(
    write: Any, subject: str, prompt: str, filled: str, kind: str
) -> None:
    found = read_edits(write(line() + "\n" + line(id="x", subject=subject, prompt=prompt)))
    assert (found.requests[1].subject, found.requests[1].prompt) == ("France", filled)
    (warning,) = found.warnings
    assert f"edits.jsonl:2: {kind}" in warning


@pytest.mark.parametrize("subject", ["क्\u200d", "\U0001f3f4\U000e0067\U000e007f", "Paris (Texas)"])
def test_signs_that_shape_the_letter_before_them_stay(subject: str) -> None:
    request = from_record({**EDIT, "subject": subject})
    assert (request.subject, request.notes) == (subject, ())


@pytest.mark.parametrize(
    ("prompt", "subject", "spelling", "named"),
    [
        ("The coast of Co\u0302te is", "C\u00f4te", "Co\u0302te", "U+006F LATIN SMALL LETTER O"),
        ("The river of Côte d\u2019Azur is", "Côte d'Azur", "Côte d\u2019Azur", "U+2019 RIGHT SINGLE QUOTATION MARK"),
        ("In New\u00a0York City", "New York", "New\u00a0York", "U+00A0 NO-BREAK SPACE, not U+0020 SPACE"),
        ("The wall of \uff30aris is", "Paris", "\uff30aris", "U+FF30 FULLWIDTH LATIN CAPITAL LETTER P"),
        ("Das Spiel O\u2013K ist", "O-K", "O\u2013K", "U+2013 EN DASH"),
    ],
)
def test_a_subject_that_the_prompt_writes_otherwise_is_taken_from_the_prompt(
    prompt: str, subject: str, spelling: str, named: str
) -> None:
    request = from_record({**EDIT, "prompt": prompt, "subject": subject})
    assert (request.subject, request.prompt) == (spelling, prompt)
    (note,) = request.notes
    assert named in note


@pytest.mark.parametrize(
    ("prompt", "subject", "reason"),
    [
        ("The Cafe\u0301 is", "Cafe\u0301s", "is not in the prompt; write {}"),
        ("the capital of france is", "France", "which has 'france'; write both alike"),
        ("d\u2019A and d\u2018A", "d'A", "is in the prompt 2 times; mark its place with {}"),
        ("The capital of {} is", "\u200b", "holds nothing that can be seen"),
    ],
)
def test_a_subject_that_cannot_be_placed_says_what_the_prompt_has(prompt: str, subject: str, reason: str) -> None:
    with pytest.raises(RequestError) as caught:
        from_record({**EDIT, "prompt": prompt, "subject": subject})
    assert reason in caught.value.reason


def test_a_question_needs_no_subject() -> None:
    record = {"id": "q", "prompt": "Which city is the capital?", "target_new": "Lyon"}
    request = from_record(record)
    assert (request.has_subject, request.prompt, request.subject) == (False, record["prompt"], "")
    assert request.to_json() == record


@pytest.mark.parametrize("join", ["", " ", "\n", None])
def test_what_goes_between_prompt_and_target_may_be_given(join: str | None) -> None:
    request = from_record({**EDIT, "join": join})
    assert request.join == join
    assert from_record(request.to_json(), file=request.file) == from_record({**EDIT, "join": join, "id": request.id})
    assert (request.digest == from_record({**EDIT, "id": request.id}).digest) is (join is None)


def test_an_id_that_a_table_wrote_with_a_point_is_a_whole_number() -> None:
    assert from_record({**EDIT, "id": 3.0}).id == "3"


def test_files_that_were_joined_keep_their_byte_order_marks(write: Any) -> None:
    part = "\ufeff" + line() + "\n"
    found = read_edits(write(part + "\ufeff" + line(subject="Spain") + "\n\ufeff\n"))
    assert [request.subject for request in found.requests] == ["France", "Spain"]


def test_the_files_hash_changes_with_any_byte(write: Any) -> None:
    first = read_edits(write(line() + "\n"))
    second = read_edits(write(line() + "\n\n"))
    assert first.sha256 != second.sha256
    assert [r.digest for r in first.requests] == [r.digest for r in second.requests]


def test_what_an_edit_writes_decides_its_digest() -> None:
    base = from_record(EDIT, line=1)
    assert base.digest == from_record({**EDIT, "paraphrase_prompts": ["x"]}, line=1).digest
    for changed in ({"prompt": "{} is"}, {"subject": "Spain"}, {"target_new": "Nice"}, {"id": "x"}):
        assert from_record({**EDIT, **changed}, line=1).digest != base.digest


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FOREIGN = (
    "requested_rewrite src alt loc loc_ans case_id ground_truth rephrase questions rephrase_prompt answers pred str"
)
FIELDS = st.sampled_from(
    [*EDIT, "id", "target_true", "neighborhood_prompts", "locality", "portability", *FOREIGN.split(), "locality_prompt"]
)
FORMATS = load_plugins().formats()
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(write: Any, content: bytes) -> None:
    path = write(content)
    strict = _outcome(path, skip_bad=False)
    lenient = _outcome(path, skip_bad=True)
    assert lenient is None or lenient.requests or lenient.rejected
    assert strict is None or (lenient is not None and strict.requests == lenient.requests)


def _outcome(path: Path, *, skip_bad: bool) -> EditFile | None:
    try:
        return read_edits(path, skip_bad=skip_bad)
    except RequestError:
        return None


@FUZZ
@given(st.dictionaries(FIELDS, JSON, max_size=8))
def test_any_object_is_taken_or_refused_whatever_format_it_resembles(write: Any, record: dict[str, Any]) -> None:
    raw = json.dumps(record).replace("NaN", "null").replace("Infinity", "1e999")
    found = read_edits(write(raw), skip_bad=True, formats=FORMATS)
    assert found.requests or found.rejected


@FUZZ
@given(st.text(min_size=1), st.text(), st.text(), st.text(min_size=1))
def test_whatever_is_taken_marks_the_subject_and_survives_a_round_trip(
    subject: str, before: str, after: str, target: str
) -> None:
    record = {"prompt": before + "{}" + after, "subject": subject, "target_new": target}
    try:
        request = from_record(record, line=1)
    except RequestError:
        return
    start, stop = trimmed(subject)
    assert request.prompt[len(request.before) : request.subject_end] == subject[start:stop] != ""
    assert from_record(json.loads(json.dumps(request.to_json())), line=1) == request
