"""The time that a chat template reads: fixed when a run begins, so that going on or repeating gives the same bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from editcli.distributed.team import Team
from editcli.errors import StateError
from editcli.records.state import RunFolder
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
    run = RunFolder(folder)
    if not run.is_run:
        return None
    try:
        recipe: Any = run.read_record().get("recipe")
    except StateError:
        # A damaged record is written anew; if a time was lost with it, going on is refused by the stream's settings.
        return None
    clock = recipe.get("template_clock") if isinstance(recipe, dict) else None
    return clock if isinstance(clock, str) else None
