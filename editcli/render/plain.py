"""Progress in plain lines, for a log, a pipe or a batch job: where no terminal can show a bar."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from editcli.words import duration, rate

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
