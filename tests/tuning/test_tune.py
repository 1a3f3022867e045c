"""``editcli tune``: what is searched, what is maximised, and a search that can be stopped and resumed."""

from __future__ import annotations

import io
import json
import math
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from editcli.__main__ import main
from editcli.errors import NumericalError, StateError
from editcli.evaluation.ability import Drift, TextBaseline, general_drift
from editcli.models.loading import LoadedModel, open_model, resolve_model
from editcli.plugin.manager import Plugins, load_plugins
from editcli.plugin.options import build
from editcli.presets.loader import all_presets
from editcli.presets.record import Preset, read_preset
from editcli.render.tune import search_charts, tune_view
from editcli.reporting import Silent
from editcli.requests.reader import EditFile
from editcli.runs.planning import described, located, plan_on, settings_for
from editcli.settings.core import TargetOptions
from editcli.settings.recipe import Recipe
from editcli.storage.choice import SINGLE
from editcli.testing import CHAT_TEMPLATE, tiny_model_folder, tiny_requests, tiny_tokenizer
from editcli.tuning import study as states
from editcli.tuning.objective import Figures
from editcli.tuning.preparation import FEWEST, MOST, Budget, TuneRecipe, edits_per_trial
from editcli.tuning.probes import counterfactuals, relations
from editcli.tuning.search import PRESET, tune
from editcli.tuning.space import COUNT, LAST, SOURCE, Bound, Candidate, Space, build_space
from editcli.tuning.study import Study, begun_with
from editcli.tuning.workbench import Workbench
from tests.support.reporters import Listener
from tests.support.workshop import Workshop

FAST = ("--sample", "4", "-o", "targets.steps=5", "-o", "targets.prefixes=1", "-o", "statistics.tokens=2000")


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return load_plugins()


# The objective.


@pytest.mark.parametrize(
    ("figures", "price", "score"),
    [
        # 3 / (2 + 2 + 1) = 0.6, and 2 points a nat for 0.05 nats.
        (Figures(0.5, 0.5, 1.0, kl=0.05), 2.0, 0.5),
        (Figures(0.5, 0.5, 1.0, kl=0.05), 0.0, 0.6),
        # 2 / (2 + 4) of the two that are known.
        (Figures(0.5, None, 0.25), 1.0, 1 / 3),
        (Figures(0.5), 1.0, 0.5),
        (Figures(0.0, 1.0, 1.0, kl=0.1), 1.0, -0.1),
        (Figures(1.0, 1.0, 1.0, kl=0.0), 1.0, 1.0),
    ],
)
def test_the_score_is_the_harmonic_mean_minus_the_price_of_drift(figures: Figures, price: float, score: float) -> None:
    assert figures.score(kl_price=price) == pytest.approx(score)


# The space.


@pytest.mark.parametrize("editor", ["memit", "rlsedit", "alphaedit", "rome", "ft", "ultraedit"])
@pytest.mark.parametrize("preset", all_presets(), ids=lambda preset: preset.name)
def test_every_preset_lies_in_the_space_around_it(preset: Preset, editor: str, plugins: Plugins) -> None:
    assert preset.match is not None
    settings = settings_for(editor, preset, {}, plugins)
    options = plugins.find("editor", editor).component.Options
    effective = {
        "targets": asdict(build(TargetOptions, settings.get("targets", {}), owner="targets")),
        editor: asdict(build(options, settings.get(editor, {}), owner=editor)),
    }
    layers = preset.layers_for(editor)
    space = build_space(effective, layers=layers, depth=preset.match.layers)
    assert {"targets.lr", "targets.clamp", "targets.v_weight_decay", LAST, COUNT} <= set(space.start)
    for bound in space.bounds:
        assert bound.low <= bound.start <= bound.high
        assert bound.low < bound.high
        assert all(bound.low <= value <= bound.high for value in bound.first)
    candidate = space.candidate(space.start)
    assert candidate.layers == layers
    for name, section in candidate.settings.items():
        assert {key: effective[name][key] for key in section} == section
    # Whatever is drawn, its layers exist and their second moments were asked for.
    for last in (min, max):
        for count in (1, 5):
            bounds = {bound.name: bound for bound in space.bounds}
            point = {**space.start, LAST: last(bounds[LAST].low, bounds[LAST].high), COUNT: count}
            assert set(space.candidate(point).layers) <= set(space.all_layers()) <= set(range(preset.match.layers))


def test_the_first_points_are_the_preset_and_then_one_change_at_a_time() -> None:
    space = build_space({"targets": {"lr": 0.1, "clamp": 0.75}}, layers=(4, 5), depth=32)
    first = list(space.first_points())
    assert first[0] == space.start == {LAST: 5, COUNT: 2, "targets.lr": 0.1, "targets.clamp": 0.75}
    assert first[1:] == [{**space.start, "targets.lr": 0.5}]


def test_a_relative_rate_is_searched_around_the_presets() -> None:
    section = {"lr": 0.03, "lr_kind": "relative"}
    (bound,) = (b for b in build_space({"targets": section}, layers=(1,), depth=8).bounds if b.name == "targets.lr")
    assert (bound.low, bound.high) == (pytest.approx(0.03 / 4), pytest.approx(0.03 * 4))
    assert bound.first == (0.06,)


@pytest.mark.parametrize(
    ("section", "low", "high"),
    [
        ({"v_weight_decay": 0.5}, 0.05, 50.0),
        ({"v_weight_decay": 0.5, "decay_kind": "absolute"}, 0.05, 50.0),
        ({"v_weight_decay": 0.1, "decay_kind": "relative"}, 0.005, 0.5),
        ({"v_weight_decay": 0.0, "decay_kind": "relative"}, 0.0, 0.5),
        ({"v_weight_decay": 100.0}, 0.05, 100.0),
    ],
)
def test_a_range_follows_what_the_preset_means_and_holds_its_value(
    section: dict[str, Any], low: float, high: float
) -> None:
    (bound,) = build_space({"targets": section}, layers=(1,), depth=8, fixed={"layers"}).bounds
    assert (bound.low, bound.high, bound.start) == (low, high, section["v_weight_decay"])
    assert bound.log == (low > 0)


def test_what_the_user_fixes_is_not_searched() -> None:
    effective = {"targets": {"lr": 0.1, "clamp": 0.75}, "memit": {"mom2_update_weight": 0.0}}
    space = build_space(effective, layers=(4, 6), depth=32, fixed={"targets.lr", "layers"})
    # A weight of 0 has no range of multiples around it.
    assert set(space.start) == {"targets.clamp"}
    assert space.candidate({"targets.clamp": 1.23456}) == Candidate((4, 6), {"targets": {"clamp": 1.235}})
    assert space.all_layers() == (4, 6)


def test_an_editor_of_one_site_has_no_number_of_layers_to_search() -> None:
    space = build_space({}, layers=(5,), depth=18, single_site=True)
    assert space.bounds == (Bound(LAST, 2, 8, 5, integer=True),)
    assert space.candidate({LAST: 8}).layers == (8,)


# Probes.


def test_probes_ask_for_one_subject_in_several_ways() -> None:
    known = relations()
    assert sum(len(relation.facts) for relation in known) >= 150
    for relation in known:
        assert all(text.count("{}") == 1 for text in (relation.prompt, *relation.paraphrases))
        assert len({subject for subject, _ in relation.facts}) == len(relation.facts)
        assert len({true for _, true in relation.facts}) > 1


def test_counterfactuals_write_another_known_answer_and_spare_their_neighbours() -> None:
    known = {relation.name: relation for relation in relations()}
    edits = counterfactuals(list(known.values()), seed=3)
    assert counterfactuals(list(known.values()), seed=3) == edits != counterfactuals(list(known.values()), seed=4)
    edited = {edit.prompt for edit in edits}
    for edit in edits:
        relation = known[edit.id.partition(":")[0]]
        facts = dict(relation.facts)
        assert facts[edit.subject] == edit.target_true != edit.target_new
        assert edit.target_new in facts.values()
        assert len(edit.paraphrase_prompts) == len(relation.paraphrases)
        assert edit.neighborhood_prompts
        for near in edit.neighborhood_prompts:
            assert near.prompt not in edited
            assert (near.prompt, near.target) in {(relation.prompt.format(s), true) for s, true in facts.items()}


def test_a_relation_with_one_answer_gives_no_edits() -> None:
    relation = replace(relations()[0], facts=(("A", "x"), ("B", "x"), ("C", "x")))
    assert counterfactuals([relation], seed=0) == ()


# Time.


@pytest.mark.parametrize(
    ("left", "each", "available", "count"),
    [
        (600.0, 1.0, 1000, MOST),
        (600.0, 5.0, 1000, 15),
        (60.0, 5.0, 1000, FEWEST),
        (600.0, 1.0, 30, 20),
        (1.0, 1.0, 1, 1),
    ],
)
def test_a_trial_has_as_many_edits_as_the_time_allows(left: float, each: float, available: int, count: int) -> None:
    assert edits_per_trial(left, each=each, available=available) == count


def test_a_budget_without_minutes_does_not_end() -> None:
    assert Budget(None).affords(1e9)
    assert not Budget(1 / 60).affords(2.0)


# The record of trials.

SPACE = Space((Bound("targets.lr", 0.02, 2.0, 0.1, first=(0.5,)), Bound(LAST, 1, 9, 4, integer=True)), (4,))


def open_study(folder: Path, **identity: Any) -> Study:
    return Study(folder / "study.jsonl", SPACE, {"model": "m", **identity}, seed=0)


def finish(study: Study, score: float) -> None:
    study.ask().tell(states.DONE, seconds=1.0, figures=Figures(score), score=score)


def test_the_first_trials_are_those_that_the_space_names(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    assert study.ask().point == {"targets.lr": 0.1, LAST: 4}
    assert study.ask().point == {"targets.lr": 0.5, LAST: 4}
    third = study.ask().point
    assert 0.02 <= third["targets.lr"] <= 2.0
    assert third not in list(SPACE.first_points())


def test_a_tie_goes_to_the_earlier_trial_and_a_better_one_wins(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    for score in (0.7, 0.704, 0.2):
        finish(study, score)
    best = study.best()
    assert best == study.start_record()
    assert best is not None
    assert (best.number, best.layers, best.settings) == (1, (4,), {"targets": {"lr": 0.1}})
    finish(study, 0.71)
    best = study.best()
    assert best is not None
    assert best.number == 4


def test_a_bad_trial_is_ended_early_but_never_the_presets_own(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    for score in (0.8, 0.9):
        ask = study.ask()
        assert not ask.hopeless(4, score)
        ask.tell(states.DONE, seconds=1.0, figures=Figures(score), score=score)
    bad = study.ask()
    # Two edits say too little.
    assert not bad.hopeless(2, 0.0)
    assert bad.hopeless(4, 0.1)
    bad.tell(states.PRUNED, seconds=0.5, figures=Figures(0.1))
    assert study.records[-1].state == "pruned"
    assert study.records[-1].figures == Figures(0.1)
    study._study.enqueue_trial(SPACE.start)
    assert not study.ask().hopeless(4, 0.0)


def test_a_search_goes_on_where_a_killed_one_was(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    finish(study, 0.5)
    killed = study.ask().point
    # What a machine that fails leaves of the last line.
    with (tmp_path / "study.jsonl").open("a") as file:
        file.write('{"op_code": 4, "worke')
    (tmp_path / "study.jsonl.lock").touch()
    again = open_study(tmp_path)
    assert [record.number for record in again.records] == [1]
    assert again.made == 1
    assert again.ask().point == killed


def test_a_trial_that_was_stopped_is_done_again(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    stopped = study.ask()
    stopped.tell(states.ENDED, seconds=1.0)
    assert study.made == 0
    assert study.best() is None
    assert [study.ask().point, study.ask().point][1] == stopped.point == SPACE.start


def test_a_search_of_another_kind_is_refused(tmp_path: Path) -> None:
    finish(open_study(tmp_path), 0.5)
    with pytest.raises(StateError, match=r"was begun with other model; resume it with the same"):
        open_study(tmp_path, model="other")


def test_a_failed_trial_says_why(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    study.ask().tell(states.FAILED, seconds=1.0, reason="it broke")
    assert study.records[0].to_json()["reason"] == "it broke"
    assert study.start_record() is None


# Trials on a model.


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tiny_model_folder(tmp_path_factory.mktemp("model") / "tiny", dtype="bfloat16")
    return open_model(resolve_model(folder), device="cpu")


@pytest.fixture
def bench(loaded: LoadedModel, plugins: Plugins, tmp_path: Path, corpus_text: str) -> Workbench:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(corpus_text)
    settings = {"targets": {"steps": 3, "prefixes": 1}}
    recipe = Recipe(edits=SOURCE, corpus=str(corpus), settings=settings, layers=(1, 2))
    return Workbench(loaded, recipe, plugins, Silent(), texts=corpus_text.splitlines())


def test_a_trial_gives_the_model_its_weights_back_bit_by_bit(bench: Workbench) -> None:
    before = {name: tensor.clone() for name, tensor in bench.loaded.model.state_dict().items()}
    edits = [*tiny_requests(0), *tiny_requests(1)]
    seen: list[tuple[int, bool]] = []
    trial = bench.run(
        Candidate((0, 1), {"targets": {"lr": 0.9}}),
        edits,
        batch=2,
        watch=lambda done, figures: seen.append((done, figures is not None)),
    )
    assert seen == [(2, True), (4, True), (6, False)]
    assert (trial.figures.kl or 0.0) > 0
    assert trial.figures.ratio != 1.0
    assert same(before, bench.loaded.model.state_dict())
    assert bench.text.drift(bench.loaded).kl == 0.0
    again = bench.run(Candidate((0, 1), {"targets": {"lr": 0.9}}), edits, batch=2, watch=lambda done, figures: None)
    assert again.figures == trial.figures


def test_a_trial_that_is_ended_gives_them_back_too(bench: Workbench) -> None:
    before = {name: tensor.clone() for name, tensor in bench.loaded.model.state_dict().items()}

    def end(done: int, figures: Figures | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.run(Candidate((1, 2), {}), tiny_requests(0), batch=1, watch=end)
    assert same(before, bench.loaded.model.state_dict())


def test_a_block_of_zeros_has_no_ratio_and_stops_no_trial(
    bench: Workbench, tmp_path: Path, plugins: Plugins, corpus_text: str
) -> None:
    folder = tiny_model_folder(tmp_path / "zero")
    weights = load_file(folder / SINGLE)
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({**weights, name: torch.zeros_like(weights[name])}, folder / SINGLE, metadata={"format": "pt"})
    zero = open_model(resolve_model(folder), device="cpu")
    other = Workbench(zero, bench.recipe, plugins, Silent(), texts=corpus_text.splitlines())
    for layers, known in (((1,), False), ((1, 2), True)):
        trial = other.run(Candidate(layers, {}), tiny_requests(0), batch=3, watch=lambda done, figures: None)
        assert (trial.figures.ratio is not None) == known
        json.dumps(trial.figures.to_json(), allow_nan=False)


def test_a_cache_that_cannot_be_written_is_one_warning_for_all_trials(
    bench: Workbench, tmp_path: Path, plugins: Plugins, corpus_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("a file where the folder of the cache would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    listening = Listener()
    recipe = replace(bench.recipe, editor="alphaedit")
    other = Workbench(bench.loaded, recipe, plugins, listening, texts=corpus_text.splitlines())
    for _ in range(2):
        other.run(Candidate((1, 2), {}), tiny_requests(0), batch=3, watch=lambda done, figures: None)
    assert [text for text in listening.warnings if "cannot be written" in text] == listening.warnings[:1]
    assert len(listening.warnings) == 1
    assert "Writing prefixes" in listening.phases


def test_settings_that_wreck_the_model_are_a_failed_trial_and_not_the_end(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: tensor.clone() for name, tensor in bench.loaded.model.state_dict().items()}
    wreck = Drift(math.nan, 1.0, math.nan, 10)
    monkeypatch.setattr(bench.text, "drift", lambda loaded: wreck)
    with pytest.raises(NumericalError, match="not numbers any more"):
        bench.run(Candidate((1, 2), {}), tiny_requests(0), batch=3, watch=lambda done, figures: None)
    assert same(before, bench.loaded.model.state_dict())


def test_the_drift_from_kept_logits_is_that_of_two_models(tmp_path: Path, corpus_text: str) -> None:
    base, edited = (
        open_model(resolve_model(tiny_model_folder(tmp_path / str(seed), seed=seed)), device="cpu") for seed in (0, 1)
    )
    texts = corpus_text.splitlines()
    baseline = TextBaseline(base, texts, max_length=64, max_tokens=300)
    both = general_drift(edited, base, texts, max_length=64, max_tokens=300)
    drift = baseline.drift(edited)
    assert drift.tokens == both.tokens
    for name in ("kl", "perplexity", "perplexity_base"):
        assert getattr(drift, name) == pytest.approx(getattr(both, name), rel=1e-5)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# The command.


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, corpus_text: str) -> tuple[str, ...]:
    """Arguments that tune a tiny model on a few edits."""
    folder = tmp_path_factory.mktemp("small")
    places = ("France", "Spain", "Italy", "Greece", "London", "Berlin", "Tokyo", "Rome")
    edits = [
        {
            "id": place,
            "prompt": "The river in {} is",
            "subject": place,
            "target_new": "a",
            "target_true": "the",
            "paraphrase_prompts": [f"In {place} the river is"],
            "neighborhood_prompts": ["The tower in Paris is"],
        }
        for place in places
    ]
    (folder / "edits.jsonl").write_text("\n".join(map(json.dumps, edits)), encoding="utf-8")
    (folder / "corpus.txt").write_text(corpus_text)
    model = tiny_model_folder(folder / "model")
    options = ("--corpus", str(folder / "corpus.txt"), "-o", "targets.steps=3", "-o", "targets.prefixes=1")
    return (str(model), str(folder / "edits.jsonl"), "--sample", "4", *options)


@pytest.fixture
def here(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, with second moments that the tests of this module share."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_two_trials_on_the_bundled_model_write_a_preset_that_apply_takes(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", "bundled", *FAST, "--trials", "2", "--json"]) == 0
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert report == json.loads(Path("tune/tune.json").read_text())
    assert [trial["number"] for trial in report["trials"]] == [1, 2]
    assert report["edits"] == {"file": SOURCE, "trial": 4, "held_out": 4, "batch": 1}
    guess, best = report["guess"], report["best"]
    assert guess["number"] == 1
    assert guess["layers"] == report["started_from"]["layers"] == [0, 1]
    assert best["score"] >= guess["score"]
    # The bundled model answers its probes, and an edit changes that.
    assert report["base"]["efficacy"] == 0.0
    assert guess["efficacy"] > 0.5
    assert set(report["held_out"]) == {"guess", "best"}
    assert "Trial 2, layers 0-1" in said.err
    preset = read_preset(Path("tune") / PRESET)
    chosen = next(trial for trial in report["trials"] if trial["number"] == report["chosen"])
    assert list(preset.layers) == chosen["layers"]
    assert preset.settings["targets"]["lr"] == chosen["settings"]["targets"]["lr"]
    assert preset.settings["targets"]["steps"] == 5
    facts = json.dumps({"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome"})
    Path("facts.jsonl").write_text(facts)
    Path("editcli.toml").write_text('preset = "tune/preset.toml"\n[statistics]\ntokens = 2000\n')
    assert main(["apply", "facts.jsonl", "--no-eval"]) == 0
    record = json.loads(Path("facts-edited/editcli/run.json").read_text())
    assert record["preset"] == {
        "name": "bundled-tuned",
        "label": "tuned",
        "layers": chosen["layers"],
        "file": "tune/preset.toml",
        "sha256": preset.sha256,
    }
    assert record["provenance"]["targets"]["lr"] == chosen["settings"]["targets"]["lr"]
    # A run can be undone and repeated after its preset file has gone.
    (Path("tune") / PRESET).unlink()
    Path("editcli.toml").unlink()
    assert main(["apply", "--repeat", "facts-edited/editcli/run.json"]) == 0
    assert main(["undo", "facts-edited"]) == 0


def test_a_search_that_is_there_is_not_overwritten(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "bundled", *FAST, "--resume"]) == 1
    assert "there is no search in tune" in capsys.readouterr().err
    Path("tune").mkdir()
    Path("tune/study.jsonl").touch()
    assert main(["tune", "bundled", *FAST]) == 1
    assert "--resume continues the search in it" in capsys.readouterr().err


def test_without_optuna_the_extra_is_named(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["tune", "bundled"]) == 1
    assert "pip install 'editcli[tune]'" in capsys.readouterr().err
    assert not Path("tune").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--minutes", "0"], 1, "--minutes must be more than 0"),
        (["--kl-price", "-1"], 1, "--kl-price must not be negative"),
        (["none.jsonl"], 2, "none.jsonl"),
        (["--editor", "memt"], 1, "did you mean 'memit'?"),
        (["--preset", "none.toml"], 1, "none.toml"),
        (["--trials", "0"], 2, "--trials"),
        (["--limit", "3"], 2, "--limit takes the first edits of a file"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    arguments: list[str], code: int, sentence: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", "bundled", *arguments]) == code
    assert sentence in capsys.readouterr().err
    assert not Path("tune").exists()


def test_a_budget_that_is_too_small_says_so_and_keeps_the_search(
    here: Path, small: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", *small, "--minutes", "0.0001"]) == 1
    assert "no trial was done within" in capsys.readouterr().err
    assert main(["tune", *small, "--trials", "1", "--resume", "--seed", "1"]) == 1
    assert "was begun with other edits, seed" in capsys.readouterr().err
    assert main(["tune", *small, "--trials", "1", "--resume"]) == 0
    assert "the preset holds the guess" in capsys.readouterr().out


def test_apply_writes_the_layers_that_were_tuned_for_an_editor_with_layers_of_its_own(
    here: Path, small: tuple[str, ...], plugins: Plugins
) -> None:
    model, edits, _, _, _, corpus, *_ = small
    run = Recipe(model=model, edits=edits, corpus=corpus, out="tune", editor="ultraedit", layers=(0, 1), batch_size=4)
    report = tune(TuneRecipe(run=run, trials=1, sample=4), plugins)
    assert report.chosen is not None
    assert report.chosen.layers == (0, 1)
    written = Recipe(model=model, edits=edits, preset=report.preset, evaluate=False)
    base = described(written, located(written, weights=False), plugins)
    planned = plan_on(base, written, plugins, EditFile(edits, "", (), (), ()))
    assert (planned.editor.name, planned.layers) == ("ultraedit", (0, 1))


CLOCK = CHAT_TEMPLATE + "{{ strftime_now('%H:%M') }}<think>"


def test_trials_share_the_templates_clock_and_a_search_is_what_its_files_hold(
    here: Path, small: tuple[str, ...], plugins: Plugins, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search that is resumed reads the time at which it was begun, and refuses another text or template."""
    _, edits, _, _, _, corpus, *_ = small
    model = tiny_model_folder(here / "model", tokenizer=tiny_tokenizer(chat_template=CLOCK))
    text = here / "text.txt"
    text.write_text(Path(corpus).read_text())
    settings = {"targets": {"steps": 1, "prefixes": 0}}
    run = Recipe(model=str(model), edits=edits, corpus=corpus, out="tune", settings=settings, chat_template=True)
    recipe = TuneRecipe(run=run, trials=1, sample=4, text=str(text))
    listening = Listener()
    tune(recipe, plugins, listening)
    assert [warning for warning in listening.warnings if "thinking block (<think>)" in warning] != []
    identity = begun_with(Path("tune/study.jsonl"))
    assert identity is not None
    clock = identity["chat template"]["clock"]
    assert clock is not None

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Later:
            return cls(2031, 5, 6, 7, 8)

    monkeypatch.setattr("editcli.runs.planning.datetime", Later)
    again = replace(recipe, resume=True, trials=2)
    assert len(tune(again, plugins).trials) == 2
    text.write_text(text.read_text() + "\nThe river")
    with pytest.raises(StateError, match="was begun with other --text;"):
        tune(again, plugins)
    text.write_text(Path(corpus).read_text())
    (model / "chat_template.jinja").write_text(CLOCK + "!")
    with pytest.raises(StateError, match="was begun with other chat template"):
        tune(again, plugins)


class _Stopping(Silent):
    """A reporter that does something when a note begins with certain words."""

    def __init__(self, when: str, act: Callable[[], None]):
        self._when, self._act = when, act

    def note(self, text: str) -> None:
        if text.startswith(self._when):
            self._act()


def test_an_interrupted_search_keeps_the_best_so_far_and_goes_on(
    here: Path, small: tuple[str, ...], plugins: Plugins
) -> None:
    model, edits, _, _, _, corpus, *_ = small
    settings = {"targets": {"steps": 3, "prefixes": 1}}
    recipe = TuneRecipe(
        run=Recipe(model=model, edits=edits, corpus=corpus, out="tune", settings=settings), trials=4, sample=4
    )
    report = tune(recipe, plugins, _Stopping("Trial 1", lambda: signal.raise_signal(signal.SIGINT)))
    assert report.status == "interrupted"
    assert [trial.state for trial in report.trials] == ["done"]
    assert report.best == report.guess == report.chosen
    assert Path("tune/preset.toml").is_file()
    assert report.held_out is None
    whole = tune(replace(recipe, resume=True), plugins)
    assert whole.status == "done"
    assert whole.trials[0] == report.trials[0]
    assert len(whole.trials) == 4
    assert whole.held_out is not None
    console = Console(width=80, file=io.StringIO())
    console.print(tune_view(whole))
    assert "1 (guess)" in console.file.getvalue()
    assert [chart.title for chart in search_charts(whole)] == ["Score", "Trade-off", "Drift from the base"]


KILLED_IN_THE_THIRD_TRIAL = """
import os, signal
from editcli.tuning.study import Study
def ask(self, real=Study.ask):
    trial = real(self)
    if trial.number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return trial
Study.ask = ask
"""


def test_a_killed_search_goes_on(
    here: Path, shop: Workshop, small: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    ended = shop.run("tune", *small, "--trials", "500", prelude=KILLED_IN_THE_THIRD_TRIAL)
    assert ended.code == -signal.SIGKILL, ended.err
    assert main(["tune", *small, "--trials", "5", "--resume", "--json"]) == 0
    said = capsys.readouterr()
    assert "Resuming after" in said.err
    report = json.loads(said.out)
    assert report["status"] == "done"
    assert len(report["trials"]) == 5
    assert report["guess"]["number"] == 1
