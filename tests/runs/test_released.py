"""A stream whose later batch contradicts an earlier edit: the old key leaves the memory, on every way to the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import editcli
from editcli.commands.evaluate import measure
from editcli.plugin.manager import load_plugins
from editcli.records.journal import BatchRecord
from editcli.records.recovery import recover
from editcli.records.state import RunFolder
from editcli.runs.undo import Undo, undo
from editcli.settings.recipes import EvalRecipe
from tests.support.facts import capital, write_lines
from tests.support.workshop import same_stream

FIRST = [capital("France", "Rome"), capital("Italy", "Berlin")]
NEXT = [capital("Spain", "Tokyo")]
NEWER = [{**capital("France", "London"), "id": "new"}, capital("Greece", "Paris")]
NEWEST = [{**capital("France", "Tokyo"), "id": "newest"}]


@pytest.fixture
def choices(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Settings of a quick stream."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    settings = {"targets": {"steps": 2, "prefixes": 0}}
    common = {"model": str(model), "layers": (1, 2), "corpus": str(model / "corpus.txt"), "device": "cpu"}
    return {**common, "editor": "rlsedit", "settings": settings, "evaluate": False}


def batches(out: str) -> list[BatchRecord]:
    return list(recover(RunFolder(Path(out))).live)


def stream(out: str | None, choices: dict[str, Any], *edits: list[dict[str, Any]], resume: bool = False) -> Any:
    with editcli.EditStream(out, **choices, **({"resume": True} if resume else {})) as opened:
        for batch in edits:
            opened.apply(batch)
        return {name: part.clone() for name, part in opened.model.state_dict().items()}


def test_the_same_bytes_follow_with_and_without_a_break_and_after_an_undo(choices: dict[str, Any]) -> None:
    stream("once", choices, FIRST, NEXT, NEWER)
    assert [batch.released for batch in batches("once")] == [None, None, ("France",)]
    stream("twice", choices, FIRST, NEXT)
    stream("short", choices, FIRST, NEXT)
    stream("twice", choices, NEWER, resume=True)
    same_stream(Path("once"), Path("twice"))
    undo(Undo(run="twice"), load_plugins())
    same_stream(Path("short"), Path("twice"))
    stream("twice", choices, NEWER, resume=True)
    same_stream(Path("once"), Path("twice"))
    # The batch that let go of a key is replayed as well.
    stream("twice", choices, NEWEST, resume=True)
    undo(Undo(run="twice"), load_plugins())
    same_stream(Path("once"), Path("twice"))


def test_a_stream_in_memory_releases_what_one_with_a_folder_does(choices: dict[str, Any]) -> None:
    kept, held = (stream(out, choices, FIRST, NEXT, NEWER, NEWEST) for out in ("out", None))
    assert [batch.released for batch in batches("out")][2:] == [("France",), ("new",)]
    assert all(torch.equal(part, held[name]) for name, part in kept.items())


def test_the_memory_holds_the_new_key_and_not_the_old_one(choices: dict[str, Any]) -> None:
    """What the memory of the first batch held but for its key, and the key of the second: explicit inverses."""
    stream("short", choices, FIRST[:1])
    stream("out", choices, FIRST[:1], NEWER[:1])
    (before, after), grams = (RunFolder(Path(out)) for out in ("short", "out")), "component/rlsedit/{}.inverse_gram"
    first, last = (after.read_segment(batch) for batch in batches("out"))
    for module in ("model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"):
        old, new = (segment.tensors[f"{module}.keys"].double() for segment in (first, last))
        assert torch.equal(last.tensors[f"{module}.released"].double(), old)
        earlier, now = (recover(folder).snapshot.tensors[grams.format(module)] for folder in (before, after))
        expected = torch.linalg.inv(torch.linalg.inv(earlier) - old @ old.T + new @ new.T)
        torch.testing.assert_close(now, expected, rtol=1e-5, atol=1e-7 * float(now.abs().max()))


def test_an_editor_without_memory_has_nothing_to_release(choices: dict[str, Any]) -> None:
    stream("out", {**choices, "editor": "memit"}, FIRST, NEWER)
    assert [batch.released for batch in batches("out")] == [None, None]


def test_a_superseded_edit_is_no_forgotten_one(choices: dict[str, Any]) -> None:
    """``run.json`` lists it, and ``eval`` leaves it out also where its file does not hold the later edit."""
    stream("out", choices, FIRST, NEWER)
    record = json.loads((Path("out") / "editcli" / "run.json").read_text())
    assert record["edits"]["applied"] == 3
    assert [(one["id"], one["superseded_by"]) for one in record["rejected"]] == [("France", "new")]
    edits = write_lines(Path("first.jsonl"), FIRST)
    found = measure(EvalRecipe(model="out", edits=str(edits), device="cpu"), load_plugins())
    assert found.edits == 1
    assert found.to_json()["superseded"] == [{"id": "France", "superseded_by": "new"}]
    undo(Undo(run="out"), load_plugins())
    assert measure(EvalRecipe(model="out", edits=str(edits), device="cpu"), load_plugins()).edits == 2
