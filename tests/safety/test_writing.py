"""A disk that is full, or may not be written: one sentence, and nothing half written stays."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from editcli.__main__ import main
from editcli.storage.checkpoint import file_digest

EDIT = {"prompt": "The capital of {} is", "target_new": "Rome"}
APPLY = (
    *("--model", "base", "--corpus", "corpus.txt", "--layers", "1-2", "--device", "cpu", "--no-eval"),
    *("-o", "targets.steps=1", "-o", "targets.prefixes=0", "--batch-size", "1"),
)
CPU = ("--device", "cpu")
MORE = ("apply", "more.jsonl", *APPLY, "--out", "run", "--resume")
EXPORT = ("export", "run", "--base", "base", "--device", "cpu", "--no-eval", "--out", "new", "--format")
COMMANDS = {
    "apply": ("apply", "facts.jsonl", *APPLY, "--out", "new"),
    "resume": MORE,
    "undo": ("undo", "run"),
    "export lora": (*EXPORT, "lora"),
    "export patch": (*EXPORT, "patch"),
    "export full": (*EXPORT, "full"),
    "apply-patch": ("apply-patch", "base", "patch", "--out", "new"),
    "stats": (
        "stats",
        "compute",
        "base",
        "--corpus",
        "corpus.txt",
        "--device",
        "cpu",
        "--tokens",
        "90",
        "--out",
        "new",
    ),
    "bench": (
        "bench",
        "--stacks",
        "memit",
        "--edits",
        "facts.jsonl",
        "--model",
        "base",
        "--device",
        "cpu",
        "--out",
        "new",
    ),
    "tune": (
        *("tune", "base", "facts.jsonl", "--corpus", "corpus.txt", "--sample", "1", "--trials", "1", "--out", "new"),
        *("-o", "targets.steps=1", "-o", "targets.prefixes=0", "--text", "text.txt"),
    ),
    "convert": ("convert", "array.json", "--out", "new"),
    "report": ("report", "run", "--base", "base", "--no-spectra", "--out", "new"),
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A base, a run of it and a patch; not to be changed."""
    place, before = tmp_path_factory.mktemp("writing"), Path.cwd()
    shutil.copytree(model, place / "base")
    shutil.copy(model / "corpus.txt", place)
    (place / "text.txt").write_text("The river is long.\n")
    edits = [{**EDIT, "id": name, "subject": name} for name in ("France", "Spain", "Italy")]
    (place / "facts.jsonl").write_text("".join(json.dumps(edit) + "\n" for edit in edits[:2]))
    (place / "more.jsonl").write_text("".join(json.dumps(edit) + "\n" for edit in edits))
    (place / "array.json").write_text(json.dumps(edits))
    os.chdir(place)
    try:
        assert main(["-q", "apply", "facts.jsonl", *APPLY, "--out", "run"]) == 0
        assert main(["-q", *EXPORT[:-2], "patch", "--format", "patch"]) == 0
    finally:
        os.chdir(before)
    return place


@contextmanager
def files_of(size: int) -> Iterator[None]:
    """Let no file grow beyond ``size`` bytes, as a disk that is full lets none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def tree(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in folder.rglob("*") if path.is_file()}


SLOW = [pytest.param(size, marks=pytest.mark.slow) for size in (3_000, 100_000)]


@pytest.mark.parametrize("size", [10, *SLOW])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(
    name: str,
    size: int,
    template: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work = shutil.copytree(template, tmp_path / "work")
    monkeypatch.chdir(work)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = tree(work)
    capsys.readouterr()
    with files_of(size):
        code = main(["-q", *COMMANDS[name]])
    said = capsys.readouterr().err
    assert code in (0, 1), said
    assert code == 1 or size > 10
    assert said.count("error: ") == code, said
    assert not [path for path in tmp_path.rglob(".*") if path.suffix in (".tmp", ".partial")]
    if code == 0:
        return
    if name not in ("apply", "resume", "undo", "bench", "tune"):
        assert tree(work) == before
        assert not (work / "new").exists()
    # A stream or a search keeps what was done, and goes on from there.
    begun = name in ("apply", "tune") and (work / "new").exists()
    assert main(["-q", *COMMANDS[name], *(["--resume"] if begun else [])]) == 0
