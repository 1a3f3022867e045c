"""Draw with rich: progress and notes on stderr, results on stdout; the tables are in the other modules here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.text import Text

from editcli.printable import printable
from editcli.render.plain import PlainProgress
from editcli.words import rate


class PlainConsole(Console):
    """A console that shows text from files and plugins as it is: neither markup nor what a terminal would obey."""

    def __init__(self, **settings: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield segments; what rich itself tells the terminal to do comes in segments of a kind of their own."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def stdout() -> Console:
    """Return a console for results; rich leaves colours out when it is no terminal or ``NO_COLOR`` is set."""
    return PlainConsole(file=sys.stdout, soft_wrap=False)


def stderr() -> Console:
    """Return a console for progress, notes and warnings."""
    return PlainConsole(file=sys.stderr)


class RichReporter:
    """A reporter that draws progress bars on a terminal; all else, and progress elsewhere, it writes as plain lines."""

    def __init__(self, *, verbosity: Callable[[], int] = lambda: 0, console: Console | None = None):
        self.console = console or stderr()
        self._verbosity = verbosity
        self._progress: Progress | None = None
        self._open = 0
        self._plain = PlainProgress(lambda text: self._line(Text(text)))

    @contextmanager
    def phase(self, name: str, total: int, unit: str = "") -> Iterator[Callable[[int], None]]:
        """Show one bar for a phase of ``total`` units; phases may be nested, each has its own bar.

        Without a terminal a phase that lasts writes a line now and then; when quiet, nothing.
        """
        if self._verbosity() < 0:
            yield lambda count: None
            return
        if not self.console.is_terminal:
            with self._plain.phase(name, total, unit) as advance:
                yield advance
            return
        progress = self._enter()
        task = progress.add_task(name, total=total, unit=unit)
        try:
            yield lambda count: progress.advance(task, count)
        finally:
            self._leave(progress, task)

    def note(self, text: str) -> None:
        """Tell something worth knowing, unless quiet."""
        if self._verbosity() >= 0:
            self._line(Text(text, style="dim"))

    def warn(self, text: str) -> None:
        """Tell something that may be wrong, even when quiet."""
        self._line(Text.assemble(("warning: ", "yellow"), text))

    def _line(self, text: Text) -> None:
        # Soft wrapping leaves a redirected line whole, so that it can be searched for.
        self.console.print(text, soft_wrap=True)

    def _enter(self) -> Progress:
        progress = self._progress
        if progress is None:
            progress = self._progress = _progress(self.console)
            progress.start()
        self._open += 1
        return progress

    def _leave(self, progress: Progress, task: TaskID) -> None:
        # Drawn once more, so that even the shortest phase is seen as done and not as never begun.
        progress.refresh()
        progress.remove_task(task)
        self._open -= 1
        if self._open == 0:
            progress.stop()
            self._progress = None


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        _Done(),
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        expand=True,
    )


class _Done(ProgressColumn):
    """How much is done, for instance ``120/2,000 edits``."""

    def render(self, task: Task) -> Text:
        unit = task.fields.get("unit", "")
        return Text(f"{task.completed:,.0f}/{task.total or 0:,.0f} {unit}".rstrip(), style="green")


class _Rate(ProgressColumn):
    """How fast it goes, for instance ``12.3/s``."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{rate(task.speed)}/s", style="cyan")
