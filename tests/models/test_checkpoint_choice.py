"""What is read, edited and saved is what transformers loads from a folder, whatever else lies in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from editcli.errors import ModelError
from editcli.models.loading import open_model, refuse_unopenable, resolve_model
from editcli.runs.output import verify, write_model
from editcli.storage.checkpoint import Checkpoint, read_header
from editcli.storage.choice import INDEX, SINGLE, choose
from tests.support.reporters import Listener

EDITED = "model.layers.1.mlp.down_proj.weight"
FIRST, SECOND = SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def zeros(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in weights.items()}


def loaded(path: Path) -> dict[str, Tensor]:
    """Return what transformers loads by itself."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


# Folders that hold more than one checkpoint, or one with oddities.


def beside(name: str) -> Callable[[Any], None]:
    def build(folder: Any) -> None:
        folder.single()
        folder.single(zeros(folder.weights), name)

    return build


def both(folder: Any) -> None:
    folder.shards(zeros(folder.weights))
    folder.single()


def pickled(folder: Any) -> None:
    folder.single()
    torch.save(zeros(folder.weights), folder.path / "pytorch_model.bin")
    (folder.path / "pytorch_model.bin.index.json").write_text("{}")


def named(folder: Any) -> None:
    folder.single(zeros(folder.weights))
    folder.single(name="other.safetensors")
    folder.configure(transformers_weights="other.safetensors")


def stored_twice(folder: Any) -> None:
    """The index names the copy that transformers does not load."""
    mapped = folder.shards()
    last = max(mapped)
    folder.single({**load_file(folder.path / FIRST), last: torch.zeros_like(folder.weights[last])}, FIRST)
    folder.index({**mapped, last: FIRST})


def edited_twice(folder: Any) -> None:
    """The tensor that is edited lies in both shards, and the index names the first."""
    assert folder.shards()[EDITED] == FIRST
    folder.single({**load_file(folder.path / SECOND), EDITED: folder.weights[EDITED] / 2}, SECOND)


def index_of_nothing(folder: Any) -> None:
    folder.index({**folder.shards(), "model.layers.9.gone": FIRST})


def other_file(folder: Any) -> None:
    folder.shards()
    folder.single({"mtp.fc.weight": torch.zeros(2, 2)}, "model-mtp.safetensors")


def without_prefix(folder: Any) -> None:
    bare = {name.removeprefix("model."): tensor for name, tensor in folder.weights.items() if name != "lm_head.weight"}
    folder.single(bare)
    folder.configure(tie_word_embeddings=True)


AMBIGUOUS: dict[str, Callable[[Any], Any]] = {
    "shards beside a single file": both,
    "a variant": beside("model.fp16.safetensors"),
    "another program's file": beside("consolidated.safetensors"),
    "pickles": pickled,
    "the config names the file": named,
    "a tensor stored twice": stored_twice,
    "the edited tensor stored twice": edited_twice,
    "an index with a name of nothing": index_of_nothing,
    "a file that no index names": other_file,
    "names without the backbone's prefix": without_prefix,
}


@pytest.mark.parametrize("build", AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
def test_what_transformers_loads_is_read_edited_and_saved(build: Any, folder: Any, tmp_path: Path) -> None:
    build(folder)
    base, out, before = Checkpoint(folder.path), tmp_path / "out", loaded(folder.path)
    for name, tensor in before.items():
        assert torch.equal(base.read(base.tensor_for(name)), tensor), name
    out.mkdir()
    name = base.tensor_for(EDITED)
    change = {name: base.read(name) + 1}
    write_model(base, out, change)
    assert verify(base, out, change).changed == (name,)
    refuse_unopenable(out)
    after = loaded(out)
    assert torch.equal(after.pop(EDITED), before.pop(EDITED) + 1)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    written = Checkpoint(out)
    assert written.remarks() == ()
    assert written.superseded == ()
    assert written.is_indexed_exactly
    assert {path.name for path in out.glob("*.safetensors*")} == choose(folder.path).names


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (both, (*SHARDS, INDEX, "neither read nor copied")),
        (other_file, ("model-mtp.safetensors", "neither read nor copied")),
        (edited_twice, (EDITED, FIRST, SECOND, "stored twice")),
        (index_of_nothing, ("names model.layers.9.gone, which its shards do not hold",)),
    ],
)
def test_what_is_left_out_is_said_in_one_sentence(build: Any, said: tuple[str, ...], folder: Any) -> None:
    build(folder)
    open_model(resolve_model(folder.path), device="cpu", reporter=(listener := Listener()))
    (text,) = listener.warnings
    assert all(part in text for part in said)


def test_an_ordinary_folder_says_nothing(model: Path) -> None:
    open_model(resolve_model(model), device="cpu", reporter=(listener := Listener()))
    assert listener.warnings == []


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "consolidated.safetensors", FIRST])
def test_weights_that_transformers_does_not_load_by_itself_are_refused(name: str, folder: Any) -> None:
    folder.single(name=name)
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(folder.path, use_safetensors=True)
    with pytest.raises(ModelError, match=f"transformers does not load {name} by itself"):
        Checkpoint(folder.path).names()


def test_the_config_cannot_name_weights_elsewhere(folder: Any) -> None:
    folder.single()
    for name, said in (
        ("../model.safetensors", "not a plain file name"),
        ("gone.safetensors", "not a safetensors file"),
    ):
        folder.configure(transformers_weights=name)
        with pytest.raises(ModelError, match=said):
            Checkpoint(folder.path).names()


def test_a_distributed_checkpoint_is_refused(folder: Any) -> None:
    """Newer versions of transformers prefer it to everything else, and older ones do not know it."""
    folder.single()
    folder.single(name="shard-00001-model-00001-of-00001.safetensors")
    with pytest.raises(ModelError, match="distributed checkpoint"):
        Checkpoint(folder.path).names()


def test_further_chat_templates_are_part_of_the_model(model: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(model, tmp_path / "base"))
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    (tmp_path / "out").mkdir()
    change = {EDITED: Checkpoint(base).read(EDITED) + 1}
    write_model(Checkpoint(base), tmp_path / "out", change)
    copy = tmp_path / "out" / "additional_chat_templates" / "tools.jinja"
    assert copy.read_text() == "{{ messages }}"
    copy.write_text("another")
    with pytest.raises(ModelError, match=r"tools\.jinja is not a copy of the base's"):
        verify(Checkpoint(base), tmp_path / "out", change)


class TestLinks:
    """Weights may be links into a hub's cache, as huggingface_hub makes them, and nowhere else."""

    @pytest.fixture
    def cache(self, model: Path, tmp_path: Path) -> Path:
        blobs = tmp_path / "cache" / "models--owner--name" / "blobs"
        blobs.mkdir(parents=True)
        shutil.copy(model / SINGLE, blobs / "0a1b2c")
        return blobs

    def test_a_link_to_a_blob_is_opened_and_copied(self, folder: Any, cache: Path, tmp_path: Path) -> None:
        (folder.path / SINGLE).symlink_to(cache / "0a1b2c")
        base, out = Checkpoint(folder.path), tmp_path / "out"
        change = {EDITED: base.read(EDITED) + 1}
        out.mkdir()
        write_model(base, out, change)
        assert verify(base, out, change).changed == (EDITED,)
        assert not (out / SINGLE).is_symlink()

    def test_a_link_to_a_link_of_a_snapshot_is_opened(self, folder: Any, cache: Path) -> None:
        snapshot = cache.parent / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (snapshot / SINGLE).symlink_to(cache / "0a1b2c")
        (folder.path / SINGLE).symlink_to(snapshot / SINGLE)
        assert EDITED in Checkpoint(folder.path).names()

    @pytest.mark.parametrize("name", ["blob", SINGLE])
    def test_a_link_to_another_file_is_refused(self, folder: Any, cache: Path, tmp_path: Path, name: str) -> None:
        shutil.copy(cache / "0a1b2c", tmp_path / name)
        (folder.path / SINGLE).symlink_to(tmp_path / name)
        with pytest.raises(ModelError, match=rf"is a link to .*{name}, out of its folder; put a copy"):
            Checkpoint(folder.path).names()

    def test_a_shard_that_links_to_another_file_is_refused(self, folder: Any, model: Path, tmp_path: Path) -> None:
        folder.single({EDITED: Checkpoint(model).read(EDITED)}, FIRST)
        folder.index({EDITED: FIRST})
        assert Checkpoint(folder.path).names() == (EDITED,)
        (folder.path / FIRST).rename(tmp_path / FIRST)
        (folder.path / FIRST).symlink_to(tmp_path / FIRST)
        with pytest.raises(ModelError, match="out of its folder"):
            Checkpoint(folder.path).names()


def test_a_shard_that_is_written_anew_keeps_what_nobody_can_read(folder: Any, tmp_path: Path) -> None:
    """Its spare copy is left out, and every other tensor is copied byte for byte, of whatever dtype."""
    edited_twice(folder)
    extra = torch.arange(4, dtype=torch.int64)
    folder.single({**load_file(folder.path / FIRST), "scales": extra}, FIRST)
    folder.index({**Checkpoint(folder.path).choice.mapped, "scales": FIRST})
    shard = folder.path / FIRST
    shard.write_bytes(shard.read_bytes().replace(b'"I64"', b'"F6X"', 1))
    base, out = Checkpoint(folder.path), tmp_path / "out"
    change = {EDITED: base.read(EDITED) + 1}
    out.mkdir()
    write_model(base, out, change)
    assert verify(base, out, change).changed == (EDITED,)
    before, after = base.entries["scales"], Checkpoint(out).entries["scales"]
    assert (after.dtype, after.shape) == ("F6X", (4,))
    assert (out / FIRST).read_bytes()[after.start : after.stop] == shard.read_bytes()[before.start : before.stop]
    assert EDITED not in read_header(out / FIRST)
