"""Eight-bit floats with scales: quantised by transformers itself, edited, and written in the same types and blocks."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from editcli.__main__ import main
from editcli.models import loading
from editcli.models.loading import open_model, resolve_model
from editcli.models.packed.checkpoint import PackedCheckpoint
from editcli.runs.output import write_model
from editcli.testing import tiny_model_folder
from tests.support.packed import EDITED, CommandContract, opened, packed, rewrite, say, words

BLOCK = [8, 8]


def quantised(path: Path, *, powers: bool = False, block: list[int] = BLOCK) -> Path:
    """Make a model folder whose matrices of the layers transformers' own operation has quantised."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(fp8, "Fp8Quantize"):
        pytest.skip("this transformers has no operation that quantises on the CPU")
    folder = tiny_model_folder(path, "llama")
    said = FineGrainedFP8Config(weight_block_size=(block[0], block[1]))
    operation = fp8.Fp8Quantize(SimpleNamespace(quantization_config=said))

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name, tensor in tensors.items() if tensor.ndim == 2 and name.startswith("model.layers")]:
            made = operation.convert({name: tensors[name]})
            tensors |= {n: t.log2().ceil().exp2() if powers and n != name else t for n, t in made.items()}

    rewrite(folder, quantise)
    say(folder, {"quant_method": "fp8", "weight_block_size": block, "activation_scheme": "dynamic", "fmt": "e4m3"})
    return folder


class TestFp8(CommandContract):
    title = "F8_E4M3 with scales"
    changing = ("weight", "weight_scale_inv")
    loss = 0.04

    @staticmethod
    def make(path: Path) -> Path:
        return quantised(path)


def test_the_weights_are_those_that_transformers_dequantises(tmp_path: Path) -> None:
    folder = quantised(tmp_path / "model")
    said: Any = FineGrainedFP8Config(weight_block_size=(BLOCK[0], BLOCK[1]), dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=said, dtype="float32")
    ours = open_model(resolve_model(folder), device="cpu").model
    expected = dict(theirs.named_parameters())
    assert all(torch.equal(parameter, expected[name].float()) for name, parameter in ours.named_parameters())


@pytest.mark.parametrize("powers", [False, True], ids=["any scales", "powers of two"])
@pytest.mark.parametrize("block", [[8, 8], [16, 40], [8, 16]], ids=["blocks", "one scale", "a part of a block"])
def test_blocks_and_the_kind_of_scales_stay(powers: bool, block: list[int], tmp_path: Path) -> None:
    base = opened(quantised(tmp_path / "model", powers=powers, block=BLOCK if block == [8, 16] else block))
    if block == [8, 16]:
        regrid(base.folder, block)
        base = opened(base.folder)
    weight = base.read(EDITED) + 0.3 * torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    stored = packed(base, weight)
    # Three bits behind the point: half a unit in the last place is a sixteenth at most.
    assert float((stored.value - weight).norm() / weight.norm()) < 0.0625
    (tmp_path / "out").mkdir()
    write_model(base, tmp_path / "out", {EDITED: stored})
    scales = load_file(tmp_path / "out" / "model.safetensors")[f"{EDITED}_scale_inv"]
    assert bool((scales.frexp().mantissa == 0.5).all()) == powers


def regrid(folder: Path, block: list[int]) -> None:
    """Give the edited matrix scales over blocks that do not divide it: 40 columns are two and a half of 16."""

    def coarsen(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            rows, columns = tensors[name.removesuffix("_scale_inv")].shape
            tensors[name] = torch.full((-(-rows // block[0]), -(-columns // block[1])), float(tensors[name].max()))

    rewrite(folder, coarsen)
    say(folder, {"quant_method": "fp8", "weight_block_size": block, "activation_scheme": "dynamic", "fmt": "e4m3"})


def test_another_type_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = quantised(tmp_path / "model")
    assert main([*words(tmp_path, base, tmp_path / "out"), "--save-dtype", "bfloat16"]) == 1
    assert "--save-dtype" in capsys.readouterr().err


def test_nothing_holds_the_weights_that_were_read_while_they_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[weakref.ref[torch.Tensor]] = []
    state, own = PackedCheckpoint.state, loading._own

    def remembered(checkpoint: PackedCheckpoint, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        made = state(checkpoint, dtype)
        read.extend(map(weakref.ref, made.values()))
        return made

    def copied(model: Any) -> None:
        gc.collect()
        assert read
        assert not any(tensor() is not None for tensor in read)
        own(model)

    monkeypatch.setattr(PackedCheckpoint, "state", remembered)
    monkeypatch.setattr(loading, "_own", copied)
    open_model(resolve_model(quantised(tmp_path / "model")), device="cpu")
