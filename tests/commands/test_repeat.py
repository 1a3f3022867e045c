"""``editcli apply --repeat``: a run is repeated from its record and compared bit by bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from editcli.__main__ import main
from editcli.commands.repeat import read_recorded
from editcli.errors import StateError
from editcli.models.loading import LoadedModel
from editcli.runs import planning
from editcli.runs.planning import Planned
from editcli.storage.checkpoint import file_digest
from editcli.testing import tiny_model_folder
from tests.support.facts import capital, write_lines

EDITS = [capital(name) for name in ("France", "Italy", "Spain")]
QUICK = ("-o", "targets.steps=2", "-o", "targets.prefixes=1", "-o", "targets.prefix_tokens=2", "--no-eval")
RECORD = "first/editcli/run.json"

Ended = tuple[int, str, str]
Run = Callable[..., Ended]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, corpus_text: str) -> Path:
    """A folder with a model, edits, a corpus and a finished run; not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    tiny_model_folder(folder / "model", "gpt2")
    write_lines(folder / "facts.jsonl", EDITS)
    (folder / "corpus.txt").write_text(corpus_text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # Statistics that another version or another number of threads left in the user's cache round differently.
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        stack = ("--stabilizer", "clip", "--layers", "1-2", "--batch-size", "2", "--seed", "7")
        stack = (*stack, "-o", "rlsedit.ridge=0.5")
        where = ("--model", "model", "--corpus", "corpus.txt", "--out", "first")
        assert main(["-q", "apply", "facts.jsonl", *where, *stack, *QUICK]) == 0
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``editcli apply`` in a copy of that folder; return exit code, standard output and standard error."""
    work = tmp_path / "work"
    shutil.copytree(made, work)
    monkeypatch.chdir(work)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    # The record names files from the root, so they are moved along.
    change(
        "recipe", lambda recipe: {**recipe, **{key: str(work / Path(recipe[key]).name) for key in ("edits", "corpus")}}
    )
    change("provenance", lambda found: {**found, "base": {**found["base"], "folder": str(work / "model")}})
    capsys.readouterr()

    def call(*arguments: str) -> Ended:
        code = main(["apply", *arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def change(section: str, how: Callable[[dict[str, Any]], Any]) -> None:
    """Change a section of the record."""
    record = json.loads(Path(RECORD).read_text())
    Path(RECORD).write_text(json.dumps({**record, section: how(record[section])}))


def test_a_run_is_repeated_bit_by_bit(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the settings file and the variables say meanwhile."""
    Path("editcli.toml").write_text("editor = 'rome'\nseed = 3\n[targets]\nsteps = 9\n")
    monkeypatch.setenv("EDITCLI_LAYERS", "3")
    monkeypatch.setenv("EDITCLI_OPTIONS", "rlsedit.ridge=9")
    code, out, err = run("--repeat", RECORD)
    assert (code, "identical: all 2 edited tensors" in " ".join(out.split())) == (0, True), err
    first, second = (file_digest(Path(name, "model.safetensors")) for name in ("first", "first-repeated"))
    assert first == second
    settings = [json.loads(Path(name, "editcli/run.json").read_text()) for name in ("first", "first-repeated")]
    assert settings[0]["provenance"]["options"] == settings[1]["provenance"]["options"]
    code, out, err = run("--repeat", "first-repeated/editcli/run.json", "--out", "third", "--json")
    assert json.loads(out)["repeats"]["identical"] is True, err


def test_the_base_and_the_edits_may_have_moved(run: Run) -> None:
    Path("model").rename("elsewhere")
    Path("facts.jsonl").rename("moved.jsonl")
    code, _, err = run("--repeat", RECORD)
    assert (code, "is not there; say where it is" in err) == (1, True)
    code, _, err = run("moved.jsonl", "--repeat", RECORD, "--out", "new")
    assert (code, "there is no model folder" in err or "hub" in err) == (1, True)
    code, out, err = run("moved.jsonl", "--repeat", RECORD, "--model", "elsewhere", "--out", "new")
    assert (code, "identical" in out) == (0, True), err


def test_a_tensor_that_differs_is_named_and_the_machine_with_it(run: Run) -> None:
    def another(found: dict[str, Any]) -> dict[str, Any]:
        weights = dict.fromkeys(list(found["weights"])[:1], "0" * 64)
        versions = {**found["versions"], "torch": "1.0"}
        return {**found, "weights": {**found["weights"], **weights}, "versions": versions, "threads": 64}

    change("provenance", another)
    code, out, _ = run("--repeat", RECORD, "--json")
    found = json.loads(out)["repeats"]
    assert (code, found["identical"], found["same_edits"]) == (1, False, True)
    assert found["differ"] == ["transformer.h.1.mlp.c_proj.weight"]
    assert [text.split()[0] for text in found["environment"]] == ["torch", "threads"]
    code, out, _ = run("--repeat", RECORD, "--out", "again")
    said = " ".join(out.split())
    assert code == 1
    assert "different: 1 of 2 edited tensors" in said
    assert "torch 1.0 then" in said


def test_other_edits_or_another_base_are_refused_before_anything_is_done(run: Run) -> None:
    lines = Path("facts.jsonl").read_text()
    Path("facts.jsonl").write_text(lines.replace("Rome", "Paris"))
    code, _, err = run("--repeat", RECORD)
    assert (code, "is not the file that" in err) == (1, True)
    Path("facts.jsonl").write_text(lines)
    weights = Path("model/model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    code, _, err = run("--repeat", RECORD)
    assert (code, "is not the base" in err) == (1, True)
    assert not Path("first-repeated").exists()


@pytest.mark.parametrize(
    "arguments",
    [("--editor", "rome"), ("--seed", "1"), ("-o", "rlsedit.ridge=1"), ("--no-eval",), ("--resume",), ("--limit", "1")],
)
def test_what_would_make_it_another_run_is_refused(run: Run, arguments: tuple[str, ...]) -> None:
    code, _, err = run("--repeat", RECORD, *arguments)
    assert (code, "--repeat repeats a run as it was; leave out" in err, arguments[0] in err) == (2, True, True)


def test_a_dry_run_shows_what_would_be_repeated(run: Run) -> None:
    code, out, err = run("--repeat", RECORD, "--dry-run", "--json")
    plan = json.loads(out)
    assert (code, plan["editor"], plan["stabilizers"], plan["batch_size"]) == (0, "rlsedit", ["clip"], 2), err
    assert [site["layer"] for site in plan["sites"]] == [1, 2]
    assert not Path("first-repeated").exists()


def test_edits_or_a_recipe_are_needed(run: Run) -> None:
    code, _, err = run("--no-eval")
    assert (code, "Missing argument 'EDITS.jsonl'" in err) == (2, True)


@pytest.mark.parametrize(
    ("section", "value", "said"),
    [
        ("status", "interrupted", "did not end"),
        ("provenance", {}, "provenance: Object missing required field `base`"),
        ("recipe", {"edits": "x", "editer": "y"}, "is not the record of a run"),
        ("recipe", [1], "is not the record of a run"),
        ("provenance", None, "is not the record of a run"),
    ],
)
def test_a_record_that_does_not_tell_enough_is_refused(run: Run, section: str, value: Any, said: str) -> None:
    change(section, lambda found: value)
    code, _, err = run("--repeat", RECORD)
    assert (code, said in err) == (1, True), err


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"status": "done"}', "\xff"])
def test_what_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(StateError, match=r"run\.json"):
        read_recorded(tmp_path / "run.json")
    with pytest.raises(StateError, match=r"missing\.json"):
        read_recorded(tmp_path / "missing.json")


def test_a_run_over_several_files_or_without_edits_is_refused(run: Run) -> None:
    change("provenance", lambda found: {**found, "pilots": {**found["pilots"], "sha256": "0"}})
    assert "several edits files" in run("--repeat", RECORD)[2]
    change("provenance", lambda found: {**found, "weights": {}})
    assert "nothing to repeat" in run("--repeat", RECORD)[2]


def test_a_strangers_record_cannot_have_code_run(run: Run) -> None:
    change("recipe", lambda recipe: {**recipe, "trust_remote_code": True, "overwrite": True})
    recipe = read_recorded(Path(RECORD)).recipe
    assert not recipe.trust_remote_code
    assert not recipe.overwrite


def test_a_lost_snapshot_is_mended_as_the_message_says(run: Run) -> None:
    state = Path("first/editcli/state.safetensors")
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(bytes(data))
    where = ("--model", "model", "--corpus", "corpus.txt", "--out", "first", "--resume")
    code, _, err = run("facts.jsonl", *where)
    assert code == 1
    advice = " ".join(err.split()).rpartition("editcli apply ")[2].split()
    assert advice == ["--repeat", RECORD]
    code, out, err = run(*advice)
    assert (code, "identical" in out) == (0, True), err


def test_batches_of_another_size_are_noted_on_resuming(run: Run) -> None:
    stack = ("--stabilizer", "clip", "--layers", "1-2", "--seed", "7", "-o", "rlsedit.ridge=0.5", *QUICK)
    where = ("--model", "model", "--corpus", "corpus.txt", "--out", "first", "--resume")
    code, _, err = run("facts.jsonl", *where, *stack, "--batch-size", "1")
    assert (code, err.count("Batches of 1 from here on; they were of 2")) == (0, 1), err
    code, _, err = run("facts.jsonl", *where, *stack, "--batch-size", "1")
    assert (code, "from here on; they were" in err) == (0, False), err


@pytest.mark.slow
def test_the_bundled_model_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a model, editor or layers named, and with what a program passed as edits."""
    monkeypatch.chdir(tmp_path)
    facts = [{"id": "f", "prompt": "The capital of {} is", "subject": "Australia", "target_new": "Vienna"}]
    Path("facts.jsonl").write_text(json.dumps(facts[0]) + "\n")
    small = ("-o", "targets.steps=2", "-o", "statistics.tokens=2000", "--no-eval")
    assert main(["-q", "apply", "facts.jsonl", "--out", "first", *small]) == 0
    assert main(["-q", "apply", "--repeat", RECORD]) == 0
    assert "identical" in capsys.readouterr().out


@pytest.mark.parametrize("later", ["layers = [2]\n[targets]\nsteps = 9\n", None])
def test_a_preset_file_is_read_once(run: Run, monkeypatch: pytest.MonkeyPatch, later: str | None) -> None:
    """It is tuned again, or goes, while the run lasts: the record holds what was used, and the run ends well."""
    preset = Path("preset.toml")
    preset.write_text("layers = [1]\n[targets]\nsteps = 3\nprefixes = 0\n")

    def open_later(planned: Planned, real: Callable[[Planned], LoadedModel] = planning.open_planned) -> LoadedModel:
        preset.unlink() if later is None else preset.write_text(later)
        return real(planned)

    monkeypatch.setattr(planning, "open_planned", open_later)
    given = ("facts.jsonl", "--model", "model", "--corpus", "corpus.txt", "--out", "other", "--no-eval")
    code, _, err = run(*given, "--preset", "preset.toml", "--limit", "1")
    assert code == 0, err
    record = json.loads(Path("other/editcli/run.json").read_text())
    assert (record["provenance"]["layers"], record["provenance"]["targets"]["steps"]) == ([1], 3)
    assert record["recipe"]["preset"]["targets"] == {"steps": 3, "prefixes": 0}
    assert record["recipe"]["preset"]["layers"] == [1]
