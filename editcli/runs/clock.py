"""Seconds that a run spends in each of its phases."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

PHASES = ("load", "prepare", "targets", "solve", "eval", "save", "total")


@dataclass(slots=True)
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
