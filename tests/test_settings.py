"""Settings are declared once: recipes check them, and the command line derives its options from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import click
import pytest

from editcli.cli.apply import apply
from editcli.cli.main import COMMANDS, build_cli
from editcli.cli.values import VALUES
from editcli.errors import OptionError
from editcli.export.recipe import ExportRecipe, PatchRecipe
from editcli.plugin.manager import Plugins
from editcli.settings.recipe import Recipe
from editcli.settings.recipes import EvalRecipe, MomentsRecipe, TuneRecipe
from editcli.settings.setting import like, setting, settings_of

RUN = Recipe(edits="e.jsonl")


@pytest.mark.parametrize("recipe", [Recipe, EvalRecipe, MomentsRecipe, TuneRecipe, ExportRecipe, PatchRecipe])
def test_every_setting_has_help_and_a_kind_of_value_that_the_command_line_knows(recipe: type[Any]) -> None:
    assert settings_of(recipe)
    for name, declared in settings_of(recipe).items():
        assert declared.help.endswith((".", "]", ")")), name
        assert declared.value in ("", *VALUES), name


@pytest.mark.parametrize(
    ("make", "flag"),
    [
        (lambda: Recipe(edits="e.jsonl", batch_size=0), "--batch-size must be at least 1"),
        (lambda: Recipe(edits="e.jsonl", dtype="float8"), "--dtype must be one of"),
        (lambda: EvalRecipe(model="m", edits="e.jsonl", limit=0), "--limit must be at least 1"),
        (lambda: EvalRecipe(model="m", edits="e.jsonl", on_error="sotp"), "did you mean 'stop'"),
        (lambda: ExportRecipe(run="r", sample=0), "--sample must be at least 1"),
        (lambda: ExportRecipe(run="r", format="lroa"), "did you mean 'lora'"),
        (lambda: MomentsRecipe(seed=-1), "--seed"),
        (lambda: TuneRecipe(run=RUN, trials=0), "--trials must be at least 1"),
    ],
)
def test_every_recipe_checks_its_settings(make: Callable[[], Any], flag: str) -> None:
    with pytest.raises(OptionError, match=flag):
        make()


def test_the_options_of_apply_are_the_settings_of_its_recipe() -> None:
    options = {parameter.name: parameter for parameter in apply.params if isinstance(parameter, click.Option)}
    for name, declared in settings_of(Recipe).items():
        if name != "edits":
            assert (options[name].help, declared.flag in options[name].opts) == (declared.help, True)
            assert bool(options[name].envvar) is (declared.env and not declared.cli_only)


def test_a_setting_that_commands_share_has_one_meaning() -> None:
    """But for its default and where ``--help`` shows it, an option of one name is one declaration."""
    group = build_cli(Plugins())
    kinds: dict[str, set[tuple[Any, ...]]] = {}
    for command in (group.get_command(click.Context(group), name) for name in COMMANDS):
        for option in command.params if command is not None else ():
            if option.name in settings_of(Recipe) and option.envvar:
                kinds.setdefault(option.name, set()).add((type(option.type), option.envvar, option.multiple))
    assert {name: each for name, each in kinds.items() if len(each) > 1} == {}


def test_a_setting_of_another_recipe_is_declared_again_with_changes() -> None:
    @dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
    class Other:
        limit: int | None = like(Recipe, "limit", section="Elsewhere")
        given: str = setting(..., "Has to be given.")

    limit = settings_of(Other)["limit"]
    assert (limit.section, limit.help, limit.least) == ("Elsewhere", settings_of(Recipe)["limit"].help, 1)
    assert settings_of(Recipe)["limit"].section == "Run"
    with pytest.raises(TypeError, match="given"):
        Other()  # type: ignore[call-arg]


def test_a_fact_that_no_setting_has_is_refused_where_it_is_declared() -> None:
    with pytest.raises(TypeError, match="sektion"):
        setting(None, "Help.", sektion="Run")
