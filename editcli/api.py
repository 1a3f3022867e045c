"""The Python interface: edit a model from a program, all at once or batch by batch.

:func:`edit` and :class:`Stream` run what the command line runs. With ``out`` the result is a run folder as ``editcli
apply`` writes it, which can be resumed, undone and repeated; without it nothing is written and the result is the model
in memory. :func:`ask` turns what a program passes into a recipe, a model and edits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

from editcli.errors import ModelError, OptionError, RequestError, StateError
from editcli.evaluation.generation import generate
from editcli.models.loading import LoadedModel
from editcli.plugin.manager import Plugins, load_plugins
from editcli.records.journal import BatchRecord
from editcli.records.requirements import check_resumable
from editcli.records.state import RunFolder
from editcli.reporting import Reporter, RunReport
from editcli.requests.reader import Collector, EditFile, refuse_deep
from editcli.requests.schema import EditRequest, from_record, kind_of
from editcli.runs import planning
from editcli.runs.apply import run
from editcli.runs.context import Context, writing
from editcli.runs.ending import Finished, finish
from editcli.runs.memory import MEMORY, borrowed, hold, put_back, unedited
from editcli.runs.opening import Job, Opened, begin, claimed, load, new
from editcli.runs.store import RunStore
from editcli.settings.recipe import Recipe, parse_layers
from editcli.settings.setting import settings_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import Unpack

    from editcli.settings.recipe import Choices


class Edited:
    """A model that was edited: what :func:`edit` returns."""

    def __init__(self, finished: Finished):
        self._finished = finished
        self.report = finished.report
        """The applied edits and their figures; ``report.status`` is ``done``, ``stopped`` or ``interrupted``."""

    def __repr__(self) -> str:
        report = self.report
        method = "+".join((report.editor, *report.stabilizers))
        return f"<Edited {report.model}: {report.applied} of {report.read} edits with {method}, {report.status}>"

    @property
    def model(self) -> Any:
        """The edited transformers model; the very object that was passed, if one was."""
        return self._finished.opened.base.loaded.model

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._finished.opened.base.loaded.tokens.tokenizer

    def complete(self, prompt: str, *, tokens: int = 10) -> str:
        """Return the likeliest continuation of ``prompt``, at most ``tokens`` tokens long."""
        return generate(self._finished.opened.base.loaded, [prompt], tokens=tokens, top_k=1)[prompt].text

    def save(self, folder: str | Path) -> Path:
        """Write model and tokenizer as a plain Hugging Face folder, and return it.

        A model that was read from files is written with only the edited tensors' bytes new, and verified; one that was
        passed as an object is written by its own ``save_pretrained``. A run that can be resumed and undone is only
        written with ``out``. Raises :class:`editcli.StateError` where ``folder`` exists and is not empty.
        """
        refuse_full(Path(folder))
        self._finished.export(Path(folder))
        return Path(folder)

    def undo(self) -> None:
        """Give the model in memory back the weights that it had before the edits, bit by bit; folders stay."""
        opened = self._finished.opened
        put_back(opened.base.loaded, opened.job.planned.sites)
        self._finished = replace(self._finished, weights={})


def edit(
    model: Loadable = None,
    edits: str | Path | Sequence[EditRequest | Mapping[str, Any]] = (),
    *,
    tokenizer: Any = None,
    out: str | Path | None = None,
    plugins: Plugins | None = None,
    reporter: Reporter | None = None,
    **choices: Unpack[Choices],
) -> Edited:
    """Write facts into a model and return it with a report of what happened::

        fact = {"prompt": "The capital of {} is", "subject": "France", "target_new": "Lyon"}
        edited = editcli.edit("gpt2-xl", [fact], editor="memit", stabilizers=["nas"])
        edited.complete("The capital of France is")

    ``model`` is a folder, a hub id, None for the bundled model, or a loaded transformers model with its ``tokenizer``;
    a loaded one is edited in place, where it is. ``edits`` are objects of the edits schema, or the path of an edits
    file. ``choices`` are the other settings of :class:`editcli.Recipe`.

    Nothing is written but the cache of second moments, unless ``out`` names a folder. When a guard of ``stop_if``
    holds the status is ``stopped`` and the model keeps the batches before. Raises :class:`editcli.EditError`; a model
    that was passed in is then as it was.
    """
    asked = ask(model, edits, tokenizer=tokenizer, out=out, plugins=plugins, reporter=reporter, choices=choices)
    with ExitStack() as stack:
        job = asked.start(stack, gather(edits, asked))
        try:
            finished = run(job)
            finished.read_out()
            edited = Edited(finished)
            if asked.held is not None and out is not None:
                edited.save(out)
        except BaseException:
            if asked.held is not None:
                put_back(asked.held, job.planned.sites)
            raise
    return edited


class Stream:
    """Edits a model batch by batch; use it as a context manager::

        with Stream("out", model="my-model", editor="alphaedit", stabilizers=["nas"]) as stream:
            stream.apply([{"prompt": "The capital of {} is", "subject": "France", "target_new": "Lyon"}])

    ``out`` is the run folder, which is locked inside the block. Every batch is durable when :meth:`apply` returns;
    leaving the block without an error writes the model folder. With ``resume=True`` a stream continues. With
    ``out=None`` it lives in memory, and ``model`` may be a loaded transformers model with its ``tokenizer``, which
    keeps the edits after the block. ``choices`` are the other settings of :class:`editcli.Recipe`; nothing is measured
    along the way unless ``evaluate=True``. Raises :class:`editcli.EditError`.
    """

    def __init__(
        self,
        out: str | Path | None = None,
        *,
        model: Loadable = None,
        tokenizer: Any = None,
        plugins: Plugins | None = None,
        reporter: Reporter | None = None,
        **choices: Unpack[Choices],
    ):
        # A program measures along the way by itself unless it asks for ``evaluate``.
        settings = {"evaluate": False, **choices}
        self._asked = ask(
            model,
            SOURCE,
            tokenizer=tokenizer,
            out=out,
            plugins=plugins,
            reporter=reporter,
            choices=settings,
            streaming=True,
        )
        self._open: Opened | None = None
        self._exit = ExitStack()

    def __enter__(self) -> Stream:
        with ExitStack() as stack:
            job = self._asked.start(stack, EditFile(SOURCE, "", (), (), ()))
            opened = begin(job, load(job))
            for batch in job.schedule.batches:
                opened.stream.apply(batch)
            self._open, self._exit = opened, stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._exit:
                opened = self._opened()
                if error is None:
                    self._finish().read_out()
                elif opened.stream.whole:
                    opened.stream.save()
        finally:
            # Also where saving failed: the lock is gone, and another process may continue in the folder.
            self._open = None

    def __repr__(self) -> str:
        state = "not open" if self._open is None else f"{len(self.edits)} edits"
        return f"<Stream in {self._asked.recipe.folder}: {state}>"

    @property
    def model(self) -> Any:
        """The model under edit, with everything applied so far."""
        return self._opened().base.loaded.model

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._opened().base.loaded.tokens.tokenizer

    @property
    def edits(self) -> Sequence[EditRequest]:
        """The edits in force."""
        return tuple(self._opened().stream.position.requests)

    def apply(self, batch: Sequence[EditRequest | Mapping[str, Any]]) -> BatchRecord:
        """Write one batch of requests, or of objects of the edits schema; on an error the weights are as before.

        Raises :class:`editcli.RequestError` for an edit that cannot be used and :class:`editcli.GuardError` when a
        guard of ``stop_if`` holds.
        """
        opened = self._opened()
        requests = [read_request(edit, SOURCE) for edit in batch]
        for request in requests:
            opened.job.planned.gate.admit(request)
        return opened.stream.apply(requests)

    def save(self) -> RunReport:
        """Write and verify the model folder as it stands, and a snapshot; in memory, only report."""
        return self._finish().report

    def _finish(self) -> Finished:
        opened = self._opened()
        opened.stream.save()
        return finish(opened, read=opened.stream.taken)

    def _opened(self) -> Opened:
        if self._open is None:
            raise StateError(f"the stream in {self._asked.recipe.folder} is not open; use it in a 'with' block")
        return self._open


EditStream = Stream
"""The name of :class:`Stream` in earlier versions."""


Loadable: TypeAlias = "str | Path | PreTrainedModel | None"
"""A folder, a hub id, None for the bundled model, or a model that is loaded already."""

SOURCE = "<program>"
"""The name of the edits file where a program passes the edits."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The run that a program asked for; ``kept`` says that the result goes into a run folder."""

    recipe: Recipe
    plugins: Plugins
    reporter: Reporter | None
    held: LoadedModel | None
    kept: bool

    def start(self, stack: ExitStack, file: EditFile) -> Job:
        """Plan the run and take what it needs, until ``stack`` is closed; nothing is loaded yet."""
        context = Context.of(self.plugins, self.reporter)
        with context.clock.spent("load"):
            if self.kept:
                planned = planning.check(self.recipe, self.plugins, context.reporter, file=file)
            else:
                planned = planning.check_in_memory(self.recipe, self.plugins, context.reporter, file, held=self.held)
        planning.tell_conflicts(planned, context.reporter)
        if self.kept:
            return stack.enter_context(claimed(planned, context))
        stack.enter_context(writing(self.recipe.folder))
        open_model = partial(planning.open_planned, planned)
        if self.held is not None:
            stack.enter_context(borrowed(self.held.model))
            open_model = partial(unedited, self.held, planned.sites)
        store = RunStore(RunFolder(self.recipe.folder), writes=False, kept=False)
        return Job(planned, open_model, store, new(planned, store), context)


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
    _refuse_idle(choices, named=named, saved=out is not None)
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
    if recipe.resume:
        check_resumable(recipe.folder, plugins)
    recipe = planning.with_clock(recipe.resolved(plugins).with_preset_read())
    held = None
    if not named:
        families = plugins.families()
        held = hold(model, tokenizer, families=families, chat_template=recipe.chat)
    name = held.source.name if held else model
    recipe = replace(recipe, model=None if name is None else str(name))
    return Asked(recipe, plugins, reporter, held, kept=out is not None and named)


def gather(edits: str | Path | Sequence[EditRequest | Mapping[str, Any]], asked: Asked) -> EditFile:
    """Read the edits that a program passes, as a file's would be read."""
    if isinstance(edits, (str, Path)):
        return planning.read_requested(asked.recipe, asked.plugins)
    skip = asked.recipe.on_error == "skip"
    collected = Collector(skip_bad=skip, limit=asked.recipe.limit, formats=asked.plugins.formats())
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


def _refuse_idle(choices: Mapping[str, Any], *, named: bool, saved: bool) -> None:
    """Refuse settings that would do nothing: silence would look like consent."""
    declared = settings_of(Recipe)
    for name in choices:
        if name in declared and declared[name].loads and not named:
            raise OptionError(f"{name}= says how editcli loads a model, but this one is loaded already; leave it out")
        if name in declared and declared[name].folder and not (saved and named):
            raise OptionError(
                f"{name}= belongs to a run folder, but this run has none; pass out= with a model's folder"
            )
