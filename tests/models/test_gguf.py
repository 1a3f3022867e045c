"""GGUF files: names, layout and numbers are those of transformers and of gguf, and only edited tensors change."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from gguf import GGUFReader, dequantize
from transformers import AutoModelForCausalLM

from editcli.errors import ModelError
from editcli.models.gguf import GgufCheckpoint
from editcli.models.loading import open_model, resolve_model
from editcli.runs.output import verify, write_model
from editcli.storage.checkpoint import Checkpoint
from editcli.storage.gguf import read_gguf, write_gguf
from editcli.storage.packing import Packed, Piece
from editcli.testing import tiny_model_folder
from tests.support.gguf_files import all_of, gguf_of

KINDS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
EDITED, OWN = "model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight"
SIZES = {"hidden_size": 64, "intermediate_size": 96}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose rows are whole blocks of 32 numbers."""
    return tiny_model_folder(tmp_path_factory.mktemp("tiny") / "model", "llama", **SIZES)


def opened(path: Path) -> GgufCheckpoint:
    checkpoint = resolve_model(path).checkpoint
    assert isinstance(checkpoint, GgufCheckpoint)
    return checkpoint


def raw(path: Path) -> dict[str, tuple[str, bytes]]:
    """Return every tensor's type and bytes, as the library reads them."""
    return {one.name: (one.tensor_type.name, one.data.tobytes()) for one in GGUFReader(path).tensors}


def metadata(path: Path) -> dict[str, list[bytes]]:
    return {name: [part.tobytes() for part in field.parts] for name, field in GGUFReader(path).fields.items()}


def test_the_weights_are_those_that_transformers_reads(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with accelerate alone")
    path = gguf_of(folder, tmp_path / "tiny.gguf", all_of("Q8_0", layer1="Q4_1", layer2="F16"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype="float32")
    ours = open_model(resolve_model(path), device="cpu").model
    expected = dict(theirs.named_parameters())
    assert expected.keys() == dict(ours.named_parameters()).keys()
    assert all(torch.equal(parameter, expected[name]) for name, parameter in ours.named_parameters())


def test_the_order_of_q_and_k_is_undone(folder: Path, tmp_path: Path) -> None:
    loaded = open_model(resolve_model(gguf_of(folder, tmp_path / "tiny.gguf", "F32")), device="cpu")
    plain = open_model(resolve_model(folder), device="cpu")
    ids = torch.tensor([[0, 5, 9, 30]])
    assert torch.equal(loaded.model(ids).logits, plain.model(ids).logits)
    assert (
        loaded.tokens.tokenizer("The capital of France")["input_ids"]
        == plain.tokens.tokenizer("The capital of France")["input_ids"]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_edited_matrix_is_written_in_its_own_type_and_nothing_else_changes(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    base = opened(gguf_of(folder, tmp_path / "tiny.gguf", all_of("Q8_0", layer1=kind)))
    assert base.stored_as(EDITED) == kind
    weight = base.read(EDITED).float() + 0.3 * torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    stored = base.encode(EDITED, weight)
    assert isinstance(stored, Packed)
    (tmp_path / "out").mkdir()
    write_model(base, tmp_path / "out", {EDITED: stored})
    assert verify(base, tmp_path / "out", {EDITED: stored}).changed == (EDITED,)
    before, after = raw(base.path), raw(tmp_path / "out" / "model.gguf")
    assert {name for name in before if before[name] != after[name]} == {OWN}
    assert after[OWN][0] == kind
    assert list(before) == list(after)
    assert metadata(base.path) == metadata(tmp_path / "out" / "model.gguf")
    # What is measured is what a reader of the file gets.
    assert torch.equal(opened(tmp_path / "out").read(EDITED).float(), stored.value.float())
    bits = {"F32": 23, "BF16": 8, "F16": 11, "Q4_0": 3, "Q4_1": 3, "Q5_0": 4, "Q5_1": 4, "Q8_0": 7}[kind]
    assert float((stored.value - weight).norm() / weight.norm()) < 2.0**-bits


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float16, "F16"), (torch.float32, "F32"), (torch.bfloat16, "BF16")])
def test_another_type_moves_the_tensors_behind_and_lists_them_anew(
    dtype: torch.dtype, kind: str, folder: Path, tmp_path: Path
) -> None:
    base = opened(gguf_of(folder, tmp_path / "tiny.gguf", "Q4_0"))
    stored = base.encode(EDITED, base.read(EDITED) * 1.5, dtype)
    (tmp_path / "out").mkdir()
    write_model(base, tmp_path / "out", {EDITED: stored})
    verify(base, tmp_path / "out", {EDITED: stored})
    before, after = raw(base.path), raw(tmp_path / "out" / "model.gguf")
    assert {name for name in before if before[name] != after[name]} == {OWN}
    assert after[OWN][0] == kind
    assert metadata(base.path) == metadata(tmp_path / "out" / "model.gguf")


def test_a_type_that_cannot_be_written_becomes_a_better_one(folder: Path, tmp_path: Path) -> None:
    wide = tiny_model_folder(tmp_path / "wide", "llama", hidden_size=64, intermediate_size=256)
    path = k_quantised(gguf_of(wide, tmp_path / "tiny.gguf", "F16"), OWN)
    base = opened(path)
    assert base.stored_as(EDITED) == "Q6_K"
    assert base.recoded(EDITED) == ("Q6_K", "Q8_0")
    assert base.recoded(EDITED, torch.float16) is None
    (tmp_path / "out").mkdir()
    stored = base.encode(EDITED, base.read(EDITED) + 1.0)
    write_model(base, tmp_path / "out", {EDITED: stored})
    verify(base, tmp_path / "out", {EDITED: stored})
    before, after = raw(path), raw(tmp_path / "out" / "model.gguf")
    assert {name for name in before if before[name] != after[name]} == {OWN}
    assert after[OWN][0] == "Q8_0"


def k_quantised(path: Path, name: str) -> Path:
    """Rewrite one tensor of a file as blocks of Q6_K with random digits and small scales."""
    header = read_gguf(path)
    rows, columns = header.tensors[name].shape
    random = numpy.random.default_rng(0)
    blocks = random.integers(0, 256, size=(rows * columns // 256, 210), dtype=numpy.uint8)
    blocks[:, 192:208] = random.integers(1, 5, size=(len(blocks), 16), dtype=numpy.uint8)
    blocks[:, 208:210] = numpy.frombuffer(numpy.float16(0.002).tobytes(), dtype=numpy.uint8)
    write_gguf(header, path.with_name("k.gguf"), {name: Piece("Q6_K", torch.from_numpy(blocks.reshape(-1)))})
    return path.with_name("k.gguf")


def test_matrices_that_lie_the_other_way_round_are_turned_back(tmp_path: Path) -> None:
    """GPT-2's matrices are (d_in, d_out) in transformers and (d_out, d_in) in the file."""
    # Transformers takes GPT-2's own proportions and context from no field of the file.
    folder = tiny_model_folder(tmp_path / "model", "gpt2", n_embd=64, n_inner=256, n_positions=1024)
    base, plain = opened(gguf_of(folder, tmp_path / "tiny.gguf", "F32")), Checkpoint(folder)
    name, own = "transformer.h.1.mlp.c_proj.weight", "blk.1.ffn_down.weight"
    assert base.shape(name) == (256, 64)
    assert torch.equal(base.read(name), plain.read(name))
    ids = torch.tensor([[0, 5, 9, 30]])
    models = (open_model(resolve_model(path), device="cpu").model for path in (base.path, folder))
    assert torch.allclose(*(model(ids).logits for model in models), atol=1e-6)
    (tmp_path / "out").mkdir()
    stored = base.encode(name, base.read(name) + 1)
    write_model(base, tmp_path / "out", {name: stored})
    assert verify(base, tmp_path / "out", {name: stored}).changed == (name,)
    assert torch.equal(opened(tmp_path / "out").read(name), base.read(name) + 1)
    assert raw(tmp_path / "out" / "model.gguf")[own][1] == (base.read(name).T + 1).contiguous().numpy().tobytes()


def test_several_files_in_a_folder_are_not_guessed_between(folder: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        gguf_of(folder, tmp_path / name)
    with pytest.raises(ModelError, match="several GGUF files"):
        resolve_model(tmp_path)
    assert resolve_model(tmp_path / "a.gguf").gguf == tmp_path / "a.gguf"


def test_files_beside_a_gguf_are_not_read(folder: Path, tmp_path: Path) -> None:
    path = gguf_of(folder, tmp_path / "tiny.gguf")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        (tmp_path / name).write_text("no such thing")
    assert open_model(resolve_model(path), device="cpu").tokens.tokenizer("Paris")["input_ids"]


def test_numbers_of_the_library_are_ours(folder: Path, tmp_path: Path) -> None:
    path = gguf_of(folder, tmp_path / "tiny.gguf", "Q5_1")
    (tensor,) = (one for one in GGUFReader(path).tensors if one.name == OWN)
    assert numpy.array_equal(opened(path).read(EDITED).numpy(), dequantize(tensor.data, tensor.tensor_type))
