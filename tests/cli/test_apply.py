"""``editcli apply`` from end to end on tiny models: what it leaves behind, and what it leaves alone."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from editcli.__main__ import main
from editcli.storage.checkpoint import Checkpoint, file_digest
from editcli.testing import POSITIONS, tiny_model_folder
from tests.support.facts import write_lines

EDITS = [
    {"id": "a", "prompt": "The capital of {} is", "subject": "France", "target_new": "Rome", "target_true": "Paris"},
    {
        "id": "b",
        "prompt": "{} was born in",
        "subject": "Ann Smith",
        "target_new": "Tokyo",
        "target_true": "London",
        "paraphrase_prompts": ["The city of Ann Smith is"],
        "neighborhood_prompts": ["Bob was born in"],
    },
    {"id": "c", "prompt": "The river in {} is", "subject": "London", "target_new": "Greece"},
]
QUICK = ("-o", "targets.steps=2", "-o", "targets.prefixes=0", "--layers", "1-2", "--device", "cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models, of both orientations, that no test changes."""
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny_model_folder(folder / name, name) for name in ("llama", "gpt2")}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus_text: str) -> Path:
    """A working folder with an edits file and a corpus; syncing files to disk is left out to save time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    write_lines(tmp_path / "facts.jsonl", EDITS)
    (tmp_path / "corpus.txt").write_text(corpus_text)
    return tmp_path


@pytest.fixture
def apply(work: Path, models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> Any:
    """Run ``editcli apply`` and return exit code, standard output and standard error."""

    def apply(*arguments: str, edits: str = "facts.jsonl", model: str | Path = models["llama"]) -> SimpleNamespace:
        capsys.readouterr()
        code = main(["apply", edits, "--model", str(model), "--corpus", "corpus.txt", *QUICK, *arguments])
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return apply


def refused(done: SimpleNamespace, *, code: int, out: str = "facts-edited") -> str:
    """Check that a run was refused in one line and left no output folder; return the line."""
    assert (done.code, done.out) == (code, "")
    line = done.err.splitlines()[-1]
    assert line.startswith("error: ")
    assert "Traceback" not in done.err
    assert not Path(out).exists()
    return line


def weights(folder: str | Path = "facts-edited") -> dict[str, str]:
    """Return the digest of the file and of each of its tensors, so that a difference says where it is."""
    checkpoint = Checkpoint(folder)
    tensors = {name: checkpoint.digest_of([name]) for name in checkpoint.names()}
    return {**tensors, "file": file_digest(Path(folder, "model.safetensors"))}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_run_leaves_an_ordinary_folder_and_ends_with_a_table(
    apply: Any, models: dict[str, Path], family: str
) -> None:
    done = apply("--stabilizer", "nas", model=models[family])
    assert done.code == 0
    for shown in ("3 of 3 edits applied", "efficacy_accuracy", "specificity_success", "R_n", "facts-edited/"):
        assert shown in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    assert "\x1b" not in done.out + done.err
    loading, memory, *_ = done.err.splitlines()
    assert loading == f"Loading {models[family]}"
    assert re.fullmatch(r"Memory: about [\d.]+ [kMGT]B of the [\d.]+ [kMGT]B free on cpu", memory)
    for name in ("run.json", "state.safetensors", "journal.jsonl", "rejected.jsonl", "updates"):
        assert Path("facts-edited/editcli", name).exists()
    assert weights() != weights(models[family])
    loaded = AutoModelForCausalLM.from_pretrained("facts-edited", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained("facts-edited", local_files_only=True)
    assert loaded(tokenizer("The capital of France is", return_tensors="pt").input_ids).logits.isfinite().all()


def test_json_is_one_document_and_equals_the_record(apply: Any) -> None:
    done = apply("--json")
    assert done.code == 0
    document = json.loads(done.out)
    record = json.loads(Path("facts-edited/editcli/run.json").read_text())
    assert {key: record[key] for key in document if key != "seconds"} == {
        key: value for key, value in document.items() if key != "seconds"
    }
    assert document["edits"] == {"read": 3, "applied": 3, "rejected": 0}
    assert set(document["efficacy"]) == {"before", "immediate", "retained"}
    assert {"load", "prepare", "targets", "solve", "eval", "save", "total"} <= set(document["seconds"])


def test_the_same_command_twice_gives_the_same_bytes(apply: Any) -> None:
    assert apply("--stabilizer", "nas", "--out", "one").code == 0
    assert apply("--stabilizer", "nas", "--out", "two").code == 0
    assert weights("one") == weights("two")
    assert apply("--stabilizer", "nas", "--out", "three", "--seed", "7").code == 0


def test_a_dry_run_prints_the_plan_and_writes_nothing(apply: Any, work: Path) -> None:
    before = sorted(path.name for path in work.iterdir())
    done = apply("--dry-run")
    assert done.code == 0
    for shown in ("model.layers.1.mlp.down_proj", "16 x 40", "3 in 1 batch of", "Nothing was written"):
        assert shown in done.out
    plan = json.loads(apply("--dry-run", "--json").out)
    assert plan["edits"] == 3
    assert [site["layer"] for site in plan["sites"]] == [1, 2]
    assert sorted(path.name for path in work.iterdir()) == before


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "an edit is a JSON object"),
        (json.dumps({**EDITS[0], "id": "x", "subject": "Spain", "prompt": "The capital is"}), "is not in the prompt"),
        (json.dumps({**EDITS[0], "id": "x", "prompt": "{} and {}"}), "more than one {}"),
        (json.dumps({**EDITS[0], "id": "x", "target_new": ""}), "'target_new' is empty"),
        (json.dumps(EDITS[0]), "was already used on line 1"),
        (json.dumps({**EDITS[0], "id": "x", "prompt": "a " * POSITIONS + "{}"}), "tokens"),
        ("\udcff", "not UTF-8"),
    ],
)
def test_bad_input_is_refused_by_line_and_leaves_nothing(apply: Any, work: Path, line: str, said: str) -> None:
    with (work / "facts.jsonl").open("ab") as file:
        file.write(line.encode("utf-8", "surrogateescape") + b"\n")
    message = refused(apply(), code=2)
    assert message.startswith("error: facts.jsonl:4")
    assert said in message
    refused(apply("--dry-run"), code=2)


def test_an_edits_file_that_is_empty_or_not_there_is_refused(apply: Any, work: Path) -> None:
    (work / "empty.jsonl").write_text("\n")
    assert "empty.jsonl: " in refused(apply(edits="empty.jsonl"), code=2, out="empty-edited")
    assert "none.jsonl: " in refused(apply(edits="none.jsonl"), code=2, out="none-edited")


def test_bad_lines_can_be_skipped_and_are_listed(apply: Any, work: Path) -> None:
    with (work / "facts.jsonl").open("a") as file:
        file.write("{\n" + json.dumps({**EDITS[0], "id": "long", "prompt": "a " * POSITIONS + "{}"}) + "\n")
    done = apply("--on-error", "skip")
    assert done.code == 0
    assert "3 of 5 edits applied" in done.out
    rejected = [json.loads(line) for line in Path("facts-edited/editcli/rejected.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rejected] == [4, 5]
    assert all(row["reason"] for row in rejected)


def test_edits_come_from_standard_input(apply: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path("facts.jsonl").read_bytes())))
    assert apply("--no-eval", edits="-").code == 0
    assert weights("stdin-edited")


def test_a_limit_takes_the_first_edits(apply: Any) -> None:
    assert "1 of 1 edit applied" in apply("--limit", "1", "--no-eval").out


def test_conflicting_edits_are_a_warning(apply: Any, work: Path) -> None:
    with (work / "facts.jsonl").open("a") as file:
        file.write(json.dumps({**EDITS[0], "id": "d", "target_new": "Berlin"}) + "\n")
    done = apply("--no-eval")
    assert done.code == 0
    assert "warning: facts.jsonl:4: " in done.err
    assert "on line 1" in done.err


def test_a_guard_stops_with_exit_code_3(apply: Any) -> None:
    done = apply("--stop-if", "drift>0.000001", "--batch-size", "1")
    assert done.code == 3
    assert "stopped by drift>1e-06" in done.err
    assert json.loads(Path("facts-edited/editcli/run.json").read_text())["status"] == "stopped"


def test_retention_is_followed_along_the_stream(apply: Any) -> None:
    done = apply("--batch-size", "1", "--eval-every", "2", "--json")
    assert done.code == 0
    lines = Path("facts-edited/editcli/journal.jsonl").read_text().splitlines()
    measured = [json.loads(line)["metrics"].get("retained") for line in lines]
    assert measured[0] is None
    assert measured[1]["edits"] == 2
    assert measured[1]["efficacy_accuracy"] is not None
    assert measured[2] is None


def test_spectra_are_looked_at_every_so_many_batches(apply: Any) -> None:
    done = apply("--batch-size", "1", "--diagnose-every", "2", "--no-eval")
    assert done.code == 0
    assert "Loading weights" not in done.err
    lines = Path("facts-edited/editcli/journal.jsonl").read_text().splitlines()
    seen = [any("spectra" in name for name in json.loads(line)["metrics"]["diagnostics"]) for line in lines]
    assert seen == [False, True, False]


def test_a_guard_that_could_never_fire_is_refused(apply: Any, work: Path) -> None:
    done = apply("--stop-if", "retained<0.6", "--no-eval")
    assert done.code == 1
    assert "has to measure; leave out --no-eval" in done.err
    edit = {name: EDITS[0][name] for name in ("prompt", "subject", "target_new")}
    (work / "facts.jsonl").write_text(json.dumps(edit))
    done = apply("--stop-if", "efficacy<0.5")
    assert done.code == 1
    assert "compares with target_true, which no edit has" in done.err
    assert not Path("facts-edited").exists()


def test_a_prompt_that_cannot_be_measured_is_refused_at_its_line(apply: Any, work: Path) -> None:
    long = {**EDITS[0], "id": "long", "paraphrase_prompts": ["river " * 400]}
    with (work / "facts.jsonl").open("a") as file:
        file.write(json.dumps(long) + "\n")
    done = apply()
    assert done.code == 2
    assert "facts.jsonl:4: " in done.err
    assert not Path("facts-edited").exists()
    assert apply("--on-error", "skip").code == 0


def test_an_existing_folder_is_refused(apply: Any) -> None:
    Path("facts-edited").mkdir()
    Path("facts-edited/precious.txt").write_text("mine")
    for arguments, said in (((), "exists and is not empty"), (("--overwrite",), "is not a run of editcli")):
        done = apply(*arguments)
        assert done.code == 1
        assert said in done.err
    assert apply("--resume").code == 1
    assert [path.name for path in Path("facts-edited").iterdir()] == ["precious.txt"]


def test_an_empty_folder_is_taken(apply: Any) -> None:
    Path("facts-edited").mkdir()
    assert apply("--no-eval").code == 0


def test_our_own_run_is_refused_then_overwritten(apply: Any) -> None:
    assert apply("--no-eval", "--limit", "1").code == 0
    first = weights()
    done = apply("--no-eval")
    assert done.code == 1
    assert "--resume continues it, --overwrite replaces it" in done.err
    assert weights() == first
    assert apply("--no-eval", "--overwrite").code == 0
    assert weights() != first


def test_the_base_model_is_never_the_output(apply: Any, models: dict[str, Path], work: Path) -> None:
    base = shutil.copytree(models["llama"], work / "base")
    done = apply("--out", "base", "--overwrite", model=base)
    assert done.code == 1
    assert weights(base) == weights(models["llama"])


def test_an_output_that_cannot_be_written_is_refused(apply: Any, work: Path) -> None:
    (work / "file").write_text("")
    assert "file is a file" in apply("--out", "file").err
    assert "file is a file" in apply("--out", "file/run").err
    assert "error: file/below" in apply("--out", "file/below").err
    if sys.platform == "linux":
        done = apply("--out", "/proc/editcli-test", "--no-eval")
        assert done.code == 1
        assert done.err.splitlines()[-1].startswith("error: ")


def test_a_disk_that_is_too_full_is_refused_before_anything_is_written(
    apply: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10, used=9, free=1))
    assert "free; choose another --out" in refused(apply(), code=1)


def test_a_disk_that_fills_up_on_the_way_leaves_nothing_half_written(
    apply: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Any, target: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(os, "replace", full)
    message = refused(apply("--no-eval"), code=1)
    assert "No space left on device" in message


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda folder: shutil.rmtree(folder), "there is no model folder"),
        (lambda folder: (folder / "config.json").unlink(), "without config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config"),
        (lambda folder: [file.unlink() for file in folder.glob("tokenizer*")], "has no tokenizer; copy tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x10" * 100), "model.safetensors"),
        (lambda folder: change(folder, model_type="bert"), "bert|model"),
        (lambda folder: change(folder, model_type="t5"), "t5|model"),
        (lambda folder: change(folder, model_type="no_such_type"), "no_such_type|config"),
    ],
)
def test_a_model_that_cannot_be_used_is_one_clear_sentence(
    apply: Any, models: dict[str, Path], work: Path, break_it: Any, said: str
) -> None:
    base = shutil.copytree(models["llama"], work / "broken")
    break_it(base)
    message = refused(apply(model=base), code=1)
    assert any(word in message for word in said.split("|"))


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_layers_that_the_model_does_not_have_are_refused(apply: Any) -> None:
    assert "layer 9 does not exist: the model has layers 0-3" in refused(apply("--layers", "9"), code=1)


def test_a_device_that_is_not_there_is_refused(apply: Any) -> None:
    assert "'nonsense' cannot be used here" in refused(apply("--device", "nonsense"), code=1)


def test_core_options_are_checked_too(apply: Any) -> None:
    assert "did you mean 'steps'" in refused(apply("-o", "targets.step=3"), code=1)


@pytest.mark.slow
def test_an_interrupted_run_exits_with_130_and_goes_on_to_the_same_bytes(apply: Any, models: dict[str, Path]) -> None:
    lines = [json.dumps({**EDITS[0], "id": str(n), "subject": f"France {n}"}) for n in range(16)]
    Path("many.jsonl").write_text("\n".join(lines) + "\n")
    options = ("--batch-size", "1", "--no-eval", "--stabilizer", "nas")
    assert apply(*options, "--out", "whole", edits="many.jsonl").code == 0

    arguments = [
        "many.jsonl",
        "--model",
        str(models["llama"]),
        "--corpus",
        "corpus.txt",
        *QUICK,
        *options,
        "--out",
        "cut",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "editcli", "apply", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    journal = Path("cut/editcli/journal.jsonl")
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert json.loads(Path("cut/editcli/run.json").read_text())["status"] == "interrupted"
    assert 2 <= journal.read_bytes().count(b"\n") < 16

    done = apply(*options, "--out", "cut", "--resume", edits="many.jsonl")
    assert done.code == 0
    assert "16 of 16 edits applied" in done.out
    assert weights("cut") == weights("whole")
