"""Input that means harm: code in texts, hostile files, links and paths, and what a terminal would obey."""

from __future__ import annotations

import ast
import io
import itertools
import json
import os
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from editcli.__main__ import main
from editcli.convert import convert
from editcli.edits import MAX_LINE_BYTES, read_edits
from editcli.errors import ModelError, OptionError, RequestError, StateError
from editcli.lines import MAX_DEPTH, is_deep
from editcli.models.checkpoint import INDEX, SINGLE, Checkpoint, read_header
from editcli.plugins import load_plugins
from editcli.printable import printable
from editcli.runs.guards import BATCH_FIGURES, SITE_FIGURES, Guard, parse_guards
from editcli.runs.output import side_files
from editcli.runs.state import RunFolder
from editcli.testing import tiny_model_folder

ROOT = Path(__file__).parent.parent
EDIT = {"id": "a", "prompt": "The capital of {} is", "subject": "France", "target_new": "Rome"}
QUICK = ("-o", "targets.steps=1", "-o", "targets.prefixes=0", "--layers", "1-2", "--device", "cpu", "--no-eval")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, corpus_text: str) -> Path:
    """A tiny model that no test changes, with a corpus beside it."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "corpus.txt").write_text(corpus_text)
    return tiny_model_folder(folder / "model")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with an edits file."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    (folder / "facts.jsonl").write_text(json.dumps(EDIT) + "\n")
    return folder


def apply(model: Path, *arguments: str, edits: str = "facts.jsonl") -> int:
    given_ = ("--model", str(model), "--corpus", str(model.parent / "corpus.txt"))
    return main(["-q", "apply", edits, *given_, *QUICK, *arguments])


# The source itself.

FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__", "input", "breakpoint"}
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "joblib", "ctypes", "pty", "code", "codeop", "yaml"}
FORBIDDEN_CALLS = {
    *("os.system", "os.popen", "os.startfile", "torch.load", "torch.hub.load", "numpy.load", "np.load"),
    *("tempfile.mktemp", "shutil.unpack_archive", "zipfile.ZipFile", "tarfile.open"),
}
SHELLS = ("subprocess.", "os.exec", "os.spawn", "asyncio.create_subprocess")


def sources() -> list[Path]:
    return sorted(path for folder in ("editcli", "plugins") for path in (ROOT / folder).rglob("*.py"))


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def dangers(tree: ast.AST) -> Iterator[str]:
    """Yield what would run text as code, start a program, or unpickle."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.partition(".")[0] in {*FORBIDDEN_MODULES, "subprocess"})
        elif isinstance(node, ast.ImportFrom):
            root = (node.module or "").partition(".")[0]
            yield from [root] if root in {*FORBIDDEN_MODULES, "subprocess"} else []
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in FORBIDDEN_NAMES | FORBIDDEN_CALLS or name.startswith(SHELLS):
                yield name
            yield from (f"{name}(shell=...)" for keyword in node.keywords if keyword.arg == "shell")


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_evaluates_text_starts_programs_or_unpickles(path: Path) -> None:
    assert list(dangers(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "text",
    [
        "eval('1')",
        "import pickle",
        "from subprocess import run",
        "os.system('ls')",
        "torch.load(path, weights_only=True)",
        "run('ls', shell=True)",
        "__import__('os')",
    ],
)
def test_the_search_finds_what_it_looks_for(text: str) -> None:
    assert list(dangers(ast.parse(text)))


# The language of --stop-if.

conditions = st.one_of(
    st.text(max_size=40),
    st.from_regex(r"\A\s*[a-z_]{1,12}\s*[<>=!]{0,3}\s*[-+.\deEinfa_]{0,12}\s*\Z"),
    st.builds(
        "{}{}{}".format, st.sampled_from([*SITE_FIGURES, *BATCH_FIGURES]), st.sampled_from("<>="), st.floats().map(str)
    ),
)


@given(conditions)
def test_a_condition_is_parsed_or_refused(text: str) -> None:
    try:
        guards = parse_guards([text])
    except OptionError:
        return
    for guard in guards:
        assert guard.figure in (*SITE_FIGURES, *BATCH_FIGURES)
        assert abs(guard.limit) < float("inf")
        assert parse_guards([f"{guard.figure}{guard.relation}{guard.limit!r}"]) == (guard,)


@pytest.mark.parametrize(
    "text", ["__import__('os').system('id')", "ratio>2 or 1", "ratio>0x10", "ratio>1_000", "ratio>\u0661", "ratio>2;x"]
)
def test_code_is_no_condition(text: str) -> None:
    with pytest.raises(OptionError):
        parse_guards([text])
    assert parse_guards(["ratio>2.5"]) == (Guard("ratio", ">", 2.5),)


# Headers of weights.


def header_bytes(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(start: Any, stop: Any, *, dtype: Any = "F32", shape: Any = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [start, stop]}


TWICE = json.dumps({"x": tensor(0, 4)})[:-1] + ', "x": ' + json.dumps(tensor(4, 8)) + "}"
HOSTILE = {
    "huge length": struct.pack("<Q", 1 << 63) + b"{}",
    "length beyond the file": struct.pack("<Q", 3) + b"{}",
    "overlap": header_bytes({"x": tensor(0, 4), "y": tensor(0, 4)}, bytes(8)),
    "partial overlap": header_bytes({"x": tensor(0, 8, shape=(2,)), "y": tensor(4, 8)}, bytes(8)),
    "negative": header_bytes({"x": tensor(-4, 0)}, bytes(8)),
    "backwards": header_bytes({"x": tensor(4, 0)}, bytes(8)),
    "beyond": header_bytes({"x": tensor(0, 1 << 40, shape=(1 << 38,))}, bytes(8)),
    "shape too large": header_bytes({"x": tensor(0, 4, shape=(1 << 40,))}, bytes(8)),
    "shape too small": header_bytes({"x": tensor(0, 8)}, bytes(8)),
    "shape overflows": header_bytes({"x": tensor(0, 4, shape=(1 << 32, 1 << 32, 1 << 32))}, bytes(8)),
    "negative shape": header_bytes({"x": tensor(0, 4, shape=(-1, -1))}, bytes(8)),
    "many dimensions": header_bytes({"x": tensor(0, 4, shape=(1,) * 100_000)}, bytes(8)),
    "huge number": header_bytes({"x": tensor(0, 10**4000)}, bytes(8)),
    "infinite": header_bytes(b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1e999]}}', bytes(8)),
    "nan": header_bytes(b'{"x": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', bytes(8)),
    "text": header_bytes({"x": tensor("0", "4")}, bytes(8)),
    "truth": header_bytes({"x": tensor(False, 4, shape=(True,))}, bytes(8)),
    "twice": header_bytes(TWICE.encode(), bytes(8)),
    "deep": header_bytes(b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "utf-16": header_bytes(json.dumps({"x": tensor(0, 4)}).encode("utf-16"), bytes(8)),
    "latin-1": header_bytes(b'{"\xff": {}}'),
    "metadata": header_bytes({"__metadata__": {"a": {"b": 1}}, "x": tensor(0, 4)}, bytes(4)),
    "list": header_bytes([]),
    "entry": header_bytes({"x": 5}),
    "long name": header_bytes({"x" * 100_000: tensor(0, 4, shape=(2,))}, bytes(4)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_one_short_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(HOSTILE[name])
    tracemalloc.start()
    try:
        with pytest.raises(ModelError) as caught:
            Checkpoint(tmp_path).names()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20_000_000
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_header_is_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    """A header that is taken describes tensors that lie in the file, apart from each other."""
    sizes = st.one_of(st.integers(-2, 20), st.floats(), st.text(max_size=2), st.none(), st.booleans())
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", 3]),
            "shape": st.one_of(st.lists(sizes, max_size=3), sizes),
            "data_offsets": st.lists(sizes, min_size=1, max_size=3),
        }
    )
    plain = st.builds(
        lambda start, length: tensor(start, start + length, dtype="U8", shape=(length,)),
        st.integers(0, 20),
        st.integers(0, 20),
    )
    header = data.draw(st.dictionaries(st.sampled_from(["x", "y", "z", "__metadata__"]), st.one_of(entry, plain)))
    raw = data.draw(st.one_of(st.just(header_bytes(header, bytes(32))), st.binary(max_size=64)))
    path = tmp_path / SINGLE
    path.write_bytes(raw)
    try:
        found = read_header(path)
    except ModelError:
        return
    taken = sorted((e.start, e.stop) for e in found.values() if e.stop > e.start)
    assert all(0 <= start <= stop <= len(raw) for start, stop in taken)
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(taken))


# Paths and links.


def shard_index(folder: Path, shard: str) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": shard}}))


@pytest.mark.parametrize("shard", ["../a.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\..\\b" * 5000])
def test_an_index_cannot_name_files_elsewhere(shard: str, tmp_path: Path) -> None:
    shard_index(tmp_path, shard)
    with pytest.raises(ModelError) as caught:
        Checkpoint(tmp_path).names()
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"x": [1]}}', "[" * 100_000, "\xff"]
)
def test_an_index_that_is_none_is_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text, encoding="latin-1")
    with pytest.raises(ModelError):
        Checkpoint(tmp_path).names()


def test_links_out_of_a_model_are_not_followed_to_other_files(tmp_path: Path, model: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    folder = tmp_path / "model"
    folder.mkdir()
    shard_index(folder, "x.safetensors")
    (folder / "x.safetensors").symlink_to(secret)
    with pytest.raises(ModelError, match="which is not a safetensors file"):
        Checkpoint(folder).names()
    (folder / "x.safetensors").unlink()
    (folder / "x.safetensors").symlink_to(model / SINGLE)
    assert Checkpoint(folder).names() == Checkpoint(model).names()
    (folder / "notes.txt").symlink_to(secret)
    with pytest.raises(ModelError, match=r"notes\.txt is a link to .*secret\.txt"):
        side_files(folder)


def test_links_within_a_model_and_of_the_hub_cache_are_followed(tmp_path: Path, model: Path, work: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(model.iterdir())):
        (blobs / f"{number:064x}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", f"{number:064x}"))
    (snapshot / "copy.txt").symlink_to("config.json")
    assert Checkpoint(snapshot).names() == Checkpoint(model).names()
    arguments = ("--corpus", str(model.parent / "corpus.txt"))
    assert main(["-q", "apply", "facts.jsonl", "--model", str(snapshot), "--out", "out", *arguments, *QUICK]) == 0
    assert not any(path.is_symlink() for path in Path("out").rglob("*"))


def test_a_linked_output_is_not_replaced(work: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert apply(model, "--out", "real") == 0
    before = (work / "real" / SINGLE).read_bytes()
    (work / "link").symlink_to("real")
    assert apply(model, "--out", "link") == 1
    assert apply(model, "--out", "link", "--overwrite") == 1
    assert "link is a symbolic link to real; pass the folder itself as --out" in capsys.readouterr().err
    (work / "nowhere").symlink_to("missing")
    assert apply(model, "--out", "nowhere") == 1
    assert not (work / "missing").exists()
    assert (work / "real" / SINGLE).read_bytes() == before
    (work / "empty").mkdir()
    (work / "scratch").symlink_to("empty")
    assert apply(model, "--out", "scratch") == 0, "a link to an empty folder is a way to name it"


@pytest.mark.parametrize("part", ["", "updates", ".lock", "journal.jsonl", "state.safetensors", "run.json"])
def test_a_link_in_the_record_of_a_run_is_refused(
    part: str, work: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert apply(model, "--out", "out") == 0
    path = work / "out" / "editcli" / part if part else work / "out" / "editcli"
    victim = work / "victim"
    if path.exists():
        path.rename(victim)
    else:
        victim.write_text("precious")
    content = victim.read_bytes() if victim.is_file() else sorted(file.name for file in victim.iterdir())
    path.symlink_to(victim)
    for arguments in (("--resume",), ("--overwrite",)):
        assert apply(model, "--out", "out", *arguments) == 1
        assert "is a symbolic link, which editcli does not follow" in capsys.readouterr().err
    assert main(["undo", "out"]) == 1
    assert content == (victim.read_bytes() if victim.is_file() else sorted(file.name for file in victim.iterdir()))


def test_overwriting_removes_links_and_not_what_they_lead_to(work: Path, model: Path) -> None:
    assert apply(model, "--out", "out") == 0
    (work / "precious").mkdir()
    (work / "precious" / "file").write_text("kept")
    (work / "out" / "folder").symlink_to(work / "precious")
    (work / "out" / "extra.txt").symlink_to(work / "precious" / "file")
    assert apply(model, "--out", "out", "--overwrite") == 0
    assert (work / "precious" / "file").read_text() == "kept"
    assert not (work / "out" / "folder").exists()


def test_a_journal_cannot_name_a_segment_elsewhere(work: Path, model: Path) -> None:
    from dataclasses import replace

    assert apply(model, "--out", "out") == 0
    folder = RunFolder(Path("out"))
    entry = folder.read_journal()[0][0]
    with pytest.raises(StateError, match="not a plain file name"):
        folder.read_requests(replace(entry, segment="../state.safetensors"))


# Edit files.


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
    monkeypatch.setattr("editcli.convert.MAX_ARRAY_BYTES", 100)
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

    from editcli.render import PlainConsole, RichReporter

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
    from editcli.render import PlainConsole, RichReporter

    out = io.StringIO()
    console = PlainConsole(file=out, force_terminal=True, width=300, color_system=None, legacy_windows=False)
    with RichReporter(console=console).phase("[red]name[/red]\x1b]0;title", 2, "edits") as advance:
        advance(2)
    assert "[red]name[/red]\\x1b" in out.getvalue()
    assert "\x1b[2K" in out.getvalue(), "rich's own control codes get through"


def test_a_command_shows_a_subject_literally(
    work: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    edit = {**EDIT, "subject": NASTY.replace("\x07", ""), "id": NASTY}
    (work / "nasty.jsonl").write_text(json.dumps(edit) + "\n" + json.dumps(edit) + "\n")
    assert main(["check", "nasty.jsonl", "--model", str(model)]) == 2, "its id is used twice"
    said = capsys.readouterr()
    assert "[red]markup[/red]" in said.out + said.err
    assert is_harmless(said.out + said.err)
    assert apply(model, edits="nasty.jsonl") == 2
    assert is_harmless(capsys.readouterr().err)
    assert main(["check", "nasty.jsonl", "--model", str(model), "--json"]) == 2
    text = capsys.readouterr().out
    assert is_harmless(text.replace("\u202e", "")), "turning the direction of writing is left to who reads the JSON"
    assert NASTY.split("\x07")[0] in "".join(texts_in(json.loads(text)))


def test_a_plugin_cannot_write_to_the_terminal_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    from editcli.render import stdout
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
