"""How a run was made: what going on with it, and taking edits back, is planned from.

Presets, defaults and the default editor change between versions; a run keeps those that it was begun with. What is
asked for by name stands over them, and is refused by the stream where it differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from editcli.errors import OptionError, StateError
from editcli.plugin.manager import Plugins
from editcli.plugin.options import merge
from editcli.presets.record import Preset, Settings
from editcli.records.record import record_to_resume
from editcli.records.state import RunFolder, StreamSettings
from editcli.settings.core import CORE
from editcli.settings.recipe import Recipe
from editcli.statistics.corpus import SELF


@dataclass(frozen=True, slots=True)
class Made:
    """The recorded choices of a run that its recipe may have left to a preset or to the program."""

    editor: str
    layers: tuple[int, ...]
    settings: Settings
    """Every option of the run's components, of its targets and of its statistics."""
    corpus: str | None
    """The reference text by name; None where the default is still the same text."""
    stats: str | None

    def within(self, preset: Preset, *, given: bool) -> Preset:
        """Return the preset for a resumed run: its recorded choices, under those of a preset ``given`` again."""
        if given:
            settings = merge(self.settings, preset.settings)
            return replace(preset, editor=preset.editor or self.editor, settings=settings)
        settings = merge(preset.settings, self.settings)
        return replace(preset, editor=self.editor, layers=self.layers, editor_layers={}, settings=settings)

    def complete(self, recipe: Recipe) -> Recipe:
        """Return the recipe with the run's reference text, where it names none."""
        if recipe.corpus is not None or recipe.stats is not None:
            return recipe
        return replace(recipe, corpus=self.corpus, stats=self.stats)


def made(recipe: Recipe, plugins: Plugins) -> Made | None:
    """Return how the run that ``recipe`` resumes was made; None for a new run."""
    folder = RunFolder(recipe.folder)
    if not (recipe.resume and folder.is_run):
        return None
    saved = completed(StreamSettings.from_json(folder.read_settings(), folder.state), plugins)
    settings: dict[str, Any] = {**saved.options, "targets": saved.targets}
    if saved.reference.options is not None:
        settings["statistics"] = saved.reference.options
    asked = recorded_recipe(folder)
    corpus = asked.corpus if asked else None
    if corpus is None and (saved.reference.corpus or "").startswith(f"{SELF}:"):
        # The text that the model writes was the default once.
        corpus = SELF
    return Made(saved.editor, saved.layers, settings, corpus, asked.stats if asked else None)


def completed(saved: StreamSettings, plugins: Plugins) -> StreamSettings:
    """Return a stream's saved settings with the options that were added since, at what was done before them."""
    options = {name: _with_defaults(values, _options(name, plugins)) for name, values in saved.options.items()}
    reference = saved.reference
    if reference.options is not None:
        reference = replace(reference, options=_with_defaults(reference.options, CORE["statistics"]))
    targets = _with_defaults({**_targets_before(saved.targets), **saved.targets}, CORE["targets"])
    return replace(saved, options=options, targets=targets, reference=reference)


def recorded_recipe(folder: RunFolder) -> Recipe | None:
    """Return the recipe of a run; None where it has no record.

    Raises :class:`StateError` where the record cannot be read, or holds a recipe of another version.
    """
    record = record_to_resume(folder.out)
    try:
        return None if record is None else Recipe.from_json(record.recipe)
    except OptionError as error:
        raise StateError(
            f"{folder.record} holds a recipe that this editcli does not know ({error}); use the editcli version that "
            "its provenance names, or remove that file to go on without it"
        ) from error


def _targets_before(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the target options of the time when steps had one unit, one clamp held for every family, each edit had an
    offset of its own, and a target any length."""
    clamp = {"norm_clamp": values["clamp"]} if "clamp" in values else {}
    return {"lr_kind": "absolute", "decay_kind": "absolute", "merge": False, "longest": None, **clamp}


def _with_defaults(values: Mapping[str, Any], options: type[Any] | None) -> dict[str, Any]:
    return dict(values) if options is None else {**asdict(options()), **values}


def _options(name: str, plugins: Plugins) -> type[Any] | None:
    """Return the options of a component; None where it is not installed, which is refused with its own sentence."""
    known = (plugins.all(kind).get(name) for kind in plugins.kinds)
    return next((brought.component.Options for brought in known if brought is not None), None)
