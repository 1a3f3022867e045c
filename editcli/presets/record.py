"""A preset, and how it is read from TOML, from a user's file or from a run's record; never imports torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tomli

from editcli.errors import OptionError, near_miss
from editcli.storage.opening import SETTINGS, expanded, read_bytes

Settings = Mapping[str, Mapping[str, Any]]

FACTS = ("name", "label", "source", "layers", "layers_for", "layers_behind_norm", "behind_norm", "match", "editor")
"""Keys of a record that are not sections of settings."""
LABELS = ("tuned", "published", "guessed")
_FROM_FILE = ("file", "sha256")
"""Keys that only the record of a run has, on a preset that came from a file."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Facts by which a preset is matched; ``vocab`` None matches every vocabulary, since users add tokens."""

    model_type: str
    layers: int
    hidden: int
    """Width of the residual stream, d_out of an editable matrix."""
    intermediate: int
    """Width of a key, d_in of an editable matrix."""
    vocab: int | None = None

    def fits(self, model: Sizes) -> bool:
        """Tell whether ``model`` has these sizes."""
        return self.misfit(model) is None

    def misfit(self, model: Sizes) -> str | None:
        """Return the first field in which ``model`` has another value; None where it has these sizes."""
        differ = (f.name for f in dataclasses.fields(self) if getattr(self, f.name) != getattr(model, f.name))
        return next((name for name in differ if not (name == "vocab" and self.vocab is None)), None)


@dataclass(frozen=True, slots=True)
class Preset:
    """Layers and settings for one model, and how far to trust them."""

    name: str
    label: str
    """One of :data:`LABELS`."""
    layers: tuple[int, ...]
    editor: str | None = None
    editor_layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Layers for editors that write other layers than :attr:`layers`."""
    settings: Settings = field(default_factory=dict)
    """``{component: {option: value}}``; sections of components that are not in use have no effect."""
    source: str = ""
    """The source of the figures."""
    match: Sizes | None = None
    file: str | None = None
    """The file that a user passed; None for a preset of the package."""
    sha256: str | None = None
    """Digest of that file's content."""

    def layers_for(self, editor: str) -> tuple[int, ...]:
        """Return the layers that ``editor`` should write."""
        return self.editor_layers.get(editor, self.layers)

    def to_record(self) -> dict[str, Any]:
        """Return the record from which :func:`parse_preset` builds this preset again."""
        match = {} if self.match is None else {k: v for k, v in dataclasses.asdict(self.match).items() if v is not None}
        facts = {
            "name": self.name,
            "label": self.label,
            "source": self.source,
            "layers": list(self.layers),
            "layers_for": {name: list(layers) for name, layers in self.editor_layers.items()},
            "editor": self.editor,
            "match": match,
            **{name: getattr(self, name) for name in _FROM_FILE},
        }
        known = {name: value for name, value in facts.items() if value not in (None, {})}
        return {**known, **{name: dict(section) for name, section in self.settings.items()}}


def sections(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a record, without the facts about it."""
    return {name: section for name, section in record.items() if name not in (*FACTS, *_FROM_FILE)}


def parse_preset(record: Mapping[str, Any], *, origin: str) -> Preset:
    """Build a preset from its record; raise :class:`OptionError` that names ``origin`` and the wrong key."""
    for name, section in sections(record).items():
        if not isinstance(section, Mapping):
            raise OptionError(f"{origin}: there is no key {name!r} in a preset{near_miss(name, FACTS)}")
    if "layers" not in record:
        raise OptionError(f"{origin}: a preset has to say which layers to edit; add for instance layers = [4, 5, 6]")
    label = _text(record, "label", origin) or "guessed"
    if label not in LABELS:
        raise OptionError(f"{origin}: label must be one of {', '.join(LABELS)}, not {label!r}")
    others = record.get("layers_for", {})
    if not isinstance(others, Mapping):
        raise OptionError(f"{origin}: layers_for must be a table of editors with their layers, not {others!r}")
    return Preset(
        name=_text(record, "name", origin) or origin,
        label=label,
        layers=_layers(record["layers"], "layers", origin),
        editor=_text(record, "editor", origin),
        editor_layers={name: _layers(layers, f"layers_for.{name}", origin) for name, layers in others.items()},
        settings=sections(record),
        source=_text(record, "source", origin) or "",
        match=_sizes(record["match"], origin) if record.get("match") else None,
        file=_text(record, "file", origin),
        sha256=_text(record, "sha256", origin),
    )


def _text(record: Mapping[str, Any], key: str, origin: str) -> str | None:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise OptionError(f"{origin}: {key} must be a text, not {value!r}")
    return value


def _layers(value: Any, key: str, origin: str) -> tuple[int, ...]:
    numbers = isinstance(value, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in value)
    if not numbers or not value or value != sorted(set(value)) or value[0] < 0:
        raise OptionError(f"{origin}: {key} must be layer numbers in ascending order such as [4, 5, 6], not {value!r}")
    return tuple(value)


def _sizes(value: Any, origin: str) -> Sizes:
    known = {f.name: str if f.name == "model_type" else int for f in dataclasses.fields(Sizes)}
    if not isinstance(value, Mapping):
        raise OptionError(f"{origin}: match must be a table of {', '.join(known)}, not {value!r}")
    for key, size in value.items():
        if key not in known:
            raise OptionError(f"{origin}: match has no key {key!r}{near_miss(key, known)}")
        if not isinstance(size, known[key]) or isinstance(size, bool):
            raise OptionError(f"{origin}: match.{key} must be {_named(known[key])}, not {size!r}")
    missing = [key for key in known if key not in value and key != "vocab"]
    if missing:
        raise OptionError(f"{origin}: match needs {' and '.join(missing)} as well")
    return Sizes(**value)


def _named(kind: type[Any]) -> str:
    return "a text" if kind is str else "a whole number"


def given_preset(given: str | Mapping[str, Any]) -> Preset:
    """Return the preset of a file, or of a record as :meth:`Preset.to_record` makes it."""
    if isinstance(given, str):
        return read_preset(Path(given))
    return parse_preset(given, origin=str(given.get("file") or "the preset of the recipe"))


def recorded_preset(given: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the record of a run's preset file: its whole content, since files change and move."""
    return None if given is None else given_preset(given).to_record()


def read_preset(file: Path) -> Preset:
    """Read a preset file; raises :class:`OptionError` that names the file and the mistake."""
    try:
        content = read_bytes(expanded(file), SETTINGS)
        record = tomli.loads(content.decode("utf-8-sig"))
    except OSError as error:
        raise OptionError(f"the preset {file} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise OptionError(f"the preset {file} is not valid TOML: {error or 'nested too deeply'}") from error
    preset = parse_preset({"name": file.stem, **record}, origin=str(file))
    return replace(preset, file=str(file), sha256=hashlib.sha256(content).hexdigest())


def refuse_misfit(preset: Preset, model: Sizes) -> None:
    """Raise :class:`OptionError` for a preset that was made for a model of another type or other sizes."""
    origin = preset.file or preset.name
    key = None if preset.match is None else preset.match.misfit(model)
    if key is not None:
        other = "pass the model it was made for, or tune this one: editcli tune MODEL"
        expected = getattr(preset.match, key)
        raise OptionError(f"{origin}: match.{key} is {expected}, but the model's is {getattr(model, key)}; {other}")
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
    # TOML has no null: an option without a value is left out.
    return (f"{key} = {_value(value)}" for key, value in table.items() if value is not None)


def _value(value: Any) -> str:
    """Return a text, a number, a truth value or a list of these as TOML writes it, which is as JSON does."""
    return json.dumps(value, ensure_ascii=False)
