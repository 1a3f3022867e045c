"""Named stacks: data that stands for an editor, stabilizers and options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from editcli.errors import OptionError, PluginError
from editcli.plugin.manager import Plugins, catalogue, load_plugins
from editcli.plugin.options import parse_assignments
from editcli.plugin.stacks import NamedStack, parse_stack
from editcli.settings.recipe import Recipe
from tests.plugin.test_manager import plugin

TEXT = """
name = "calm"
summary = "Least squares, calmly."
reference = "none"
editor = "memit"
stabilizers = ["nas", "revive"]

[memit]
remember = true

[nas]
guard = 3.0

[targets]
steps = 7
"""


@pytest.fixture
def plugins() -> Plugins:
    """The built-in plugins and one that brings a stack."""
    plugins = load_plugins()
    plugins.register(plugin(editcli_stacks=lambda: [parse_stack(TEXT, origin="calm.toml")]), "calm")
    return plugins


def test_a_stack_is_written_out_into_the_recipe(plugins: Plugins) -> None:
    recipe = Recipe(edits="facts.jsonl", editor="calm").resolved(plugins)
    assert (recipe.editor, recipe.stabilizers, recipe.stack) == ("memit", ("nas", "revive"), "calm")
    assert recipe.settings == {"memit": {"remember": True}, "nas": {"guard": 3.0}, "targets": {"steps": 7}}


def test_the_user_stands_over_the_stack(plugins: Plugins) -> None:
    asked: Mapping[str, Mapping[str, Any]] = {"nas": {"guard": 5.0}, "rect": {"keep": 0.3}}
    recipe = Recipe(edits="f", editor="calm", stabilizers=("rect", "nas"), settings=asked).resolved(plugins)
    assert recipe.stabilizers == ("nas", "revive", "rect")
    assert recipe.settings["nas"] == {"guard": 5.0}
    assert recipe.settings["rect"] == {"keep": 0.3}
    assert recipe.settings["memit"] == {"remember": True}


def test_a_recipe_that_is_written_out_stays_as_it_is(plugins: Plugins) -> None:
    """A recorded recipe is resolved again when its run is repeated."""
    once = Recipe(edits="f", editor="calm").resolved(plugins)
    assert Recipe.from_json(once.to_json()).resolved(plugins) == once
    plain = Recipe(edits="f", editor="memit")
    assert plain.resolved(plugins) is plain


def test_a_file_is_a_stack_too(plugins: Plugins, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('editor = "rlsedit"\n[rlsedit]\nridge = 0.5\n')
    recipe = Recipe(edits="f", editor=str(file)).resolved(plugins)
    assert (recipe.editor, recipe.stack, recipe.settings) == ("rlsedit", "mine", {"rlsedit": {"ridge": 0.5}})


def test_listing_says_what_a_stack_stands_for(plugins: Plugins) -> None:
    (row,) = catalogue(plugins, "calm")
    assert (row["kind"], row["summary"]) == ("stack", "Least squares, calmly.")
    expected = "--editor memit --stabilizer nas --stabilizer revive -o memit.remember=true -o nas.guard=3.0"
    assert row["stack"] == f"{expected} -o targets.steps=7"


@pytest.mark.parametrize("stack", load_plugins().stacks().values(), ids=lambda stack: stack.name)
def test_every_stack_of_the_package_resolves_to_what_its_line_says(stack: NamedStack) -> None:
    plugins = load_plugins()
    recipe = Recipe(edits="f", editor=stack.name).resolved(plugins)
    words = stack.written_out.split()
    pairs = list(zip(words[::2], words[1::2], strict=True))
    named = {flag: [value for key, value in pairs if key == flag] for flag in ("--editor", "--stabilizer", "-o")}
    written = Recipe(
        edits="f",
        editor=named["--editor"][0],
        stabilizers=tuple(named["--stabilizer"]),
        settings=parse_assignments(named["-o"]),
    )
    written.check(plugins)
    assert (written.editor, written.stabilizers) == (recipe.editor, recipe.stabilizers)
    assert {n: set(s) for n, s in written.settings.items()} == {n: set(s) for n, s in recipe.settings.items()}
    assert stack.summary.endswith(".")
    assert stack.reference


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("= 1", "not valid TOML"),
        ('name = "x"', "editor"),
        ('name = "x"\neditor = 3', "editor must be a text"),
        ('name = "x"\neditor = "memit"\nstabilizer = "nas"', "'stabilizer'.*stabilizers"),
        ('name = "x"\neditor = "memit"\nstabilizers = "nas"', "a list of names"),
    ],
)
def test_an_unusable_stack_names_its_file_and_the_key(text: str, named: str) -> None:
    with pytest.raises(OptionError, match=rf"x\.toml.*{named}"):
        parse_stack(text, origin="x.toml")


@pytest.mark.parametrize(
    "text",
    [
        'editor = "memitt"',
        'editor = "memit"\nstabilizers = ["nass"]',
        'editor = "memit"\n[memit]\nrememberr = true',
    ],
)
def test_what_a_stack_names_wrongly_is_said_with_its_name(plugins: Plugins, tmp_path: Path, text: str) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    with pytest.raises(OptionError, match=r"stack wrong.*did you mean"):
        Recipe(edits="f", editor=str(file)).resolved(plugins)
    with pytest.raises(OptionError, match=r"none\.toml cannot be read"):
        Recipe(edits="f", editor=str(tmp_path / "none.toml")).resolved(plugins)


def test_a_stack_is_offered_as_a_near_miss_and_is_no_stabilizer(plugins: Plugins) -> None:
    with pytest.raises(PluginError, match="did you mean 'calm'"):
        Recipe(edits="f", editor="calmm").resolved(plugins)
    with pytest.raises(PluginError, match=r"named stack.*--editor"):
        Recipe(edits="f", stabilizers=("calm",)).resolved(plugins)


@pytest.mark.parametrize("taken", ["calm", "memit"])
def test_a_name_that_is_taken_is_refused_with_both_plugins(plugins: Plugins, taken: str) -> None:
    stack = NamedStack(taken, editor="rlsedit")
    plugins.register(plugin(editcli_stacks=lambda: [stack]), "second")
    with pytest.raises(PluginError, match="second"):
        plugins.stacks()
