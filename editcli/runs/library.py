"""A stream of edits for programs: the same journal, snapshots and guards as the command line's, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from editcli.edits import EditFile, EditRequest, from_record
from editcli.errors import StateError
from editcli.plugins import Plugins, load_plugins
from editcli.recipe import Recipe
from editcli.report import Reporter, RunReport, Silent
from editcli.runs import planning
from editcli.runs.apply import Run, writing
from editcli.runs.batch import BatchReport
from editcli.runs.clock import Clock
from editcli.runs.state import RunFolder
from editcli.runs.stream import Stream

SOURCE = "<program>"


class EditStream:
    """Edits a model batch by batch into the folder ``out``; use it as a context manager::

        with EditStream("out", model="my-model", editor="alphaedit", stabilizers=("nas",)) as stream:
            stream.apply([{"prompt": "The capital of {} is", "subject": "France", "target_new": "Lyon"}])

    ``choices`` are the other settings of :class:`editcli.Recipe`; with ``resume=True`` a stream goes on. The folder is
    locked inside the block. Every batch is durable when :meth:`apply` returns; leaving the block without an error
    writes the model folder. Raises :class:`editcli.EditError`.
    """

    def __init__(
        self, out: str | Path, *, plugins: Plugins | None = None, reporter: Reporter | None = None, **choices: Any
    ):
        # What is measured along the way is the program's own business unless it asks.
        self._recipe = Recipe(edits=SOURCE, out=str(out), **{"evaluate": False, **choices})
        self._plugins, self._reporter = plugins, reporter or Silent()
        self._open: tuple[Run, Stream] | None = None
        self._exit = ExitStack()

    def __enter__(self) -> EditStream:
        plugins = self._plugins or load_plugins()
        clock = Clock()
        nothing = EditFile(SOURCE, "", (), (), ())
        with ExitStack() as stack:
            planned = planning.check(self._recipe, plugins, self._reporter, file=nothing)
            folder = RunFolder(self._recipe.folder)
            stack.enter_context(writing(folder.out))
            stack.enter_context(folder.locked())
            run = Run(planned, folder, plugins, self._reporter, clock)
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
        with self._exit:
            _, stream = self._opened()
            if error is None:
                self.save()
            elif stream.whole:
                stream.save()
        self._open = None

    @property
    def model(self) -> Any:
        """The model under edit, with everything applied so far."""
        return self._opened()[0].loaded.model

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
        requests = [edit if isinstance(edit, EditRequest) else from_record(edit, file=SOURCE) for edit in batch]
        for request in requests:
            run.loaded.tokens.check(request)
        return stream.apply(requests)

    def save(self) -> RunReport:
        """Write and verify the model folder as it stands, and a snapshot."""
        run, stream = self._opened()
        stream.save()
        run.read = len(stream.position.requests)
        return run.finish(stream, None)

    def _opened(self) -> tuple[Run, Stream]:
        if self._open is None:
            raise StateError(f"the stream in {self._recipe.folder} is not open; use it in a 'with' block")
        return self._open
