"""Where a setting comes from: defaults < editcli.toml < variables < command line."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from editcli.__main__ import main
from editcli.settings.recipe import Recipe
from editcli.testing import tiny_model_folder

Recipes = Callable[..., Recipe]


class Outcome:
    """What a plan prints."""

    def to_json(self) -> dict[str, Any]:
        return {"plan": float("nan")}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipes:
    """Run ``editcli apply --dry-run`` with a stand-in for the library and return the recipe that reached it."""
    seen: list[Recipe] = []

    def plan(recipe: Recipe, plugins: Any, reporter: Any) -> Outcome:
        seen.append(recipe)
        return Outcome()

    stand_in = types.ModuleType("editcli.runs.planning")
    stand_in.plan = plan  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "editcli.runs.planning", stand_in)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Recipe:
        assert main(["apply", "e.jsonl", "--dry-run", "--json", *arguments]) == 0
        return seen[-1]

    return run


def config(text: str, name: str = "editcli.toml") -> None:
    Path(name).write_text(text, encoding="utf-8")


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str, code: int) -> str:
    assert main(["apply", "e.jsonl", "--dry-run", *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return line


def test_with_nothing_set_the_recipe_is_the_default_one(recipe: Recipes) -> None:
    assert recipe() == Recipe(edits="e.jsonl")


def test_each_source_overrides_the_weaker_ones(recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    config('model = "from-file"\nbatch-size = 3\nseed = 1\nlimit = 9')
    monkeypatch.setenv("EDITCLI_BATCH_SIZE", "4")
    monkeypatch.setenv("EDITCLI_SEED", "2")
    got = recipe("--seed", "5")
    assert (got.model, got.batch_size, got.seed, got.limit, got.dtype) == ("from-file", 4, 5, 9, "auto")


def test_every_kind_of_value_can_stand_in_the_file(recipe: Recipes) -> None:
    config(
        'editor = "memit"\nstabilizers = ["nas", "revive"]\nlayers = "1-2,4"\neval = false\nstop-if = ["ratio>2"]\n'
        "batch_size = 7\nchat-template = true\n[memit]\nremember = true\nmom2-update-weight = 5\n[targets]\nsteps = 3\n"
    )
    got = recipe()
    assert (got.editor, got.stabilizers, got.layers) == ("memit", ("nas", "revive"), (1, 2, 4))
    assert (got.evaluate, got.stop_if, got.batch_size, got.chat_template) == (False, ("ratio>2",), 7, True)
    assert got.settings == {"memit": {"remember": True, "mom2_update_weight": 5}, "targets": {"steps": 3}}


@pytest.mark.parametrize("layers", ["[1, 2, 4]", '["1-2", 4]', '"1,2,4"'])
def test_layers_may_be_a_list_in_the_file(recipe: Recipes, layers: str) -> None:
    config(f"layers = {layers}")
    assert recipe().layers == (1, 2, 4)


def test_component_options_are_merged_key_by_key(recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    config("[nas]\nguard = 1\npilots = 11\ntrim = 0.1")
    monkeypatch.setenv("EDITCLI_OPTIONS", "nas.pilots=12 nas.trim=0.2")
    got = recipe("-s", "nas", "-o", "nas.trim=0.3")
    assert got.settings["nas"] == {"guard": 1, "pilots": "12", "trim": "0.3"}


def test_lists_come_from_commas_and_from_repetition(recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    assert recipe("-s", "nas", "-s", "revive").stabilizers == ("nas", "revive")
    assert recipe("-s", "revive, nas").stabilizers == ("revive", "nas")
    monkeypatch.setenv("EDITCLI_STABILIZERS", "nas,revive")
    assert recipe().stabilizers == ("nas", "revive")
    assert recipe("-s", "clip").stabilizers == ("clip",)


def test_flags_can_be_set_by_variables(recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDITCLI_EVAL", "no")
    monkeypatch.setenv("EDITCLI_OUT", "elsewhere")
    monkeypatch.setenv("EDITCLI_LAYERS", "0-1")
    got = recipe()
    assert (got.evaluate, got.out, got.layers) == (False, "elsewhere", (0, 1))


def test_another_file_can_be_named(recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    config("seed = 1")
    config("seed = 2", "other.toml")
    config("seed = 3", "third.toml")
    assert recipe("--config", "other.toml").seed == 2
    monkeypatch.setenv("EDITCLI_CONFIG", "third.toml")
    assert recipe().seed == 3


def test_a_byte_order_mark_is_tolerated(recipe: Recipes) -> None:
    Path("editcli.toml").write_bytes(b"\xef\xbb\xbfseed = 4\r\n")
    assert recipe().seed == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stabiliser = ['nas']", "editcli.toml: there is no setting 'stabiliser'; did you mean 'stabilizer"),
        ("batchsize = 3", "did you mean 'batch_size'"),
        ("[memitt]\nremember = true", "editcli.toml: there is no table [memitt]; did you mean 'memit'?"),
        ("[memit]\nrememer = true", "editcli.toml: memit has no option 'rememer'; did you mean 'remember'?"),
        ("[memit]\nremember = 3", "editcli.toml: memit.remember must be true or false"),
        ("[apply]\nseeed = 3", "editcli.toml [apply]: there is no setting 'seeed'; did you mean 'seed'?"),
        ("trust-remote-code = true", "--trust-remote-code is only taken from the command line"),
        ("overwrite = true", "--overwrite is only taken from the command line"),
        ("json = true", "--json is only taken from the command line"),
        ("seed = ", "editcli.toml: is not valid TOML"),
        ("seed = 1\nseed = 2", "editcli.toml: is not valid TOML"),
        ("a = \xff".encode("latin-1"), "editcli.toml: is not valid TOML"),
    ],
)
def test_a_bad_settings_file_is_refused_by_name(
    recipe: Recipes, capsys: pytest.CaptureFixture[str], text: str | bytes, said: str
) -> None:
    Path("editcli.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert said in refusal(capsys, code=1)


def test_a_value_of_the_wrong_type_says_where_it_was_read(
    recipe: Recipes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config('batch-size = "many"')
    assert "read from editcli.toml" in refusal(capsys, code=2)
    monkeypatch.setenv("EDITCLI_BATCH_SIZE", "lots")
    assert "read from the variable EDITCLI_BATCH_SIZE" in refusal(capsys, code=2)


def test_a_settings_file_that_is_not_there_is_an_error_only_when_it_was_named(
    recipe: Recipes, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recipe().seed == 0
    capsys.readouterr()
    assert "nowhere.toml: " in refusal(capsys, "--config", "nowhere.toml", code=1)


def test_a_mistyped_variable_is_pointed_out(
    recipe: Recipes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDITCLI_STABILISERS", "nas")
    assert recipe().stabilizers == ()
    assert "did you mean EDITCLI_STABILIZERS?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--edtor", "memit"], 2, "--editor"),
        (["--editor", "memot"], 1, "did you mean 'memit'"),
        (["--editor", "nas"], 1, "is a stabilizer, not an editor; pass it as --stabilizer"),
        (["-s", "nsa"], 1, "did you mean 'nas'"),
        (["-s", "nas", "-o", "nas.gard=1"], 1, "nas has no option 'gard'; did you mean 'guard'?"),
        (["-o", "nas.guard=1"], 1, "add --stabilizer nas"),
        (["-e", "rome", "-o", "memit.remember=1"], 1, "add --editor memit"),
        (["-o", "memit"], 1, "write NAME.KEY=VALUE"),
        (["--layers", "4-x"], 2, "cannot read layers '4-x'"),
        (["--batch-size", "0"], 2, "--batch-size"),
        (["--dtype", "float8"], 2, "--dtype"),
        (["--stop-if", "ratio=3"], 1, "--stop-if"),
        (["--resume", "--overwrite"], 1, "exclude each other"),
        (["second.jsonl"], 2, "second.jsonl"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_refused_in_one_line(
    recipe: Recipes, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str
) -> None:
    assert said in refusal(capsys, *arguments, code=code)


def test_json_is_one_document_even_for_numbers_that_json_does_not_know(
    recipe: Recipes, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe()
    assert capsys.readouterr().out == '{\n  "plan": null\n}\n'


def test_inspect_shows_the_configured_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though the model is an argument there, and no option; what is written on the command line still wins."""
    monkeypatch.chdir(tmp_path)

    def shown(*arguments: str) -> str:
        assert main(["inspect", "--json", *arguments]) == 0
        return json.loads(capsys.readouterr().out)["model"]

    folders = [str(tiny_model_folder(tmp_path / name)) for name in ("filed", "named", "given")]
    assert shown() == "bundled"
    Path("editcli.toml").write_text("model = 'filed'\n")
    assert Path(shown()).name == "filed"
    monkeypatch.setenv("EDITCLI_MODEL", "named")
    assert Path(shown()).name == "named"
    assert shown(folders[2]) == folders[2]
