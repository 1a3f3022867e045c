"""Checkpoints of pickle files: edited in a temporary copy on request, and nothing but tensors is read of them."""

from __future__ import annotations

import gc
import json
import pickle
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from editcli.__main__ import main
from editcli.errors import ModelError
from editcli.models.loading import resolve_model
from editcli.storage.pickles import PARTS, WHOLE, convert_pickles
from editcli.testing import tiny_model_folder


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def pickled(path: Path, *, parts: int = 1, legacy: bool = False) -> Path:
    """Make a model folder whose weights are pickles."""
    folder = tiny_model_folder(path, "llama")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if parts == 1:
        torch.save(tensors, folder / WHOLE, _use_new_zipfile_serialization=not legacy)
        return folder
    names = [f"pytorch_model-{n + 1:05}-of-{parts:05}.bin" for n in range(parts)]
    mapped = {name: names[number % parts] for number, name in enumerate(tensors)}
    for file in names:
        torch.save({name: tensors[name] for name, where in mapped.items() if where == file}, folder / file)
    (folder / PARTS).write_text(json.dumps({"metadata": {}, "weight_map": mapped}))
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a fact and a text, and one for temporary files that are watched."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    fact = {"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome"}
    (tmp_path / "facts.jsonl").write_text(json.dumps(fact))
    (tmp_path / "corpus.txt").write_text("The capital city of Italy is Rome and the river in London is by Paris. " * 40)
    return tmp_path


def apply(place: Path, model: Path, *more: str) -> int:
    words = ["apply", str(place / "facts.jsonl"), "--model", str(model), "--out", str(place / "out"), "--layers", "1,2"]
    words += ["--corpus", str(place / "corpus.txt"), "-o", "statistics.tokens=200", "-o", "targets.steps=3"]
    return main([*words, "-o", "targets.prefixes=1", *more])


@pytest.mark.parametrize("parts", [1, 2])
def test_the_edited_model_is_in_safetensors_and_the_pickles_stay(
    parts: int, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = pickled(place / "model", parts=parts)
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    assert apply(place, model, "--convert-bin") == 0
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    weights = {name for path in (place / "out").glob("*.safetensors") for name in load_file(path)}
    files = [torch.load(path, weights_only=True) for path in model.glob("*.bin")]
    expected = {name: tensor for file in files for name, tensor in file.items()}
    assert weights == expected.keys()
    written = {name: t for path in (place / "out").glob("*.safetensors") for name, t in load_file(path).items()}
    differing = {name for name, tensor in expected.items() if not torch.equal(tensor, written[name])}
    assert differing == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)}
    assert not list((place / "out").glob("*.bin*"))
    # The run finds its base again, and no copy is left behind.
    capsys.readouterr()
    assert main(["inspect", str(place / "out"), "--norms", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sites"][0]["drift"] > 0
    assert main(["undo", str(place / "out"), "--to", "0"]) == 0
    gc.collect()
    assert not list((place / "temporary").glob("editcli-bin-*"))


def test_without_the_request_they_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert apply(place, pickled(place / "model")) == 1
    assert "--convert-bin" in capsys.readouterr().err
    assert not (place / "out").exists()


def test_safetensors_beside_them_are_taken(place: Path) -> None:
    folder = tiny_model_folder(place / "model", "llama")
    (folder / WHOLE).write_bytes(b"no pickle")
    assert resolve_model(folder, convert=True).folder == folder.resolve()


def test_files_of_old_versions_are_read(tmp_path: Path) -> None:
    folder = pickled(tmp_path / "model", legacy=True)
    (tmp_path / "out").mkdir()
    convert_pickles(folder, tmp_path / "out")
    expected = torch.load(folder / WHOLE, weights_only=True)
    converted = load_file(tmp_path / "out" / "model.safetensors")
    assert converted.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in converted.items())


def hostile(folder: Path, touched: Path) -> None:
    torch.save({"weight": Touch(touched)}, folder / WHOLE)


def bare(folder: Path, touched: Path) -> None:
    (folder / WHOLE).write_bytes(pickle.dumps(Touch(touched), protocol=2))


def cut(folder: Path, touched: Path) -> None:
    content = (folder / WHOLE).read_bytes()
    (folder / WHOLE).write_bytes(content[: len(content) // 2])


def nameless(folder: Path, touched: Path) -> None:
    torch.save([torch.zeros(2)], folder / WHOLE)


def numbers(folder: Path, touched: Path) -> None:
    torch.save({"weight": 3}, folder / WHOLE)


def linked(folder: Path, touched: Path) -> None:
    outside = folder.parent / "outside.bin"
    (folder / WHOLE).rename(outside)
    (folder / WHOLE).symlink_to(outside)


@pytest.mark.parametrize("make", [hostile, bare, cut, nameless, numbers, linked])
def test_what_is_no_file_of_tensors_is_one_sentence(
    make: object, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pickled(place / "model")
    assert callable(make)
    make(folder, place / "touched")
    assert apply(place, folder, "--convert-bin") == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert WHOLE in said[0]
    assert not (place / "touched").exists()
    assert not (place / "out").exists()
    gc.collect()
    assert not list((place / "temporary").glob("editcli-bin-*"))


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = pickled(tmp_path / "model", parts=2)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match="00002-of-00002"):
        convert_pickles(folder, tmp_path / "out")
