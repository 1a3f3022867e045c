"""A run folder of an earlier version, made with its default editor, guess and reference text, is still a run.

``data/earlier`` is what that version wrote for ``apply facts.jsonl --model base --out run --batch-size 2 --device cpu
--no-eval -o targets.steps=2``, with its paths made relative.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from editcli.__main__ import main

EDIT = {"id": "d", "prompt": "The capital of {} is", "subject": "Greece", "target_new": "Berlin"}
RESUME = ("-q", "apply", "facts.jsonl", "--model", "base", "--out", "run", "--device", "cpu", "--no-eval", "--resume")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run of three edits in two batches, with one more edit in its file."""
    shutil.copytree(Path(__file__).with_name("data") / "earlier", tmp_path / "earlier")
    monkeypatch.chdir(tmp_path / "earlier")
    with Path("facts.jsonl").open("a") as file:
        file.write(json.dumps(EDIT) + "\n")
    return Path("run")


def record(run: Path) -> dict[str, Any]:
    return json.loads((run / "editcli" / "run.json").read_text())


def test_it_is_inspected_resumed_and_undone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-q", "inspect", str(run)]) == 0
    begun, weights = record(run), load_file(run / "model.safetensors")
    capsys.readouterr()
    assert main([*RESUME]) == 0, capsys.readouterr().err
    resumed = record(run)
    assert (resumed["editor"], resumed["edits"]["applied"]) == ("memit", 4)
    then, now = begun["provenance"], resumed["provenance"]
    assert now["options"] == then["options"]
    # Options that were added since stand at what was done before them.
    added = {"lr_kind": "absolute", "decay_kind": "absolute", "norm_clamp": then["targets"]["clamp"]}
    added |= {"stop": "loss", "stop_patience": 2, "per_layer": False, "merge": False, "longest": None}
    assert now["targets"] == {**then["targets"], **added}
    assert resumed["recipe"]["corpus"] == "self"
    assert main(["-q", "undo", str(run)]) == 0, capsys.readouterr().err
    undone = load_file(run / "model.safetensors")
    assert all(bool((undone[name] == weight).all()) for name, weight in weights.items())
    assert main(["-q", "undo", str(run), "--edit", "a"]) == 0, capsys.readouterr().err
    assert record(run)["edits"]["applied"] == 2
    assert main(["-q", "undo", str(run), "--to", "0"]) == 0, capsys.readouterr().err
    base = load_file("base/model.safetensors")
    assert all(bool((load_file(run / "model.safetensors")[name] == weight).all()) for name, weight in base.items())


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--editor", "rlsedit"), "made with editor = memit, not rlsedit"),
        (("--layers", "1"), "made with layers = [0, 1], not [1]"),
        (("-o", "targets.lr_kind=relative"), "made with targets = lr_kind: absolute, not lr_kind: relative"),
        (("-o", "memit.ridge=1"), "made with options = memit: ridge: 0.0, not memit: ridge: 1.0"),
        (("--corpus", "english"), "made with other reference text or statistics"),
    ],
)
def test_another_setting_is_refused_by_name(
    asked: tuple[str, ...], said: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*RESUME, *asked]) == 1
    assert said in " ".join(capsys.readouterr().err.split())
    assert record(run)["status"] == "done"
