"""What the tests of hostile input share: a model, a working folder and a short run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from editcli.__main__ import main
from tests.support.commands import APPLY, EXPORT, FACT
from tests.support.facts import EDIT, write_lines

QUICK = ("-o", "targets.steps=1", "-o", "targets.prefixes=0", "--layers", "1-2", "--device", "cpu", "--no-eval")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with an edits file."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    write_lines(folder / "facts.jsonl", [EDIT])
    return folder


@pytest.fixture
def apply(model: Path, work: Path) -> Callable[..., int]:
    """Run ``editcli apply`` in the working folder, on ``base`` or the model; return its exit code."""

    def run(*arguments: str, edits: str = "facts.jsonl", base: Path | None = None) -> int:
        given = ("--model", str(base or model), "--corpus", str(model / "corpus.txt"))
        return main(["-q", "apply", edits, *given, *QUICK, *arguments])

    return run


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A base, a run of it, a patch, edits and texts; not to be changed."""
    place, before = tmp_path_factory.mktemp("writing"), Path.cwd()
    shutil.copytree(model, place / "base")
    shutil.copy(model / "corpus.txt", place)
    (place / "text.txt").write_text("The river is long.\n")
    edits = [{**FACT, "id": name, "subject": name} for name in ("France", "Spain", "Italy")]
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
