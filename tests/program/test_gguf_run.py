"""The real commands on a GGUF that knows facts: apply, resume, undo, inspect, diff, eval, export, and llama.cpp."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from editcli.__main__ import main
from editcli.models.loading import bundled_folder
from tests.support.gguf_files import all_of, gguf_of
from tests.support.places import SAMPLES

FACTS = [json.loads(line) for line in (SAMPLES / "facts.jsonl").read_text("utf-8").splitlines()][:4]
KINDS = ["Q8_0", "Q5_1"]
"""The types of the two edited matrices."""
ENGINE = "xllamacpp"

ASK = """
import json, sys, xllamacpp
path, prompts = sys.argv[1], json.load(sys.stdin)
settings = xllamacpp.CommonParams()
settings.model.path, settings.n_ctx, settings.cpuparams.n_threads, settings.warmup = path, 128, 1, False
server = xllamacpp.Server(settings)
asked = [{"prompt": prompt, "max_tokens": 6, "temperature": 0.0} for prompt in prompts]
print(json.dumps([server.handle_completions(one)["choices"][0]["text"] for one in asked]))
"""


def run(*words: str) -> int:
    return main(list(words))


def apply(edits: Path, model: Path, *more: str) -> int:
    return run("apply", str(edits), "--model", str(model), "--batch-size", "2", *more)


def raw(path: Path) -> dict[str, tuple[str, bytes]]:
    return {one.name: (one.tensor_type.name, one.data.tobytes()) for one in GGUFReader(path).tensors}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundled model as a GGUF, some facts, and a run of two batches that was made at once."""
    place = tmp_path_factory.mktemp("gguf")
    kinds = all_of("F16", layer0="Q8_0", layer1="Q5_1")
    gguf_of(bundled_folder(), place / "facts.gguf", kinds)
    for name, count in (("two", 2), ("four", 4)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in FACTS[:count]))
    assert apply(place / "four.jsonl", place / "facts.gguf", "--out", str(place / "edited")) == 0
    return place


def test_the_facts_are_in_the_file_and_only_edited_tensors_differ(place: Path) -> None:
    record = json.loads((place / "edited" / "editcli" / "run.json").read_text("utf-8"))
    assert record["efficacy"]["before"]["efficacy_accuracy"] == 0
    assert record["efficacy"]["retained"]["efficacy_accuracy"] == 1
    eight, five = (site["cast_loss"] for site in record["sites"])
    assert 0 < eight < 0.01 < five < 0.1
    before, after = raw(place / "facts.gguf"), raw(place / "edited" / "model.gguf")
    assert {name for name in before if before[name] != after[name]} == {f"blk.{n}.ffn_down.weight" for n in (0, 1)}
    assert {name: kind for name, (kind, _) in before.items()} == {name: kind for name, (kind, _) in after.items()}


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bytes(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert apply(place / "two.jsonl", place / "facts.gguf", "--out", str(out)) == 0
    assert apply(place / "four.jsonl", place / "facts.gguf", "--out", str(out), "--resume") == 0
    assert (out / "model.gguf").read_bytes() == (place / "edited" / "model.gguf").read_bytes()


def test_an_undo_of_everything_leaves_the_file_of_before(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "edited", tmp_path / "edited")
    assert run("undo", str(tmp_path / "edited"), "--to", "0") == 0
    assert (tmp_path / "edited" / "model.gguf").read_bytes() == (place / "facts.gguf").read_bytes()


def said(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    capsys.readouterr()
    assert run(*words, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_the_other_commands_read_the_folder(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edited, base = str(place / "edited"), str(place / "facts.gguf")
    inspected = said(capsys, "inspect", edited, "--norms")
    assert [site["dtype"] for site in inspected["sites"]] == KINDS
    assert inspected["verdict"] == "fine"
    assert inspected["base"] == base
    differing = said(capsys, "diff", base, edited)["tensors"]
    assert [one["dtype"] for one in differing] == KINDS
    assert said(capsys, "eval", edited, str(place / "four.jsonl"))["efficacy_accuracy"] == 1
    said(capsys, "check", str(place / "four.jsonl"), "--model", base)
    assert run("export", edited, "--format", "full", "--out", str(tmp_path / "full")) == 0
    assert (tmp_path / "full" / "model.gguf").read_bytes() == (place / "edited" / "model.gguf").read_bytes()


@pytest.mark.parametrize("form", ["lora", "patch"])
def test_what_belongs_to_plain_tensors_is_refused(
    form: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("export", str(place / "edited"), "--format", form, "--out", str(tmp_path / "x")) == 1
    assert "--format full" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.skipif(
    importlib.util.find_spec(ENGINE) is None, reason=f"needs llama.cpp as a Python package: pip install {ENGINE}"
)
def test_llama_cpp_says_the_new_facts(place: Path) -> None:
    prompts = [fact["prompt"].replace("{}", fact["subject"]) for fact in FACTS]
    answers = {}
    for name in ("facts.gguf", "edited/model.gguf"):
        told = subprocess.run(
            [sys.executable, "-c", ASK, str(place / name)],
            input=json.dumps(prompts),
            capture_output=True,
            text=True,
            check=True,
        )
        answers[name] = json.loads(told.stdout.splitlines()[-1])
    for fact, old, new in zip(FACTS, *answers.values(), strict=True):
        assert new.strip().startswith(fact["target_new"])
        assert not old.strip().startswith(fact["target_new"])
