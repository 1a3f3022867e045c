"""Everything about a run that can be known, and refused, before any weight is loaded."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import torch

from editcli.distributed.team import Team
from editcli.editing.session import ModelSession, PilotSource
from editcli.errors import OptionError, RequestError, StateError
from editcli.evaluation.admission import Gate, thinking_warning, without_subject, without_targets
from editcli.formatting import size
from editcli.models.architectures import Architecture, Family
from editcli.models.fit import check_fit
from editcli.models.loading import (
    LoadedModel,
    Loading,
    ModelSource,
    bundled_folder,
    describe_model,
    open_model,
    resolve_model,
)
from editcli.models.tokens import Tokens
from editcli.plugin.interfaces import Component, Diagnostic, Editor, Site, Stabilizer
from editcli.plugin.manager import Plugins
from editcli.plugin.options import build, merge
from editcli.plugin.wrapping import give_wrapped
from editcli.presets.loader import load_preset
from editcli.presets.record import Preset, Settings
from editcli.records.edits import superseded
from editcli.records.requirements import check_resumable
from editcli.records.state import RunFolder
from editcli.reporting import Rejection, Reporter, Silent
from editcli.requests.reader import EditFile, conflicts, read_edits
from editcli.requests.schema import EditRequest
from editcli.requests.superseding import supersede
from editcli.runs.forecast import Footprint, check_memory
from editcli.runs.output import needed_bytes
from editcli.runs.resuming import Made, made, recorded_recipe
from editcli.settings.core import StatisticsOptions, TargetOptions
from editcli.settings.guards import BATCH_FIGURES, Guard, parse_guards
from editcli.settings.recipe import Recipe
from editcli.storage.checkpoint import Checkpoint
from editcli.storage.folders import may_write

DEFAULT_EDITOR = "rlsedit"
DEFAULT_BATCH = 100
MASTER_BYTES = 4
TRIAL_EDITS = 16
"""Edits whose targets a dry run optimises to estimate the time."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A run that is ready to load its model: checked edits, sites, components with their options."""

    recipe: Recipe
    file: EditFile
    requests: tuple[EditRequest, ...]
    rejected: tuple[Rejection, ...]
    conflicts: tuple[str, ...]
    """Warnings about edits that a later one contradicts, which can be used itself."""
    source: ModelSource
    config: Any
    families: tuple[Family, ...]
    preset: Preset
    sites: tuple[Site, ...]
    shapes: tuple[tuple[int, int], ...]
    editor: Editor
    stabilizers: tuple[Stabilizer, ...]
    gate: Gate
    """The conditions on every edit."""
    targets: TargetOptions
    statistics: StatisticsOptions
    guards: tuple[Guard, ...]
    batch_size: int
    target_tokens: int
    """Tokens of all prompts with their targets."""
    model_bytes: int = 0
    """Bytes of the edited copy on disk."""
    recoded: tuple[tuple[str, str, str], ...] = ()
    """Edited modules whose type cannot be written, with that type and the one in its place."""
    footprint: Footprint | None = None
    """The memory that the run takes; None for a model that is loaded already."""

    @property
    def routed(self) -> bool:
        """Whether routed experts are edited."""
        return self.editor.writes_experts

    def focused(self, loaded: LoadedModel) -> LoadedModel:
        """Return the loaded model of the plan with its architecture turned to the matrices that the plan edits."""
        return replace(loaded, architecture=replace(loaded.architecture, routed=self.routed))

    @property
    def target_layers(self) -> tuple[int, ...]:
        """The layers at which targets are optimised."""
        return self.layers if self.targets.per_layer else self.layers[-1:]

    @property
    def layers(self) -> tuple[int, ...]:
        """The edited layers."""
        return tuple(site.layer for site in self.sites)

    @property
    def components(self) -> tuple[Component, ...]:
        """The editor, the one that it wraps, and the stabilizers."""
        wrapped = () if self.editor.wrapped is None else (self.editor.wrapped,)
        return (self.editor, *wrapped, *self.stabilizers)

    @property
    def state_bytes(self) -> int:
        """Bytes of one snapshot's weights, a lower bound of its size."""
        return sum(MASTER_BYTES * rows * columns for rows, columns in self.shapes)


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan that ``--dry-run`` shows."""

    model: str
    preset: str
    label: str
    editor: str
    stabilizers: tuple[str, ...]
    edits: int
    rejected: tuple[Rejection, ...]
    batches: int
    batch_size: int
    sites: tuple[dict[str, Any], ...]
    tokens: int
    bytes: dict[str, int]
    """``model`` and ``disk`` in the output folder; in memory those of :class:`editcli.runs.forecast.Footprint`."""
    seconds: float | None
    """Estimated time for all targets, from one measured batch."""
    out: str
    memory: str = "not known"
    """The memory that the run takes, as one sentence."""
    warnings: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Return the plan as a JSON object."""
        record = {name: getattr(self, name) for name in self.__slots__}
        record["rejected"] = [{"id": r.id, "line": r.line, "reason": r.reason} for r in self.rejected]
        return record


def check(recipe: Recipe, plugins: Plugins, reporter: Reporter, *, file: EditFile | None = None) -> Planned:
    """Check everything that needs no weights: names, options, edits, folders, disk space, memory.

    ``file`` stands for the edits where they come from elsewhere than a file; it may be empty.
    """
    if recipe.resume:
        check_resumable(recipe.folder, plugins)
    file = file or read_requested(recipe, plugins)
    for warning in file.notes:
        reporter.warn(warning)
    # An output or a configuration that cannot be used is refused before weights are fetched.
    source = located(recipe, weights=False)
    check_output(recipe, source)
    if recipe.convert_bin:
        source = located(recipe)
    before = made(recipe, plugins)
    recipe = before.complete(recipe) if before else recipe
    base = described(recipe, source, plugins)
    if source.converted is None:
        located(recipe)
    warn_of_thinking(base.tokens, reporter)
    check_fit(base.checkpoint, base.model, reporter)
    planned = replace(plan_on(base, recipe, plugins, file, before=before), model_bytes=needed_bytes(base.checkpoint))
    check_disk(recipe.folder, planned.model_bytes + 2 * planned.state_bytes)
    return replace(planned, footprint=check_memory(planned, base, reporter))


def check_in_memory(
    recipe: Recipe, plugins: Plugins, reporter: Reporter, file: EditFile, *, held: LoadedModel | None
) -> Planned:
    """Check as :func:`check` does where nothing is written; ``held`` is the model where it is loaded already."""
    for warning in file.notes:
        reporter.warn(warning)
    base = held
    if base is None:
        base = described(recipe, located(recipe), plugins)
        check_fit(base.checkpoint, base.model, reporter)
    warn_of_thinking(base.tokens, reporter)
    return plan_on(base, recipe, plugins, file)


def tell_conflicts(planned: Planned, reporter: Reporter) -> None:
    """Warn about edits that a later one contradicts."""
    for warning in planned.conflicts:
        reporter.warn(warning)


def plan(recipe: Recipe, plugins: Plugins, reporter: Reporter | None = None) -> Plan:
    """Return what :func:`editcli.runs.apply.apply` would do; writes nothing and times one small batch."""
    reporter = reporter or Silent()
    planned = check(recipe, plugins, reporter)
    tell_conflicts(planned, reporter)
    seconds = _measured_seconds(planned, reporter) if planned.editor.needs_values else None
    return Plan(
        model=planned.source.name,
        preset=planned.preset.name,
        label=planned.preset.label,
        editor=planned.editor.name,
        stabilizers=tuple(part.name for part in planned.stabilizers),
        edits=len(planned.requests),
        rejected=planned.rejected,
        batches=math.ceil(len(planned.requests) / planned.batch_size),
        batch_size=planned.batch_size,
        sites=tuple(
            {"module": site.module, "layer": site.layer, "shape": list(shape)}
            for site, shape in zip(planned.sites, planned.shapes, strict=True)
        ),
        tokens=planned.target_tokens,
        bytes={
            "model": planned.model_bytes,
            "disk": planned.model_bytes + planned.state_bytes,
            **(planned.footprint.to_json() if planned.footprint else {}),
        },
        seconds=seconds,
        out=str(recipe.folder),
        memory=planned.footprint.sentence() if planned.footprint else "not known",
        warnings=(*planned.file.notes, *planned.conflicts),
    )


def _measured_seconds(planned: Planned, reporter: Reporter) -> float:
    loaded = planned.focused(open_planned(planned))
    session = ModelSession(loaded, planned.layers, options=planned.targets, reporter=reporter, seed=planned.recipe.seed)
    sample = planned.requests[:TRIAL_EDITS]
    started = time.perf_counter()
    for stage in session.stages:
        stage.values(sample)
    return (time.perf_counter() - started) * len(planned.requests) / len(sample)


def located(recipe: Recipe, *, weights: bool = True) -> ModelSource:
    """Return where the model of a recipe lies, fetched when it is a hub id."""
    return resolve_model(
        recipe.model,
        revision=recipe.revision,
        weights=weights,
        code=recipe.trust_remote_code,
        convert=recipe.convert_bin,
    )


def warn_of_thinking(tokens: Tokens, reporter: Reporter) -> None:
    """Warn where the chat template leaves the model thinking when the answer begins."""
    warning = thinking_warning(tokens)
    if warning is not None:
        reporter.warn(warning)


def read_requested(recipe: Recipe, plugins: Plugins) -> EditFile:
    """Read the edits file of a recipe."""
    skip = recipe.on_error == "skip"
    return read_edits(recipe.edits, skip_bad=skip, limit=recipe.limit, formats=plugins.formats())


def described(recipe: Recipe, source: ModelSource, plugins: Plugins) -> LoadedModel:
    """Return the model of a recipe without its weights."""
    return describe_model(source, Loading.of(recipe), plugins.families())


def plan_on(
    base: LoadedModel, recipe: Recipe, plugins: Plugins, file: EditFile, *, before: Made | None = None
) -> Planned:
    """Plan a run on a model that may be loaded already; looks at no folder to write to.

    ``before`` is how a resumed run was made; it decides where ``recipe`` leaves a choice open.
    """
    guards = parse_guards(recipe.stop_if)
    skip = recipe.on_error == "skip"
    architecture = base.architecture
    preset, name, settings = _method(recipe, base, plugins, before)
    editor = component(plugins, "editor", name, settings)
    architecture = replace(architecture, routed=editor.writes_experts)
    gate = _gate(recipe, base, editor, settings, plugins)
    sites = choose_sites(recipe, preset, architecture, base.checkpoint, editor, per_layer=gate.targets.per_layer)
    requests, rejected, total = usable(file, gate, skip_bad=skip)
    check_guards(guards, requests, measured=recipe.evaluate)
    stabilizers = tuple(component(plugins, "stabilizer", name, settings) for name in recipe.stabilizers)
    _refuse_mixing(editor, stabilizers)
    return Planned(
        recipe=recipe,
        file=file,
        requests=requests,
        rejected=rejected,
        conflicts=_conflicts(file, requests, rejected),
        source=base.source,
        config=base.model.config,
        families=plugins.families(),
        preset=preset,
        sites=sites,
        shapes=tuple(architecture.shape(site.layer) for site in sites),
        editor=editor,
        stabilizers=stabilizers,
        gate=gate,
        targets=gate.targets,
        statistics=build(StatisticsOptions, settings.get("statistics", {}), owner="statistics"),
        guards=guards,
        batch_size=recipe.batch_size or (1 if editor.single_site else DEFAULT_BATCH),
        target_tokens=total,
        recoded=tuple(_recoded(recipe, sites, base.checkpoint)),
    )


def open_planned(planned: Planned) -> LoadedModel:
    """Load the model of a plan."""
    split = planned.recipe.parallel == "tensor"
    return open_model(planned.source, Loading.of(planned.recipe), families=planned.families, split=split)


def settings_for(editor: str, preset: Preset, user: Settings, plugins: Plugins) -> dict[str, dict[str, Any]]:
    """Merge the settings that the editor suggests for other components, the preset's and the user's, weakest first."""
    kind = cast("type[Editor]", plugins.find("editor", editor).component)
    return merge(kind.suggests, preset.settings, user)


def check_guards(guards: Sequence[Guard], requests: Sequence[EditRequest], *, measured: bool) -> None:
    """Refuse a guard that could never fire: silence would look like safety."""
    watched = [guard for guard in guards if guard.figure in BATCH_FIGURES]
    if watched and not measured:
        raise OptionError(f"--stop-if {watched[0]} has to measure; leave out --no-eval")
    if watched and requests and not any(request.target_true for request in requests):
        raise OptionError(f"--stop-if {watched[0]} compares with target_true, which no edit has; add it to the edits")


def component(plugins: Plugins, kind: str, name: str, settings: Any) -> Any:
    """Build an editor or stabilizer with its options, and the editor that it wraps."""
    kind_class = plugins.find(kind, name).component
    made = kind_class(build(kind_class.Options, settings.get(name, {}), owner=name))
    give_wrapped(made, settings, plugins)
    return made


def diagnostics(recipe: Recipe, plugins: Plugins) -> tuple[Diagnostic, ...]:
    """Build every installed diagnostic; ``--diagnose-every`` is the ``every`` of those that have such an option."""
    settings = dict(recipe.settings)
    for name, registered in plugins.all("diagnostic").items():
        asked = {field.name for field in dataclasses.fields(registered.component.Options)}
        if recipe.diagnose_every is not None and "every" in asked:
            settings[name] = {"every": recipe.diagnose_every, **settings.get(name, {})}
    return tuple(component(plugins, "diagnostic", name, settings) for name in plugins.all("diagnostic"))


def choose_sites(
    recipe: Recipe,
    preset: Preset,
    architecture: Architecture,
    checkpoint: Checkpoint,
    editor: Editor,
    *,
    per_layer: bool = False,
) -> tuple[Site, ...]:
    """Return the sites to edit: the layers asked for, else the preset's; only the last for a single-site editor.

    ``per_layer`` leaves the first and the last of them, which have targets of their own: BLUE.
    """
    layers = recipe.layers or preset.layers_for((editor.wrapped or editor).name)
    if not layers:
        raise OptionError(f"the model has only {architecture.layers} layers, too few to guess sites; pass --layers")
    if max(layers) >= architecture.layers:
        raise OptionError(f"layer {max(layers)} does not exist: the model has layers 0-{architecture.layers - 1}")
    sites = tuple(architecture.site(layer) for layer in layers)
    if editor.single_site:
        sites = sites[-1:]
    elif per_layer and editor.needs_values:
        sites = tuple(dict.fromkeys((sites[0], sites[-1])))
    for site in sites:
        _refuse_other_matrix(site, editor)
        checkpoint.weight_of(site.module)
    return sites


def _refuse_other_matrix(site: Site, editor: Editor) -> None:
    """Raise :class:`OptionError` for experts that the editor does not write, and for one that writes nothing else."""
    if bool(site.experts) == editor.writes_experts:
        return
    if site.experts:
        raise OptionError(
            f"layer {site.layer} is a mixture of {site.experts} experts without a shared one, which {editor.name} does "
            "not write; use --editor moeedit"
        )
    raise OptionError(
        f"layer {site.layer} has no routed experts, which are all that {editor.name} writes; choose other --layers or "
        "another --editor"
    )


def _refuse_mixing(editor: Editor, stabilizers: Sequence[Stabilizer]) -> None:
    """Raise :class:`OptionError` for a stabilizer that would change experts that no edit is routed to."""
    mixing = next((part.name for part in stabilizers if part.mixes_inputs), None)
    if editor.writes_experts and mixing is not None:
        raise OptionError(
            f"{mixing} filters updates along directions that run through all experts of a layer, so it would change "
            f"experts that no edit is routed to; leave it out with {editor.name}"
        )


def _recoded(recipe: Recipe, sites: Sequence[Site], checkpoint: Checkpoint) -> Iterator[tuple[str, str, str]]:
    """Yield the sites that are written in another type than they have, with both types; refuse what cannot be."""
    for site in sites:
        kinds = checkpoint.recoded(checkpoint.weight_of(site.module), save_dtype(recipe))
        if kinds is not None:
            yield site.module, *kinds


def save_dtype(recipe: Recipe) -> torch.dtype | None:
    """Return the type in which edited weights are to be saved; None for the checkpoint's own."""
    return None if recipe.save_dtype == "auto" else getattr(torch, recipe.save_dtype)


def gate_of(recipe: Recipe, base: LoadedModel, plugins: Plugins) -> Gate:
    """Return what decides whether an edit can be used in a run of ``recipe``; reads no weights."""
    _, name, settings = _method(recipe, base, plugins)
    return _gate(recipe, base, component(plugins, "editor", name, settings), settings, plugins)


def _method(
    recipe: Recipe, base: LoadedModel, plugins: Plugins, before: Made | None = None
) -> tuple[Preset, str, dict[str, dict[str, Any]]]:
    """Return the preset, the editor's name and the settings of all components."""
    preset = load_preset(base.model.config, base.architecture, recipe.preset)
    preset = before.within(preset, given=recipe.preset is not None) if before else preset
    name = recipe.editor or preset.editor or DEFAULT_EDITOR
    return preset, name, settings_for(name, preset, recipe.settings, plugins)


def _gate(recipe: Recipe, base: LoadedModel, editor: Editor, settings: Mapping[str, Any], plugins: Plugins) -> Gate:
    targets = build(TargetOptions, settings.get("targets", {}), owner="targets")
    editors = [cast("type[Editor]", one.component) for one in plugins.all("editor").values()]
    return Gate(
        tokens=base.tokens,
        editor=editor,
        targets=targets,
        without_subject=without_subject(editors),
        without_targets=without_targets(editors),
        measured=recipe.evaluate,
    )


def usable(file: EditFile, gate: Gate, *, skip_bad: bool) -> tuple[tuple[EditRequest, ...], tuple[Rejection, ...], int]:
    """Return the edits to write, what was rejected or superseded, and the number of tokens."""
    requests: list[EditRequest] = []
    rejected = [Rejection(id=f"line-{e.line}", reason=e.reason, line=e.line) for e in file.rejected]
    total = 0
    for request in file.requests:
        try:
            total += len(gate.admit(request).ids)
            requests.append(request)
        except RequestError as error:
            if not skip_bad:
                raise
            rejected.append(Rejection(id=request.id, reason=error.reason, line=error.line))
    if not requests and rejected:
        first = rejected[0]
        raise RequestError(
            f"no edit is usable; the first was refused because {first.reason}", file=file.source, line=first.line
        )
    # Only an edit that can be used itself supersedes another.
    in_force, replaced = supersede(requests)
    return tuple(in_force), (*rejected, *map(superseded, replaced)), total


def _conflicts(file: EditFile, requests: Sequence[EditRequest], rejected: Sequence[Rejection]) -> tuple[str, ...]:
    """Return a warning for every edit that a later one contradicts, of those that can be used."""
    known = {request.id for request in requests} | {one.id for one in rejected if one.superseded_by is not None}
    return tuple(conflicts(request for request in file.requests if request.id in known))


def check_output(recipe: Recipe, source: ModelSource) -> None:
    """Refuse an output folder that would harm something: the base, another's folder, an unwritable place."""
    out, run = recipe.folder, RunFolder(recipe.folder)
    run.refuse_links()
    if out.is_symlink() and (recipe.overwrite or not out.exists()):
        raise StateError(f"{out} is a symbolic link to {out.readlink()}; pass the folder itself as --out")
    if out.exists() and not out.is_dir():
        raise StateError(f"{out} is a file; choose another --out")
    folder = (source.folder if source.converted is None else source.converted.origin).resolve()
    if out.resolve() == folder or out.resolve() in folder.parents:
        raise StateError(f"{out} holds the base model itself; choose another --out")
    if recipe.resume and not (run.is_run or run.is_fresh):
        raise StateError(f"{out} is not a run of editcli, so there is nothing to resume; leave out --resume")
    if not recipe.resume and out.is_dir() and any(out.iterdir()) and not run.is_fresh:
        if not recipe.overwrite:
            hint = "--resume continues it, --overwrite replaces it" if run.is_run else "choose another --out"
            raise StateError(f"{out} exists and is not empty; {hint}")
        if not run.is_run:
            raise StateError(f"{out} is not a run of editcli, so --overwrite leaves it alone; choose another --out")
    parent = _existing(out)
    if not parent.is_dir():
        raise StateError(f"{out} cannot be made: {parent} is a file; choose another --out")
    if not may_write(parent):
        raise StateError(f"{out} cannot be written: no permission in {parent}; choose another --out")


def check_disk(out: Path, needed: int) -> None:
    """Refuse to start when the output cannot fit."""
    free = shutil.disk_usage(_existing(out)).free
    if free < needed:
        raise StateError(f"{out} needs about {size(needed)}, but its disk has {size(free)} free; choose another --out")


def with_clock(recipe: Recipe, team: Team | None = None, *, folders: Iterable[Path] = ()) -> Recipe:
    """Return the recipe with a time for its chat template: of the run that is resumed, of ``folders``, else now."""
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
    return None if recipe is None else recipe.template_clock


def pilot_source(requests: Sequence[EditRequest]) -> PilotSource:
    """Return what NAS calibrates on: the edits themselves, then the bundled pilot prompts, each mixed by their hash.

    A file is often sorted by relation, and calibrating ends once enough edits were measured, so the first ones of a
    file would stand for the rest.
    """
    path = bundled_folder() / "pilots.jsonl"
    # Components read keys and values of pilots at their subjects.
    edits = _mixed([request for request in requests if request.has_subject])
    if not path.is_file():
        return PilotSource(edits, f"{len(edits)} edits of this run")
    bundled = _mixed(read_edits(path).requests)
    return PilotSource((*edits, *bundled), f"the {len(edits)} edits of this run, then {len(bundled)} bundled prompts")


def _mixed(requests: Sequence[EditRequest]) -> tuple[EditRequest, ...]:
    """Return edits in an order that their content alone decides."""
    return tuple(sorted(requests, key=lambda request: request.digest))


def _existing(path: Path) -> Path:
    """Return the nearest parent of ``path`` that exists, or the path itself."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
