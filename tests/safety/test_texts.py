"""Hostile texts: edits, settings, and what a terminal would obey."""

from __future__ import annotations

import io
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from editcli.__main__ import main
from editcli.errors import RequestError
from editcli.formatting import printable
from editcli.plugin.manager import load_plugins
from editcli.requests.convert import convert
from editcli.requests.reader import read_edits
from editcli.storage.lines import MAX_DEPTH, MAX_LINE_BYTES, is_deep
from tests.support.facts import EDIT

# Edit files.


@pytest.mark.slow
def test_a_line_of_any_length_takes_bounded_memory(tmp_path: Path) -> None:
    """A sparse gigabyte without a line feed, before and after good lines."""
    path = tmp_path / "facts.jsonl"
    with path.open("wb") as file:
        file.write(json.dumps(EDIT).encode() + b"\n")
        file.seek(1 << 30, os.SEEK_CUR)
        file.write(b"\n" + json.dumps({**EDIT, "id": "b"}).encode() + b"\n")
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match=r"facts\.jsonl:2: the line is longer than 1,048,576 bytes"):
            read_edits(path)
        found = read_edits(path, skip_bad=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [request.id for request in found.requests] == ["a", "b"]
    assert [error.line for error in found.rejected] == [2]
    assert peak < 16 * MAX_LINE_BYTES


def test_what_is_converted_takes_bounded_memory_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([EDIT] * 3))
    monkeypatch.setattr("editcli.requests.convert.MAX_ARRAY_BYTES", 100)
    with pytest.raises(RequestError, match="the array is larger than 100 bytes"):
        convert(path)


@pytest.mark.parametrize("extra", [-1, 0, 1, 2, 3])
def test_the_limit_of_a_line_is_exact(extra: int, tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    for ending in (b"\n", b"\r\n", b""):
        empty = len(json.dumps({**EDIT, "note": ""}))
        line = json.dumps({**EDIT, "note": "x" * (MAX_LINE_BYTES + extra - empty)}).encode()
        path.write_bytes(line + ending + (json.dumps({**EDIT, "id": "b"}).encode() if ending else b""))
        found = read_edits(path, skip_bad=True)
        assert [error.line for error in found.rejected] == ([1] if extra > 0 else [])
        assert len(found.requests) == (extra <= 0) + bool(ending)


@pytest.mark.parametrize(
    "value",
    [
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 50_000 + "1" + "}" * 50_000,
        "[" * MAX_DEPTH + "]" * MAX_DEPTH,
        "1" * 100_000,
        "1e999",
        "-1e999",
        "NaN",
        "Infinity",
        "-Infinity",
    ],
)
def test_json_beyond_what_json_holds_is_a_sentence(value: str, tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps(EDIT)[:-1] + f', "note": {value}}}\n')
    with pytest.raises(RequestError) as caught:
        read_edits(path)
    assert caught.value.line == 1
    assert len(str(caught.value)) < len(str(path)) + 250
    path.write_text(f"[{path.read_text()}]")
    with pytest.raises(RequestError):
        convert(path)


@given(
    st.recursive(
        st.integers(), lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2)
    )
)
def test_depth_is_counted(value: Any) -> None:
    def depth(value: Any) -> int:
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
        return 0 if items is None else 1 + max(map(depth, items), default=0)

    assert is_deep(value) == (depth(value) > MAX_DEPTH)
    for _ in range(MAX_DEPTH - 1):
        value = [value]
    assert is_deep(value) == (depth(value) > MAX_DEPTH)


# Settings files.

scalars = st.one_of(
    st.integers(),
    st.floats(),
    st.booleans(),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=8),
    st.dates(),
    st.datetimes(),
)


def toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return str(value)
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


KEYS = [
    "model",
    "editor",
    "stabilizer",
    "layers",
    "batch-size",
    "seed",
    "limit",
    "stop-if",
    "dtype",
    "out",
    "eval",
    "x",
]


@given(
    values=st.dictionaries(st.sampled_from(KEYS), st.one_of(scalars, st.lists(scalars, max_size=2)), max_size=2),
    data=st.data(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_any_settings_file_is_read_or_refused(
    values: dict[str, Any], data: st.DataObject, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to where the edits would be read, of which there are none."""
    options = data.draw(st.dictionaries(st.sampled_from(["ridge", "remember", "y"]), scalars, max_size=2))
    lines = [f"{key} = {toml(value)}" for key, value in values.items()]
    lines += ["[memit]", *(f"{key} = {toml(value)}" for key, value in options.items())]
    (work / "editcli.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    said = io.StringIO()
    monkeypatch.setattr("sys.stderr", said)
    assert main(["apply", "missing.jsonl"]) in (1, 2)
    assert said.getvalue().count("error: ") >= 1
    assert "Traceback" not in said.getvalue()


@pytest.mark.parametrize(
    "text",
    [
        "seed = " + "1" * 5000,
        "seed = " + "[" * 5000 + "]" * 5000,
        "a." * 5000 + "b = 1",
        "x = '\x00'",
        "seed = 1\nseed = 2",
        "[memit]\n[memit]",
        "seed = 1e999",
        "\ufeff\ufeffseed = 1",
        "editor = ['a', ['b']]",
        "[memit]\nridge = {a = {b = 1}}",
        "[[memit]]\nridge = 1",
        "[apply.memit]\nridge = 1",
    ],
)
def test_a_hostile_settings_file_is_one_line(text: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "editcli.toml").write_text(text, encoding="utf-8")
    assert main(["apply", "facts.jsonl"]) in (1, 2)
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert len(said) < 600


# What a terminal would obey.

NASTY = "\x1b[31mred\x1b]0;title\x07\x9b2J\x7f\u202ebackwards [red]markup[/red] :smile:"


def texts_in(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in items for text in texts_in(item)]


def is_harmless(text: str) -> bool:
    return not any(c in text for c in "\x1b\x07\x9b\x7f\u202e")


@given(st.text())
def test_what_is_printable_stays_as_it_is(text: str) -> None:
    shown = printable(text)
    assert is_harmless(shown)
    assert printable(shown) == shown
    assert shown == text or not text.isprintable()


@pytest.mark.parametrize("terminal", [False, True])
def test_tables_and_notes_show_texts_literally(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.table import Table
    from rich.text import Text

    from editcli.render.console import PlainConsole, RichReporter

    out = io.StringIO()
    console = PlainConsole(file=out, force_terminal=terminal, width=300, color_system=None, legacy_windows=False)
    table = Table(NASTY, title=NASTY)
    table.add_row(NASTY)
    table.add_row(Text(NASTY))
    table.add_row("[red]markup[/red] :smile:")
    console.print(table)
    console.print(NASTY, Text(NASTY))
    reporter = RichReporter(console=console)
    reporter.note(NASTY)
    reporter.warn(NASTY)
    shown = out.getvalue()
    assert is_harmless(shown)
    assert shown.count("\\x1b[31mred") == 8
    # What the escapes make longer is cut in a table, which was measured without them.
    assert shown.count("[red]markup[/red] :smile:") >= 5


def test_a_progress_bar_shows_names_literally_and_still_draws() -> None:
    from editcli.render.console import PlainConsole, RichReporter

    out = io.StringIO()
    console = PlainConsole(file=out, force_terminal=True, width=300, color_system=None, legacy_windows=False)
    with RichReporter(console=console).phase("[red]name[/red]\x1b]0;title", 2, "edits") as advance:
        advance(2)
    assert "[red]name[/red]\\x1b" in out.getvalue()
    assert "\x1b[2K" in out.getvalue(), "rich's own control codes get through"


def test_a_command_shows_a_subject_literally(
    work: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, apply: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    edit = {**EDIT, "subject": NASTY.replace("\x07", ""), "id": NASTY}
    (work / "nasty.jsonl").write_text(json.dumps(edit) + "\n" + json.dumps(edit) + "\n")
    assert main(["check", "nasty.jsonl", "--model", str(model)]) == 2, "its id is used twice"
    said = capsys.readouterr()
    assert "[red]markup[/red]" in said.out + said.err
    assert is_harmless(said.out + said.err)
    assert apply(edits="nasty.jsonl") == 2
    assert is_harmless(capsys.readouterr().err)
    assert main(["check", "nasty.jsonl", "--model", str(model), "--json"]) == 2
    text = capsys.readouterr().out
    assert is_harmless(text.replace("\u202e", "")), "turning the direction of writing is left to who reads the JSON"
    assert NASTY.split("\x07")[0] in "".join(texts_in(json.loads(text)))


def test_a_plugin_cannot_write_to_the_terminal_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    from editcli.render.console import stdout
    from editcli.render.plugins import plugins_table

    plugins = load_plugins()
    rows = [
        {
            "name": NASTY,
            "kind": "editor",
            "plugin": NASTY,
            "distribution": NASTY,
            "version": NASTY,
            "summary": NASTY,
            "paper": NASTY,
            "options": [],
        }
    ]
    stdout().print(plugins_table(rows, plugins.broken))
    assert is_harmless(capsys.readouterr().out)
