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
