"""The time that a chat template reads: fixed when a run begins, so that going on or repeating gives the same bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from editcli.distributed.team import Team
from editcli.records.state import RunFolder
from editcli.runs.resuming import recorded_recipe
from editcli.settings.recipe import Recipe


def with_clock(recipe: Recipe, team: Team | None = None, *, folders: Iterable[Path] = ()) -> Recipe:
    """Return the recipe with a time for its chat template: of the run that goes on, of ``folders``, else now."""
    if not recipe.chat_template or recipe.template_clock is not None:
        return recipe
    places = [recipe.folder, *folders] if recipe.resume else [*folders]
    return replace(recipe, template_clock=clock_of(places, team or Team()))


def clock_of(places: Iterable[Path], team: Team) -> str:
    """Return the time that the first of some runs recorded, else now; the same in every process of ``team``."""
    recorded = next((clock for place in places if (clock := _recorded_clock(place)) is not None), None)
    now = recorded or datetime.now().isoformat(timespec="seconds")
    # Processes that start a moment apart must read one time.
    return str(team.exchange("the template's clock", now)[0])


def _recorded_clock(folder: Path) -> str | None:
    """Return the time that a run's chat template read; None where there is no run or no such time."""
    recipe = recorded_recipe(RunFolder(folder))
    # Where a time was lost with a damaged record, going on is refused by the stream's settings.
    return None if recipe is None else recipe.template_clock
