"""What the tests of hostile input share: a model, a working folder and a short run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from editcli.__main__ import main
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
