"""The main job on the model that really knows facts, seen from outside: plain files, transformers, a new process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from editcli.editing.session import ModelSession
from editcli.models.loading import bundled_folder, open_model, resolve_model
from editcli.plugin.manager import load_plugins
from editcli.requests.schema import from_record
from editcli.runs.apply import apply
from editcli.settings.core import TargetOptions
from editcli.settings.recipe import Recipe
from editcli.storage.checkpoint import Checkpoint
from editcli.testing import CHAT_TEMPLATE, tiny_model_folder, tiny_tokenizer
from tests.support.places import SAMPLES

SAMPLE = SAMPLES / "facts.jsonl"
EDITS = [json.loads(line) for line in SAMPLE.read_text("utf-8").splitlines()]

ASK = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompts = sys.argv[1], json.load(sys.stdin)
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), AutoTokenizer.from_pretrained(folder)
answers = []
for prompt in prompts:
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    answers.append(tokenizer.decode(ids[0], skip_special_tokens=True))
assert "editcli" not in sys.modules
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("run") / "out"
    report = apply(Recipe(edits=str(SAMPLE), stabilizers=("nas",), out=str(out)), load_plugins())
    return out, report.to_json()


def test_the_edits_are_known_and_the_neighbours_are_kept(run: tuple[Path, dict[str, Any]]) -> None:
    report = run[1]
    assert report["status"] == "done"
    assert report["edits"] == {"read": len(EDITS), "applied": len(EDITS), "rejected": 0}
    assert report["efficacy"]["before"]["efficacy_accuracy"] <= 0.05
    assert report["efficacy"]["retained"]["efficacy_accuracy"] >= 0.95
    assert report["generalization"]["accuracy"]["after"] >= 0.8
    assert report["specificity"]["accuracy"]["after"] >= 0.9


@pytest.mark.slow
def test_the_saved_folder_says_the_same_in_plain_transformers(run: tuple[Path, dict[str, Any]]) -> None:
    out, report = run
    prompts = [edit["prompt"].replace("{}", edit["subject"]) for edit in EDITS]
    told = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ASK, str(out)],
        input=json.dumps(prompts),
        capture_output=True,
        text=True,
        check=True,
    )
    answers = json.loads(told.stdout.splitlines()[-1])
    starts = [f"{prompt} {edit['target_new']}" for prompt, edit in zip(prompts, EDITS, strict=True)]
    said = [answer.startswith(start) for answer, start in zip(answers, starts, strict=True)]
    assert sum(said) / len(said) == report["efficacy"]["retained"]["efficacy_accuracy"]


def test_what_is_saved_is_the_base_plus_the_recorded_updates(run: tuple[Path, dict[str, Any]]) -> None:
    out, report = run
    base, saved = Checkpoint(bundled_folder()), Checkpoint(out)
    (segment,) = (out / "editcli" / "updates").iterdir()
    with safe_open(segment, framework="pt") as file:
        for site in report["sites"]:
            name = f"{site['module']}.weight"
            keys, left, right = (file.get_tensor(f"{site['module']}.{part}") for part in ("keys", "left", "right"))
            rows, columns = base.shape(name)
            assert keys.shape == (columns, len(EDITS))
            assert (left.shape[0], right.shape[0]) == (rows, columns)
            expected = (base.read(name).float() + left @ right.T).to(base.dtype(name))
            torch.testing.assert_close(saved.read(name), expected, rtol=2**-7, atol=1e-6)
            assert float((saved.read(name) != expected).float().mean()) < 0.01
    planned = {f"{site['module']}.weight" for site in report["sites"]}
    differ = {name for name in base.names() if not torch.equal(base.read(name), saved.read(name))}
    assert differ == planned


@pytest.mark.slow
def test_the_anchor_is_in_the_state_and_was_measured_before_the_first_write(run: tuple[Path, dict[str, Any]]) -> None:
    out, report = run
    with safe_open(out / "editcli" / "state.safetensors", framework="pt") as file:
        stored = json.loads(file.metadata()["components"])["component/nas"]["anchor"]
        prefixes = json.loads(file.metadata()["settings"])["prefixes"]
    assert stored == report["components"]["nas"]["anchor"]
    assert report["components"]["nas"]["source"]
    loaded = open_model(resolve_model(None))
    targets = json.loads((out / "editcli" / "run.json").read_text("utf-8"))["provenance"]["targets"]
    from editcli.requests.reader import read_edits
    from editcli.runs.planning import pilot_source

    session = ModelSession(
        loaded,
        [site["layer"] for site in report["sites"]],
        options=TargetOptions(**targets),
        prefixes=prefixes,
        pilots=pilot_source(read_edits(SAMPLE).requests),
    )
    nas = load_plugins().find("stabilizer", "nas").component()
    nas.prepare(session)
    assert nas.state().json["anchor"] == pytest.approx(stored, rel=1e-6)


@pytest.mark.slow
def test_edits_inside_a_chat_template(tmp_path: Path) -> None:
    """The subject is looked up inside the rendered text, and evaluation asks inside the template too."""
    folder = tiny_model_folder(tmp_path / "model")
    tiny_tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    edits = tmp_path / "facts.jsonl"
    record = {"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome", "target_true": "Paris"}
    edits.write_text(json.dumps(record), encoding="utf-8")
    settings = {"targets": {"prefixes": 0, "lr": 0.5}, "rlsedit": {"mom2_update_weight": 1e-3}}
    reports = [
        apply(
            Recipe(
                edits=str(edits),
                model=str(folder),
                out=str(tmp_path / f"out-{chat}"),
                settings=settings,
                corpus="self",
                chat_template=chat,
            ),
            load_plugins(),
        )
        for chat in (True, False)
    ]
    loaded = open_model(resolve_model(tmp_path / "out-True"), chat_template=True)
    fact = from_record(record)
    (encoded,) = loaded.tokens.encode([loaded.tokens.locate(fact, "Rome")])
    assert loaded.tokens.decode(encoded.ids).startswith("[user] The capital of France is")
    ids = torch.tensor([encoded.ids[:-1]])
    said = [
        torch.log_softmax(model.model(input_ids=ids).logits[0, -1], -1)[encoded.target_ids[0]]
        for model in (open_model(resolve_model(folder)), loaded)
    ]
    assert said[1] > said[0]
    assert reports[0].efficacy["before"] != reports[1].efficacy["before"] or reports[0].sites != reports[1].sites
