"""Preset files of users: read, checked, written; never imports torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli

from editcli.errors import OptionError
from editcli.presets.model import Preset, Sizes, parse_preset, sections


def given_preset(given: str | Mapping[str, Any]) -> Preset:
    """Return the preset of a file, or of a record as :meth:`Preset.to_record` makes it."""
    if isinstance(given, str):
        return read_preset(Path(given))
    return parse_preset(given, origin=str(given.get("file") or "the preset of the recipe"))


def recorded_preset(given: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what a run records of the preset file that it was given: all of it, since files change and move."""
    return None if given is None else given_preset(given).to_record()


def read_preset(file: Path) -> Preset:
    """Read a preset file; raises :class:`OptionError` that names the file and what is wrong with it."""
    try:
        content = file.expanduser().read_bytes()
        record = tomli.loads(content.decode("utf-8-sig"))
    except OSError as error:
        raise OptionError(f"the preset {file} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise OptionError(f"the preset {file} is not valid TOML: {error or 'nested too deeply'}") from error
    preset = parse_preset({"name": file.stem, **record}, origin=str(file))
    return replace(preset, file=str(file), sha256=hashlib.sha256(content).hexdigest())


def refuse_misfit(preset: Preset, model: Sizes) -> None:
    """Raise :class:`OptionError` where a preset was made for a model of another type or other sizes."""
    origin = preset.file or preset.name
    key = None if preset.match is None else preset.match.misfit(model)
    if key is not None:
        other = "pass the model it was made for, or tune this one: editcli tune MODEL"
        asked = getattr(preset.match, key)
        raise OptionError(f"{origin}: match.{key} is {asked}, but the model's is {getattr(model, key)}; {other}")
    for name, layers in {"layers": preset.layers, **preset.editor_layers}.items():
        if layers[-1] >= model.layers:
            where = name if name == "layers" else f"layers_for.{name}"
            raise OptionError(f"{origin}: {where} names layer {layers[-1]}, but the model has 0-{model.layers - 1}")


def preset_text(preset: Preset, *, comment: str = "") -> str:
    """Return a preset as the text of a file that :func:`read_preset` reads."""
    record = preset.to_record()
    facts = {name: value for name, value in record.items() if name not in ("file", "sha256")}
    lines = [f"# {line}" for line in comment.splitlines()]
    lines += [f"{key} = {_value(value)}" for key, value in facts.items() if not isinstance(value, Mapping)]
    tables = {**{name: facts[name] for name in ("match", "layers_for") if name in facts}, **sections(facts)}
    for name, table in tables.items():
        lines += ["", f"[{name}]", *_pairs(table)]
    return "\n".join(lines) + "\n"


def _pairs(table: Mapping[str, Any]) -> Iterator[str]:
    # TOML has no word for "no value", and an option that is left out has none.
    return (f"{key} = {_value(value)}" for key, value in table.items() if value is not None)


def _value(value: Any) -> str:
    """Return a text, a number, a truth value or a list of these as TOML writes it, which is how JSON does."""
    return json.dumps(value, ensure_ascii=False)
