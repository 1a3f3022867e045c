"""A view of a run does without what cannot be read of its record, and says what that is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from editcli.__main__ import main

BATCH = "000001.safetensors"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run of three edits in two batches."""
    shutil.copytree(Path(__file__).with_name("data") / "earlier", tmp_path / "earlier")
    monkeypatch.chdir(tmp_path / "earlier")
    return Path("run")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def tear(path: Path) -> None:
    path.write_text('{"id": "a", "reason": "so", "line": 1}\n{"id": \n')


def alter(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"batch", b"BATCH", 1))


def put_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


@pytest.mark.parametrize(
    ("file", "damage", "clause"),
    [
        (f"updates/{BATCH}", cut, "1 batch cannot be read, so 2 edits are shown without prompt, target and norm"),
        (f"updates/{BATCH}", Path.unlink, "1 batch cannot be read"),
        (f"updates/{BATCH}", put_folder, "1 batch cannot be read"),
        ("rejected.jsonl", tear, "rejected.jsonl has 1 line that cannot be read (line 2)"),
        ("outcomes.jsonl", put_folder, "outcomes.jsonl: it is a folder"),
        ("journal.jsonl", alter, "the history of this run cannot be shown"),
    ],
)
def test_what_a_view_leaves_out_is_named(
    run: Path, capsys: pytest.CaptureFixture[str], file: str, damage: Callable[[Path], None], clause: str
) -> None:
    assert main(["-q", "inspect", "run", "--norms", "--json"]) == 0
    whole = capsys.readouterr()
    assert json.loads(whole.out)["problems"] == []
    damage(run / "editcli" / file)
    assert main(["-q", "inspect", "run", "--norms", "--json"]) == 0
    seen = capsys.readouterr()
    (problem,) = json.loads(seen.out)["problems"]
    assert clause in problem
    assert clause in seen.err


def test_a_page_names_it_as_well(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut(run / "editcli" / "updates" / BATCH)
    assert main(["-q", "report", "run", "--no-spectra", "--out", "page.html"]) == 0
    clause = "1 batch cannot be read"
    assert clause in capsys.readouterr().err
    assert clause in Path("page.html").read_text("utf-8")
