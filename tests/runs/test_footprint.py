"""What a run says about memory before it loads anything, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from editcli.__main__ import main
from editcli.errors import ModelError
from editcli.health.inspect import inspect
from editcli.models import memory
from editcli.models.loading import open_model, resolve_model
from editcli.plugin.editors import InverseGramEditor
from editcli.plugin.manager import load_plugins
from editcli.reporting import Silent
from editcli.runs import forecast as footprint
from editcli.runs import planning
from editcli.runs.apply import apply
from editcli.runs.planning import plan
from editcli.settings.recipe import Recipe
from editcli.testing import tiny_model_folder
from editcli.testing.models import EXPERTS
from tests.support.families import needs_packed_experts
from tests.support.reporters import Listener

PLUGINS = load_plugins()


@pytest.fixture
def recipe(tmp_path: Path, corpus_text: str) -> Recipe:
    model = tiny_model_folder(tmp_path / "model", tied=True)
    edits, corpus = tmp_path / "facts.jsonl", tmp_path / "corpus.txt"
    corpus.write_text(corpus_text, "utf-8")
    fact = {"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome"}
    edits.write_text(json.dumps(fact), "utf-8")
    return Recipe(
        edits=str(edits),
        model=str(model),
        out=str(tmp_path / "out"),
        layers=(1, 2),
        corpus=str(corpus),
        device="cpu",
        evaluate=False,
        settings={"targets": {"steps": 2, "prefixes": 1}},
    )


def leave(monkeypatch: pytest.MonkeyPatch, free: int | None) -> None:
    monkeypatch.setattr(footprint, "free_bytes", lambda device: free)


def planned(recipe: Recipe) -> footprint.Footprint:
    found = planning.check(recipe, PLUGINS, Silent()).footprint
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["memit", "alphaedit", "rlsedit", "rome"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_certain_is_what_is_held(recipe: Recipe, name: str, dtype: str) -> None:
    found = planned(replace(recipe, editor=name, dtype=dtype))
    model = open_model(resolve_model(recipe.model), device="cpu", dtype=dtype).model
    assert found.weights == sum(p.numel() * p.element_size() for p in model.parameters())
    layers = 1 if name == "rome" else 2
    assert found.masters == layers * 16 * 40 * 4
    assert found.inverse_gram == layers * 40 * 40 * 8


def test_the_editors_matrices_are_counted_as_they_are(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = InverseGramEditor.prepare

    def prepare(self: InverseGramEditor, session: Any) -> None:
        real(self, session)
        seen.append(sum(gram.matrix.numel() * gram.matrix.element_size() for gram in self.memory.values()))

    monkeypatch.setattr(InverseGramEditor, "prepare", prepare)
    apply(recipe, PLUGINS)
    assert seen == [planned(replace(recipe, overwrite=True)).inverse_gram]


@needs_packed_experts
def test_a_mixture_has_a_matrix_and_a_moment_for_each_expert(recipe: Recipe, tmp_path: Path) -> None:
    model = tiny_model_folder(tmp_path / "mixture", "mixtral")
    forecast = planned(replace(recipe, model=str(model), editor="moeedit"))
    assert forecast.inverse_gram == 2 * EXPERTS * 40 * 40 * 8
    # Each moment counts its tokens as well.
    assert forecast.statistics == 2 * EXPERTS * 41 * 41 * 8
    wider = tiny_model_folder(tmp_path / "wider", "mixtral", num_local_experts=2 * EXPERTS)
    # Experts that a token does not pass through keep nothing for its backward pass.
    assert planned(replace(recipe, model=str(wider), editor="moeedit")).activations == forecast.activations
    preset = len(inspect(model).preset.layers)
    assert inspect(model).statistics_bytes == preset * EXPERTS * 41 * 41 * 8


def test_an_editor_without_such_matrices_needs_none(recipe: Recipe) -> None:
    found = planned(replace(recipe, editor="ultraedit", settings={}))
    assert (found.inverse_gram, found.statistics, found.activations) == (0, 0, 0)


def test_longer_batches_and_lower_layers_need_more_activations(recipe: Recipe) -> None:
    low = planned(replace(recipe, layers=(0, 1)))
    assert low.activations > planned(recipe).activations > 0
    assert planned(replace(recipe, dtype="bfloat16")).activations < planned(recipe).activations


@pytest.mark.parametrize("run", [apply, plan])
def test_what_cannot_fit_is_refused_before_anything_is_loaded(
    run: Any, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    leave(monkeypatch, planned(recipe).needed - 1)
    monkeypatch.setattr(planning, "open_model", lambda *a, **k: pytest.fail("the model was loaded"))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ModelError, match=r"cannot fit: .* on cpu, which has .* free; use a smaller --dtype"):
        run(recipe, PLUGINS)
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_line_says_one_sentence(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(monkeypatch, 1000)
    command = ["apply", recipe.edits, "--model", str(recipe.model), "--out", recipe.out, "--layers", "1,2"]
    for extra in ([], ["--dry-run"]):
        assert main([*command, "--device", "cpu", *extra]) == 1
        error = capsys.readouterr().err
        assert error.splitlines()[-1].startswith("error: the model in")
        assert "Traceback" not in error
    assert not Path(recipe.out).exists()


def test_what_may_not_fit_is_a_warning(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(monkeypatch, planned(recipe).needed)
    listener = Listener()
    planning.check(recipe, PLUGINS, listener)
    assert [text for text in listener.warnings if "may not fit" in text]


def test_the_user_can_insist(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(monkeypatch, 1000)
    monkeypatch.setenv(footprint.UNCHECKED, "1")
    listener = Listener()
    planning.check(recipe, PLUGINS, listener)
    assert [text for text in listener.warnings if "cannot fit" in text]


@pytest.mark.parametrize("free", [None, 10**12])
def test_a_plan_that_fits_or_cannot_be_judged_is_only_told(
    free: int | None, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(monkeypatch, free)
    listener = Listener()
    found = planning.check(recipe, PLUGINS, listener).footprint
    assert not [text for text in listener.warnings if "fit" in text]
    assert found is not None
    assert found.fits
    told = found.summary()
    assert ("1.0 TB free" in told) == (free is not None)
    assert len(told) < 60, "one short line; what the memory is for is the dry run's to say"
    assert "weights" in plan(recipe, PLUGINS).memory


def test_a_spread_model_is_not_refused(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(monkeypatch, 1000)
    assert planned(replace(recipe, device_map="auto")).free is None


def test_what_lives_elsewhere_takes_nothing_here(recipe: Recipe) -> None:
    here = planned(recipe)
    assert planned(replace(recipe, solve_device="meta")).needed == here.weights
    assert planned(replace(recipe, solve_device="meta")).state == 0
    for device in ("auto", "cpu"):
        same = planned(replace(recipe, device=device, solve_device="cpu"))
        if same.device == "cpu":
            assert same.needed == here.needed


def test_a_dry_run_has_the_figures(recipe: Recipe) -> None:
    found = planned(recipe)
    bytes_ = plan(recipe, PLUGINS).to_json()["bytes"]
    assert {name: bytes_[name] for name in ("weights", "masters", "inverse_gram", "needed")} == {
        "weights": found.weights,
        "masters": found.masters,
        "inverse_gram": found.inverse_gram,
        "needed": found.weights + found.masters + found.inverse_gram,
    }
    assert {"model", "disk", "statistics"} <= set(bytes_)


class TestFreeMemory:
    def group(self, folder: Path, files: dict[str, str]) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)
        return folder

    def test_a_control_group_limits_what_is_free(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        stat = "anon 5\ninactive_file 30\n"
        inner = self.group(tmp_path / "unified", {"memory.max": "max\n", "memory.current": "50", "memory.stat": stat})
        outer = self.group(tmp_path, {"memory.max": "100\n", "memory.current": "60\n", "memory.stat": stat})
        (tmp_path / "own").write_text("0::/unified\n")
        monkeypatch.setattr(memory, "_CONTROL_GROUPS", outer)
        monkeypatch.setattr(memory, "_SELF", tmp_path / "own")
        assert inner.is_dir()
        assert memory.free_bytes(torch.device("cpu")) == 100 - 60 + 30

    def test_the_first_version_of_control_groups_counts_too(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = {
            "memory.limit_in_bytes": "100",
            "memory.usage_in_bytes": "130",
            "memory.stat": "total_inactive_file 10",
        }
        self.group(tmp_path / "memory" / "job", files)
        (tmp_path / "own").write_text("5:devices:/job\n4:memory:/job\n")
        monkeypatch.setattr(memory, "_CONTROL_GROUPS", tmp_path)
        monkeypatch.setattr(memory, "_SELF", tmp_path / "own")
        assert memory.free_bytes(torch.device("cpu")) == 0

    def test_without_control_groups_the_system_is_asked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "_SELF", tmp_path / "absent")
        found = memory.free_bytes(torch.device("cpu"))
        assert found is not None
        assert found > 1 << 20

    def test_a_device_that_cannot_be_asked_is_unknown(self) -> None:
        assert memory.free_bytes(torch.device("mps")) is None
