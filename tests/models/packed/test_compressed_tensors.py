"""Models that the package compressed-tensors itself compressed: edited, and written as it wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from editcli.__main__ import main
from editcli.models.loading import open_model, resolve_model
from editcli.runs.output import write_model
from editcli.testing import tiny_model_folder, tiny_tokenizer
from tests.support.packed import EDITED, CommandContract, PackedContract, opened, packed, say, words

pytest.importorskip("compressed_tensors", reason="needs pip install compressed-tensors, which has no CPU limits")
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams

SHAPE = (32, 64)
"""Of the edited matrix."""
INT = {"type": "int", "symmetric": True}


def compressed(path: Path, weights: dict[str, Any], form: str, activations: Any = None) -> Path:
    """Have the package compress a tiny model with scales that span its weights, and save it."""
    plain = tiny_model_folder(path.with_name("plain"), "llama", hidden_size=SHAPE[0], intermediate_size=SHAPE[1])
    model = AutoModelForCausalLM.from_pretrained(plain)
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "format": form}
    said = {
        "config_groups": {"group_0": group},
        "format": form,
        "ignore": ["lm_head"],
        "quant_method": "compressed-tensors",
    }
    apply_quantization_config(model, QuantizationConfig(**said))
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            set_scales(module, scheme.weights)
    compressor: Any = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    say(path, {**said, "quantization_status": "compressed"})
    return path


def set_scales(module: Any, how: Any) -> None:
    """Set scales and zero points that span the weight of each block."""
    rows, columns = module.weight.shape
    below, beside = (*module.weight_scale.shape, 1, 1)[:2] if module.weight_scale.ndim > 1 else (1, 1)
    grid = module.weight.detach().reshape(below, rows // below, beside, columns // beside)
    scale, zero = calculate_qparams(grid.amin((1, 3)), grid.amax((1, 3)), how)
    module.weight_scale.data = scale.reshape(module.weight_scale.shape).to(module.weight_scale)
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data = zero.reshape(module.weight_zero_point.shape).to(module.weight_zero_point)


class Contract(PackedContract):
    """What is true of each format: the weights are those that the package computes with."""

    def test_the_weights_are_those_that_the_package_decompresses(self, folder: Path) -> None:
        ours = dict(open_model(resolve_model(folder), device="cpu").model.named_parameters())
        theirs = decompressed(folder)
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(parameter, theirs[name], rtol=1e-6, atol=1e-7) for name, parameter in ours.items())

    def test_the_package_reads_what_was_written(self, folder: Path, tmp_path: Path) -> None:
        base = opened(folder)
        stored = packed(base, base.read(EDITED) + 0.05 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)))
        write_model(base, tmp_path, {EDITED: stored})
        assert torch.allclose(decompressed(tmp_path)[EDITED], stored.value, rtol=1e-6, atol=1e-7)


def decompressed(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a model that transformers and the package have read."""
    said: Any = CompressedTensorsConfig(run_compressed=False)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=said, dtype="float32")
    with torch.no_grad():
        model(torch.tensor([[3, 4]]))
    return {n: p for n, p in model.named_parameters() if n.endswith(("weight", "bias"))}


class TestFourBitsInGroups(Contract, CommandContract):
    title = "compressed-tensors 4-bit, groups of 16"
    changing = ("weight_packed", "weight_scale")
    loss = 0.18

    @staticmethod
    def make(path: Path) -> Path:
        return compressed(path, {**INT, "num_bits": 4, "strategy": "group", "group_size": 16}, "pack-quantized")


class TestZeroPoints(Contract):
    title = "compressed-tensors 4-bit, groups of 16"
    changing = ("weight_packed", "weight_scale", "weight_zero_point")
    loss = 0.18

    @staticmethod
    def make(path: Path) -> Path:
        how = {"type": "int", "num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 16}
        return compressed(path, how, "pack-quantized")


class TestEightBitsPacked(Contract):
    title = "compressed-tensors 8-bit, groups of 64"
    changing = ("weight_packed", "weight_scale")
    loss = 0.01

    @staticmethod
    def make(path: Path) -> Path:
        return compressed(path, {**INT, "num_bits": 8, "strategy": "channel"}, "pack-quantized")


class TestInt8(Contract):
    title = "I8 with scales"
    changing = ("weight", "weight_scale")
    loss = 0.01

    @staticmethod
    def make(path: Path) -> Path:
        activations = {**INT, "num_bits": 8, "strategy": "token", "dynamic": True}
        return compressed(path, {**INT, "num_bits": 8, "strategy": "channel"}, "int-quantized", activations)


class TestFp8(Contract):
    title = "F8_E4M3 with scales"
    changing = ("weight", "weight_scale")
    loss = 0.04

    @staticmethod
    def make(path: Path) -> Path:
        activations = {"type": "float", "num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}
        weights = {"type": "float", "num_bits": 8, "strategy": "channel", "symmetric": True}
        return compressed(path, weights, "float-quantized", activations)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
        ({"format": "marlin-24"}, "marlin-24"),
        ({"quantization_status": "frozen"}, "frozen"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "transforms"),
    ],
)
def test_what_cannot_be_written_again_is_refused(
    change: dict[str, Any], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_model_folder(tmp_path / "model", "llama")
    say(folder, {"quant_method": "compressed-tensors", "format": "pack-quantized", **change})
    assert main(words(tmp_path, folder, tmp_path / "out")) == 1
    said = capsys.readouterr().err
    assert reason in said
    assert "edit the 16-bit original" in said
    assert not (tmp_path / "out" / "config.json").exists()
