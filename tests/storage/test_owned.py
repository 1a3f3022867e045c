"""What is read from files owns its memory: results depend neither on a header's length nor on who writes the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from editcli.errors import ModelError
from editcli.models import loading
from editcli.models.loading import open_model, resolve_model
from editcli.storage.checkpoint import Checkpoint
from editcli.storage.choice import SINGLE
from editcli.storage.files import read_safetensors
from editcli.testing import tiny_model_folder

HEADERS = range(0, 64, 8)
"""How much longer than usual a file's header is: a tensor in it then begins at each place within 64 bytes."""


def with_header(folder: Path, longer: int) -> Path:
    """Write the weights of a model again behind a header that is so many bytes longer."""
    path = folder / SINGLE
    save_file(load_file(path), path, metadata={"format": "pt", "filler": "x" * longer})
    return folder


def aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % 64 == 0


@pytest.mark.parametrize("longer", HEADERS)
def test_every_tensor_is_aligned_wherever_it_lies_in_its_file(longer: int, tmp_path: Path) -> None:
    folder = with_header(tiny_model_folder(tmp_path / "model", "llama"), longer)
    checkpoint = Checkpoint(folder)
    assert all(aligned(checkpoint.read(name)) for name in checkpoint.names())
    assert all(map(aligned, read_safetensors(folder / SINGLE)[0].values()))
    assert all(map(aligned, open_model(resolve_model(folder), device="cpu").model.parameters()))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_file_that_changes_in_place_does_not_change_who_has_read_it(family: str, tmp_path: Path) -> None:
    """Tied weights included: they stay one parameter."""
    folder = tiny_model_folder(tmp_path / "model", family)
    model = open_model(resolve_model(folder), device="cpu").model
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    stored = Checkpoint(folder).read(next(iter(Checkpoint(folder).names())))
    copy = stored.clone()
    with (folder / SINGLE).open("r+b") as file:
        file.write(b"\0" * (folder / SINGLE).stat().st_size)
    assert torch.equal(stored, copy)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied is bool(model.config.tie_word_embeddings)


def test_memory_that_runs_out_over_the_copy_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensor: Tensor) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(loading, "owned", full)
    with pytest.raises(ModelError, match=r"cannot load the model in .* allocate memory"):
        open_model(resolve_model(tiny_model_folder(tmp_path / "model", "llama")), device="cpu")
