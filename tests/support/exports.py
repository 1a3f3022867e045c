"""Models of every kind that is stored differently, and what the tests of exports compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from editcli import API_VERSION, Stabilizer, hookimpl
from tests.support.facts import PLACES

SITES = {"llama": "model.layers.{}.mlp.down_proj", "gpt2": "transformer.h.{}.mlp.c_proj"}


@dataclass(frozen=True)
class Kind:
    """How a model is stored and saved."""

    family: str = "llama"
    model: tuple[tuple[str, Any], ...] = ()
    choices: tuple[tuple[str, Any], ...] = ()

    @property
    def modules(self) -> list[str]:
        return [SITES[self.family].format(layer) for layer in (1, 2)]


KINDS = {
    "linear": Kind(),
    "conv1d": Kind("gpt2"),
    "square": Kind("gpt2", model=(("square", True),)),
    "tied": Kind(model=(("tied", True),)),
    "sharded": Kind(model=(("shards", 3),)),
    "bfloat16": Kind(model=(("dtype", "bfloat16"),)),
    "saved as bfloat16": Kind(choices=(("save_dtype", "bfloat16"),)),
    "read out": Kind(choices=(("stabilizers", ("half",)),)),
}


class Half(Stabilizer):
    """Save half of the change: what is saved is not what the updates add up to."""

    name = "half"
    reference = "a test"

    def stabilize_weight(self, session: Any, site: Any, weight: Any) -> Any:
        base = session.baseline(site)
        return base + (weight - base) / 2


editcli_api = API_VERSION


@hookimpl
def editcli_stabilizers() -> list[type[Stabilizer]]:
    return [Half]


def model_of(folder: Path) -> Any:
    """Load a model as anybody would, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


@torch.no_grad()
def logits(model: Any, folder: Path) -> torch.Tensor:
    """Return a model's logits for every subject."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    asked = [tokenizer(f"The capital of {place} is", return_tensors="pt").input_ids for place in PLACES]
    return torch.cat([model(input_ids=ids).logits.reshape(-1, model.config.vocab_size) for ids in asked])


def files(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def model_files(folder: Path) -> dict[str, bytes]:
    """Return the content of the files that a model is loaded from."""
    return {name: data for name, data in files(folder).items() if "/" not in name and name != "README.md"}


def change_weight(folder: Path, layer: int, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change one matrix of a model folder in place."""
    file, name = folder / "model.safetensors", f"{SITES['llama'].format(layer)}.weight"
    tensors = load_file(file)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, file, {"format": "pt"})
