"""``eval --as``: figures of quantised copies stand beside those of the model, which they do not change."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from editcli.__main__ import main
from editcli.commands.evaluate import EvalRecipe, measure
from editcli.errors import OptionError
from editcli.plugin.manager import Plugins
from editcli.testing import tiny_model_folder
from tests.support.facts import CAPITALS, write_lines

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is missing: editcli[quantise]")


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(tiny_model_folder(tmp_path / "model", hidden_size=32, intermediate_size=64))


@pytest.fixture
def edits(tmp_path: Path) -> str:
    return str(write_lines(tmp_path / "edits.jsonl", CAPITALS[:3]))


@needs_gguf
def test_copies_are_measured_beside_the_model(model: str, edits: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain = measure(EvalRecipe(model=model, edits=edits, device="cpu"), Plugins()).to_json()
    before = {path.name: path.read_bytes() for path in Path(model).iterdir()}
    command = ["eval", model, edits, "--as", "gguf:Q8_0", "--as", "gguf:q4_0", "--device", "cpu"]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    copies = report.pop("quantised")
    assert plain.pop("quantised") == []
    assert report == plain
    assert [one["as"] for one in copies] == ["gguf:Q8_0", "gguf:Q4_0"]
    for one in copies:
        assert one["library"].startswith("gguf ")
        assert one["tensors"]
        assert one["counts"] == report["counts"]
        assert one["efficacy_accuracy"] is not None
    assert main(command) == 0
    assert "gguf:Q4_0" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in Path(model).iterdir()} == before


@needs_gguf
def test_the_raw_numbers_of_a_copy_are_those_of_quantised_weights(model: str, edits: str) -> None:
    report = measure(EvalRecipe(model=model, edits=edits, quantise=("gguf:Q4_0",), device="cpu"), Plugins())
    ours = [answer.logprob for outcome in report.evaluation.outcomes for answer in outcome.efficacy]
    theirs = [answer.logprob for outcome in report.quantised[0].evaluation.outcomes for answer in outcome.efficacy]
    assert theirs != ours
    assert theirs == pytest.approx(ours, abs=1)


def test_what_cannot_be_measured_is_refused_before_a_model_is_opened(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OptionError, match="EDITS"):
        EvalRecipe(model="bundled", quantise=("int8",), harness=("x",))
    assert main(["eval", "nowhere", "edits.jsonl", "--as", "gguf:Q4_K_M"]) == 1
    assert "gguf:Q4_K_M is not supported" in capsys.readouterr().err
