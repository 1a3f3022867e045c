"""Recipes: every setting of ``apply``, checked when the recipe is made."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from editcli.errors import OptionError, PluginError
from editcli.plugin.manager import load_plugins
from editcli.settings.recipe import Recipe, default_out, parse_layers


@pytest.mark.parametrize(
    ("text", "layers"),
    [("4", (4,)), ("4-8", (4, 5, 6, 7, 8)), ("4-6,10", (4, 5, 6, 10)), (" 10 , 2-3 ", (2, 3, 10)), ("0-1,1", (0, 1))],
)
def test_layers_are_numbers_and_ranges(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize(
    "text", ["", "a", "4-", "-4", "4--8", "8-4", "1.5", "4,,5", "0-99999999", "²", "0x1", "9" * 5000]
)
def test_layers_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="layers"):
        parse_layers(text)


@given(st.text(alphabet="0123456789-, x", max_size=12))
def test_any_layers_text_gives_ascending_layers_or_an_option_error(text: str) -> None:
    try:
        layers = parse_layers(text)
    except OptionError:
        return
    assert list(layers) == sorted(set(layers))


@pytest.mark.parametrize(
    ("edits", "out"), [("facts.jsonl", "facts-edited"), ("a/b.c.jsonl", "b.c-edited"), ("-", "stdin-edited")]
)
def test_the_output_folder_is_named_after_the_edits(edits: str, out: str) -> None:
    assert default_out(edits) == Recipe(edits=edits).out == out


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"limit": -1}, "--limit must be at least 1"),
        ({"batch_size": 10**400}, "--batch-size must be at most 9223372036854775807"),
        ({"checkpoint_every": 0}, "--checkpoint-every"),
        ({"eval_every": 0}, "--eval-every"),
        ({"diagnose_every": 0}, "--diagnose-every"),
        ({"seed": -1}, "--seed"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
        ({"dtype": "float8"}, "--dtype must be one of"),
        ({"save_dtype": "bf16"}, "--save-dtype must be one of"),
        ({"on_error": "ignore"}, "--on-error must be one of stop, skip"),
        ({"layers": ()}, "ascending"),
        ({"layers": (3, 2)}, "ascending"),
        ({"layers": (-1,)}, "ascending"),
        ({"stabilizers": ("nas", "nas")}, "'nas' is given 2 times"),
    ],
)
def test_an_impossible_recipe_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        Recipe(edits="e.jsonl", **settings)


def test_a_recipe_survives_json() -> None:
    recipe = Recipe(edits="e.jsonl", layers=(1, 2), stabilizers=("nas",), settings={"nas": {"guard": 3}}, limit=5)
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_a_recipe_from_json_refuses_what_it_does_not_know() -> None:
    with pytest.raises(OptionError, match="did you mean 'editor'"):
        Recipe.from_json({"edits": "e.jsonl", "editer": "memit"})
    with pytest.raises(OptionError, match="add 'edits'"):
        Recipe.from_json({"editor": "memit"})


@pytest.mark.parametrize(
    ("settings", "kind", "said"),
    [
        ({"editor": "memot"}, PluginError, "did you mean 'memit'"),
        ({"editor": "nas"}, PluginError, "is a stabilizer, not an editor; pass it as --stabilizer"),
        ({"stabilizers": ("nsa",)}, PluginError, "did you mean 'nas'"),
        ({"settings": {"memit": {"rememer": True}}}, OptionError, "did you mean 'remember'"),
        ({"settings": {"nsa": {"guard": 2}}}, OptionError, "did you mean 'nas'"),
        ({"settings": {"nas": {"guard": "wide"}}}, OptionError, "nas.guard must be a number"),
    ],
)
def test_names_and_options_are_checked_without_a_model(settings: dict[str, Any], kind: type, said: str) -> None:
    with pytest.raises(kind, match=said):
        Recipe(edits="e.jsonl", **settings).check(load_plugins())


def test_a_recipe_with_known_names_passes() -> None:
    settings = {"memit": {"remember": "true"}, "targets": {"steps": 3}}
    Recipe(edits="e.jsonl", editor="memit", stabilizers=("nas",), settings=settings).check(load_plugins())
