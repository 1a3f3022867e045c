"""What every format of few bits must hold, to be inherited by the tests of each: its files are edited as they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from editcli.__main__ import main
from editcli.errors import ModelError
from editcli.models.loading import resolve_model
from editcli.models.packed.checkpoint import PackedCheckpoint
from editcli.runs.output import verify, write_model
from editcli.storage.packing import Packed, pieces_of, stored_digest

MODULE = "model.layers.1.mlp.down_proj"
EDITED = f"{MODULE}.weight"
FACTS = [
    {"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome"},
    {"prompt": "The capital of {} is", "subject": "Spain", "target_new": "Tokyo"},
]
CORPUS = "The capital city of Italy is Rome and the river in London is by Paris. " * 40
SINGLE = "model.safetensors"


def opened(folder: Path) -> PackedCheckpoint:
    checkpoint = resolve_model(folder).checkpoint
    assert isinstance(checkpoint, PackedCheckpoint)
    return checkpoint


def packed(base: PackedCheckpoint, weight: Tensor) -> Packed:
    """Return the pieces of the edited matrix."""
    stored = base.encode(EDITED, weight)
    assert isinstance(stored, Packed)
    return stored


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def differing(one: Path, other: Path) -> set[str]:
    """Return the tensors of two folders that differ in any byte; their names and types must not."""
    before, after = load_file(one / SINGLE), load_file(other / SINGLE)
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    return {name for name in before if not torch.equal(raw(before[name]), raw(after[name]))}


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a folder's file."""
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE, {"format": "pt"})


def say(folder: Path, said: Mapping[str, Any]) -> None:
    """Give a folder's config what it says of quantised weights."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": said}), "utf-8")


def words(tmp_path: Path, base: Path, out: Path, facts: int = 1) -> list[str]:
    """Return a command line that edits two layers quickly."""
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in FACTS[:facts]), "utf-8")
    (tmp_path / "corpus.txt").write_text(CORPUS, "utf-8")
    line = [
        "apply",
        str(tmp_path / "facts.jsonl"),
        "--model",
        str(base),
        "--out",
        str(out),
        "--layers",
        "1,2",
        "--json",
    ]
    line += ["--corpus", str(tmp_path / "corpus.txt"), "-o", "statistics.tokens=200"]
    return [*line, "-o", "targets.steps=3", "-o", "targets.prefixes=1"]


class PackedContract:
    """Properties of one format; a fixture makes ``folder``, a tiny model that was quantised in it."""

    make: ClassVar[Callable[[Path], Path]]
    """Makes the model in a folder that is not there yet."""

    title: ClassVar[str]
    """What the edited matrix is stored as."""
    changing: ClassVar[tuple[str, ...]]
    """The last parts of the names of the tensors that change with it."""
    loss: ClassVar[float]
    """The largest share of its norm that a matrix may lose by being packed."""

    def test_packing_what_was_read_changes_no_byte(self, folder: Path) -> None:
        base = opened(folder)
        stored = packed(base, base.read(EDITED))
        assert stored.pieces.keys() == {f"{MODULE}.{part}" for part in self.changing}
        assert stored_digest(stored) == base.stored_digest(EDITED)
        assert torch.equal(stored.value, base.read(EDITED))

    def test_the_layout_packs_what_it_unpacked_into_the_same_bytes(self, folder: Path) -> None:
        one, tensors = opened(folder).matrices[EDITED], load_file(folder / SINGLE)
        parts = {role: tensors[name] for role, name in (*one.pieces.items(), *one.beside.items())}
        again = one.layout.pack(one.layout.unpack(parts), parts)
        assert again.keys() == one.pieces.keys()
        assert all(torch.equal(raw(again[role]), raw(parts[role])) for role in again)

    def test_an_edited_matrix_is_packed_as_it_was(self, folder: Path, tmp_path: Path) -> None:
        base = opened(folder)
        noise = torch.randn(base.shape(EDITED), generator=torch.Generator().manual_seed(0))
        weight = base.read(EDITED) + 0.05 * noise
        stored = packed(base, weight)
        assert float((stored.value - weight).norm() / weight.norm()) < self.loss
        write_model(base, tmp_path, {EDITED: stored})
        assert verify(base, tmp_path, {EDITED: stored}).changed == (EDITED,)
        assert EDITED not in differing(folder, tmp_path) - pieces_of(EDITED, stored).keys()
        written = opened(tmp_path)
        assert written.stored_as(EDITED) == self.title
        assert torch.equal(written.read(EDITED), stored.value)
        assert written.stored_digest(EDITED) == stored_digest(stored)

    def test_a_matrix_that_loses_its_pieces_is_one_sentence(self, folder: Path, tmp_path: Path) -> None:
        checkpoint = opened(folder)
        one = checkpoint.matrices[EDITED]
        # The first piece tells that the matrix is packed; without it the weight is missing.
        for name in list(one.pieces.values())[1:]:
            broken = shutil.copytree(folder, tmp_path / name)
            rewrite(broken, lambda tensors, name=name: tensors.pop(name))
            self.refuse(broken)
        for name in one.pieces.values():
            broken = shutil.copytree(folder, tmp_path / f"short-{name}")
            rewrite(broken, lambda tensors, name=name: tensors.update({name: tensors[name].reshape(-1)[:-1].clone()}))
            self.refuse(broken)

    def refuse(self, folder: Path) -> None:
        with pytest.raises(ModelError, match=r"cannot be read as|lacks a tensor") as caught:
            _ = opened(folder).entries
        assert str(folder) in str(caught.value)
        assert MODULE in str(caught.value)


class CommandContract(PackedContract):
    """The properties of a format through the command line as well."""

    def test_the_command_edits_inspects_exports_and_takes_back(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out"
        assert main(words(tmp_path, folder, out)) == 0
        record = json.loads(capsys.readouterr().out)
        assert all(0 < site["cast_loss"] < self.loss for site in record["sites"])
        planned = {f"model.layers.{layer}.mlp.down_proj.{part}" for layer in (1, 2) for part in self.changing}
        assert differing(folder, out)
        assert differing(folder, out) <= planned
        assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()
        assert main(["inspect", str(out), "--norms", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["sites"][0]["dtype"] == self.title
        assert main(["diff", str(folder), str(out), "--json"]) == 0
        tensors = json.loads(capsys.readouterr().out)["tensors"]
        assert {one["name"] for one in tensors} == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)}
        assert main(["export", str(out), "--out", str(tmp_path / "plain"), "--format", "full"]) == 0
        assert not differing(out, tmp_path / "plain")
        capsys.readouterr()
        assert main(["export", str(out), "--out", str(tmp_path / "adapter"), "--format", "lora"]) == 1
        assert "packed" in capsys.readouterr().err
        assert main(["undo", str(out), "--to", "0"]) == 0
        assert not differing(folder, out)

    @pytest.mark.slow
    def test_a_resumed_run_ends_with_the_same_bytes(self, folder: Path, tmp_path: Path) -> None:
        whole, parted = tmp_path / "whole", tmp_path / "parted"
        assert main([*words(tmp_path, folder, whole, facts=2), "--batch-size", "1"]) == 0
        assert main([*words(tmp_path, folder, parted, facts=1), "--batch-size", "1"]) == 0
        assert main([*words(tmp_path, folder, parted, facts=2), "--batch-size", "1", "--resume"]) == 0
        assert not differing(whole, parted)
