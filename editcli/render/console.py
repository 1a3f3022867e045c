"""Draw with rich: progress and notes on stderr, results on stdout; the tables are in the other modules here.

Where no terminal can show a bar, in a log, a pipe or a batch job, progress is written in plain lines.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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

from editcli.formatting import duration, printable, rate

FIRST, EVERY = 1.0, 10.0
"""Seconds until a phase counts as one that lasts and is announced, and between its later lines."""
ENOUGH = 0.05
"""Share of a phase that must be done before its end is estimated: edits of one batch end together."""
LOOK = 0.25
"""Seconds between looks at what is due."""


@dataclass(slots=True)
class _Phase:
    """One phase under way."""

    name: str
    total: int
    unit: str
    started: float
    done: int = 0
    said: float | None = None
    """When its last line was written; None before the first."""
    said_done: int = 0

    def line(self, now: float) -> str:
        """Return where the phase stands: done, total, rate and remaining time."""
        spent = now - self.started
        text = self._with(self._count() if self.total > 1 else "")
        if self.done and self.total > 1:
            text = f"{text}, {rate(self.done / spent)}/s"
            left = spent / self.done * max(0, self.total - self.done)
            return f"{text}, {duration(left)} left" if self.done >= ENOUGH * self.total else text
        return text if self.said is None else f"{text} after {duration(spent)}"

    def ending(self, now: float) -> str:
        """Return what the phase came to."""
        whole = f"{self.done:,} {self.unit}".rstrip() if self.done == self.total else self._count()
        return f"{self._with(whole if self.total > 1 else 'done')} in {duration(now - self.started)}"

    def _count(self) -> str:
        return f"{self.done:,}/{self.total:,} {self.unit}".rstrip()

    def _with(self, text: str) -> str:
        return f"{self.name}: {text}" if text else self.name


class PlainProgress:
    """Writes a line when a phase turns out to last, every ten seconds from then on, and at its end.

    A thread of its own looks at the clock, since a phase may be busy for minutes before anything in it is done. Of
    nested phases the innermost speaks; those around it speak when they have advanced.
    """

    def __init__(self, write: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic):
        self._write, self._clock = write, clock
        self._phases: list[_Phase] = []
        self._lock = threading.Lock()

    @contextmanager
    def phase(self, name: str, total: int, unit: str = "") -> Iterator[Callable[[int], None]]:
        """Follow a phase of ``total`` units."""
        own = _Phase(name, total, unit, self._clock())

        def advance(count: int) -> None:
            own.done += count

        with self._lock:
            self._phases.append(own)
        with self._watched():
            try:
                yield advance
            finally:
                with self._lock:
                    self._phases.remove(own)
        if own.said is not None:
            self._write(own.ending(self._clock()))

    def look(self) -> None:
        """Write the lines that are due now."""
        with self._lock:
            now = self._clock()
            for phase in self._phases:
                if self._is_due(phase, now):
                    self._write(phase.line(now))
                    phase.said, phase.said_done = now, phase.done

    def _is_due(self, phase: _Phase, now: float) -> bool:
        if phase is not self._phases[-1] and phase.done == phase.said_done:
            return False
        return now - phase.started >= FIRST if phase.said is None else now - phase.said >= EVERY

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Have a thread look at the clock while the outermost phase lasts."""
        if len(self._phases) > 1:
            yield
            return
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(LOOK):
                self.look()

        thread = threading.Thread(target=watch, name="editcli-progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


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
