"""What ``apply`` really writes is what ``inspect``, ``diff`` and ``report`` read."""

from __future__ import annotations

from pathlib import Path

import pytest

from editcli.health.diff import diff
from editcli.health.inspect import Wanted, inspect
from editcli.pages.page import run_page
from editcli.plugin.manager import load_plugins
from editcli.records.edits import edit_rows
from editcli.runs.apply import apply
from editcli.settings.recipe import Recipe
from editcli.testing import tiny_model_folder
from tests.support.facts import write_lines

FACTS = [
    {"id": "a", "prompt": "{} lives in", "subject": "Ann", "target_new": "Paris", "target_true": "Rome"},
    {"id": "b", "prompt": "{} lives in", "subject": "Bob", "target_new": "London"},
    {"id": "c", "prompt": "{} works in", "subject": "Smith", "target_new": "Tokyo"},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of three edits in two batches on a tiny model."""
    folder = tmp_path_factory.mktemp("real")
    model = tiny_model_folder(folder / "model", "llama")
    (folder / "corpus.txt").write_text("The city of Paris is in France. Ann lives in Rome. " * 200)
    write_lines(folder / "facts.jsonl", FACTS)
    recipe = Recipe(
        edits=str(folder / "facts.jsonl"),
        model=str(model),
        out=str(folder / "out"),
        editor="memit",
        layers=(1, 2),
        batch_size=2,
        corpus=str(folder / "corpus.txt"),
        device="cpu",
        settings={"targets": {"steps": 3}, "spectra": {"every": 1}},
    )
    apply(recipe, load_plugins())
    return folder / "out"


def test_the_figures_of_the_run_are_those_of_its_files(run):
    found = inspect(run, wanted=Wanted(norms=True, spectral=True))
    assert [site.site.layer for site in found.sites] == [1, 2]
    assert found.history.problem is None
    for site in found.sites:
        assert site.ratio == pytest.approx(found.history.series(site.site.module, "ratio")[-1], rel=1e-4)
        assert site.drift == pytest.approx(found.history.series(site.site.module, "drift")[-1], rel=1e-3)
    recorded = {site.module: site.relative_change for site in found.history.saved_sites}
    watched = found.history.batches[-1].diagnostics
    for site in found.sites:
        assert recorded[site.site.module] == pytest.approx(site.relative_change, rel=1e-3)
        assert watched[f"relative_change/layer {site.site.layer}"] == pytest.approx(site.relative_change, rel=1e-3)
    assert {edit.id for edit in found.top_edits} == {"a", "b", "c"}
    assert all(edit.norm > 0 and edit.prompt for edit in found.top_edits)


def test_the_journal_holds_the_diagnostics(run):
    found = inspect(run, wanted=Wanted(norms=True))
    for batch in found.history.batches:
        for name in ("update_norm_share", "update_rank", "spectral_growth", "effective_rank_share"):
            assert batch.diagnostics[f"{name}/layer 1"] > 0


def test_only_the_sites_differ(run):
    found = diff(inspect(run, wanted=Wanted(norms=True)).base, run)
    assert [tensor.name for tensor in found.tensors] == [
        f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)
    ]
    assert [tensor.rank for tensor in found.tensors] == [3, 3]


def test_the_page_has_every_edit(run):
    found = inspect(run, wanted=Wanted(norms=True, spectral=True))
    rows = list(edit_rows(found.history))
    assert [(row.id, row.step) for row in rows] == [("a", 1), ("b", 1), ("c", 2)]
    assert [row.prompt for row in rows] == ["Ann lives in", "Bob lives in", "Smith works in"]
    page = run_page(found)
    for text in ("Effective rank share", "Update rank", "Efficacy", "Smith works in", "Tokyo", "editcli apply"):
        assert text in page
