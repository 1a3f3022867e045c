"""``eval --harness``: a task of our own, run by lm-evaluation-harness, against the same question asked by ourselves."""

from __future__ import annotations

import builtins
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from editcli.__main__ import main
from editcli.commands.evaluate import EvalRecipe
from editcli.errors import OptionError
from editcli.evaluation.harness import require_harness, run_harness
from editcli.evaluation.scoring import Probe, score
from editcli.models.loading import LoadedModel, open_model, resolve_model
from editcli.settings.suites import SUITES

installed = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed: editcli[harness]"
)

QUESTIONS = (
    ("The capital of France is", ("Paris", "London"), 0),
    ("The capital of Germany is", ("Rome", "Berlin"), 1),
    # Asked for the wrong answer, so that the share of right ones is neither 0 nor 1.
    ("The capital of Italy is", ("Rome", "Berlin"), 1),
)
TASK = """task: our_capitals
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one task and its data; nothing is looked up on a hub."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "capitals.jsonl"
    data.write_text(
        "".join(json.dumps(dict(zip(("question", "choices", "gold"), q, strict=True))) + "\n" for q in QUESTIONS)
    )
    (folder / "capitals.yaml").write_text(TASK.format(data=data))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return folder


WRITTEN = """task: our_capitals
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: " {{{{choices[gold]}}}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 3
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
"""The same questions, answered freely."""


@pytest.fixture
def small_suite(tasks: Path) -> Path:
    """A folder with small tasks of the names that the standard suite asks for."""
    data = tasks / "capitals.jsonl"
    for name in SUITES["standard"].tasks:
        text = WRITTEN if name in ("gsm8k", "ifeval") else TASK
        (tasks / f"{name}.yaml").write_text(text.format(data=data).replace("our_capitals", name))
    return tasks


@pytest.fixture(scope="module")
def bundled() -> LoadedModel:
    return open_model(resolve_model(None), device="cpu")


def share_right(loaded: LoadedModel) -> float:
    """Ask the same by ourselves: the choice with the larger sum of log-probabilities is taken, as the harness does."""
    right = 0
    for question, choices, gold in QUESTIONS:
        found = score(loaded, [Probe(question, choice) for choice in choices])
        lengths = [len(loaded.tokens.encode([loaded.tokens.continue_with(question, c)])[0].target) for c in choices]
        sums = [answer.logprob * length for answer, length in zip(found, lengths, strict=True)]
        right += sums.index(max(sums)) == gold
    return right / len(QUESTIONS)


@installed
def test_a_local_task_gives_what_we_measure_ourselves(bundled: LoadedModel, tasks: Path):
    found = run_harness(bundled, ["our_capitals"], include=[str(tasks)])
    assert found.tasks["our_capitals"]["acc,none"] == pytest.approx(share_right(bundled))
    assert 0 < share_right(bundled) < 1
    assert found.samples == {"our_capitals": 3}
    assert found.version


@installed
def test_a_task_file_is_a_task(bundled: LoadedModel, tasks: Path):
    assert run_harness(bundled, [str(tasks / "capitals.yaml")]).samples == {"our_capitals": 3}


@installed
def test_the_command_measures_model_and_base(tasks: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["eval", "bundled", "--harness", "our_capitals", "--harness-include", str(tasks), "--device", "cpu"]
    text = tasks / "text.txt"
    text.write_text("The capital of France is Paris.\n")
    assert main([*arguments, "--base=bundled", "--text", str(text), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    figures = found["harness"]["tasks"]["our_capitals"]
    assert figures["acc,none"] == pytest.approx(2 / 3)
    assert found["base"]["harness"] == found["harness"]
    assert found["edits_file"] is found["efficacy_success"] is None
    assert found["drift"]["kl"] == pytest.approx(0, abs=1e-6)
    assert main(arguments) == 0
    assert "our_capitals acc,none" in capsys.readouterr().out


@installed
def test_unknown_tasks_and_missing_data_are_refused_in_one_sentence(bundled: LoadedModel, tasks: Path):
    with pytest.raises(OptionError, match="did you mean 'our_capitals'"):
        run_harness(bundled, ["our_capitols"], include=[str(tasks)])
    with pytest.raises(OptionError, match="there is no task file"):
        run_harness(bundled, [str(tasks / "none.yaml")])
    (tasks / "capitals.jsonl").unlink()
    with pytest.raises(OptionError, match=r"the data of our_capitals cannot be read"):
        run_harness(bundled, ["our_capitals"], include=[str(tasks)])


def test_without_the_extra_one_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "lm_eval":
            raise ModuleNotFoundError("No module named 'lm_eval'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(OptionError, match=r"pip install 'editcli\[harness\]'"):
        require_harness()


def test_what_makes_no_sense_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(OptionError, match="--harness"):
        EvalRecipe(model="bundled", harness_include=("tasks",))
    assert main(["eval", "bundled"]) == 2
    assert "EDITS.jsonl" in capsys.readouterr().err


@installed
def test_the_suite_is_one_switch(small_suite: Path, capsys: pytest.CaptureFixture[str]):
    text = small_suite / "text.txt"
    text.write_text("The capital of France is Paris.\n")
    command = ["eval", "bundled", "--suite", "standard", "--harness-include", str(small_suite), "--device", "cpu"]
    assert main([*command, "--limit", "2", "--base=bundled", "--text", str(text), "--json"]) == 0
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    harness, standard = report["harness"], SUITES["standard"]
    assert list(harness["tasks"]) == list(standard.tasks)
    assert harness["suite"] == {
        "name": "standard",
        "version": standard.version,
        "tasks": list(standard.tasks),
        "left_out": ["xstest"],
    }
    assert "has no xstest" in shown.err
    # Of the first two questions the model knows both answers, and it writes them as it chooses them.
    assert {figures["acc,none"] for figures in harness["tasks"].values() if "acc,none" in figures} == {1.0}
    assert harness["tasks"]["gsm8k"]["exact_match,none"] == 1.0
    assert set(harness["samples"].values()) == {2} == {harness["limit"]}
    assert set(harness["versions"]) == set(standard.tasks) == set(harness["shots"])
    assert report["base"]["harness"] == harness


@installed
def test_an_optional_task_is_run_where_it_is_known(bundled: LoadedModel, small_suite: Path):
    (small_suite / "xstest.yaml").write_text(
        (small_suite / "mmlu.yaml").read_text().replace("task: mmlu", "task: xstest")
    )
    suite = SUITES["standard"]
    result = run_harness(bundled, ["mmlu", "our_capitals"], suite=suite, include=[str(small_suite)], limit=1)
    assert set(result.tasks) == {*suite.tasks, "xstest", "our_capitals"}
    assert result.suite is not None
    assert result.suite["left_out"] == []


@installed
@pytest.mark.slow
def test_the_harness_knows_every_task_of_the_suites():
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    manager = TaskManager()
    assert all(manager.match_tasks([task]) for suite in SUITES.values() for task in suite.tasks)


def test_the_most_documents_are_those_of_the_tasks_or_the_limit_without_edits():
    assert EvalRecipe(model="m", suite="standard", limit=5).documents == 5
    assert EvalRecipe(model="m", edits="e", suite="standard", limit=5).documents is None
    assert EvalRecipe(model="m", edits="e", suite="standard", limit=5, task_limit=7).documents == 7


@pytest.mark.parametrize(
    ("fields", "message"), [({"suite": "standrad"}, "did you mean 'standard'"), ({"task_limit": 3}, "--task-limit")]
)
def test_a_suite_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str):
    with pytest.raises(OptionError, match=message):
        EvalRecipe(model="m", edits="e", **fields)
