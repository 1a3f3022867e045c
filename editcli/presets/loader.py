"""Which layers to edit and with which settings: a preset per model, and a labelled guess for every other model.

A preset is matched by the model's type and sizes, never by its name or folder. It is one TOML file, or one row of
``models.toml``, whose rows share profiles of settings. Labels: ``published`` figures come from the papers'
configurations, ``tuned`` ones from our own sweep, ``guessed`` ones from proportions:

- Layers. The published sites lie between 7 % and 39 % of the depth and are five or six in a row. The guess takes the
  last five layers of the middle of that range, 13 % to 28 %; for 32 layers these are the published 4-8.
- Layers of families that norm their MLPs' output (Gemma 2 and 3, OLMo 2): only the last of these. Behind a norm an MLP
  can turn its contribution but not lengthen it, so the last site cannot make up for what writing the earlier ones
  changed on the way to it; alone, it reaches its target exactly.
- Layers for UltraEdit are late ones, 29 and 30 of 32.
- ``mom2_update_weight``, w. An edit with key k is written to the share s / (1 + s), s = k^T C^-1 k / w. On
  the reference text itself k^T C^-1 k is d_in on average, whatever the scale of the keys, so at w = d_in half of
  the residual of an unremarkable key is written, and more of a rare one's. The published values are 0.8 to 3.1 times
  d_in; the guess is d_in.
- AlphaEdit's published threshold is an absolute eigenvalue, which depends on the scale of the keys. On real keys it
  keeps two thirds to three quarters of the directions, so the guess keeps 0.7 of them. Its l2 is in units of the mean
  ||P k||^2 on reference text.
- UltraEdit's step is lr ||k^||^2 per deviation of the gradient, and ||k^||^2 is d_in on average, so lr times d_in is
  kept at its published product.
- Targets. The published rates, 0.1 and 0.5, are steps in coordinates whose scale differs between models by more than
  ten times. The guess takes steps of a fifth of ||h||. At its published weight the divergence on "{subject} is a" alone
  holds the loss of many targets above the published stop on real models, so the guess weighs it an eighth as much. Most
  targets are reached within 12 steps; the few that take more than the published 25 may take 50.
- Targets behind a norm. What stands in front of a norm has no length, only a direction, and a clamp of 0.75 would
  bound its turn to 49 degrees; the guess lets delta outgrow what it is added to, and takes longer steps.

This module never imports torch.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import tomli

from editcli.plugin.options import merge
from editcli.presets.record import FACTS, Preset, Settings, Sizes, given_preset, parse_preset, refuse_misfit, sections

if TYPE_CHECKING:
    from editcli.models.architectures import Architecture

__all__ = ["FACTS", "Preset", "Settings", "Sizes", "all_presets", "guess", "load_preset", "sizes_of"]

_GUESS, _TABLE = "guess.toml", "models.toml"
_GUESSED = "guess"
"""The profile of a row whose settings, and layers if it names none, are those of the guess for its sizes."""


def load_preset(config: Any, architecture: Architecture, given: str | Mapping[str, Any] | None = None) -> Preset:
    """Return the preset for a model with this transformers ``config``, or a guess labelled as one.

    ``given`` is a preset file, or the record of one, and replaces the known presets; raises :class:`OptionError` where
    it does not fit the model.
    """
    sizes = sizes_of(config, architecture)
    guessed = guess(sizes, behind_norm=architecture.mlp_norm(0) is not None)
    if given is not None:
        best = given_preset(given)
        refuse_misfit(best, sizes)
    else:
        fitting = [preset for preset in all_presets() if preset.match is not None and preset.match.fits(sizes)]
        if not fitting:
            return guessed
        # A preset that also names the vocabulary is more specific.
        best = min(fitting, key=lambda preset: preset.match is None or preset.match.vocab is None)
    # A preset that names its editor gives that editor's layers.
    others = {name: layers for name, layers in guessed.editor_layers.items() if name != best.editor}
    return replace(best, editor_layers={**others, **best.editor_layers})


def sizes_of(config: Any, architecture: Architecture) -> Sizes:
    """Return the sizes by which a model's preset is matched."""
    rows, columns = architecture.shape(0)
    # Of a model that reads images as well, the sizes are those of its text tower.
    config = config.get_text_config()
    return Sizes(config.model_type, architecture.layers, rows, columns, getattr(config, "vocab_size", None))


def all_presets() -> tuple[Preset, ...]:
    """Return every preset that ships with the package, by name."""
    records = dict(_records())
    rows = _rows(records.pop(_TABLE))
    files = (parse_preset(record, origin=name) for name, record in records.items() if name != _GUESS)
    return tuple(sorted((*files, *rows), key=lambda preset: preset.name))


def guess(sizes: Sizes, *, behind_norm: bool = False) -> Preset:
    """Return depth-proportional layers and width-proportional weights; see the module's docstring."""
    record = dict(_records())[_GUESS]
    scales = {"per_width": sizes.intermediate, "per_inverse_width": 1 / sizes.intermediate}
    scaled = [_scaled(record.pop(name), factor) for name, factor in scales.items()]
    return Preset(
        name=f"{sizes.model_type}, {sizes.layers} layers",
        label=record["label"],
        layers=_within(sizes.layers, **record["layers_behind_norm" if behind_norm else "layers"]),
        editor_layers={name: _within(sizes.layers, **shares) for name, shares in record["layers_for"].items()},
        settings=merge(sections(record), *scaled, record["behind_norm"] if behind_norm else {}),
        source=record["source"],
    )


def _within(count: int, *, first_share: float, last_share: float, most: int) -> tuple[int, ...]:
    """Return at most ``most`` layers between two fractions of the depth; the very last only if there is no other."""
    last = min(int(last_share * count), max(count - 2, 0))
    first = max(last + 1 - most, min(int(first_share * count), last))
    return tuple(range(first, last + 1))


def _scaled(settings: Settings, factor: float) -> dict[str, dict[str, Any]]:
    return {name: {key: value * factor for key, value in section.items()} for name, section in settings.items()}


def _rows(table: Mapping[str, Any]) -> Iterator[Preset]:
    """Yield the presets of the table of models: a row's values override those of its profile."""
    for row in table["models"]:
        facts = {name: value for name, value in row.items() if name not in ("profile", "behind_norm")}
        if row["profile"] == _GUESSED:
            base = guess(Sizes(**row["match"]), behind_norm=row.get("behind_norm", False))
            profile, layers = base.settings, list(base.layers)
        else:
            profile, layers = table["profiles"][row["profile"]], []
        record = {"layers": layers, **facts, **merge(profile, sections(facts))}
        yield parse_preset(record, origin=f"{_TABLE}: {row['name']}")


def _records() -> Iterator[tuple[str, dict[str, Any]]]:
    for file in importlib.resources.files("editcli.presets").iterdir():
        if file.name.endswith(".toml"):
            yield file.name, tomli.loads(file.read_text("utf-8"))
