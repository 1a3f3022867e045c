"""The command on the model card repeats the run."""

from __future__ import annotations

import shlex

import click
import pytest

from editcli.cli.apply import apply
from editcli.recipe import Recipe
from editcli.runs.card import command_line

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
