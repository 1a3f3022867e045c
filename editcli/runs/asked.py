"""Turn what a program passes to the library into a recipe, a model and edits, and start a run with them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from editcli.edits import Collector, EditFile, EditRequest, from_record, refuse_deep
from editcli.errors import ModelError, OptionError, RequestError, StateError
from editcli.formats import load_formats
from editcli.models.fit import check_fit
from editcli.plugins import Plugins, load_plugins
from editcli.recipe import Recipe, parse_layers
from editcli.report import Reporter, Silent
from editcli.request import kind_of
from editcli.runs import planning
from editcli.runs.apply import writing
from editcli.runs.clock import Clock
from editcli.runs.conversation import with_clock
from editcli.runs.memory import MEMORY, HeldModel, Saved, Unsaved, borrowed, hold
from editcli.runs.remarks import tell_conflicts
from editcli.runs.state import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Loadable: TypeAlias = "str | Path | PreTrainedModel | None"
"""A folder, a hub id, None for the bundled model, or a model that is loaded already."""

SOURCE = "<program>"
"""What stands where a run of the command line names its edits file."""

_OF_LOADING = ("revision", "device", "device_map", "dtype", "trust_remote_code")
_OF_FOLDERS = ("resume", "overwrite", "checkpoint_every")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a program asked for; ``kept`` says that the result goes into a run folder."""

    recipe: Recipe
    plugins: Plugins
    reporter: Reporter
    held: HeldModel | None
    kept: bool

    def start(self, stack: ExitStack, file: EditFile) -> Saved:
        """Plan the run and take what it needs, until ``stack`` is closed; nothing is loaded yet."""
        clock = Clock()
        with clock.spent("load"):
            planned = self._plan(file)
        tell_conflicts(planned, self.reporter)
        stack.enter_context(writing(self.recipe.folder))
        if self.kept:
            folder = RunFolder(self.recipe.folder)
            stack.enter_context(folder.locked())
            return Saved(planned, folder, self.plugins, self.reporter, clock)
        if self.held is not None:
            stack.enter_context(borrowed(self.held.model))
        return Unsaved(planned, self.plugins, self.reporter, clock, held=self.held)

    def _plan(self, file: EditFile) -> planning.Planned:
        if self.kept:
            return planning.check(self.recipe, self.plugins, self.reporter, file=file)
        self.recipe.check(self.plugins)
        for warning in file.notes:
            self.reporter.warn(warning)
        base = self.held
        if base is None:
            source = planning.located(self.recipe)
            base = planning.described(self.recipe, source, self.plugins)
            check_fit(base.checkpoint, base.model, self.reporter)
        planning.warn_of_thinking(base.tokens, self.reporter)
        return planning.plan_on(base, self.recipe, self.plugins, file)


def ask(
    model: Loadable,
    edits: Any,
    *,
    tokenizer: Any,
    out: str | Path | None,
    plugins: Plugins | None,
    reporter: Reporter | None,
    choices: Mapping[str, Any],
    streaming: bool = False,
) -> Asked:
    """Check what a program passes; raises :class:`editcli.EditError` for what cannot go together."""
    plugins = plugins or load_plugins()
    named = model is None or isinstance(model, (str, Path))
    _refuse_idle(choices, named=named, kept=out is not None)
    if named and tokenizer is not None:
        raise OptionError("tokenizer= goes with a model that is loaded already; a folder or a hub id has its own")
    if not named and tokenizer is None:
        raise ModelError("pass tokenizer= with a model that is loaded already; an edit is located by its tokens")
    if out is not None and not named:
        if streaming:
            raise OptionError("a stream into a folder reads its base from files; pass the model's folder, or out=None")
        refuse_full(Path(out))
    recipe = _recipe(edits if isinstance(edits, (str, Path)) else SOURCE, out, choices)
    if recipe.parallel == "tensor":
        raise OptionError("parallel='tensor' needs several processes; run 'editcli apply' with torchrun")
    recipe = with_clock(recipe.with_preset_read())
    held = None
    if not named:
        families = planning.brought_families(plugins)
        held = hold(model, tokenizer, families=families, chat_template=recipe.chat)
    name = held.source.name if held else model
    recipe = _with(recipe, model=None if name is None else str(name))
    return Asked(recipe, plugins, reporter or Silent(), held, kept=out is not None and named)


def gather(edits: str | Path | Sequence[EditRequest | Mapping[str, Any]], asked: Asked) -> EditFile:
    """Read the edits that a program passes, as a file's would be read."""
    if isinstance(edits, (str, Path)):
        return planning.read_requested(asked.recipe, asked.plugins)
    skip = asked.recipe.on_error == "skip"
    collected = Collector(skip_bad=skip, limit=asked.recipe.limit, formats=load_formats(asked.plugins))
    for number, edit in enumerate(_listed(edits)):
        place = f"edits[{number}]"
        collected.add(lambda edit=edit, place=place: _record(edit, place), file=place, line=None)
        if collected.full:
            break
    if not collected.requests and not collected.rejected:
        raise RequestError("there is no edit; pass objects of the edits schema, or the path of an edits file")
    return collected.result(SOURCE, "")


def read_request(edit: EditRequest | Mapping[str, Any], place: str) -> EditRequest:
    """Build a request from what a program passes; raise :class:`RequestError` when it is none."""
    return edit if isinstance(edit, EditRequest) else from_record(_record(edit, place), file=place)


def refuse_full(folder: Path) -> None:
    """Raise :class:`StateError` unless ``folder`` is a new or an empty one."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise StateError(f"{folder} exists and is not an empty folder; choose another one")


def _listed(edits: Any) -> Iterable[Any]:
    if isinstance(edits, (Mapping, EditRequest)):
        raise RequestError("edits must be a list; write [...] around a single one")
    return edits


def _record(edit: Any, place: str) -> dict[str, Any]:
    """Return an edit as its line of a file would be read, so that it can be recorded."""
    if isinstance(edit, EditRequest):
        return edit.to_json()
    if not isinstance(edit, Mapping):
        raise RequestError(f"an edit is an object of the edits schema, not {kind_of(edit)}", file=place)
    try:
        return refuse_deep(json.loads(json.dumps(dict(edit), allow_nan=False)), file=place, line=None)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"this edit cannot be written as JSON: {error}", file=place) from error


def _recipe(edits: str | Path, out: str | Path | None, choices: Mapping[str, Any]) -> Recipe:
    """Build the recipe; names may come as one text or as any sequence, layers also as ``"4-8"``."""
    values = dict(choices)
    for name in ("stabilizers", "stop_if"):
        if name in values:
            given = values[name]
            values[name] = (given,) if isinstance(given, str) else tuple(given)
    if values.get("layers") is not None:
        given = values["layers"]
        values["layers"] = parse_layers(given) if isinstance(given, str) else tuple(given)
    return Recipe.from_json({**values, "edits": str(edits), "out": MEMORY if out is None else str(out)})


def _with(recipe: Recipe, *, model: str | None) -> Recipe:
    return Recipe.from_json({**recipe.to_json(), "model": model})


def _refuse_idle(choices: Mapping[str, Any], *, named: bool, kept: bool) -> None:
    """Refuse settings that would do nothing: silence would look like consent."""
    for name in _OF_LOADING:
        if name in choices and not named:
            raise OptionError(f"{name}= says how editcli loads a model, but this one is loaded already; leave it out")
    for name in _OF_FOLDERS:
        if name in choices and not (kept and named):
            raise OptionError(
                f"{name}= belongs to a run folder, but this run has none; pass out= with a model's folder"
            )
