"""Stacks side by side: ordinary runs, put beside each other, gone on with where they were stopped."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from rich.console import Console

from editcli.commands import bench as library
from editcli.commands.bench import Point, bench, collapse_point, parse_stacks
from editcli.errors import NumericalError, OptionError, PluginError, StateError
from editcli.plugin.manager import Plugins, load_plugins
from editcli.records.state import RunFolder
from editcli.render.bench import bench_charts, bench_table
from editcli.settings.recipe import Recipe
from editcli.testing import tiny_model_folder
from tests.support.reporters import Listener

pytestmark = pytest.mark.slow

STACKS = (("memit",), ("rlsedit", "nas"))
THREE = ("efficacy", "generalization", "specificity")


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return load_plugins()


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    edits = tmp_path / "stream.jsonl"
    places = ("France", "Spain", "Italy", "Greece", "London", "Berlin", "Tokyo", "Rome")
    lines = [
        {
            "id": place,
            "prompt": "The river in {} is",
            "subject": place,
            "target_new": "a",
            "target_true": "the",
            "neighborhood_prompts": ["The tower in Paris is"],
        }
        for place in places
    ]
    edits.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return Recipe(
        edits=str(edits),
        model=str(tiny_model_folder(tmp_path / "model")),
        out=str(tmp_path / "bench"),
        batch_size=2,
        eval_every=1,
        corpus="self",
        settings={"targets": {"steps": 2, "prefixes": 1}, "nas": {"pilots": 4}, "statistics": {"tokens": 200}},
    )


def test_every_stack_is_a_run_on_the_same_edits(recipe: Recipe, plugins: Plugins) -> None:
    report = bench(recipe, STACKS, plugins)
    assert report.complete
    assert [curve.stack for curve in report.curves] == ["memit", "rlsedit+nas"]
    for curve in report.curves:
        assert [point.edits for point in curve.points] == [2, 4, 6, 8]
        assert set(curve.cohorts) == set(library.COLLAPSING)
        assert all(len(shares) == 4 for shares in curve.cohorts.values())
        record = RunFolder(Path(curve.out)).read_record()
        assert record is not None
        assert record.efficacy is not None
        assert record.efficacy.retained is not None
        last = curve.last
        assert last is not None
        assert last.figures["efficacy_success"] == record.efficacy.retained["efficacy_success"]
        assert set(last.figures) == {f"{n}_{form}" for n in THREE for form in ("success", "accuracy")}
        # The sample is the whole of so short a stream, so its mean is the mean of the four quarters.
        for name in library.COLLAPSING:
            assert fmean(curve.cohorts[name]) == pytest.approx(last.figures[name])
        ratios = [site.ratio for site in record.sites or () if site.ratio is not None]
        assert last.ratio == pytest.approx(max(ratios), rel=1e-6)
        # Along its stream a run measures distributions as well, which a bench does not compare.
        assert record.protocols is not None
        assert "distribution.neighbors.median" in record.protocols
    written = json.loads((recipe.folder / "bench.json").read_text())
    assert written["curves"][1]["stack"] == "rlsedit+nas"
    assert written["protocols"]["efficacy_success"] == {"protocol": "teacher_forced", "scorer": "more_probable"}
    assert all(curve["protocols"] == written["protocols"] for curve in written["curves"])
    bench_table(report)
    assert not any(chart.empty for chart in bench_charts(report))


def test_a_stopped_bench_goes_on_and_a_finished_stack_is_not_run_again(
    recipe: Recipe, plugins: Plugins, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A run records its edits by their path from the root.
    monkeypatch.chdir(Path(recipe.edits).parent)
    recipe = replace(recipe, edits="stream.jsonl")
    whole = bench(recipe, STACKS[:1], plugins)
    started: list[str] = []
    real = library.apply

    def counted(recipe: Recipe, *rest: Any) -> Any:
        started.append(recipe.out)
        return real(recipe, *rest)

    monkeypatch.setattr(library, "apply", counted)
    both = bench(recipe, STACKS, plugins)
    assert started == [str(recipe.folder / "rlsedit+nas")]
    assert both.curves[0] == whole.curves[0]


def test_stacks_that_were_measured_differently_are_not_compared_in_silence(recipe: Recipe, plugins: Plugins) -> None:
    listener = Listener()
    bench(recipe, STACKS, plugins, listener)
    assert not any("measured differently" in text for text in listener.warnings)
    path = recipe.folder / "rlsedit+nas" / "editcli" / "run.json"
    record = json.loads(path.read_text())
    record["protocols"]["efficacy_success"]["protocol"] = "generated"
    path.write_text(json.dumps(record))
    bench(recipe, STACKS, plugins, listener)
    (text,) = [text for text in listener.warnings if "measured differently" in text]
    assert "memit and rlsedit+nas" in text
    assert "efficacy_success is teacher_forced" in text


def test_an_earlier_bench_of_other_settings_does_not_count(recipe: Recipe, plugins: Plugins) -> None:
    bench(recipe, STACKS[:1], plugins)
    with pytest.raises(StateError, match="was made with other limit, seed"):
        bench(replace(recipe, limit=4, seed=1), STACKS[:1], plugins)


def test_a_stack_that_cannot_be_computed_does_not_end_the_bench(
    recipe: Recipe, plugins: Plugins, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = library.apply

    def fails_first(recipe: Recipe, *rest: Any) -> Any:
        if recipe.editor == "memit":
            raise NumericalError("made up", site="here")
        return real(recipe, *rest)

    monkeypatch.setattr(library, "apply", fails_first)
    report = bench(recipe, STACKS, plugins)
    assert [curve.status for curve in report.curves] == ["failed", "done"]
    assert report.curves[0].last is None
    bench_table(report)


def test_the_collapse_point_is_where_a_retained_efficacy_first_falls() -> None:
    values = ((100, 1.0, 0.7), (200, 0.6, 0.59), (300, 0.61, None), (400, 0.599, 0.9))
    points = [Point(n, 1.0, {"efficacy_success": a, "efficacy_accuracy": b}) for n, a, b in values]
    assert collapse_point(points, "efficacy_success") == 400
    assert collapse_point(points, "efficacy_accuracy") == 200
    assert collapse_point(points[:1], "efficacy_success") is None
    assert collapse_point([], "efficacy_success") is None


def test_a_finished_bench_of_an_earlier_version_gives_the_table_of_this_one(
    recipe: Recipe, plugins: Plugins, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bench(recipe, STACKS, plugins)
    (recipe.folder / "bench.json").unlink()
    monkeypatch.setattr(library, "apply", None)
    assert bench(recipe, STACKS, plugins) == whole
    written = json.loads((recipe.folder / "bench.json").read_text())
    assert written == json.loads(json.dumps(whole.to_json()))
    assert set(written["curves"][0]["collapse"]) == {"efficacy_success", "efficacy_accuracy"}


def test_the_table_fits_a_terminal_and_names_what_is_missing(recipe: Recipe, plugins: Plugins) -> None:
    report = bench(recipe, STACKS, plugins)
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(bench_table(report))
    shown = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "…" not in shown
    # No paraphrases were given, so there is no figure for them.
    assert "n/a/n/a" in shown


def test_stacks_are_read_and_checked(plugins: Plugins) -> None:
    assert parse_stacks("memit, memit+nas+revive,memit", plugins) == (("memit",), ("memit", "nas", "revive"))
    with pytest.raises(PluginError, match="did you mean 'memit'"):
        parse_stacks("memti", plugins)
    with pytest.raises(PluginError, match="not a stabilizer"):
        parse_stacks("memit+rome", plugins)
    with pytest.raises(OptionError, match="cannot read the stack"):
        parse_stacks("memit++nas", plugins)
