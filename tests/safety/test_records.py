"""Records from strangers: whatever stands in them, reading gives the record or one kind of error."""

from __future__ import annotations

import copy
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import hostile
from benchmarks.hostile import ROWS, attacking
from benchmarks.special_files import Case, fault_of
from benchmarks.workshop import Ended
from editcli.errors import EditError, FileError, StateError
from editcli.export.patch import MANIFEST, read_manifest
from editcli.export.record import recipe_of
from editcli.records.decoding import (
    MAX_VALUES,
    UnreadableError,
    decode,
    encode,
    parse,
    read_json,
)
from editcli.records.decoding import (
    to_text as checked_text,
)
from editcli.records.edits import OutcomeLine, RejectedLine
from editcli.records.journal import BatchRecord, UndoRecord, journal_line, read_lines
from editcli.records.record import Provenance, RunRecord, read_record
from editcli.records.state import RunFolder, StreamSettings, requests_of
from editcli.runs.card import model_card
from editcli.settings.recipe import Recipe
from editcli.storage.conversion import convert
from editcli.storage.files import write_json, write_lines
from editcli.storage.lines import MAX_DEPTH
from tests.support.places import ROOT

EARLIER = ROOT / "tests" / "records" / "data" / "earlier" / "run"
HASH = "0" * 64
JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(-3, 3),
        st.floats(),
        st.text(max_size=6),
        st.sampled_from(["\ud800", "a\x00", "done", "batch", "undo", "\x1b[31m", "9" * 400]),
        st.integers(10**30, 10**40),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
"""Any JSON value, and what Python reads as one."""
HYPOTHESIS = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def earlier(name: str) -> Any:
    return json.loads((EARLIER / "editcli" / name).read_text("utf-8"))


RECORD = {
    **earlier("run.json"),
    "rejected": [{"id": "x", "line": 3, "reason": "why", "superseded_by": "y"}],
    "efficacy": {"before": None, "immediate": {"efficacy_accuracy": 0.5}, "retained": {"efficacy_accuracy": 1}},
    "specificity": {"before": 1.0, "after": 0.5, "accuracy": {"before": 1.0, "after": None}},
    "targets": {"optimised": 3, "reached": 2, "clamped": 0},
    "unknown": {"of a": ["later", "version"]},
}
LINE = json.loads((EARLIER / "editcli/journal.jsonl").read_text("utf-8").splitlines()[0])
ENDING = {name: LINE.pop(name) for name in ("seconds", "weights", "previous")}
MORE = {"targets": {"optimised": 2}, "superseded": {"a": "b"}, "released": ["c"], "already_true": ["a"]}
BATCH = {**LINE, **MORE, **ENDING}
UNDO = {
    "sequence": 1,
    "kind": "undo",
    "step": 0,
    "edits": ["a"],
    "segment": None,
    "sha256": None,
    "consumed": HASH,
    "removed": {"a": HASH},
    "redo": [],
    "undone": 0,
    "previous": HASH,
}
ANSWER = {"prompt": "p", "target": "t", "logprob": -1.0, "exact": True, "success": None}
SETTINGS = {
    "base": HASH,
    "editor": "memit",
    "stabilizers": ["nas"],
    "options": {"memit": {"ridge": 0.0}},
    "seed": 0,
    "targets": {"clamp": 0.75},
    "layers": [0, 1],
    "tokenizer": HASH,
    "save_dtype": "auto",
    "dtype": "torch.float32",
    "reference": {"corpus": "self:1", "options": {"tokens": None}},
    "chat_template": False,
    "chat": None,
    "prefixes": ["The"],
}
MANIFEST_RECORD = {
    "format": 1,
    "editcli": "0.1.0",
    "recipe": {"edits": "facts.jsonl"},
    "files": {"config.json": HASH},
    "base": {"name": "base", "revision": None, "commit": None, "fingerprint": HASH},
    "patch": {"file": "patch.safetensors", "sha256": HASH},
    "tensors": [
        {"name": "w", "shape": [2, 3], "dtype": "F32", "base_dtype": "F32", "base_sha256": HASH, "sha256": HASH}
    ],
}


def of_manifest(folder: Path, text: str) -> Any:
    (folder / MANIFEST).write_text(text)
    return read_manifest(folder)


def of_segment(folder: Path, text: str) -> Any:
    return requests_of({"format": "1", "edits": text, "places": '[["f", 1]]'})


def of_journal(folder: Path, text: str) -> Any:
    return list(read_lines([text.encode("utf-8", "surrogatepass")], folder / "journal.jsonl"))


def of_run(folder: Path, text: str) -> Any:
    """Read a record, and what every reader makes of one."""
    (folder / "editcli").mkdir(exist_ok=True)
    (folder / "editcli/run.json").write_text(text)
    record = read_record(folder)
    assert record is not None
    again = RunRecord.from_json(parse(checked_text(record.to_json(), RunRecord.from_json)))
    assert again == record
    if record.ended:
        assert model_card(record.report, recipe_of(record), record.provenance, diagnostics={})
    return record


def of_recipe(folder: Path, text: str) -> Any:
    value = parse(text)
    return Recipe.from_json(value) if isinstance(value, dict) else None


READERS: dict[str, tuple[Any, Callable[[Path, str], Any]]] = {
    "run.json": (RECORD, of_run),
    "recipe": (RECORD["recipe"], of_recipe),
    "batch": (BATCH, of_journal),
    "undo": (UNDO, of_journal),
    "settings": (SETTINGS, lambda folder, text: StreamSettings.from_json(convert(parse(text), dict[str, Any]), folder)),
    "manifest": (MANIFEST_RECORD, of_manifest),
    "edits": ([{"id": "a", "prompt": "The {} is", "subject": "x", "target_new": "y"}], of_segment),
    "outcome": (
        {"id": "a", "efficacy": [ANSWER], "paraphrases": [ANSWER], "neighbors": []},
        lambda folder, text: decode(text.encode("utf-8", "surrogatepass"), OutcomeLine),
    ),
    "rejected": (
        {"id": "a", "line": 3, "reason": "why", "file": None},
        lambda folder, text: decode(text.encode("utf-8", "surrogatepass"), RejectedLine),
    ),
}
"""Records, each with how it is read."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def with_value(record: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    changed = copy.deepcopy(record)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return changed


@pytest.mark.parametrize("name", READERS)
def test_a_record_is_read(name: str, tmp_path: Path) -> None:
    record, read = READERS[name]
    assert read(tmp_path, json.dumps(record)) is not None


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
@HYPOTHESIS
def test_any_value_at_any_place_gives_the_record_or_one_error(name: str, tmp_path: Path, data: st.DataObject) -> None:
    record, read = READERS[name]
    changed = with_value(record, data.draw(st.sampled_from(list(places(record)))), data.draw(JSON))
    with suppress(EditError, UnreadableError):
        read(tmp_path, json.dumps(changed))


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    "text",
    [
        *("", "null", "5", "NaN", '"x"', "[]", "{}", "{", "[" * 100_000, "[" * 100_000 + "]" * 100_000),
        *('{"a":' * 100_000, '{"a": "\\ud800"}', '{"a": 1e999}', '{"a": -Infinity}', "1" * 5000, "\ufeff{}"),
    ],
    ids=lambda text: text[:12] or "nothing",
)
def test_what_is_no_record_at_all_is_refused(name: str, text: str, tmp_path: Path) -> None:
    if (name, text) in (("edits", "[]"), ("recipe", "null"), ("recipe", "5"), ("recipe", '"x"'), ("recipe", "[]")):
        pytest.skip("it is one")
    with pytest.raises((EditError, UnreadableError)):
        READERS[name][1](tmp_path, text)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("edits", "read"), "3", "edits.read: Expected `int`"),
        (("edits", "applied"), -1, "edits.applied: Expected `int` >= 0"),
        (("sites", 0, "ratio"), [], "sites[0].ratio: Expected"),
        (("provenance", "base"), {}, "provenance.base: Object missing required field `name`"),
        (("provenance", "base", "folder"), "a\x00", "NUL character"),
        (("provenance",), None, "provenance: Expected `object`"),
        (("components",), {"memit": {"n": 2**64}}, "whole number beyond"),
    ],
)
def test_the_error_names_the_file_the_field_and_a_remedy(
    path: tuple[Any, ...], value: Any, said: str, tmp_path: Path
) -> None:
    (tmp_path / "editcli").mkdir()
    (tmp_path / "editcli/run.json").write_text(json.dumps(with_value(RECORD, path, value)))
    with pytest.raises(StateError) as caught:
        RunFolder(tmp_path).read_record()
    assert said in str(caught.value)
    assert str(tmp_path / "editcli/run.json") in str(caught.value)
    assert "restore it from a backup" in str(caught.value)


def test_a_line_of_the_journal_is_named_with_its_field(tmp_path: Path) -> None:
    lines = (EARLIER / "editcli/journal.jsonl").read_bytes().splitlines()
    lines[1] = lines[1].replace(b'"layer": 1', b'"layer": null')
    said = r"journal.jsonl:2 is damaged \(sites\[1\].layer: Expected `int`, got `null`\)"
    with pytest.raises(StateError, match=said):
        list(read_lines(lines, tmp_path / "journal.jsonl"))


def test_numbers_that_no_stream_has_are_refused(tmp_path: Path) -> None:
    for changes, said in (({"step": 2}, "it is 2 after 0"), ({"sequence": 2}, "numbered 2"), ({"edits": []}, "length")):
        with pytest.raises(StateError, match=said):
            of_journal(tmp_path, json.dumps({**BATCH, **changes}))
    for changes, said in (
        ({"step": 1}, "it is 1 after 0"),
        ({"redo": [1]}, "no earlier batch"),
        ({"kind": "x"}, "kind"),
    ):
        with pytest.raises(StateError, match=said):
            of_journal(tmp_path, json.dumps({**UNDO, **changes}))


def test_a_record_is_written_as_it_was_read_with_what_this_version_does_not_know() -> None:
    record = copy.deepcopy(RECORD)
    record["provenance"]["base"]["mirror"] = "elsewhere"
    record["sites"][1]["kurtosis"] = 3.5
    record["provenance"]["base"]["card"] = {}
    decoded = RunRecord.from_json(record)
    written = decoded.to_json()
    assert written["provenance"]["base"]["mirror"] == "elsewhere"
    assert written["sites"][1]["kurtosis"] == 3.5
    assert written["unknown"] == RECORD["unknown"]
    # Options that older versions did not write stand at their documented values.
    del written["preset"]["file"], written["preset"]["sha256"], written["provenance"]["kernels"]
    for site in written["sites"]:
        del site["relative_change"]
    assert written == record


@pytest.mark.parametrize(("line", "kind"), [(BATCH, BatchRecord), (UNDO, UndoRecord)])
def test_a_journal_line_is_written_as_it_was_read(line: dict[str, Any], kind: type[Any]) -> None:
    assert json.loads(journal_line(convert(line, kind), "")) == line
    assert list(json.loads(journal_line(convert(line, kind), ""))) == list(line)


def test_a_record_of_an_earlier_version_is_read() -> None:
    record = read_record(EARLIER)
    assert record is not None
    assert record.ended
    assert record.provenance.base.card == {}
    assert record.preset is not None
    assert record.preset.file is None
    assert encode(record.provenance.pilots) == earlier("run.json")["provenance"]["pilots"]
    assert [entry.step for entry, _ in RunFolder(EARLIER).read_journal()] == [1, 2]


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create()
    folder.write_record(RECORD)
    before = folder.record.read_bytes()
    for value in ("\ud800", {1, 2}, "a\x00b", 10**400):
        with pytest.raises(StateError, match="would not be readable"):
            folder.write_record({**RECORD, "components": {"memit": {"figure": value}}})
    # Null can take the place of a figure, but not of a count.
    with pytest.raises(StateError, match="would not be readable"):
        folder.write_record({**RECORD, "edits": {"read": float("nan"), "applied": 0, "rejected": 0}})
    assert folder.record.read_bytes() == before
    assert [path.name for path in folder.folder.iterdir() if path.name.startswith(".")] == []


def test_a_figure_that_is_not_finite_is_written_as_null(tmp_path: Path) -> None:
    folder, figures = RunFolder(tmp_path), {"a": float("nan"), "b": [float("-inf"), 1.5], "c": {"d": float("inf")}}
    folder.create()
    folder.write_record({**RECORD, "components": {"memit": figures}})
    record = folder.read_record()
    assert record is not None
    assert record.components == {"memit": {"a": None, "b": [None, 1.5], "c": {"d": None}}}
    write_json(tmp_path / "bench.json", {"figures": figures, "out": "a\udcffb"})
    written = json.loads((tmp_path / "bench.json").read_text("utf-8"), parse_constant=pytest.fail)
    assert written == {"figures": {"a": None, "b": [None, 1.5], "c": {"d": None}}, "out": "a\udcffb"}
    write_lines(tmp_path / "lines.jsonl", [figures, 1])
    lines = (tmp_path / "lines.jsonl").read_text("utf-8").splitlines()
    assert json.loads(lines[0], parse_constant=pytest.fail)["a"] is None


def test_a_record_stays_as_small_as_what_is_read_of_it(tmp_path: Path) -> None:
    """A stream of a million edits names the first refused ones; the file of all lies beside it."""
    folder, count = RunFolder(tmp_path), 20_000
    folder.create()
    rejected = [{"id": f"edit-{number}", "line": number, "reason": "no " * 730} for number in range(count)]
    counts = {"read": count, "applied": 0, "rejected": count}
    folder.write_record({**RECORD, "rejected": rejected, "already_true": ["x"] * count, "edits": counts})
    assert folder.record.stat().st_size <= 40 << 20
    record = folder.read_record()
    assert record is not None
    assert record.edits is not None
    assert (len(record.rejected or ()), record.edits.rejected) == (10_000, count)


def test_a_record_that_is_too_large_all_the_same_is_not_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create()
    with pytest.raises(StateError, match="larger than 41,943,040 bytes"):
        folder.write_record({**RECORD, "components": {"memit": {"text": "x" * (41 << 20)}}})
    assert not folder.record.exists()


def test_a_journal_that_is_full_is_told_before_a_line_is_lost(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create()
    folder.append("{}")
    folder.refuse_full("{}")
    os.truncate(folder.journal, 256 << 20)
    with pytest.raises(StateError, match="larger than 268,435,456 bytes"):
        folder.refuse_full("{}")


def test_size_and_depth_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(12 << 30)
    with pytest.raises(FileError, match="larger than 41,943,040 bytes"):
        read_json(path)
    path.unlink()
    parse("[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1))
    with pytest.raises(UnreadableError, match="nested too deeply"):
        parse("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2))
    with pytest.raises(UnreadableError, match="more than"):
        parse("[" + "0," * MAX_VALUES + "0]")


def test_provenance_is_written_with_the_keys_that_it_always_had() -> None:
    known = earlier("run.json")["provenance"]
    made = convert(known, Provenance).to_json()
    assert [name for name in made if name in known] == list(known)


# Every command, on records that were changed.


@pytest.fixture(scope="module")
def attack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("hostile")
    with attacking(folder, seed=1) as attack:
        yield attack


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_no_command_ends_in_a_traceback(attack: Any, row: str) -> None:
    first = list(ROWS).index(row)
    for number in range(first, first + 12 * len(ROWS), len(ROWS)):
        attack.example(number)
    assert not attack.counts.failures


def test_the_attack_notices_what_is_wrong(attack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would find nothing if it took a traceback, a usage error, a hang or a gigabyte for an answer."""

    def ends(answer: Callable[[], tuple[int, str]]) -> str:
        monkeypatch.setattr(attack.shop, "run", lambda words: answer())
        return attack._outcome("run", "inspect", loud=False)[1]

    def large() -> tuple[int, str]:
        assert len(b"x" * (512 << 20)) > 0
        return 0, ""

    monkeypatch.setattr(hostile, "MEMORY", 64 << 20)
    assert ends(lambda: (0, "")) == ""
    assert ends(lambda: (1, "error: so\n")) == ""
    assert "ZeroDivisionError" in ends(lambda: (1 // 0, ""))
    assert "exit code 2" in ends(lambda: (2, "error: so\n"))
    assert "without a sentence" in ends(lambda: (1, "so\n"))
    if sys.platform.startswith("linux"):
        assert "MiB more than otherwise" in ends(large)
    monkeypatch.setattr(hostile, "SECONDS", 0.01)
    assert "HangError" in ends(lambda: (sum(range(10**9)), ""))


def test_the_special_files_notice_what_is_wrong(tmp_path: Path) -> None:
    case, said = Case("run/editcli/run.json", "a folder", "inspect", ("inspect",)), "error: so\n"
    assert fault_of(case, Ended(1, said, 0.1, 0), tmp_path, 0) is None
    for ended, beyond in (
        (Ended(2, said, 0.1, 0), 0),
        (Ended(-9, said, 0.1, 0, timed_out=True), 0),
        (Ended(1, "", 0.1, 0), 0),
        (Ended(0, said, 0.1, 0), 0),
        (Ended(1, f"Traceback\n{said}", 0.1, 0), 0),
        (Ended(1, said, 0.1, 0), (1 << 30) + 1),
    ):
        assert fault_of(case, ended, tmp_path, beyond) is not None
    edits = Case("facts.jsonl", "a folder", "check", ("check",))
    assert fault_of(edits, Ended(2, said, 0.1, 0), tmp_path, 0) is None
    (tmp_path / ".run.json.x.tmp").touch()
    assert fault_of(case, Ended(1, said, 0.1, 0), tmp_path, 0) is not None


def test_the_attack_changes_records_and_puts_them_back(attack: Any) -> None:
    for name, row in ROWS.items():
        folder = attack.shop.folder / row.folders[-1]
        if row.change.__name__ != "whole":
            before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            changed = []
            for number in range(3):
                row.change(folder, row.files[0], random.Random(number))
                changed.append({path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} != before)
                attack.shop.put_back(row.folders[-1])
            assert any(changed), name
            assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["immediate", "diagnostics"])
def test_a_figure_that_no_float_can_hold_is_refused(name: str) -> None:
    """A line is decoded straight into its type, which has to bound what a program computes with."""
    line = {**copy.deepcopy(BATCH), "metrics": {name: {"efficacy_accuracy": 10**400}}}
    with pytest.raises(UnreadableError, match="metrics"):
        decode(json.dumps(line), BatchRecord)
