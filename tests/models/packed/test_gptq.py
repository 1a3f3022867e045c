"""GPTQ and AWQ: words by their definitions, and models whose layers gptqmodel packed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from editcli.__main__ import main
from editcli.models.packed.awq import ORDER, InterleavedIntegers
from editcli.models.packed.gptq import GroupedIntegers
from editcli.models.packed.integers import Integers
from editcli.runs.output import write_model
from editcli.testing import tiny_model, tiny_model_folder, tiny_tokenizer
from tests.support.packed import EDITED, MODULE, CommandContract, PackedContract, opened, packed, rewrite, say, words

SHAPE, GROUP = (64, 96), 32
"""Of the edited matrix, and the columns of a group."""


def signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def drawn(rows: int, columns: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return numbers below 16, zero points from 1 on and scales, of ``count`` groups."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (rows, columns), generator=generator)
    zeros = torch.randint(1, 16, (rows, count), generator=generator)
    return codes, zeros, torch.rand(rows, count, generator=generator).half()


@pytest.mark.parametrize("shift", [0, 1])
def test_gptq_by_its_definition(shift: int) -> None:
    rows, columns, listed = 8, 16, torch.tensor([1, 0] * 8)
    codes, zeros, scales = drawn(rows, columns, 2)
    weight = (codes - zeros[:, listed]) * scales[:, listed].float()
    parts = {"scale": scales.T.contiguous(), "g_idx": listed.int()}
    lower = [
        [sum(int(codes[r, 8 * w + i]) << 4 * i for i in range(8)) for r in range(rows)] for w in range(columns // 8)
    ]
    parts["weight"] = torch.tensor([[signed(word) for word in line] for line in lower], dtype=torch.int32)
    centres = [[sum(int(zeros[r, g]) - shift << 4 * r for r in range(rows))] for g in range(2)]
    parts["zero"] = torch.tensor([[signed(word) for word in line] for line in centres], dtype=torch.int32)
    layout = GroupedIntegers(Integers(4, lowest=shift), (rows, columns), shift)
    assert torch.allclose(layout.unpack(parts), weight)
    again = layout.pack(weight, parts)
    assert all(torch.equal(again[role], parts[role]) for role in again)


def test_awq_by_its_definition() -> None:
    rows, columns = 16, 8
    codes, zeros, scales = drawn(rows, columns, 2)

    def row_words(numbers: Tensor) -> Tensor:
        lines = [
            [signed(sum(int(line[8 * w + ORDER[i]]) << 4 * i for i in range(8))) for w in range(rows // 8)]
            for line in numbers.T
        ]
        return torch.tensor(lines, dtype=torch.int32)

    parts = {"weight": row_words(codes), "zero": row_words(zeros), "scale": scales.T.contiguous()}
    layout = InterleavedIntegers((rows, columns), 2)
    weight = (codes - zeros.repeat_interleave(4, 1)) * scales.repeat_interleave(4, 1).float()
    assert torch.allclose(layout.unpack(parts), weight)
    again = layout.pack(weight, parts)
    assert all(torch.equal(again[role], parts[role]) for role in again)


def gptqmodel() -> Any:
    """Return the package, or skip: it takes seconds to import and wants packages of its own."""
    # Its packing in C++ would be compiled first.
    os.environ["GPTQMODEL_DISABLE_PACK_EXT"] = "1"
    return pytest.importorskip("gptqmodel", reason="needs pip install gptqmodel")


def made(path: Path, said: dict[str, Any], pack: Callable[[Any], Any]) -> Path:
    """Have ``pack`` make a quantised layer of every linear map in the layers of a tiny model, and save them."""
    sizes: dict[str, Any] = {"hidden_size": SHAPE[0], "intermediate_size": SHAPE[1]}
    tiny_model_folder(path, "llama", tokenizer=tiny_tokenizer(), dtype="float16", **sizes)
    model = tiny_model("llama", dtype="float16", **sizes)

    def quantise(tensors: dict[str, Tensor]) -> None:
        for name, module in model.named_modules():
            if type(module) is torch.nn.Linear and name != "lm_head":
                tensors.pop(f"{name}.weight")
                layer = pack(module)
                tensors |= {f"{name}.{part}": tensor for part, tensor in layer.state_dict().items()}

    rewrite(path, quantise)
    say(path, said)
    return path


def spans(weight: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return scales and zero points, (rows, groups), that span the groups of a weight."""
    groups = weight.float().reshape(len(weight), count, -1)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scales = ((high - low) / 15).half().float()
    return scales, (-low / scales).round().clamp(1, 15)


def gptq_layer(module: Any, *, symmetric: bool, form: str, order: Tensor | None = None) -> Any:
    """Return the layer that gptqmodel packs."""
    gptqmodel()
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    rows, columns = module.weight.shape
    kind: Any = TorchLinear
    layer = kind(
        bits=4, group_size=GROUP, sym=symmetric, desc_act=order is not None, in_features=columns, out_features=rows
    )
    listed = torch.arange(columns) // GROUP if order is None else order
    sorted_weight = module.weight[:, torch.argsort(listed, stable=True)]
    scales, zeros = spans(sorted_weight, columns // GROUP)
    if symmetric:
        groups = sorted_weight.float().reshape(rows, -1, GROUP)
        scales, zeros = (groups.abs().amax(2) / 7.5).half().float(), torch.full_like(zeros, 8)
    layer.pack(module.float(), scales, zeros, listed.int())
    if form == "gptq":
        said: Any = SimpleNamespace(bits=4, pack_dtype=torch.int32)
        convert_gptq_v2_to_v1_format_module(layer, said)
    return layer


def gptq_folder(path: Path, *, symmetric: bool, form: str, order: bool = False) -> Path:
    said = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": symmetric, "desc_act": order}
    said |= {"checkpoint_format": form, "pack_dtype": "int32"}

    def layer(module: Any) -> Any:
        columns = module.weight.shape[1]
        # Neighbouring columns are in different groups, as where they were sorted by their activations.
        groups = torch.arange(columns) % (columns // GROUP) if order else None
        return gptq_layer(module, symmetric=symmetric, form=form, order=groups)

    return made(path, said, layer)


class Gptq(PackedContract):
    """What is true of GPTQ in all its forms: gptqmodel computes with the same weights."""

    title = "GPTQ 4-bit"
    loss = 0.18

    def test_gptqmodel_reads_what_was_written(self, folder: Path, tmp_path: Path) -> None:
        base = opened(folder)
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
        for weight in (base.read(EDITED), base.read(EDITED) + 0.05 * noise):
            stored = packed(base, weight)
            write_model(base, tmp_path, {EDITED: stored})
            assert torch.allclose(dequantised(tmp_path).T, stored.value, rtol=1e-6, atol=1e-6)


def dequantised(folder: Path) -> Tensor:
    """Return the edited matrix, (columns, rows), as a layer of gptqmodel computes it from the file."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    kind: Any = TorchLinear
    layer = kind(bits=4, group_size=GROUP, sym=False, desc_act=True, in_features=SHAPE[1], out_features=SHAPE[0])
    tensors = load_file(folder / "model.safetensors")
    layer.load_state_dict({part: tensors[f"{MODULE}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")})
    layer.scales = layer.scales.float()
    if opened(folder).said["checkpoint_format"] == "gptq":
        convert_gptq_v1_to_v2_format_module(layer, bits=4, pack_dtype=torch.int32)
    return layer.dequantize_weight().float()


class TestGptq(Gptq, CommandContract):
    changing = ("qweight", "scales", "qzeros")

    @staticmethod
    def make(path: Path) -> Path:
        return gptq_folder(path, symmetric=True, form="gptq")


class TestGptqWithZeroPoints(Gptq):
    changing = ("qweight", "scales", "qzeros")

    @staticmethod
    def make(path: Path) -> Path:
        return gptq_folder(path, symmetric=False, form="gptq_v2")


class TestGptqInOrderOfActivations(Gptq):
    changing = ("qweight", "scales", "qzeros")

    @staticmethod
    def make(path: Path) -> Path:
        return gptq_folder(path, symmetric=False, form="gptq", order=True)


class TestAwq(CommandContract):
    title = f"AWQ 4-bit, groups of {GROUP}"
    changing = ("qweight", "scales", "qzeros")
    loss = 0.18

    @staticmethod
    def make(path: Path) -> Path:
        gptqmodel()
        from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

        def layer(module: Any) -> Any:
            rows, columns = module.weight.shape
            kind: Any = AwqTorchLinear
            packed = kind(bits=4, group_size=GROUP, sym=False, desc_act=False, in_features=columns, out_features=rows)
            packed.pack(module.float(), *spans(module.weight, columns // GROUP))
            return packed

        said = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
        return made(path, said, layer)

    def test_autoawq_reads_what_was_written(self, folder: Path, tmp_path: Path) -> None:
        awq = pytest.importorskip("awq.utils.packing_utils", reason="needs pip install autoawq", exc_type=ImportError)
        base = opened(folder)
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
        for weight in (base.read(EDITED), base.read(EDITED) + 0.05 * noise):
            stored = packed(base, weight)
            write_model(base, tmp_path, {EDITED: stored})
            tensors = load_file(tmp_path / "model.safetensors")
            parts = [tensors[f"{MODULE}.{part}"] for part in ("qweight", "qzeros", "scales")]
            assert torch.allclose(stored.value, awq.dequantize_gemm(*parts, 4, GROUP).T.float(), atol=1e-3)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"quant_method": "gptq", "bits": 3}, "3 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "gemv"),
        ({"quant_method": "awq", "bits": 8, "version": "gemm"}, "8 bits"),
    ],
)
def test_what_cannot_be_written_again_is_refused(
    said: dict[str, Any], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_model_folder(tmp_path / "model", "llama")
    say(folder, said)
    assert main(words(tmp_path, folder, tmp_path / "out")) == 1
    said_by_us = capsys.readouterr().err
    assert reason in said_by_us
    assert "edit the 16-bit original" in said_by_us
