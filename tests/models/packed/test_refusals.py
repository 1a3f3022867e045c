"""Quantised models that cannot be written again: one sentence with the reason and the way round it, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

from editcli.__main__ import main
from editcli.testing import tiny_model_folder
from tests.support.families import needs_packed_experts
from tests.support.packed import say, words


@pytest.mark.parametrize("method", ["hqq", "quanto", "eetq", "vptq"])
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


@needs_packed_experts
def test_a_model_without_a_16_bit_original_is_refused_with_the_way_to_make_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_model_folder(tmp_path / "model", "gpt_oss")
    say(folder, {"quant_method": "mxfp4"})
    assert main([*words(tmp_path, folder, tmp_path / "out"), "--editor", "moeedit"]) == 1
    said = capsys.readouterr().err
    assert "quantised (mxfp4)" in said
    assert "Mxfp4Config(dequantize=True)" in said
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("method", ["fp8"])
def test_a_config_that_says_so_of_plain_weights_is_refused(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_model_folder(tmp_path / "model", "llama")
    say(folder, {"quant_method": method})
    assert main(words(tmp_path, folder, tmp_path / "out")) == 1
    assert "remove quantization_config" in capsys.readouterr().err
