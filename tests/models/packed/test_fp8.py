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
from editcli.models.packed.fp8 import EightBitFloats
from editcli.runs.output import write_model
from editcli.storage.packing import Packed
from editcli.testing import tiny_model_folder
from tests.support.families import needs_packed_experts
from tests.support.packed import EDITED, CommandContract, differing, opened, packed, raw, rewrite, say, words

BLOCK = [8, 8]


def quantised(
    path: Path, *, family: str = "llama", powers: bool = False, block: list[int] = BLOCK, **config: Any
) -> Path:
    """Make a model folder whose matrices of the layers transformers' own operation has quantised."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(fp8, "Fp8Quantize"):
        pytest.skip("this transformers has no operation that quantises on the CPU")
    folder = tiny_model_folder(path, family, **config)
    said = FineGrainedFP8Config(weight_block_size=(block[0], block[1]))
    operation = fp8.Fp8Quantize(SimpleNamespace(quantization_config=said))

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name, tensor in tensors.items() if tensor.ndim == 2 and name.endswith("proj.weight")]:
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


@pytest.fixture(scope="module", params=["deepseek-v3", "qwen3_moe"])
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture whose experts are stored one by one, each with scales, as DeepSeek-V3 is published."""
    folder = tmp_path_factory.mktemp("mixtures") / request.param
    return quantised(folder, family=request.param, intermediate_size=24, moe_intermediate_size=16)


def expert(number: int, part: str) -> str:
    return f"model.layers.1.mlp.experts.{number}.down_proj.{part}"


@needs_packed_experts
def test_experts_that_are_packed_one_by_one_are_edited_and_taken_back(mixture: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([*words(tmp_path, mixture, out), "--editor", "moeedit", "--no-eval"]) == 0
    changed = differing(mixture, out)
    stored = {
        name for name in load_file(mixture / "model.safetensors") if ".experts." in name and ".down_proj." in name
    }
    assert changed
    assert changed <= stored
    assert main(["undo", str(out), "--to", "0"]) == 0
    assert not differing(mixture, out)


@needs_packed_experts
def test_experts_that_no_edit_reached_are_not_packed_again(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = opened(mixture)
    name = base.weight_of("model.layers.1.mlp.experts.down_proj")
    weight = base.read(name)
    weight[2] += 0.1
    packs: list[torch.Tensor] = []
    pack = EightBitFloats.pack

    def counted(layout: EightBitFloats, numbers: torch.Tensor, parts: Any) -> Any:
        packs.append(numbers)
        return pack(layout, numbers, parts)

    monkeypatch.setattr(EightBitFloats, "pack", counted)
    stored = base.encode(name, weight)
    assert isinstance(stored, Packed)
    (numbers,) = packs
    assert torch.equal(numbers, weight[2])
    before = load_file(mixture / "model.safetensors")
    for number in (0, 1, 3):
        for part in ("weight", "weight_scale_inv"):
            piece = expert(number, part)
            assert torch.equal(raw(stored.pieces[piece].data), raw(before[piece]))
