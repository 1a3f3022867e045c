"""Eight-bit floats with scales: quantised by transformers itself, edited, and written in the same types and blocks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from editcli.__main__ import main
from editcli.models.fp8 import Fp8Checkpoint
from editcli.models.loading import open_model, resolve_model
from editcli.runs.output import verify, write_model
from editcli.storage.packing import Packed
from editcli.testing import tiny_model_folder

EDITED = "model.layers.1.mlp.down_proj.weight"
SCALES = f"{EDITED}_scale_inv"
BLOCK = [8, 8]


def quantised(path: Path, *, powers: bool = False, block: list[int] = BLOCK) -> Path:
    """Make a model folder whose matrices of the layers transformers' own operation has quantised."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(fp8, "Fp8Quantize"):
        pytest.skip("this transformers has no operation that quantises on the CPU")
    folder = tiny_model_folder(path, "llama")
    said = FineGrainedFP8Config(weight_block_size=tuple(block))
    operation = fp8.Fp8Quantize(SimpleNamespace(quantization_config=said))
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        packed = tensor.ndim == 2 and name.startswith("model.layers")
        tensors |= operation.convert({name: tensor}) if packed else {name: tensor}
    if powers:
        tensors = {n: t.log2().ceil().exp2() if n.endswith("_scale_inv") else t for n, t in tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    packing = {"quant_method": "fp8", "weight_block_size": block, "activation_scheme": "dynamic", "fmt": "e4m3"}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": packing}))
    return folder


def opened(folder: Path) -> Fp8Checkpoint:
    checkpoint = resolve_model(folder).checkpoint
    assert isinstance(checkpoint, Fp8Checkpoint)
    return checkpoint


def differing(one: Path, other: Path) -> set[str]:
    before, after = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    return {name for name in before if not torch.equal(raw(before[name]), raw(after[name]))}


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_the_weights_are_those_that_transformers_dequantises(tmp_path: Path) -> None:
    folder = quantised(tmp_path / "model")
    said: Any = FineGrainedFP8Config(weight_block_size=tuple(BLOCK), dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=said, dtype="float32")
    ours = open_model(resolve_model(folder), device="cpu").model
    expected = dict(theirs.named_parameters())
    assert all(torch.equal(parameter, expected[name].float()) for name, parameter in ours.named_parameters())


@pytest.mark.parametrize("powers", [False, True], ids=["any scales", "powers of two"])
@pytest.mark.parametrize("block", [[8, 8], [16, 40], [8, 16]], ids=["blocks", "one scale", "a part of a block"])
def test_an_edited_matrix_is_packed_as_it_was(powers: bool, block: list[int], tmp_path: Path) -> None:
    base = opened(quantised(tmp_path / "model", powers=powers, block=BLOCK if block == [8, 16] else block))
    if block == [8, 16]:
        regrid(base.folder, block)
        base = opened(base.folder)
    weight = base.read(EDITED) + 0.3 * torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    stored = base.encode(EDITED, weight)
    assert isinstance(stored, Packed)
    # Three bits behind the point: half a unit in the last place is a sixteenth.
    assert float(((stored.value - weight).abs() / weight.abs().clamp_min(0.05)).max()) < 0.0626
    (tmp_path / "out").mkdir()
    write_model(base, tmp_path / "out", {EDITED: stored})
    assert verify(base, tmp_path / "out", {EDITED: stored}).changed == (EDITED,)
    assert differing(base.folder, tmp_path / "out") == {EDITED, SCALES}
    written = opened(tmp_path / "out")
    assert torch.equal(written.read(EDITED), stored.value)
    scales = load_file(tmp_path / "out" / "model.safetensors")[SCALES]
    assert bool((scales.frexp().mantissa == 0.5).all()) == powers


def regrid(folder: Path, block: list[int]) -> None:
    """Give the edited matrix scales over blocks that do not divide it: 40 columns are two and a half of 16."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        rows, columns = tensors[name.removesuffix("_scale_inv")].shape
        tensors[name] = torch.full((-(-rows // block[0]), -(-columns // block[1])), float(tensors[name].max()))
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = block
    (folder / "config.json").write_text(json.dumps(config))


def test_the_command_edits_and_takes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = quantised(tmp_path / "model"), tmp_path / "out"
    fact = {"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome"}
    (tmp_path / "facts.jsonl").write_text(json.dumps(fact))
    (tmp_path / "corpus.txt").write_text("The capital city of Italy is Rome and the river in London is by Paris. " * 40)
    words = ["apply", str(tmp_path / "facts.jsonl"), "--model", str(base), "--out", str(out), "--layers", "1,2"]
    words += ["--corpus", str(tmp_path / "corpus.txt"), "--json", "-o", "statistics.tokens=200"]
    assert main([*words, "-o", "targets.steps=3", "-o", "targets.prefixes=1"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert all(0 < site["cast_loss"] < 0.04 for site in record["sites"])
    changed = differing(base, out)
    names = {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)}
    assert names <= changed <= names | {f"{name}_scale_inv" for name in names}
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert main(["inspect", str(out), "--norms", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sites"][0]["dtype"] == "F8_E4M3 with scales"
    assert main(["undo", str(out), "--to", "0"]) == 0
    assert not differing(base, out)


def test_another_type_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = quantised(tmp_path / "model")
    fact = {"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome"}
    (tmp_path / "facts.jsonl").write_text(json.dumps(fact))
    words = ["apply", str(tmp_path / "facts.jsonl"), "--model", str(base), "--out", str(tmp_path / "out")]
    assert main([*words, "--save-dtype", "bfloat16", "--layers", "1"]) == 1
    assert "--save-dtype" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "mxfp4", "compressed-tensors"])
def test_other_ways_are_refused_with_the_way_round_them(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_model_folder(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    said = {"quant_method": method, "bits": 4, "config_groups": {}, "load_in_4bit": True, "group_size": 128}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    (tmp_path / "facts.jsonl").write_text('{"prompt": "The capital of {} is", "subject": "A", "target_new": "B"}')
    words = ["apply", str(tmp_path / "facts.jsonl"), "--model", str(folder), "--out", str(tmp_path / "out")]
    assert main(words) == 1
    said_by_us = capsys.readouterr().err
    assert f"quantised ({method})" in said_by_us
    assert "quantise the result" in said_by_us
