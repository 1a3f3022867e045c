"""The settings of ``apply``, and of loading a model, as frozen values that are checked when they are made."""

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
from editcli.plugin.families import MAX_LAYERS
from editcli.plugin.options import build, merge
from editcli.presets.record import Preset, given_preset, recorded_preset
from editcli.settings.core import CORE
from editcli.settings.guards import parse_guards
from editcli.settings.setting import check_values, setting

if TYPE_CHECKING:
    from editcli.plugin.manager import Plugins

DTYPES = ("auto", "float32", "bfloat16", "float16")
ON_ERROR = ("stop", "skip")
PARALLEL = ("data", "tensor")
MODEL, METHOD, OUTPUT = "Model", "Method", "Output"
"""Sections of ``--help``."""


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
    convert_bin: bool
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


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadingSettings:
    """Settings of loading a model, the device, and the seed; raises :class:`OptionError` for an unusable value."""

    device: str = setting(
        "auto", "Where to compute: auto, cpu, cuda, cuda:1, mps.", section=MODEL, value="device", place=True, loads=True
    )
    device_map: str | None = setting(
        None,
        "Spread the model over devices: auto, balanced, sequential (needs accelerate).",
        section=MODEL,
        value="device_map",
        place=True,
        loads=True,
    )
    dtype: str = setting(
        "auto",
        "Type to compute in; auto is float32 on a CPU, else the checkpoint's. Edited matrices are always float32.",
        section=MODEL,
        choices=DTYPES,
        decides=True,
        loads=True,
    )
    trust_remote_code: bool = setting(
        False,
        "Run the code that comes with the model. It can do anything you can.",
        section=MODEL,
        cli_only=True,
        place=True,
        loads=True,
    )
    seed: int = setting(0, "Random seed.", section=METHOD, least=0, decides=True)

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**63, "--seed must be a whole number from 0 to 2**63 - 1")
        check_values(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatLoadingSettings(LoadingSettings):
    """The same, and whether and how the model's chat template wraps the prompts."""

    chat_template: bool = setting(
        False, "Apply the model's chat template to every prompt.", section=MODEL, decides=True
    )
    system: str | None = setting(
        None, "System message of the chat template.", section=MODEL, metavar="TEXT", decides=True
    )
    template_args: Mapping[str, Any] | None = setting(
        None,
        "Variables of the chat template, such as '{\"enable_thinking\": false}'.",
        section=MODEL,
        value="json",
        decides=True,
    )
    template_clock: str | None = None
    """Date and time that the chat template reads; None is when the command begins, or what the model's run recorded."""

    def __post_init__(self) -> None:
        # A dataclass with slots is built twice, and super() would name the first of the two.
        LoadingSettings.__post_init__(self)
        _require(self.chat_template or self.system is None, "--system goes into the chat template; add --chat-template")
        _require(
            self.chat_template or not self.template_args,
            "--template-args goes into the chat template; add --chat-template",
        )
        # Building them checks them.
        self.chat  # noqa: B018

    @property
    def chat(self) -> bool | ChatSettings:
        """The settings of the chat template; False for plain prompts."""
        return self.chat_template and ChatSettings(self.system, self.template_args or {}, self.template_clock)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe(ChatLoadingSettings):
    """The settings of a run: edits, model, method and output folder; raises :class:`OptionError` when impossible.

    ``None`` leaves a choice to the preset or to the program. ``settings`` holds component options as
    ``{component: {option: value}}``, for instance ``{"memit": {"remember": True}}``.
    """

    edits: str = setting(..., "Edits file; - is standard input.", value="file", place=True, decides=True)
    model: str | None = setting(
        None,
        "Folder or hub id.  [default: the bundled model]",
        section=MODEL,
        flags=("-m",),
        value="model",
        place=True,
        decides=True,
    )
    revision: str | None = setting(
        None,
        "Branch, tag or commit of a hub id.",
        section=MODEL,
        metavar="REVISION",
        place=True,
        decides=True,
        loads=True,
    )
    parallel: str = setting(
        "data",
        "Divide over the processes of torchrun: data, the edits; tensor, the matrices of a model too large for one "
        "device.",
        section=MODEL,
        choices=PARALLEL,
        place=True,
    )
    editor: str | None = setting(
        None,
        "Method that turns facts into weight updates, a named stack, or a stack's TOML file.  [default: the preset's, "
        "or rlsedit]",
        section=METHOD,
        flags=("-e",),
        value="editor",
    )
    stabilizers: tuple[str, ...] = setting(
        (),
        "Method that protects the model in a stream of edits; repeatable, applied in the order given.",
        section=METHOD,
        flags=("--stabilizer", "-s"),
        value="stabilizer",
    )
    preset: str | Mapping[str, Any] | None = setting(
        None,
        "Preset file with layers and settings, as tune writes it.  [default: the model's own preset]",
        section=METHOD,
        value="file",
        decides=True,
    )
    """A recipe that was read from ``run.json`` holds the record of a preset instead of a file's name."""
    layers: tuple[int, ...] | None = setting(
        None,
        "Layers to edit, such as 4-8 or 4-8,10.  [default: the preset's]",
        section=METHOD,
        value="layers",
        decides=True,
    )
    batch_size: int | None = setting(
        None, "Edits written at once.  [default: 100; 1 for rome]", section=METHOD, flags=("-b",), least=1, decides=True
    )
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    stack: str | None = None
    """The named stack that ``editor``, ``stabilizers`` and ``settings`` were written out from."""
    stats: str | None = setting(
        None, "Statistics file to use instead of computing or looking one up.", section=METHOD, value="file", place=True
    )
    solve_device: str | None = setting(
        None,
        "Device for the edited matrices and their solves.  [default: where the edited layers are]",
        section=METHOD,
        value="device",
        place=True,
    )
    corpus: str | None = setting(
        None,
        "Text for the statistics: english, a file, hf:ID[:CONFIG], or self, which the model writes.",
        section=METHOD,
        value="corpus",
        place=True,
    )
    out: str = setting(
        "", "Folder to write.  [default: <edits stem>-edited]", section=OUTPUT, value="folder", place=True, folder=True
    )
    overwrite: bool = setting(
        False, "Replace DIR if an earlier run wrote it.", section=OUTPUT, cli_only=True, place=True, folder=True
    )
    resume: bool = setting(
        False, "Continue the run in DIR, with the same edits or more.", section=OUTPUT, cli_only=True, folder=True
    )
    convert_bin: bool = setting(
        False,
        "Of a model in pickle files (.bin), edit a temporary copy in safetensors; only tensors are read.",
        section=MODEL,
        cli_only=True,
        loads=True,
    )
    save_dtype: str = setting(
        "auto", "Type of the edited tensors in the file; auto is the checkpoint's own.", section=OUTPUT, choices=DTYPES
    )
    limit: int | None = setting(None, "Take only the first N edits.", least=1, decides=True)
    on_error: str = setting(
        "stop", "Stop at an edit that cannot be used, before writing anything, or skip and list it.", choices=ON_ERROR
    )
    checkpoint_every: int | None = setting(None, "Save the state every N batches.", least=1, folder=True)
    stop_if: tuple[str, ...] = setting(
        (),
        "Stop, with exit code 3, before writing a batch for which EXPR holds; repeatable: ratio>2.5, drift>1, "
        "retained<0.6, efficacy<0.5, jump>0.5 (the change of R_n by one batch).",
        value="guard",
    )
    evaluate: bool = setting(True, "Measure before and after.", flags=("--eval",), variable="EDITCLI_EVAL")
    eval_every: int | None = setting(None, "Measure retention every N batches.", least=1, decides=True)
    diagnose_every: int | None = setting(None, "Compute spectra every N batches.", least=1)

    def __post_init__(self) -> None:
        if not self.out:
            # A frozen dataclass has no other way to compute one field from another.
            object.__setattr__(self, "out", default_out(self.edits))
        ChatLoadingSettings.__post_init__(self)
        _require(not (self.resume and self.overwrite), "--resume and --overwrite exclude each other; choose one")
        split = self.parallel == "tensor"
        _require(not (split and self.device_map), "--parallel tensor and --device-map exclude each other; choose one")
        _check_layers(self.layers)
        _check_stabilizers(self.stabilizers)

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

    def resolved(self, plugins: Plugins) -> Recipe:
        """Return the checked recipe with a named stack written out; raises as :meth:`check` does.

        The stack's stabilizers act before those that are asked for besides; options that the user sets stand over
        the stack's. :attr:`stack` keeps its name.
        """
        stack = plugins.stack(self.editor)
        if stack is None:
            self.check(plugins)
            return self
        recipe = dataclasses.replace(
            self,
            editor=stack.editor,
            stabilizers=tuple(dict.fromkeys((*stack.stabilizers, *self.stabilizers))),
            settings=merge(stack.settings, self.settings),
            stack=stack.name,
        )
        try:
            dataclasses.replace(
                recipe, stabilizers=stack.stabilizers, settings=stack.settings, preset=None, stop_if=()
            ).check(plugins)
        except EditError as error:
            raise OptionError(f"the stack {stack.name}: {error}") from error
        recipe.check(plugins)
        return recipe

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


def check_section(name: str, settings: Mapping[str, Any], plugins: Plugins) -> None:
    """Raise :class:`OptionError` when no component is called ``name`` or it has no such options."""
    components = [named[name] for kind in plugins.kinds if name in (named := plugins.all(kind))]
    if components:
        build(components[0].component.Options, settings, owner=name)
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
        _require(stop < MAX_LAYERS, f"layers {text!r} go beyond {MAX_LAYERS - 1}; layers are counted from 0")
        layers.update(range(start, stop + 1))
    return tuple(sorted(layers))


def default_out(edits: str) -> str:
    """Return the output folder for an edits file: ``<stem>-edited`` in the working folder."""
    stem = "stdin" if edits == "-" else Path(edits).stem
    return f"{stem or 'edits'}-edited"


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 9


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise OptionError(sentence)


def _check_layers(layers: tuple[int, ...] | None) -> None:
    if layers is None:
        return
    ascending = bool(layers) and all(a < b for a, b in itertools.pairwise(layers)) and layers[0] >= 0
    _require(ascending, f"layers must be given once each, ascending from 0 upwards, not {list(layers)}")


def _check_stabilizers(names: tuple[str, ...]) -> None:
    for name in names:
        _require(names.count(name) == 1, f"the stabilizer {name!r} is given {names.count(name)} times; give it once")
