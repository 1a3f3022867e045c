"""The command on the model card repeats the run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
from huggingface_hub import ModelCard

from editcli.cli.apply import apply
from editcli.records.record import BaseRef
from editcli.runs.card import card_text, carried, command_line, public_name, shareable
from editcli.settings.recipe import Recipe

RECIPES = [
    Recipe(edits="facts.jsonl"),
    Recipe(edits="a b.jsonl", model="some/model", stabilizers=("nas", "revive"), layers=(4, 5, 9), seed=3),
    Recipe(edits="x.jsonl", evaluate=False, chat_template=True, stop_if=("ratio>2", "drift>1"), dtype="bfloat16"),
    Recipe(edits="x.jsonl", corpus="self", batch_size=7, eval_every=2, settings={"memit": {"remember": True}}),
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_command_is_understood_and_says_the_same(recipe: Recipe) -> None:
    program, command, *arguments = shlex.split(command_line(recipe))
    assert (program, command) == ("editcli", "apply")
    context = apply.make_context("apply", arguments, resilient_parsing=False)
    values = dict(context.params)
    assert values["edits"] == recipe.edits
    for name in ("model", "stabilizers", "layers", "seed", "evaluate", "stop_if", "dtype", "corpus", "batch_size"):
        assert values[name] == getattr(recipe, name), name
    assert values["chat_template"] is recipe.chat_template
    assert list(values["assignments"]) == [f"{n}.{k}={v}" for n, s in recipe.settings.items() for k, v in s.items()]
    assert isinstance(context, click.Context)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("name", "folder", "commit", "public"),
    [
        ("someone/tiny", "/cache/snapshots/" + COMMIT, COMMIT, "someone/tiny"),
        ("/data/mine/tiny", "/data/mine/tiny", None, "tiny"),
        ("../tiny/", "/data/tiny", None, "tiny"),
        ("link", "/data/elsewhere", None, "link"),
        (".", "/data/tiny", None, "tiny"),
        ("..", "/data/tiny", None, "tiny"),
        ("bundled", "/python/editcli/bundled", None, "bundled"),
    ],
)
def test_the_base_is_named_without_a_path(name: str, folder: str, commit: str | None, public: str) -> None:
    base = BaseRef(name=name, folder=folder, commit=commit, fingerprint="")
    assert public_name(base) == public
    recipe = Recipe(
        edits="/home/me/facts.jsonl",
        model=name,
        stats="~/stats.safetensors",
        corpus="hf:owner/texts",
        settings={"memit": {"remember": True}, "other": {"file": "/home/me/secret.bin", "share": 0.5}},
    )
    command = command_line(shareable(recipe, base))
    assert not any(part in command for part in ("/home", "/data", "/cache", "~", ".."))
    assert f"--model {public}" in command
    assert (f"--revision {COMMIT}" in command) == (commit is not None)
    assert "hf:owner/texts" in command


@pytest.mark.parametrize("preset", ["/home/me/tune/preset.toml", {"file": "/home/me/tune/preset.toml", "layers": [1]}])
def test_a_preset_is_named_without_its_folder(preset: Any) -> None:
    """The same for a recipe of the command line and for one that was read from a record, which holds the preset."""
    recipe = shareable(Recipe(edits="facts.jsonl", preset=preset), BaseRef(name="tiny", fingerprint=""))
    assert command_line(recipe) == "editcli apply facts.jsonl --preset preset.toml"
    assert isinstance(preset, str) or recipe.preset == {"file": "preset.toml", "layers": [1]}


def test_the_front_matter_names_what_holds_for_the_copy_as_well(tmp_path: Path) -> None:
    """A base model on the hub and its licence, valid for the hub's own reader; a folder is no base of the hub's."""
    card = tmp_path / "README.md"
    card.write_text(
        "---\nlicense: other\nlicense_link: LICENSE\nlicense_name: 'a: b'\ntags: [x]\n---\n# Base\n", "utf-8"
    )
    said = carried(tmp_path)
    assert said == {"license": "other", "license_link": "LICENSE", "license_name": "a: b"}
    for commit, base_model in ((COMMIT, "someone/tiny"), (None, None)):
        base = BaseRef(name="someone/tiny", commit=commit, card=said, fingerprint="")
        text = card_text(base, ["# Edited", "", "body"], library="transformers")
        assert text.endswith("\n---\n\n# Edited\n\nbody\n")
        data = ModelCard(text).data
        assert (data.base_model, data.license, data.license_name) == (base_model, "other", "a: b")
        assert "x" not in (data.tags or [])


@pytest.mark.parametrize(
    "text",
    [
        "# no front matter",
        "---\n- a list\n---\n",
        "---\nlicense: [\n---\n",
        "---\nlicense: {a: b}\n---\n",
        "---\nlicense: /home/me/LICENSE\n---\n",
        "---\nlicense:\n---\n",
    ],
)
def test_a_card_that_says_nothing_usable_is_no_obstacle(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text, "utf-8")
    assert carried(tmp_path) == {}
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert carried(tmp_path) == {}
    assert json.dumps(carried(tmp_path / "missing")) == "{}"
