"""Hostile model folders: headers, indexes, links and paths."""

from __future__ import annotations

import itertools
import json
import shutil
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from editcli.__main__ import main
from editcli.errors import ModelError, StateError
from editcli.records.history import read_history
from editcli.records.journal import journal_line
from editcli.records.state import RunFolder
from editcli.runs.output import side_files
from editcli.storage.checkpoint import Checkpoint, read_header
from editcli.storage.choice import INDEX, SINGLE

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
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"x": shard}}))


@pytest.mark.parametrize("shard", ["../a.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\..\\b" * 5000])
def test_an_index_cannot_name_files_elsewhere(shard: str, tmp_path: Path) -> None:
    shard_index(tmp_path, shard)
    with pytest.raises(ModelError) as caught:
        Checkpoint(tmp_path).names()
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"x": [1]}}',
        '{"weight_map": {}, "metadata": {}}',
        '{"weight_map": {"x": "x.safetensors"}}',
        "[" * 100_000,
        "\xff",
    ],
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
    with pytest.raises(ModelError, match="out of its folder"):
        Checkpoint(folder).names()
    (folder / "x.safetensors").unlink()
    shutil.copy(model / SINGLE, folder / "y.safetensors")
    (folder / "x.safetensors").symlink_to("y.safetensors")
    assert {entry.name for entry in Checkpoint(folder).stored} == set(Checkpoint(model).names())
    (folder / "notes.txt").symlink_to(secret)
    with pytest.raises(ModelError, match=r"notes\.txt is a link to .*secret\.txt"):
        side_files(folder)


def test_links_within_a_model_and_of_the_hub_cache_are_followed(
    tmp_path: Path, model: Path, work: Path, apply: Any
) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(model.iterdir())):
        (blobs / f"{number:064x}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", f"{number:064x}"))
    (snapshot / "copy.txt").symlink_to("config.json")
    assert Checkpoint(snapshot).names() == Checkpoint(model).names()
    assert apply("--out", "out", base=snapshot) == 0
    assert not any(path.is_symlink() for path in Path("out").rglob("*"))


def test_a_linked_output_is_not_replaced(work: Path, capsys: pytest.CaptureFixture[str], apply: Any) -> None:
    assert apply("--out", "real") == 0
    before = (work / "real" / SINGLE).read_bytes()
    (work / "link").symlink_to("real")
    assert apply("--out", "link") == 1
    assert apply("--out", "link", "--overwrite") == 1
    assert "link is a symbolic link to real; pass the folder itself as --out" in capsys.readouterr().err
    (work / "nowhere").symlink_to("missing")
    assert apply("--out", "nowhere") == 1
    assert not (work / "missing").exists()
    assert (work / "real" / SINGLE).read_bytes() == before
    (work / "empty").mkdir()
    (work / "scratch").symlink_to("empty")
    assert apply("--out", "scratch") == 0, "a link to an empty folder is a way to name it"


@pytest.mark.parametrize("part", ["", "updates", ".lock", "journal.jsonl", "state.safetensors", "run.json"])
def test_a_link_in_the_record_of_a_run_is_refused(
    part: str, work: Path, capsys: pytest.CaptureFixture[str], apply: Any
) -> None:
    assert apply("--out", "out") == 0
    path = work / "out" / "editcli" / part if part else work / "out" / "editcli"
    victim = work / "victim"
    if path.exists():
        path.rename(victim)
    else:
        victim.write_text("precious")
    content = victim.read_bytes() if victim.is_file() else sorted(file.name for file in victim.iterdir())
    path.symlink_to(victim)
    for arguments in (("--resume",), ("--overwrite",)):
        assert apply("--out", "out", *arguments) == 1
        assert "is a symbolic link, which editcli does not follow" in capsys.readouterr().err
    assert main(["undo", "out"]) == 1
    assert content == (victim.read_bytes() if victim.is_file() else sorted(file.name for file in victim.iterdir()))


def test_overwriting_removes_links_and_not_what_they_lead_to(work: Path, apply: Any) -> None:
    assert apply("--out", "out") == 0
    (work / "precious").mkdir()
    (work / "precious" / "file").write_text("kept")
    (work / "out" / "folder").symlink_to(work / "precious")
    (work / "out" / "extra.txt").symlink_to(work / "precious" / "file")
    assert apply("--out", "out", "--overwrite") == 0
    assert (work / "precious" / "file").read_text() == "kept"
    assert not (work / "out" / "folder").exists()


@pytest.mark.parametrize("name", ["../state.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\0b", 5, ["x"]])
def test_a_journal_cannot_name_a_segment_elsewhere(work: Path, apply: Any, name: Any, capsys: Any) -> None:
    assert apply("--out", "out") == 0
    folder = RunFolder(Path("out"))
    entries = [entry for entry, _ in folder.read_journal()]
    lines: list[str] = []
    for entry in (*entries[:-1], replace(entries[-1], segment=name)):
        lines.append(journal_line(entry, lines[-1] if lines else ""))
    folder.cut_journal(lines)
    reason = "not a plain file name" if isinstance(name, str) else "segment: Expected `str`"
    with pytest.raises(StateError, match=reason):
        folder.read_journal()
    # Neither a table of edits nor an export looks at such a file.
    history = read_history(Path("out"))
    assert history is not None
    assert reason in str(history.problem)
    assert (history.requests(), history.top_edits()) == ({}, ())
    capsys.readouterr()
    assert main(["inspect", "out", "--norms"]) == 0
    assert reason in " ".join(capsys.readouterr().err.split())
