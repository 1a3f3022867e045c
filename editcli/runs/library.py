"""The library's front door: edit a model from a program, all at once or batch by batch.

:func:`edit` and :class:`Stream` run what the command line runs. With ``out`` the result is a run folder as ``editcli
apply`` writes it, which can be resumed, undone and repeated; without it nothing is written and the result is the model
in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from editcli.edits import EditFile, EditRequest
from editcli.errors import StateError
from editcli.evaluation.generation import generate
from editcli.plugins import Plugins
from editcli.report import Reporter, RunReport
from editcli.runs.asked import SOURCE, Loadable, ask, gather, read_request, refuse_full
from editcli.runs.batch import BatchReport
from editcli.runs.memory import Saved, put_back
from editcli.runs.stream import Stream as Journal

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from editcli.recipe import Choices


class Edited:
    """A model that was edited: what :func:`edit` returns."""

    def __init__(self, run: Saved, report: RunReport):
        self._run = run
        self.report = report
        """What was applied and what it measured; ``report.status`` is ``done``, ``stopped`` or ``interrupted``."""

    def __repr__(self) -> str:
        report = self.report
        method = "+".join((report.editor, *report.stabilizers))
        return f"<Edited {report.model}: {report.applied} of {report.read} edits with {method}, {report.status}>"

    @property
    def model(self) -> Any:
        """The edited transformers model; the very object that was passed, if one was."""
        return self._run.loaded.model

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._run.loaded.tokens.tokenizer

    def complete(self, prompt: str, *, tokens: int = 10) -> str:
        """Return the likeliest continuation of ``prompt``, at most ``tokens`` tokens long."""
        return generate(self._run.loaded, [prompt], tokens=tokens, top_k=1)[prompt].text

    def save(self, folder: str | Path) -> Path:
        """Write model and tokenizer as a plain Hugging Face folder, and return it.

        A model that was read from files is written with only the edited tensors' bytes new, and verified; one that was
        passed as an object is written by its own ``save_pretrained``. A run that can be resumed and undone is only
        written with ``out``. Raises :class:`editcli.StateError` where ``folder`` exists and is not empty.
        """
        refuse_full(Path(folder))
        return self._run.export(Path(folder))

    def undo(self) -> None:
        """Give the model in memory back the weights that it had before the edits, bit by bit; folders stay."""
        put_back(self._run.loaded, self._run.planned.sites)
        self._run.weights = {}


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
        run = asked.start(stack, gather(edits, asked))
        try:
            report = run.go()
            run.session.restore(run.weights)
            edited = Edited(run, report)
            if asked.held is not None and out is not None:
                edited.save(out)
        except BaseException:
            if asked.held is not None:
                put_back(asked.held, run.planned.sites)
            raise
    return edited


class Stream:
    """Edits a model batch by batch; use it as a context manager::

        with Stream("out", model="my-model", editor="alphaedit", stabilizers=["nas"]) as stream:
            stream.apply([{"prompt": "The capital of {} is", "subject": "France", "target_new": "Lyon"}])

    ``out`` is the run folder, which is locked inside the block. Every batch is durable when :meth:`apply` returns;
    leaving the block without an error writes the model folder; with ``resume=True`` a stream goes on. With ``out=None``
    the stream lives in memory, and ``model`` may be a loaded transformers model with its ``tokenizer``, which keeps
    the edits after the block. ``choices`` are the other settings of :class:`editcli.Recipe`, except that nothing is
    measured along the way unless ``evaluate=True``. Raises :class:`editcli.EditError`.
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
        # What is measured along the way is the program's own business unless it asks.
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
        self._open: tuple[Saved, Journal] | None = None
        self._exit = ExitStack()

    def __enter__(self) -> Stream:
        with ExitStack() as stack:
            run = self._asked.start(stack, EditFile(SOURCE, "", (), (), ()))
            run.open()
            stream = run.stream()
            run.begin(stream)
            for batch in run.todo():
                stream.apply(batch)
            self._open, self._exit = (run, stream), stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._exit:
                run, stream = self._opened()
                if error is None:
                    self.save()
                    run.session.restore(run.weights)
                elif stream.whole:
                    stream.save()
        finally:
            # Also where saving failed: the lock is gone, and somebody else may go on with the folder.
            self._open = None

    def __repr__(self) -> str:
        state = "not open" if self._open is None else f"{len(self.edits)} edits"
        return f"<Stream in {self._asked.recipe.folder}: {state}>"

    @property
    def model(self) -> Any:
        """The model under edit, with everything applied so far."""
        return self._opened()[0].loaded.model

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._opened()[0].loaded.tokens.tokenizer

    @property
    def edits(self) -> Sequence[EditRequest]:
        """The edits in force."""
        return tuple(self._opened()[1].position.requests)

    def apply(self, batch: Sequence[EditRequest | Mapping[str, Any]]) -> BatchReport:
        """Write one batch of requests, or of objects of the edits schema; on an error the weights are as before.

        Raises :class:`editcli.RequestError` for an edit that cannot be used and :class:`editcli.GuardError` when a
        guard of ``stop_if`` holds.
        """
        run, stream = self._opened()
        requests = [read_request(edit, SOURCE) for edit in batch]
        for request in requests:
            run.planned.gate.admit(request)
        return stream.apply(requests)

    def save(self) -> RunReport:
        """Write and verify the model folder as it stands, and a snapshot; in memory, only report."""
        run, stream = self._opened()
        stream.save()
        run.read = stream.taken
        return run.finish(stream, None)

    def _opened(self) -> tuple[Saved, Journal]:
        if self._open is None:
            raise StateError(f"the stream in {self._asked.recipe.folder} is not open; use it in a 'with' block")
        return self._open


EditStream = Stream
"""The name of :class:`Stream` in earlier versions."""
