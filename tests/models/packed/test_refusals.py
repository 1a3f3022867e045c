"""Quantised models that cannot be written again: one sentence with the reason and the way round it, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

from editcli.__main__ import main
from editcli.testing import tiny_model_folder
from tests.support.packed import say, words


@pytest.mark.parametrize("method", ["mxfp4", "hqq", "quanto", "eetq", "vptq"])
def test_other_ways_are_refused_with_the_way_round_them(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_model_folder(tmp_path / "model", "llama")
    say(folder, {"quant_method": method, "bits": 4})
    assert main(words(tmp_path, folder, tmp_path / "out")) == 1
    said = capsys.readouterr().err
    assert f"quantised ({method})" in said
    assert "quantise the result" in said
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("method", ["fp8"])
def test_a_config_that_says_so_of_plain_weights_is_refused(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_model_folder(tmp_path / "model", "llama")
    say(folder, {"quant_method": method})
    assert main(words(tmp_path, folder, tmp_path / "out")) == 1
    assert "remove quantization_config" in capsys.readouterr().err
