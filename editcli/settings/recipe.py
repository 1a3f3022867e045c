"""Everything that decides what ``apply`` does, as one frozen value that is checked when it is made."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import msgspec

from editcli.errors import EditError, OptionError, near_miss
from editcli.models.chat_settings import ChatSettings
from editcli.plugin.options import build
from editcli.presets.record import Preset, given_preset, recorded_preset
from editcli.settings.core import CORE
from editcli.settings.guards import parse_guards

if TYPE_CHECKING:
    from editcli.plugin.manager import Plugins

DTYPES = ("auto", "float32", "bfloat16", "float16")
ON_ERROR = ("stop", "skip")
PARALLEL = ("data", "tensor")
MAX_LAYER = 9_999
"""No model has more layers; a mistyped range must not fill the memory."""


class Choices(TypedDict, total=False):
    """The settings of a :class:`Recipe` that a program may give by name; sequences may be of any kind."""

    revision: str | None
    editor: str | None
    stabilizers: Sequence[str]
    batch_size: int | None
    layers: Sequence[int] | str | None
    preset: str | Mapping[str, Any] | None
    settings: Mapping[str, Mapping[str, Any]]
    device: str
    device_map: str | None
    solve_device: str | None
    parallel: str
    dtype: str
    save_dtype: str
    resume: bool
    overwrite: bool
    limit: int | None
    on_error: str
    checkpoint_every: int | None
    stop_if: Sequence[str]
    evaluate: bool
    eval_every: int | None
    diagnose_every: int | None
    seed: int
    stats: str | None
    corpus: str | None
    chat_template: bool
    system: str | None
    template_args: Mapping[str, Any] | None
    template_clock: str | None
    trust_remote_code: bool


_COUNTS = ("batch_size", "limit", "checkpoint_every", "eval_every", "diagnose_every")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What to write into which model, how, and where the result goes; raises :class:`OptionError` when impossible.

    ``None`` leaves a choice to the preset or to the program. ``settings`` holds component options as
    ``{component: {option: value}}``, for instance ``{"memit": {"remember": True}}``.
    """

    edits: str
    """The edits file; ``-`` is standard input."""
    model: str | None = None
    """A folder or a hub id; None is the bundled model."""
    revision: str | None = None
    editor: str | None = None
    stabilizers: tuple[str, ...] = ()
    """Stabilizers in the order in which they act."""
    out: str = ""
    """The folder to write; empty means ``<edits stem>-edited`` in the working folder."""
    batch_size: int | None = None
    layers: tuple[int, ...] | None = None
    preset: str | Mapping[str, Any] | None = None
    """A preset file instead of the model's preset, or the record of one, as ``run.json`` holds it."""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    device: str = "auto"
    device_map: str | None = None
    solve_device: str | None = None
    """Where masters, statistics and solves live; None is where the edited layers are."""
    parallel: str = "data"
    """What several processes share: edits (``data``), or the matrices of one model (``tensor``)."""
    dtype: str = "auto"
    save_dtype: str = "auto"
    resume: bool = False
    overwrite: bool = False
    limit: int | None = None
    on_error: str = "stop"
    checkpoint_every: int | None = None
    stop_if: tuple[str, ...] = ()
    evaluate: bool = True
    eval_every: int | None = None
    diagnose_every: int | None = None
    seed: int = 0
    stats: str | None = None
    corpus: str | None = None
    chat_template: bool = False
    system: str | None = None
    """The system message that stands before every prompt in the chat template."""
    template_args: Mapping[str, Any] | None = None
    """Variables of the chat template, for instance ``{"enable_thinking": False}``."""
    template_clock: str | None = None
    """Date and time that the chat template reads; None is when the run begins, and its record then says when."""
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not self.out:
            # A frozen dataclass has no other way to compute one field from another.
            object.__setattr__(self, "out", default_out(self.edits))
        for name in _COUNTS:
            _require(getattr(self, name) is None or getattr(self, name) >= 1, f"{_flag(name)} must be at least 1")
        _require(0 <= self.seed < 2**63, "--seed must be a whole number from 0 to 2**63 - 1")
        _require(not (self.resume and self.overwrite), "--resume and --overwrite exclude each other; choose one")
        _one_of("--dtype", self.dtype, DTYPES)
        _one_of("--save-dtype", self.save_dtype, DTYPES)
        _one_of("--on-error", self.on_error, ON_ERROR)
        _one_of("--parallel", self.parallel, PARALLEL)
        split = self.parallel == "tensor"
        _require(not (split and self.device_map), "--parallel tensor and --device-map exclude each other; choose one")
        _check_layers(self.layers)
        _check_stabilizers(self.stabilizers)
        check_chat(self.chat_template, self.system, self.template_args)
        # Building them checks them.
        self.chat  # noqa: B018

    @property
    def chat(self) -> bool | ChatSettings:
        """What the chat template is given; False for plain prompts."""
        return self.chat_template and ChatSettings(self.system, self.template_args or {}, self.template_clock)

    @property
    def folder(self) -> Path:
        """The folder to write."""
        return Path(self.out)

    def to_json(self) -> dict[str, Any]:
        """Return every setting, for ``run.json``."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        settings = {name: dict(options) for name, options in self.settings.items()}
        lists = {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
        return {**values, **lists, "settings": settings}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Recipe:
        """Build a recipe from :meth:`to_json`'s object; raise :class:`OptionError` on a setting it does not know."""
        known = {f.name for f in dataclasses.fields(cls)}
        for name in record:
            if name not in known:
                raise OptionError(f"a recipe has no setting {name!r}{near_miss(name, known)}")
        if "edits" not in record:
            raise OptionError("the recipe does not say which edits file to apply; add 'edits'")
        try:
            return msgspec.convert(dict(record), cls)
        except (msgspec.ValidationError, RecursionError) as error:
            raise OptionError(f"the recipe cannot be used: {error}") from error

    def with_preset_read(self) -> Recipe:
        """Return the recipe with what its preset file holds, since the file may change or go while the run lasts."""
        return dataclasses.replace(self, preset=recorded_preset(self.preset))

    def check(self, plugins: Plugins) -> None:
        """Raise when a name, an option or a guard is not known; needs neither a model nor torch."""
        parse_guards(self.stop_if)
        if self.editor is not None:
            plugins.find("editor", self.editor)
        for name in self.stabilizers:
            plugins.find("stabilizer", name)
        for name, settings in self.settings.items():
            check_section(name, settings, plugins)
        if self.preset is not None:
            check_preset(given_preset(self.preset), plugins)


def check_preset(preset: Preset, plugins: Plugins) -> None:
    """Raise :class:`OptionError` when a preset file names an editor or an option that is not known."""
    origin = preset.file or preset.name
    try:
        for name in (*([preset.editor] if preset.editor else []), *preset.editor_layers):
            plugins.find("editor", name)
        for name, settings in preset.settings.items():
            check_section(name, settings, plugins)
    except EditError as error:
        raise OptionError(f"{origin}: {error}") from error


def check_chat(chat_template: bool, system: str | None, template_args: Mapping[str, Any] | None) -> None:
    """Raise :class:`OptionError` for settings of a chat template that is not used."""
    _require(chat_template or system is None, "--system goes into the chat template; add --chat-template")
    _require(chat_template or not template_args, "--template-args goes into the chat template; add --chat-template")


def check_section(name: str, settings: Mapping[str, Any], plugins: Plugins) -> None:
    """Raise :class:`OptionError` when no component is called ``name`` or it has no such options."""
    found = [components[name] for kind in plugins.kinds if name in (components := plugins.all(kind))]
    if found:
        build(found[0].component.Options, settings, owner=name)
    elif name in CORE:
        build(CORE[name], settings, owner=name)
    else:
        known = {*CORE, *(component for kind in plugins.kinds for component in plugins.all(kind))}
        raise OptionError(f"there is nothing called {name!r} to set options of{near_miss(name, known)}")


def parse_layers(text: str) -> tuple[int, ...]:
    """Read layer numbers such as ``4-8,10``, counted from 0; raise :class:`OptionError` when they make no sense."""
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not _is_number(first) or (dash and not _is_number(last)):
            raise OptionError(f"cannot read layers {text!r}: write numbers and ranges such as 4-8,10")
        start, stop = int(first), int(last or first)
        _require(start <= stop, f"the range {part.strip()!r} in layers {text!r} runs backwards; write {stop}-{start}")
        _require(stop <= MAX_LAYER, f"layers {text!r} go beyond {MAX_LAYER}; layers are counted from 0")
        layers.update(range(start, stop + 1))
    return tuple(sorted(layers))


def default_out(edits: str) -> str:
    """Return the output folder for an edits file: ``<stem>-edited`` in the working folder."""
    stem = "stdin" if edits == "-" else Path(edits).stem
    return f"{stem or 'edits'}-edited"


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 9


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise OptionError(sentence)


def _one_of(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise OptionError(f"{flag} must be one of {', '.join(choices)}, not {value!r}{near_miss(value, choices)}")


def _check_layers(layers: tuple[int, ...] | None) -> None:
    if layers is None:
        return
    ascending = bool(layers) and all(a < b for a, b in itertools.pairwise(layers)) and layers[0] >= 0
    _require(ascending, f"layers must be given once each, ascending from 0 upwards, not {list(layers)}")


def _check_stabilizers(names: tuple[str, ...]) -> None:
    for name in names:
        _require(names.count(name) == 1, f"the stabilizer {name!r} is given {names.count(name)} times; give it once")
