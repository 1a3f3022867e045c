"""``eval``: what is measured on a saved folder equals what is measured in memory; nulls, samples, raw numbers, base."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stdout
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from safetensors.torch import load_file, save_file

import editcli_formats
from editcli.__main__ import main
from editcli.commands.evaluate import EvalRecipe, measure, sample
from editcli.commands.evidence import read_earlier
from editcli.errors import ModelError, OptionError
from editcli.evaluation import locality as baseline
from editcli.evaluation.generation import Generation
from editcli.evaluation.metrics import evaluate
from editcli.evaluation.registry import METRICS, PROTOCOLS, paths
from editcli.models.loading import bundled_folder, open_model, resolve_model
from editcli.plugin.manager import Plugins
from editcli.records.evidence import read_evidence, state_of
from editcli.records.state import RunFolder
from editcli.reporting import Silent
from editcli.requests.reader import read_edits
from editcli.requests.schema import from_record
from editcli.testing import tiny_model_folder
from tests.support.facts import write_lines
from tests.support.places import SAMPLES

FACTS = SAMPLES / "facts.jsonl"

SUBJECTS = ("France", "Italy", "Spain", "Greece", "London", "Rome")
RECORDS = [
    {
        "id": subject,
        "prompt": "The capital of {} is",
        "subject": subject,
        "target_new": "Tokyo",
        "target_true": "Berlin",
        "paraphrase_prompts": [f"The city of {subject} is", f"{subject} has the capital"],
        "neighborhood_prompts": ["The capital of Germany is"],
    }
    for subject in SUBJECTS
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return tiny_model_folder(folder / "edited", seed=1), tiny_model_folder(folder / "base", seed=2)


@pytest.fixture
def edits(tmp_path: Path) -> str:
    path = tmp_path / "edits.jsonl"
    write_lines(path, RECORDS)
    return str(path)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("The capital city of France is Paris\n\nAnn wrote it\n")
    return str(path)


@pytest.fixture
def plugins() -> Plugins:
    plugins = Plugins()
    plugins.register(editcli_formats, "formats")
    return plugins


def test_a_saved_folder_measures_as_the_model_in_memory(models: tuple[Path, Path], edits: str, plugins: Plugins):
    found = measure(EvalRecipe(model=str(models[0]), edits=edits, device="cpu"), plugins)
    loaded = open_model(resolve_model(models[0]), device="cpu")
    assert found.evaluation == evaluate(loaded, read_edits(edits).requests)


def test_foreign_records_are_measured_as_they_stand(models: tuple[Path, Path], tmp_path: Path, plugins: Plugins):
    path = tmp_path / "zsre.jsonl"
    record = {"subject": "Ann", "src": "Who is Ann?", "alt": "Bob", "answers": ["Smith"], "loc": "who", "loc_ans": "It"}
    path.write_text(json.dumps(record))
    found = measure(EvalRecipe(model=str(models[0]), edits=str(path), device="cpu"), plugins).to_json()
    assert found["zsre"]["locality"] is not None
    assert found["generalization_success"] is None


def test_a_sample_is_the_same_for_the_same_seed(edits: str):
    requests = read_edits(edits).requests
    chosen = sample(requests, 3, seed=1)
    assert chosen == sample(requests, 3, seed=1)
    assert any(sample(requests, 3, seed=seed) != chosen for seed in range(2, 6))
    assert [r.line for r in chosen] == sorted(r.line or 0 for r in chosen)
    assert sample(requests, 99, seed=1) == requests == sample(requests, None, seed=1)


def test_the_base_is_measured_beside_the_model(
    models: tuple[Path, Path], edits: str, text: str, capsys: pytest.CaptureFixture[str]
):
    edited, base = map(str, models)
    code = main(["eval", edited, edits, f"--base={base}", "--text", text, "--device", "cpu", "--json"])
    assert code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["base"]["model"] == base
    assert found["base"]["efficacy_success"] is not None
    assert found["drift"]["kl"] > 0
    assert found["drift"]["tokens"] > 5


def test_raw_numbers_are_written(models: tuple[Path, Path], edits: str, tmp_path: Path):
    out = tmp_path / "raw.jsonl"
    code = main(["eval", str(models[0]), edits, "--out", str(out), "--sample", "4", "--device", "cpu", "-q"])
    assert code == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 4
    assert {line["id"] for line in lines} < set(SUBJECTS)
    assert lines[0]["paraphrases"][1]["rival_logprob"] < 0


def test_the_table_names_every_metric(models: tuple[Path, Path], edits: str, capsys: pytest.CaptureFixture[str]):
    assert main(["eval", str(models[0]), edits, "--metrics", "counterfact,zsre", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    for name in ("efficacy_success", "generalization_accuracy", "specificity_success", "score", "zsre locality"):
        assert name in shown


def test_bad_settings_are_refused(models: tuple[Path, Path], edits: str, plugins: Plugins, tmp_path: Path):
    model = str(models[0])
    with pytest.raises(OptionError, match="--base"):
        EvalRecipe(model=model, edits=edits, text="text.txt")
    with pytest.raises(OptionError, match="does not exist"):
        EvalRecipe(model=model, edits=edits, out=str(tmp_path / "none" / "raw.jsonl"))
    with pytest.raises(OptionError, match="did you mean 'zsre'"):
        measure(EvalRecipe(model=model, edits=edits, metrics=("zsr",)), plugins)
    with pytest.raises(ModelError, match=r"records no base; pass the base as --base=MODEL"):
        measure(EvalRecipe(model=model, edits=edits, base="own"), plugins)
    with pytest.raises(OptionError, match=r"none\.txt"):
        measure(EvalRecipe(model=model, edits=edits, base=model, text=str(tmp_path / "none.txt")), plugins)


def test_bad_edits_stop_or_are_left_out(models: tuple[Path, Path], edits: str, capsys: pytest.CaptureFixture[str]):
    with Path(edits).open("a") as file:
        file.write('{"prompt": "no subject"}\n')
    arguments: list[Any] = ["eval", str(models[0]), edits, "--device", "cpu", "--json"]
    assert main(arguments) == 2
    assert "edits.jsonl:7: " in capsys.readouterr().err
    assert main([*arguments, "--on-error", "skip"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rejected"]) == 1


@pytest.fixture
def damaged(tmp_path: Path) -> str:
    """The bundled model without what its first layers know."""
    folder = Path(shutil.copytree(bundled_folder(), tmp_path / "damaged"))
    tensors = load_file(folder / "model.safetensors")
    for layer in (0, 1):
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def test_locality_without_an_answer_is_held_against_the_bases_own(
    damaged: str, text: str, tmp_path: Path, plugins: Plugins
):
    path = tmp_path / "knowedit.jsonl"
    record = {"prompt": "The capital of France is", "subject": "France", "target_new": "Tokyo"}
    prompts = [{"prompt": "The capital of Japan is"}, {"prompt": "The capital of Spain is", "ground_truth": "Rome"}]
    path.write_text(json.dumps({**record, "locality": {"Relation_Specificity": prompts}}))
    own: dict[str, Any] = {"edits": str(path), "device": "cpu", "metrics": ("knowedit",)}
    found = measure(EvalRecipe(model=damaged, base="bundled", text=text, **own), plugins)
    first, second = found.evaluation.outcomes[0].locality
    assert first.target.startswith("Tokyo")
    assert first.axis == "relation_specificity"
    assert second.target == "Rome"
    # What the base says greedily is its own answer: all of it is right there, and not in a model that lost it.
    assert found.base_evaluation is not None
    assert found.base_evaluation.outcomes[0].locality[0].accuracy == 1
    assert first.accuracy < 1
    # Without a base there is nothing to hold it against.
    alone = measure(EvalRecipe(model=damaged, **own), plugins)
    assert [answer.target for answer in alone.evaluation.outcomes[0].locality] == ["Rome"]


def test_a_base_answer_that_is_no_text_is_left_out_and_told(models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    told: list[str] = []
    reporter = Silent()
    monkeypatch.setattr(reporter, "warn", told.append, raising=False)
    loaded = open_model(resolve_model(models[0]), device="cpu")
    monkeypatch.setattr(
        baseline, "generate", lambda loaded, prompts, **rest: {p: Generation(p, " \n") for p in prompts}
    )
    edits = (from_record({**RECORDS[0], "locality": [{"prompt": "Ann lives in"}]}),)
    assert baseline.answer_locality(loaded, edits, reporter=reporter) == edits
    assert told == ["1 locality prompts left out: the base model's answer is no text"]


@pytest.fixture
def run(models: tuple[Path, Path], edits: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of ours on the base model."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    out = tmp_path / "out"
    # Too little text for an exact second moment, but enough for any change at all.
    chosen = ["--layers", "1-2", "--corpus", text, "--editor", "ft"]
    quick = ["-o", "targets.steps=5", "-o", "targets.prefixes=0", "-q", "--batch-size", "3", "--eval-every", "1"]
    assert main(["apply", edits, "--model", str(models[1]), "--out", str(out), "--device", "cpu", *chosen, *quick]) == 0
    return out


def test_a_run_measures_as_it_reported_and_knows_its_base(
    run: Path, models: tuple[Path, Path], edits: str, text: str, capsys: pytest.CaptureFixture[str]
):
    capsys.readouterr()
    assert main(["eval", str(run), edits, "--base", "--text", text, "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    report = json.loads((run / "editcli" / "run.json").read_text())
    for when, measured in (("retained", found), ("before", found["base"])):
        for name, value in report["efficacy"][when].items():
            assert measured[name] == pytest.approx(value, abs=1e-5), (when, name)
    assert Path(found["base"]["model"]) == models[1].resolve()
    assert found["drift"]["perplexity"] != found["drift"]["perplexity_base"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The unedited bundled model against itself, with everything that is measured by default and the baseline."""
    folder = tmp_path_factory.mktemp("measured")
    arguments = ["eval", "bundled", str(FACTS), "--limit", "3", "--base=bundled", "--baseline", "in-context"]
    (folder / "text.txt").write_text("The capital of Italy is Rome. The tower is in the city.\n")
    extra = ["--text", str(folder / "text.txt"), "--out", str(folder / "raw.jsonl"), "--device", "cpu", "--json"]
    with redirect_stdout(io.StringIO()) as printed:
        assert main([*arguments, *extra]) == 0
    (folder / "eval.json").write_text(printed.getvalue())
    lines = (folder / "raw.jsonl").read_text().splitlines()
    return {"folder": folder, "figures": json.loads(printed.getvalue()), "lines": [json.loads(line) for line in lines]}


def test_an_unedited_model_says_nothing_new_and_equals_its_base(measured: dict[str, Any]):
    figures, base = measured["figures"], measured["figures"]["base"]
    for name in ("efficacy_exact", "efficacy_contains_new", "generalization_contains_new", "specificity_contains_new"):
        assert figures["generated"][name] == 0
    assert figures["generated"]["efficacy_contains_old"] == 1
    assert figures["choice"] == base["choice"]
    assert figures["generated"] == base["generated"]
    for part in ("neighbors", "unrelated"):
        assert figures["distribution"][part]["median"] == figures["distribution"][part]["p90"] == 0
        assert all(one["kl"] == 0 for one in figures["distribution"][part]["worst"])


def test_every_figure_names_its_protocol_and_its_settings(measured: dict[str, Any]):
    figures = measured["figures"]
    assert set(figures["protocols"]) == set(paths(figures))
    assert figures["protocols"]["generated.efficacy_exact"] == {"protocol": "generated", "scorer": "exact_match"}
    assert {one["protocol"] for one in figures["protocols"].values()} == set(PROTOCOLS)
    settings = figures["protocol_settings"]
    assert settings["generated"]["stop"] == ["end_of_text", "newline", "sentence"]
    assert (settings["generated"]["least_new_tokens"], settings["generated"]["most_new_tokens"]) == (0, 32)
    assert settings["prompts"] == "bare"


def test_figures_validate_and_a_protocol_of_ones_own_does_not(measured: dict[str, Any]):
    schema = json.loads((files("editcli") / "schemas" / "evaluation.schema.json").read_text("utf-8"))
    check = jsonschema.Draft202012Validator(schema)
    check.check_schema(schema)
    check.validate(measured["figures"])
    for path, value in (("protocols", {"score": {"protocol": "guessed", "scorer": "x"}}), ("score", 1.5), ("base", {})):
        assert not check.is_valid({**measured["figures"], path: value})
    # A metric that is declared is in the schema with its protocol.
    text = json.dumps(schema)
    assert all(f"{metric.protocol}, {metric.scorer}: " in text for metric in METRICS)


def test_the_baseline_states_the_fact_in_front_of_every_prompt(measured: dict[str, Any]):
    line = measured["lines"][0]
    fact = f"New fact: {line['efficacy'][0]['prompt']} {line['efficacy'][0]['target']}.\n"
    for group in ("efficacy", "paraphrases", "neighbors"):
        stated = [answer["prompt"] for answer in line["in_context"][group]]
        assert stated == [fact + answer["prompt"] for answer in line[group]]
    assert measured["figures"]["in_context"]["model"] == "bundled"


def test_raw_texts_stand_beside_those_of_the_base(measured: dict[str, Any]):
    for line in measured["lines"]:
        assert [one["prompt"] for one in line["generated"]] == [one["prompt"] for one in line["base"]["generated"]]
        assert line["generated"][0]["text"].rstrip(".") == line["efficacy"][0]["rival"]
        assert {one["prompt"] for one in line["divergences"]} <= {one["prompt"] for one in line["neighbors"]}


def test_an_earlier_evaluation_is_shown_and_other_protocols_are_warned_of(
    measured: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    earlier = measured["folder"] / "eval.json"
    arguments = ["eval", "bundled", str(FACTS), "--limit", "1", "--device", "cpu", "--against", str(earlier)]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "earlier" in shown.out
    assert "do not compare" not in shown.err
    changed = json.loads(earlier.read_text())
    changed["protocols"]["efficacy_success"] = {"protocol": "generated", "scorer": "contains"}
    other = measured["folder"] / "other.json"
    other.write_text(json.dumps(changed))
    assert main([*arguments[:-1], str(other), "--max-new-tokens", "5"]) == 0
    warned = " ".join(capsys.readouterr().err.split())
    assert "efficacy_success is teacher_forced (more_probable) here and generated (contains) there" in warned
    assert "do not compare generated figures" in warned
    for text in ("{}", "{torn"):
        other.write_text(text)
        assert main([*arguments[:-1], str(other)]) == 1
        said = capsys.readouterr().err
        assert "other.json" in said
        assert "evaluation.json of --record" in said


def test_settings_that_need_each_other_are_checked_before_a_model_is_loaded(edits: str):
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"baseline": "in-contex"}, "in-context"),
        ({"baseline": "in-context"}, "--base"),
        ({"metrics": ("distribution",)}, "--base"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "--max-new-tokens"),
        ({"stop": ("line",)}, "line"),
    )
    for wrong, word in cases:
        with pytest.raises(OptionError, match=word):
            EvalRecipe(model="none", edits=edits, **wrong)


def test_free_answers_alone_are_given_to_every_prompt(models: tuple[Path, Path], edits: str, plugins: Plugins):
    recipe = EvalRecipe(model=str(models[0]), edits=edits, metrics=("generated",), max_new_tokens=2, device="cpu")
    measured = measure(recipe, plugins)
    assert measured.evaluation.generated is not None
    assert measured.evaluation.generated["specificity_contains_own"] is not None
    assert {one.group for one in measured.evaluation.outcomes[0].generated} == {"efficacy", "paraphrases", "neighbors"}


def test_only_a_run_keeps_evidence(models: tuple[Path, Path], edits: str, plugins: Plugins):
    with pytest.raises(OptionError, match="--record"):
        measure(EvalRecipe(model=str(models[0]), edits=edits, record=True, device="cpu"), plugins)


def test_a_run_keeps_its_evidence_and_tells_what_is_retained_by_age(run: Path, edits: str, text: str):
    arguments = ["eval", str(run), edits, "--base", "--text", text, "--device", "cpu", "--record", "-q", "--json"]
    with redirect_stdout(io.StringIO()) as printed:
        assert main(arguments) == 0
    figures = json.loads(printed.getvalue())
    parts = [(one["first"], one["last"], one["edits"]) for one in figures["cohorts"]]
    assert parts == [(place, place, 1) for place in range(1, len(SUBJECTS) + 1)]
    folder = RunFolder(run)
    kept = read_evidence(folder)
    assert kept is not None
    assert kept.figures == figures
    assert kept.state == state_of(folder)
    assert [line.id for line in kept.answers] == list(SUBJECTS)
    earlier = read_earlier(str(folder.evaluation))
    assert earlier is not None
    assert earlier.figures == figures
    first = kept.answers[0]
    assert first.base is not None
    assert [one.prompt for one in first.base.generated] == [one.prompt for one in first.generated]
    # What the run measured along the stream, from stored distributions of the base, is what is measured now.
    entries = [json.loads(entry) for entry in folder.journal.read_text().splitlines()]
    along = [entry["metrics"]["retained"] for entry in entries]
    assert [one["edits"] for one in along] == [3, 6]
    for name in ("median", "p90"):
        measured = figures["distribution"]["neighbors"][name]
        assert along[-1][f"distribution.neighbors.{name}"] == pytest.approx(measured, rel=1e-3)
        assert along[0][f"distribution.unrelated.{name}"] > 0
    protocols = json.loads(folder.record.read_text())["protocols"]
    assert protocols["distribution.neighbors.p90"] == {"protocol": "distribution", "scorer": "kl"}
