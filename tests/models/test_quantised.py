"""Quantised copies: GGUF's rules by hand, bitsandbytes as transformers loads it, and nothing left behind."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from editcli.errors import OptionError
from editcli.models.loading import LoadedModel, Loading, ModelSource, open_model, resolve_model
from editcli.models.quantisation import GGUF_TYPES, NAMES, Quantisation, parse_quantisation, parse_quantisations
from editcli.models.quantised import open_quantised, through_gguf
from editcli.testing import tiny_model_folder

CPU = Loading(device="cpu")


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{missing} not installed: editcli[quantise]")


gguf, bitsandbytes = needs("gguf"), needs("bitsandbytes", "accelerate")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """A tiny model most of whose rows are a whole number of blocks long."""
    folder = tmp_path_factory.mktemp("wide")
    return resolve_model(tiny_model_folder(folder / "model", hidden_size=32, intermediate_size=64, tied=True))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """A tiny model with transposed weights whose rows no block divides."""
    return resolve_model(tiny_model_folder(tmp_path_factory.mktemp("narrow") / "model", "gpt2"))


def weights(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}


def q8_0(rows: np.ndarray) -> np.ndarray:
    """Quantise and dequantise blocks of 32: d = max |x| / 127 in half precision, q = round(x / d)."""
    blocks = rows.reshape(-1, 32).astype(np.float64)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 127
    whole = np.round(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0))
    return (whole * scale.astype(np.float16)).reshape(rows.shape)


@gguf
def test_q8_0_is_the_nearest_of_255_steps_of_each_block() -> None:
    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    assert through_gguf(rows, "Q8_0").numpy() == pytest.approx(q8_0(rows.numpy()), abs=1e-6)


@gguf
def test_fewer_bits_lose_more() -> None:
    rows = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    errors = [float((through_gguf(rows, type) - rows).norm() / rows.norm()) for type in GGUF_TYPES]
    assert errors[0] < 0.01
    assert errors[1] < errors[2] < errors[4]
    assert errors[3] < errors[4] < 0.2


@gguf
def test_rows_in_parts_are_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    whole = through_gguf(rows, "Q4_0")
    monkeypatch.setattr("editcli.models.quantised._ROWS", 3)
    assert torch.equal(through_gguf(rows, "Q4_0"), whole)


@gguf
def test_every_matrix_takes_the_type_that_llama_cpp_gives_it(wide: ModelSource) -> None:
    before = weights(open_model(wide, CPU))
    model = open_quantised(wide, Quantisation("gguf", "Q4_0"), loading=CPU)
    after = weights(model.loaded)
    assert model.library.startswith("gguf ")
    assert model.tensors["Q8_0"] == ("model.embed_tokens",)
    assert "model.layers.*.mlp.down_proj" in model.tensors["Q4_0"]
    assert set(model.tensors) == {"Q8_0", "Q4_0"}
    for name, tensor in before.items():
        type = "Q8_0" if name in ("model.embed_tokens.weight", "lm_head.weight") else "Q4_0"
        expected = through_gguf(tensor, type) if tensor.dim() == 2 else tensor
        assert torch.equal(after[name], expected), name
    assert not torch.equal(after["model.layers.0.mlp.down_proj.weight"], before["model.layers.0.mlp.down_proj.weight"])


@gguf
def test_rows_that_no_block_divides_are_stored_in_half_precision(narrow: ModelSource) -> None:
    before = weights(open_model(narrow, CPU))
    model = open_quantised(narrow, Quantisation("gguf", "Q8_0"), loading=CPU)
    assert set(model.tensors) == {"F16", "float32"}
    assert model.tensors["float32"] == ("transformer.wpe",)
    name = "transformer.h.1.mlp.c_proj.weight"
    assert torch.equal(weights(model.loaded)[name], before[name].half().float())


@gguf
def test_blocks_run_along_the_input_of_a_transposed_weight(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "model", "gpt2", n_embd=32, n_inner=64)
    source, name = resolve_model(folder), "transformer.h.0.mlp.c_proj.weight"
    before = weights(open_model(source, CPU))[name]
    after = weights(open_quantised(source, Quantisation("gguf", "Q4_1"), loading=CPU).loaded)[name]
    assert torch.equal(after, through_gguf(before.T, "Q4_1").T)


@bitsandbytes
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_bitsandbytes_quantises_all_linear_maps_but_the_head(wide: ModelSource, kind: str) -> None:
    from bitsandbytes import functional  # pyright: ignore[reportMissingImports]

    plain = open_model(wide, CPU)
    model = open_quantised(wide, Quantisation(kind), loading=CPU)
    assert model.tensors["float32"] == ("model.embed_tokens",)
    assert "model.layers.*.mlp.down_proj" in model.tensors[kind]
    name = "model.layers.0.mlp.down_proj"
    before, module = plain.model.get_parameter(f"{name}.weight"), model.loaded.model.get_submodule(name)
    if kind == "nf4":
        value = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert float((value - before).norm() / before.norm()) < 0.15
        seen = module(torch.eye(before.shape[1]))
        # Some CPUs take the products in bfloat16, whose steps are 0.4 % wide.
        assert torch.allclose(seen, value.T, rtol=1e-2, atol=1e-4)
    else:
        # Rows by their largest entry: q = round(127 x / max |x|), within half a step in every entry.
        step = before.abs().amax(dim=1, keepdim=True) / 127
        seen = module(torch.eye(before.shape[1])).T
        assert bool(((seen - before).abs() <= 0.6 * step + 2e-3 * before.abs()).all())


@bitsandbytes
def test_the_package_kernels_is_out_of_sight_only_for_the_import(wide: ModelSource) -> None:
    before = sys.modules.get("kernels", "absent")
    open_quantised(wide, Quantisation("nf4"), loading=CPU)
    assert sys.modules.get("kernels", "absent") == before


def test_every_name_is_read_in_any_case_and_once() -> None:
    assert [one.name for one in parse_quantisations((*NAMES, "GGUF:q8_0", "NF4"))] == list(NAMES)


@pytest.mark.parametrize("text", ["Q8_0", "gguf", "gguf:Q4_K_M", "gguf:Q8_0:x", "fp8", ""])
def test_another_name_is_one_sentence_with_the_list(text: str) -> None:
    with pytest.raises(OptionError) as raised:
        parse_quantisation(text)
    assert all(name in str(raised.value) for name in (text, *NAMES))


@pytest.mark.parametrize(("kind", "package"), [("gguf", "gguf"), ("int8", "bitsandbytes"), ("nf4", "bitsandbytes")])
def test_a_missing_package_is_one_sentence(kind: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptionError, match=rf"{package}.*pip install 'editcli\[quantise\]'"):
        Quantisation(kind).require()
