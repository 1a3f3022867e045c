"""Models that bitsandbytes itself quantised on the CPU, through transformers: edited, and written as it wrote them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from editcli.errors import ModelError
from editcli.models.loading import open_model, resolve_model
from editcli.models.quantised import quiet_kernels
from editcli.runs.output import write_model
from editcli.testing import tiny_model_folder, tiny_tokenizer
from tests.support.packed import EDITED, CommandContract, PackedContract, opened, packed, rewrite

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing: editcli[quantise]")
pytest.importorskip("accelerate", reason="accelerate is missing: editcli[quantise]")


def quantised(path: Path, **how: Any) -> Path:
    """Have transformers and bitsandbytes quantise a tiny model and save it."""
    # The CPU kernel of bitsandbytes 0.50 reads matrices wrongly whose rows are shorter than a block.
    plain = tiny_model_folder(path.with_name("plain"), "llama", hidden_size=64, intermediate_size=72)
    model = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=BitsAndBytesConfig(**how), device_map={"": "cpu"}
    )
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def nf4(path: Path) -> Path:
    return quantised(path, load_in_4bit=True, bnb_4bit_quant_type="nf4")


class Contract(PackedContract):
    """What is true of each of the types: the weights are those that bitsandbytes computes with."""

    def test_the_weights_are_those_of_bitsandbytes(self, folder: Path) -> None:
        theirs = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"})
        ours = open_model(resolve_model(folder), device="cpu").model
        for name, module in theirs.named_modules():
            if type(module).__module__.startswith("bitsandbytes"):
                expected = self.dequantised(module)
                assert torch.allclose(ours.get_submodule(name).weight, expected, rtol=self.rounding(module), atol=1e-7)

    def test_bitsandbytes_reads_what_was_written(self, folder: Path, tmp_path: Path) -> None:
        base = opened(folder)
        stored = packed(
            base, base.read(EDITED) + 0.05 * torch.randn(64, 72, generator=torch.Generator().manual_seed(1))
        )
        write_model(base, tmp_path, {EDITED: stored})
        with quiet_kernels():
            before, theirs = (
                AutoModelForCausalLM.from_pretrained(path, device_map={"": "cpu"}) for path in (folder, tmp_path)
            )
            module = theirs.get_submodule(EDITED.removesuffix(".weight"))
            assert torch.allclose(self.dequantised(module), stored.value, rtol=self.rounding(module), atol=1e-7)
            # The int8 kernel of bitsandbytes 0.48 gives NaN on a CPU, whatever was written.
            finite = [bool(model(torch.tensor([[3, 4]])).logits.isfinite().all()) for model in (before, theirs)]
        assert finite[1] or not finite[0]

    def rounding(self, module: Any) -> float:
        """Return the relative rounding of what bitsandbytes computes: of its scales and table in half precision."""
        kind = module.weight.quant_state.dtype
        return 2e-6 if kind == torch.float32 else 3 * torch.finfo(kind).eps

    def dequantised(self, module: Any) -> torch.Tensor:
        weight = module.weight
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()


class TestNf4(Contract):
    title = "bitsandbytes nf4, blocks of 64"
    changing = ("weight", "weight.absmax")
    loss = 0.12
    make = staticmethod(nf4)


class TestDoublyQuantised(Contract, CommandContract):
    title = "bitsandbytes nf4, blocks of 64, scales quantised"
    changing = ("weight", "weight.absmax", "weight.nested_absmax")
    loss = 0.12

    @staticmethod
    def make(path: Path) -> Path:
        return quantised(path, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


class TestFp4(Contract):
    title = "bitsandbytes fp4, blocks of 64"
    changing = ("weight", "weight.absmax")
    loss = 0.18

    @staticmethod
    def make(path: Path) -> Path:
        return quantised(path, load_in_4bit=True, bnb_4bit_quant_type="fp4")


class TestInt8(Contract, CommandContract):
    title = "bitsandbytes int8"
    changing = ("weight", "SCB")
    loss = 0.01

    @staticmethod
    def make(path: Path) -> Path:
        return quantised(path, load_in_8bit=True)

    def rounding(self, module: Any) -> float:
        return 2e-6

    def dequantised(self, module: Any) -> torch.Tensor:
        weight = module.weight
        scales = module.state.SCB if weight.SCB is None else weight.SCB
        return weight.data.float() * scales.float().unsqueeze(1) / 127


def test_a_rounded_matrix_loses_little_more_than_bitsandbytes_own(tmp_path: Path) -> None:
    base = opened(nf4(tmp_path / "model"))
    weight = torch.randn(64, 72, generator=torch.Generator().manual_seed(2))
    data, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
    theirs = bitsandbytes.functional.dequantize_4bit(data, state)
    ours = packed(base, weight).value
    assert float((ours - weight).norm()) <= 1.2 * float((theirs - weight).norm())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"quant_type": "nf4", "blocksize": 64, "shape": [64, 71]}', "bytes where"),
        (b'{"quant_type": "nf4", "blocksize": 0, "shape": [64, 72]}', "sizes"),
        (b'{"quant_type": "nf4", "blocksize": 64}', "shape"),
        (b'{"quant_type": "nf4", "blocksize": 32, "shape": [64, 72]}', "would fit"),
        (b"[]", "does not describe"),
        (b"\xff", "does not describe"),
    ],
)
def test_a_state_that_cannot_be_true_is_one_sentence(text: bytes, reason: str, tmp_path: Path) -> None:
    folder = shutil.copytree(nf4(tmp_path / "base"), tmp_path / "model")
    name = f"{EDITED}.quant_state.bitsandbytes__nf4"
    rewrite(folder, lambda tensors: tensors.update({name: torch.tensor(list(text), dtype=torch.uint8)}))
    with pytest.raises(ModelError, match="cannot be read as bitsandbytes") as caught:
        _ = opened(folder).entries
    assert reason in str(caught.value)
