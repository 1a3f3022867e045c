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
"""Seconds until the first line about a phase, and between its later lines."""
ENOUGH = 0.05
"""Share of a phase that must be done before its remaining time is estimated: edits of one batch end together."""
LOOK = 0.25
"""Seconds between checks whether a line is due."""


@dataclass(slots=True)
class _Phase:
    """One phase under way."""

    name: str
    total: int
    unit: str
    started: float
    done: int = 0
    reported: float | None = None
    """When its last line was written; None before the first."""
    reported_done: int = 0

    def line(self, now: float) -> str:
        """Return the progress of the phase: done, total, rate and remaining time."""
        spent = now - self.started
        text = self._with(self._count() if self.total > 1 else "")
        if self.done and self.total > 1:
            text = f"{text}, {rate(self.done / spent)}/s"
            left = spent / self.done * max(0, self.total - self.done)
            return f"{text}, {duration(left)} left" if self.done >= ENOUGH * self.total else text
        return text if self.reported is None else f"{text} after {duration(spent)}"

    def ending(self, now: float) -> str:
        """Return the last line of the phase: units done and seconds spent."""
        count = f"{self.done:,} {self.unit}".rstrip() if self.done == self.total else self._count()
        return f"{self._with(count if self.total > 1 else 'done')} in {duration(now - self.started)}"

    def _count(self) -> str:
        return f"{self.done:,}/{self.total:,} {self.unit}".rstrip()

    def _with(self, text: str) -> str:
        return f"{self.name}: {text}" if text else self.name


class PlainProgress:
    """Writes a line one second into a phase, every ten seconds from then on, and at its end.

    A thread watches the clock, since a phase may be busy for minutes before its first unit is done. Of nested phases
    the innermost reports; an outer one reports only after it has advanced.
    """

    def __init__(self, write: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic):
        self._write, self._clock = write, clock
        self._phases: list[_Phase] = []
        self._lock = threading.Lock()

    @contextmanager
    def phase(self, name: str, total: int, unit: str = "") -> Iterator[Callable[[int], None]]:
        """Follow a phase of ``total`` units."""
        phase = _Phase(name, total, unit, self._clock())

        def advance(count: int) -> None:
            phase.done += count

        with self._lock:
            self._phases.append(phase)
        with self._watched():
            try:
                yield advance
            finally:
                with self._lock:
                    self._phases.remove(phase)
        if phase.reported is not None:
            self._write(phase.ending(self._clock()))

    def look(self) -> None:
        """Write the lines that are due now."""
        with self._lock:
            now = self._clock()
            for phase in self._phases:
                if self._is_due(phase, now):
                    self._write(phase.line(now))
                    phase.reported, phase.reported_done = now, phase.done

    def _is_due(self, phase: _Phase, now: float) -> bool:
        if phase is not self._phases[-1] and phase.done == phase.reported_done:
            return False
        return now - phase.started >= FIRST if phase.reported is None else now - phase.reported >= EVERY

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Run the thread that watches the clock while the outermost phase lasts."""
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
    """A console that shows text from files and plugins literally: no markup, no control characters."""

    def __init__(self, **settings: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield segments; rich's own control codes come in separate segments."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def stdout() -> Console:
    """Return a console for results; rich omits colours without a terminal or when ``NO_COLOR`` is set."""
    return PlainConsole(file=sys.stdout, soft_wrap=False)


def stderr() -> Console:
    """Return a console for progress, notes and warnings."""
    return PlainConsole(file=sys.stderr)


class RichReporter:
    """A reporter that draws progress bars on a terminal, and writes plain lines for everything else."""

    def __init__(self, *, verbosity: Callable[[], int] = lambda: 0, console: Console | None = None):
        self.console = console or stderr()
        self._verbosity = verbosity
        self._progress: Progress | None = None
        self._open = 0
        self._plain = PlainProgress(lambda text: self._line(Text(text)))

    @contextmanager
    def phase(self, name: str, total: int, unit: str = "") -> Iterator[Callable[[int], None]]:
        """Show one bar for a phase of ``total`` units; phases may be nested, each has its own bar.

        Without a terminal a long phase writes a line now and then; when quiet, nothing.
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
        """Write a note, unless quiet."""
        if self._verbosity() >= 0:
            self._line(Text(text, style="dim"))

    def warn(self, text: str) -> None:
        """Write a warning, even when quiet."""
        self._line(Text.assemble(("warning: ", "yellow"), text))

    def _line(self, text: Text) -> None:
        # Soft wrapping keeps a redirected line whole, for grep.
        self.console.print(text, soft_wrap=True)

    def _enter(self) -> Progress:
        progress = self._progress
        if progress is None:
            progress = self._progress = _progress(self.console)
            progress.start()
        self._open += 1
        return progress

    def _leave(self, progress: Progress, task: TaskID) -> None:
        # Draw once more, so that even the shortest phase is shown as done.
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
    """Units done, for instance ``120/2,000 edits``."""

    def render(self, task: Task) -> Text:
        unit = task.fields.get("unit", "")
        return Text(f"{task.completed:,.0f}/{task.total or 0:,.0f} {unit}".rstrip(), style="green")


class _Rate(ProgressColumn):
    """Units per second, for instance ``12.3/s``."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{rate(task.speed)}/s", style="cyan")
