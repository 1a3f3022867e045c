"""What is written to the output folder, byte by byte."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from editcli.errors import ModelError
from editcli.plugin.interfaces import Site
from editcli.runs.output import side_files, to_stored, verify, write_model
from editcli.storage import files
from editcli.storage.checkpoint import Checkpoint, file_digest
from editcli.testing import tiny_model_folder

NAME = "model.layers.1.mlp.down_proj.weight"


def edited(base: Checkpoint) -> dict[str, torch.Tensor]:
    return {NAME: base.read(NAME) + 1}


@pytest.fixture(params=[1, 3])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    folder = tiny_model_folder(tmp_path / "base", shards=request.param)
    (folder / "extra.txt").write_text("kept", encoding="utf-8")
    return Checkpoint(folder)


def test_only_the_bytes_of_the_changed_tensors_are_new(base: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_model(base, out, edited(base))
    entry = base.entries[NAME]
    for name in base.files:
        old, new = (base.folder / name).read_bytes(), (out / name).read_bytes()
        assert len(old) == len(new)
        differ = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
        assert all(name == entry.file and entry.start <= i < entry.stop for i in differ)
    for path in side_files(base.folder):
        assert file_digest(path) == file_digest(out / path.name)
    assert verify(base, out, edited(base)).changed == (NAME,)
    assert not list(out.glob(".*.tmp"))


def test_another_dtype_is_written_for_the_changed_tensors_only(base: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in edited(base).items()}
    write_model(base, out, tensors)
    stored = {key: value for file in Checkpoint(out).files for key, value in load_file(out / file).items()}
    assert stored[NAME].dtype == torch.bfloat16
    assert {key for key, value in stored.items() if value.dtype != torch.float32} == {NAME}
    assert verify(base, out, tensors).changed == (NAME,)


def test_a_flipped_bit_anywhere_is_found(base: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_model(base, out, edited(base))
    for name in ("model.layers.0.self_attn.q_proj.weight", NAME):
        entry = base.entries[name]
        data = bytearray((out / entry.file).read_bytes())
        data[entry.start] ^= 1
        (out / entry.file).write_bytes(bytes(data))
        with pytest.raises(ModelError, match=name):
            verify(base, out, edited(base))
        data[entry.start] ^= 1
        (out / entry.file).write_bytes(bytes(data))


def test_nothing_changed_is_an_error(base: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    same = {NAME: base.read(NAME)}
    write_model(base, out, same)
    with pytest.raises(ModelError, match="nothing changed"):
        verify(base, out, same)


def test_transposed_weights_are_stored_as_they_were(tmp_path: Path) -> None:
    base = Checkpoint(tiny_model_folder(tmp_path / "base", "gpt2"))
    name = base.tensor_for("transformer.h.1.mlp.c_proj.weight")
    weight = base.read(name).T
    site = Site(1, name.removesuffix(".weight"), transposed=True)
    assert torch.equal(to_stored(weight, name, base, site), base.read(name))
    with pytest.raises(ModelError, match="stored as"):
        to_stored(weight, name, base, replace(site, transposed=False))


class TestCopies:
    """However a shard is copied, it has the base's bytes and shares no fate with the base."""

    WAYS = ("as the system likes", "cloned", "by the kernel", "by the kernel, in parts", "interrupted", "by hand")

    @pytest.fixture(params=WAYS)
    def way(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
        """Make the system offer one way of copying only; a clone, which few file systems have, is acted."""
        way, real = request.param, getattr(os, "copy_file_range", None)
        if way == "as the system likes":
            return way

        def clone(original: Any, file: Any) -> bool:
            if way == "cloned":
                file.write(original.read())
                file.flush()
            return way == "cloned"

        def in_parts(source: int, target: int, count: int) -> int:
            if real is None:
                pytest.skip("this system copies no file by itself")
            if way == "interrupted" and os.lseek(source, 0, os.SEEK_CUR):
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            return real(source, target, min(count, 1000) if way != "by the kernel" else count)

        monkeypatch.setattr(files, "_cloned", clone)
        monkeypatch.setattr(os, "copy_file_range", None if way == "by hand" else in_parts, raising=False)
        return way

    def test_the_copy_has_the_same_bytes(self, way: str, base: Checkpoint, tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        write_model(base, out, edited(base))
        assert verify(base, out, edited(base)).changed == (NAME,)
        assert [(out / name).stat().st_size for name in base.files] == [
            (base.folder / name).stat().st_size for name in base.files
        ]

    def test_writing_into_the_copy_leaves_the_base_alone(self, way: str, base: Checkpoint, tmp_path: Path) -> None:
        """Also where the base is what the hub's cache holds: links to files that other projects share."""
        blobs, cache, out = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "commit", tmp_path / "out"
        shutil.copytree(base.folder, blobs)
        for folder in (cache, out):
            folder.mkdir(parents=True)
        for path in blobs.iterdir():
            (cache / path.name).symlink_to(path)
        before = {path.name: file_digest(path) for path in blobs.iterdir()}
        write_model(Checkpoint(cache), out, edited(base))
        for path in out.iterdir():
            assert not path.is_symlink()
            with path.open("r+b") as file:
                file.write(b"written in place")
        assert {path.name: file_digest(path) for path in blobs.iterdir()} == before

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux has this call")
    def test_a_file_system_that_cannot_clone_is_found_out(self, tmp_path: Path) -> None:
        (tmp_path / "one").write_bytes(b"content")
        with (tmp_path / "one").open("rb") as original, (tmp_path / "two").open("w+b") as file:
            if files._cloned(original, file):
                assert file.read() == b"content"
            else:
                assert file.read() == b""


class TestCheckpoint:
    def test_reads_what_the_library_reads(self, base: Checkpoint) -> None:
        for file in base.files:
            for name, tensor in load_file(base.folder / file).items():
                assert torch.equal(base.read(name), tensor)
                assert base.shape(name) == tuple(tensor.shape)

    def test_pickled_weights_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(ModelError, match="pickle files"):
            Checkpoint(tmp_path).names()

    def test_an_empty_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="Hugging Face"):
            Checkpoint(tmp_path).names()

    @pytest.mark.parametrize("shard", ["../stolen.safetensors", "/etc/passwd", "a/b.safetensors", ".."])
    def test_a_shard_outside_the_folder_is_refused(self, shard: str, tmp_path: Path) -> None:
        import json

        (tmp_path / "stolen.safetensors").write_bytes(b"")
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}), encoding="utf-8")
        with pytest.raises(ModelError, match="not a plain file name"):
            Checkpoint(folder).names()

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\xff" * 64,
            (1 << 60).to_bytes(8, "little") + b"{}",
            (2).to_bytes(8, "little") + b"[]",
            (64).to_bytes(8, "little") + b'{"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}  ',
            (62).to_bytes(8, "little") + b'{"x": {"dtype": "F32", "shape": [4], "data_offsets": [-9, 4]}}',
        ],
    )
    def test_a_damaged_or_hostile_header_is_one_sentence(self, data: bytes, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").write_bytes(data)
        with pytest.raises(ModelError, match=r"model\.safetensors"):
            Checkpoint(tmp_path).names()
