"""What the tests of model folders share: a tiny model, its weights, and ways to write them differently."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from editcli.storage.choice import INDEX, SINGLE

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


class Folder:
    """A model folder with config and tokenizer, to be given weights."""

    def __init__(self, path: Path, weights: Mapping[str, Tensor]):
        self.path, self.weights = path, dict(weights)

    def single(self, weights: Mapping[str, Tensor] | None = None, name: str = SINGLE) -> None:
        """Write weights, the model's own by default, into one file."""
        save_file(dict(self.weights if weights is None else weights), self.path / name, metadata={"format": "pt"})

    def shards(self, weights: Mapping[str, Tensor] | None = None) -> dict[str, str]:
        """Write weights as two shards with an index, and return its map."""
        weights = self.weights if weights is None else weights
        names = sorted(weights)
        parts = [names[: len(names) // 2], names[len(names) // 2 :]]
        for file, part in zip(SHARDS, parts, strict=True):
            self.single({name: weights[name] for name in part}, file)
        mapped = {name: file for file, part in zip(SHARDS, parts, strict=True) for name in part}
        self.index(mapped)
        return mapped

    def index(self, mapped: Mapping[str, str], **fields: Any) -> None:
        """Write the index of shards."""
        (self.path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": mapped, **fields}))

    def configure(self, **fields: Any) -> None:
        """Change the config."""
        path = self.path / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Folder:
    """A folder with the tiny model's config and tokenizer, and no weights."""
    path = shutil.copytree(model, tmp_path / "folder", ignore=shutil.ignore_patterns("*.safetensors"))
    return Folder(Path(path), load_file(model / SINGLE))
