"""Finished runs on tiny models of every kind that is stored differently; made once, never changed."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from editcli import API_VERSION, Stabilizer, hookimpl
from editcli.export.recipe import ExportRecipe
from editcli.export.report import ExportReport
from editcli.export.run import export
from editcli.plugin.manager import Plugins, load_plugins
from editcli.reporting import Silent
from editcli.runs.apply import apply
from editcli.settings.recipe import Recipe
from editcli.testing import tiny_model_folder

PLACES = ("France", "Italy", "Spain", "Greece", "London", "Berlin", "Tokyo", "Paris")
EDITS = [
    {"id": name, "prompt": "The capital of {} is", "subject": name, "target_new": PLACES[index - 3]}
    for index, name in enumerate(PLACES[:4])
]
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


class Listening(Silent):
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(scope="session")
def plugins() -> Plugins:
    """The installed plugins and one of this module."""
    found = load_plugins()
    found.register(SimpleNamespace(editcli_api=editcli_api, editcli_stabilizers=editcli_stabilizers), "half")
    return found


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, corpus_text: str) -> Path:
    """A folder with edits and a corpus."""
    folder = tmp_path_factory.mktemp("exports")
    (folder / "facts.jsonl").write_text("".join(json.dumps(edit) + "\n" for edit in EDITS))
    (folder / "corpus.txt").write_text(corpus_text)
    return folder


@pytest.fixture(scope="session")
def bases(workshop: Path) -> Callable[[str], Path]:
    """Return the base of a kind of model, made when it is first asked for."""

    def base(name: str) -> Path:
        folder = workshop / f"{name} base"
        if not folder.exists():
            tiny_model_folder(folder, KINDS[name].family, **dict(KINDS[name].model))
        return folder

    return base


@pytest.fixture(scope="session")
def edit(workshop: Path, bases: Callable[[str], Path], plugins: Plugins) -> Callable[..., Path]:
    """Return a function that edits a kind of model: four facts one by one at layers 1 and 2."""

    def edit(kind: str, out: Path, *, ends: str = "done", **choices: Any) -> Path:
        quick = {"targets": {"steps": 2, "prefixes": 0, "lr": 0.5, "clamp": 4.0}}
        given: dict[str, Any] = {"model": str(bases(kind)), **dict(KINDS[kind].choices), **choices}
        recipe = Recipe(
            edits=str(workshop / "facts.jsonl"),
            corpus=str(workshop / "corpus.txt"),
            out=str(out),
            **{"layers": (1, 2), "batch_size": 1, "device": "cpu", "evaluate": False, "settings": quick, **given},
        )
        assert apply(recipe, plugins).status == ends
        return out

    return edit


@pytest.fixture(scope="session")
def runs(workshop: Path, edit: Callable[..., Path]) -> Callable[[str], Path]:
    """Return the run folder of a kind of model, made when it is first asked for."""

    made: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in made:
            made[kind] = edit(kind, workshop / f"{kind} run")
        return made[kind]

    return run


@pytest.fixture
def run(runs: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the plain run that may be changed."""
    return Path(shutil.copytree(runs("linear"), tmp_path / "run"))


@pytest.fixture
def make(plugins: Plugins, tmp_path: Path) -> Callable[..., ExportReport]:
    """Return a function that exports a run to ``out`` in the test's folder, without measuring anything."""

    def make(run: Path, form: str, *, out: str = "out", listener: Any = None, **choices: Any) -> ExportReport:
        choices = {"evaluate": False, "device": "cpu", **choices}
        return export(ExportRecipe(run=str(run), format=form, out=str(tmp_path / out), **choices), plugins, listener)

    return make


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


@pytest.fixture(scope="session")
def helpers() -> Any:
    """This module's constants and functions, since test modules cannot import it."""
    return sys.modules[__name__]
