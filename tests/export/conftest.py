"""Finished runs on tiny models of every kind that is stored differently; made once, never changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from editcli.export.recipe import ExportRecipe
from editcli.export.report import ExportReport
from editcli.export.run import export
from editcli.plugin.manager import Plugins, load_plugins
from editcli.runs.apply import apply
from editcli.settings.recipe import Recipe
from editcli.testing import tiny_model_folder
from tests.support.exports import KINDS, editcli_api, editcli_stabilizers
from tests.support.facts import CAPITALS, write_lines


@pytest.fixture(scope="session")
def plugins() -> Plugins:
    """The installed plugins and one that reads weights out differently."""
    plugins = load_plugins()
    plugins.register(SimpleNamespace(editcli_api=editcli_api, editcli_stabilizers=editcli_stabilizers), "half")
    return plugins


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, corpus_text: str) -> Path:
    """A folder with edits and a corpus."""
    folder = tmp_path_factory.mktemp("exports")
    write_lines(folder / "facts.jsonl", CAPITALS[:4])
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
