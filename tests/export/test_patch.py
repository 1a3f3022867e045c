"""A patch and its base give the run's folder byte for byte; anything else is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from editcli.errors import ModelError, StateError
from editcli.export.recipe import PatchRecipe
from editcli.export.run import apply_patch
from editcli.storage import folders as folders
from editcli.storage.checkpoint import Checkpoint, file_digest
from editcli.storage.files import tensor_digest
from editcli.testing import tiny_model_folder
from tests.support.exports import KINDS, change_weight, files, model_files
from tests.support.reporters import Listener

STORED = ("linear", "conv1d", "tied", "sharded", "bfloat16", "saved as bfloat16", "read out")


@pytest.fixture
def patch(runs: Callable[[str], Path], make: Callable[..., Any], tmp_path: Path) -> Path:
    """A patch of the plain run."""
    make(runs("linear"), "patch", out="patch")
    return tmp_path / "patch"


def applied(base: Path, patch: Path, out: Path, listener: Any = None) -> Any:
    return apply_patch(PatchRecipe(base=str(base), patch=str(patch), out=str(out)), listener)


def refusal(base: Path, patch: Path, out: Path) -> str:
    """Check that a patch is refused and leaves nothing; return the sentence."""
    with pytest.raises((ModelError, StateError)) as caught:
        applied(base, patch, out)
    assert not out.exists()
    assert not list(out.parent.glob(".*"))
    return str(caught.value)


@pytest.mark.parametrize("kind", STORED)
def test_the_base_and_a_patch_give_the_runs_folder_byte_for_byte(
    kind: str,
    runs: Callable[[str], Path],
    bases: Callable[[str], Path],
    make: Callable[..., Any],
    tmp_path: Path,
) -> None:
    run, base = runs(kind), bases(kind)
    make(run, "patch", out="patch")
    report = applied(base, tmp_path / "patch", tmp_path / "rebuilt")
    assert report.different == ()
    assert model_files(tmp_path / "rebuilt") == model_files(run)
    assert model_files(run) != model_files(base)
    # Nothing but the changed tensors travels.
    names = {f"{module}.weight" for module in KINDS[kind].modules}
    held, saved = load_file(tmp_path / "patch" / "patch.safetensors"), Checkpoint(run)
    assert set(held) == names == set(report.tensors)
    assert all(torch.equal(held[name], saved.read(name)) for name in names)
    assert all(held[name].dtype == saved.dtype(name) for name in names)
    # The plain folder is the same, card and record included.
    make(run, "full", out="full")
    assert files(tmp_path / "full") == files(tmp_path / "rebuilt")


def test_the_manifest_says_what_it_is_for(patch: Path, bases: Callable[[str], Path], workshop: Path) -> None:
    manifest = json.loads((patch / "manifest.json").read_text())
    assert manifest["base"]["name"] == bases("linear").name
    assert manifest["base"]["fingerprint"] == Checkpoint(bases("linear")).fingerprint()
    assert manifest["recipe"]["edits"] == "facts.jsonl"
    for tensor in manifest["tensors"]:
        assert {"name", "dtype", "shape", "sha256", "base_sha256"} <= set(tensor)
        assert tensor["sha256"] != tensor["base_sha256"]
    assert str(workshop) not in "".join(path.read_text("utf-8", "replace") for path in patch.rglob("*.json"))


def flip(weight: torch.Tensor) -> torch.Tensor:
    weight = weight.clone()
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    return weight


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (flip, "is not the one that the patch was made for"),
        (lambda weight: weight.to(torch.bfloat16), "has BF16"),
        (lambda weight: weight.T, "has F32 [40, 16]"),
    ],
    ids=["a bit", "dtype", "shape"],
)
def test_another_base_is_refused_by_the_tensor_that_differs(
    patch: Path, bases: Callable[[str], Path], tmp_path: Path, change: Any, said: str
) -> None:
    other = Path(shutil.copytree(bases("linear"), tmp_path / "other"))
    change_weight(other, 2, change)
    sentence = refusal(other, patch, tmp_path / "rebuilt")
    assert "model.layers.2.mlp.down_proj.weight" in sentence
    assert said in sentence
    assert bases("linear").name in sentence


def test_a_base_without_such_tensors_is_refused(patch: Path, bases: Callable[[str], Path], tmp_path: Path) -> None:
    assert "has no such tensor" in refusal(bases("conv1d"), patch, tmp_path / "rebuilt")


def test_the_same_tensors_in_other_files_are_taken_and_said_to_be_so(
    patch: Path, runs: Callable[[str], Path], tmp_path: Path
) -> None:
    sharded = tiny_model_folder(tmp_path / "sharded", "llama", shards=3)
    listener = Listener()
    report = applied(sharded, patch, tmp_path / "rebuilt", listener)
    assert "model.safetensors" in report.different
    assert report.to_json()["identical"] is False
    (warning,) = listener.warnings
    assert "not the run's folder byte for byte" in warning
    rebuilt, run = Checkpoint(tmp_path / "rebuilt"), Checkpoint(runs("linear"))
    assert all(torch.equal(rebuilt.read(name), run.read(name)) for name in run.names())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda patch: (patch / "manifest.json").unlink(), "is no patch"),
        (lambda patch: (patch / "manifest.json").write_text("{"), "cannot be read"),
        (lambda patch: (patch / "manifest.json").write_text("[" * 100_000), "cannot be read"),
        (lambda patch: (patch / "manifest.json").write_text('{"format": 9, "editcli": "9.1"}'), "made it (9.1)"),
        (lambda patch: (patch / "patch.safetensors").unlink(), "cannot be read"),
        (lambda patch: (patch / "patch.safetensors").write_bytes(b"x"), "is not what manifest.json says"),
        (lambda patch: (patch / "editcli/run.json").write_text("{}"), "is not a record of a run"),
    ],
)
def test_a_damaged_patch_is_refused(
    patch: Path, bases: Callable[[str], Path], tmp_path: Path, damage: Callable[[Path], Any], said: str
) -> None:
    damage(patch)
    assert said in refusal(bases("linear"), patch, tmp_path / "rebuilt")


def test_a_taken_folder_is_left_alone(patch: Path, bases: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "rebuilt"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(StateError, match="exists and is not empty"):
        applied(bases("linear"), patch, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    with pytest.raises(StateError, match="is a file"):
        applied(bases("linear"), patch, out / "mine.txt")
    (out / "mine.txt").unlink()
    assert applied(bases("linear"), patch, out).different == ()


KILLED = """
import os, signal, sys
from editcli.export import run
from editcli.export.recipe import PatchRecipe
def write_model(base, folder, tensors, real=run.write_model):
    real(base, folder, tensors)
    os.kill(os.getpid(), signal.SIGKILL)
run.write_model = write_model
run.apply_patch(PatchRecipe(base=sys.argv[1], patch=sys.argv[2], out=sys.argv[3]))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_what_is_killed_leaves_no_folder_that_looks_whole(
    patch: Path, bases: Callable[[str], Path], runs: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "work" / "rebuilt"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(bases("linear")), str(patch), str(out)], check=False
    )
    assert done.returncode == -9
    assert not out.exists()
    (left,) = out.parent.iterdir()
    (left / "junk").mkdir()
    applied(bases("linear"), patch, out)
    # What the killed process left went with the next one.
    assert list(out.parent.iterdir()) == [out]
    assert model_files(out) == model_files(runs("linear"))


def test_two_processes_do_not_write_one_folder(patch: Path, bases: Callable[[str], Path], tmp_path: Path) -> None:
    from editcli.storage.folders import new_folder

    out = tmp_path / "rebuilt"
    with new_folder(out) as folder:
        (folder / "first.txt").write_text("first")
        with pytest.raises(StateError, match="being written by another"):
            applied(bases("linear"), patch, out)
    assert [path.name for path in out.iterdir()] == ["first.txt"]


def test_a_full_disk_leaves_nothing_and_is_one_sentence(
    patch: Path, bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr("editcli.export.run.write_model", full)
    assert "No space left on device" in refusal(bases("linear"), patch, tmp_path / "rebuilt")


def redo(patch: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change a patch's tensors and every hash with them, as somebody who made it by hand would."""
    weights, manifest = patch / "patch.safetensors", json.loads((patch / "manifest.json").read_text())
    tensors = {name: change(tensor).contiguous() for name, tensor in load_file(weights).items()}
    save_file(tensors, weights)
    manifest["patch"]["sha256"] = file_digest(weights)
    for one in manifest["tensors"]:
        one["sha256"] = tensor_digest(tensors[one["name"]])
    (patch / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change",
    [lambda weight: weight.double()[:1], lambda weight: weight.T, lambda weight: torch.cat([weight, weight])],
    ids=["dtype", "turned", "longer"],
)
def test_tensors_of_another_kind_than_the_manifest_says_are_refused(
    patch: Path, bases: Callable[[str], Path], tmp_path: Path, change: Any
) -> None:
    redo(patch, change)
    assert "is not what manifest.json says" in refusal(bases("linear"), patch, tmp_path / "rebuilt")


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("manifest.json", lambda found: found["tensors"][0].update(name=["a", "list"])),
        ("editcli/run.json", lambda found: found["sites"][0].update(ratio="not a number")),
        ("editcli/run.json", lambda found: found["seconds"].update(load=float("inf"))),
        ("editcli/run.json", lambda found: found.update(note="\ud800")),
        ("editcli/run.json", lambda found: found["provenance"].pop("versions")),
    ],
)
def test_a_record_of_another_make_is_refused(
    patch: Path, bases: Callable[[str], Path], tmp_path: Path, file: str, change: Callable[[Any], Any]
) -> None:
    record = json.loads((patch / file).read_text())
    change(record)
    (patch / file).write_text(json.dumps(record))
    assert Path(file).name in refusal(bases("linear"), patch, tmp_path / "rebuilt")


def test_a_link_in_the_place_of_the_hidden_folder_is_not_followed(
    patch: Path, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    (tmp_path / ".rebuilt.partial").symlink_to(mine)
    with pytest.raises(StateError, match="symbolic link"):
        applied(bases("linear"), patch, tmp_path / "rebuilt")
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]


@pytest.mark.skipif(os.name != "posix", reason="elsewhere no folder with an open file can be renamed")
def test_the_hidden_folder_is_held_until_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_name = folders._take_name

    def second(partial: Path, place: Path) -> None:
        with pytest.raises(StateError, match="being written by another"), folders.new_folder(place):
            pass
        take_name(partial, place)

    monkeypatch.setattr(folders, "_take_name", second)
    with folders.new_folder(tmp_path / "out") as folder:
        (folder / "first.txt").write_text("first")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["first.txt"]
