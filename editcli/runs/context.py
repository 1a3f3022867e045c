"""The context of a run: its plugins, reporter, processes and clock, and how it reacts to a signal or a full disk."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

from editcli.distributed.team import Team
from editcli.errors import FileError, ModelError, StateError
from editcli.plugin.manager import Plugins
from editcli.reporting import Reporter, Silent

PHASES = ("load", "prepare", "targets", "solve", "eval", "save", "total")


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds spent in each phase of a run."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def spent(self, phase: str) -> Iterator[None]:
        """Add the time of a ``with`` block to ``phase``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - started

    def rounded(self) -> dict[str, float]:
        """Return all phases and the total so far."""
        total = time.perf_counter() - self.started
        return {phase: round(spent, 3) for phase, spent in {**self.seconds, "total": total}.items()}


@dataclass(frozen=True, slots=True)
class Context:
    """The plugins, the reporter, the processes and the clock of one run."""

    plugins: Plugins
    reporter: Reporter
    team: Team
    clock: Clock = field(default_factory=Clock)

    @classmethod
    def of(cls, plugins: Plugins, reporter: Reporter | None, team: Team | None = None) -> Context:
        """Return a context that starts now; only rank 0 of ``team`` reports."""
        team = team or Team()
        return cls(plugins, reporter if reporter is not None and team.leads else Silent(), team)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn a full disk, a missing permission or a full device into one sentence."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        remedy = "use a smaller --dtype or targets.batch_tokens, --device cpu or --device-map auto"
        raise ModelError(f"the memory of the device is full; {remedy}") from error
    except FileError:
        # An unreadable file is not one that could not be written.
        raise
    except OSError as error:
        place, reason = error.filename or out, error.strerror or str(error)
        raise StateError(f"cannot write {place}: {reason}; free some space or choose another --out") from error


class Interrupts:
    """A context in which the first SIGINT or SIGTERM only sets ``asked``, and the second one acts as usual."""

    def __init__(self, reporter: Reporter):
        self.asked = False
        self._reporter = reporter
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        # Python lets only the main thread handle signals; elsewhere the caller's own handlers stay in force.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # A program that was started in the background with signals ignored keeps ignoring them.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._restore()
        # The signal may have come while the same stream was being written to, which Python refuses; better no note.
        with suppress(RuntimeError):
            self._reporter.note("Stopping after this batch; once more to stop at once (the last snapshot stays whole)")

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            # None stands for a handler that was not set from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
